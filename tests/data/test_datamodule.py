"""The data module in a Trainer."""

import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import datasets
import lightning as L
import numpy as np
import pytest
import torch

from zolightning.data import PromptDataModule

# what Lightning says when it cannot tell what a batch or a loader is
pytestmark = [
    pytest.mark.filterwarnings("error:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("error:You are using a custom batch sampler"),
]


def flat(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def test_each_stage_reads_what_it_needs(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    folder = write_rows(test=9)
    data = PromptDataModule("sst2", str(folder), batch_size=4)
    make_trainer().test(spectator, data, verbose=False)
    assert sorted(flat(spectator.eval_ids)) == list(range(9))
    with pytest.raises(ValueError, match=r"train.jsonl, .csv or .parquet does not exist"):
        make_trainer().validate(spectator, data, verbose=False)
    write_rows(train=20)
    spectator.eval_ids.clear()
    make_trainer().validate(spectator, PromptDataModule("sst2", str(folder), num_validation=6), verbose=False)
    assert len(flat(spectator.eval_ids)) == 6


def test_validation_rows_come_from_the_training_file_unless_they_have_their_own(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    make_spectator: Callable[..., L.LightningModule],
) -> None:
    folder = write_rows(train=20)
    data = PromptDataModule("sst2", str(folder), num_validation=5, batch_size=1)
    spectator = make_spectator()
    make_trainer(max_epochs=1).fit(spectator, datamodule=data)
    assert sorted(flat(spectator.train_ids + spectator.eval_ids)) == list(range(20))
    assert len(flat(spectator.eval_ids)) == 5

    write_rows(validation=7)
    spectator = make_spectator()
    make_trainer(max_epochs=1).fit(spectator, datamodule=data)
    assert sorted(flat(spectator.train_ids)) == list(range(20))
    assert len(flat(spectator.eval_ids)) == 5


def test_hub_rows_are_sampled_as_in_mezo(
    monkeypatch: pytest.MonkeyPatch, make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    def load_dataset(path: str, name: str, split: str, revision: str | None) -> datasets.Dataset:
        assert (path, name, revision) == ("nyu-mll/glue", "sst2", None)
        size = {"train": 50, "validation": 12}[split]
        return datasets.Dataset.from_list([{"sentence": f"dish {index}", "label": index % 2} for index in range(size)])

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = PromptDataModule("sst2", num_train=20, num_validation=10, num_test=8, seed=3, batch_size=5)
    make_trainer(max_epochs=1).fit(spectator, datamodule=data)
    np.random.seed(3)
    chosen = np.random.permutation(50)[:30].tolist()
    assert sorted(flat(spectator.train_ids)) == sorted(chosen[:20])
    assert sorted(flat(spectator.eval_ids)) == sorted(chosen[20:])

    spectator.eval_ids.clear()
    make_trainer().test(spectator, data, verbose=False)
    np.random.seed(3)
    assert sorted(flat(spectator.eval_ids)) == sorted(np.random.permutation(12)[:8].tolist())


def test_predictions_are_of_the_test_rows(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    data = PromptDataModule("sst2", str(write_rows(test=9)), batch_size=4, num_test=8)
    assert len(set(flat(make_trainer().predict(spectator, data)))) == 8


def test_batches_for_a_gpu_come_in_pinned_memory(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    spectator: L.LightningModule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, trainer = PromptDataModule("sst2", str(write_rows(train=20)), num_validation=4), make_trainer(max_steps=1)
    trainer.fit(spectator, datamodule=data)
    assert not any(loader.pin_memory for loader in (data.train_dataloader(), data.val_dataloader()))
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda"))
    assert all(loader.pin_memory for loader in (data.train_dataloader(), data.val_dataloader()))


def test_examples_per_class(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    data = PromptDataModule("sst2", str(write_rows(train=40)), examples_per_class=3, batch_size=2, seed=13)
    make_trainer(max_epochs=1).fit(spectator, datamodule=data)
    for batches in (spectator.train_ids, spectator.eval_ids):
        assert sorted(id % 2 for id in flat(batches)) == [0, 0, 0, 1, 1, 1]
    assert not set(flat(spectator.train_ids)) & set(flat(spectator.eval_ids))


def test_a_users_own_task_and_prompt(
    tmp_path: Path,
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    spectator: L.LightningModule,
) -> None:
    write_rows(train=[{"report": f"fog {index}", "outcome": "dry"} for index in range(9)])
    task = tmp_path / "weather.yaml"
    task.write_text(
        "name: weather\nfolder: .\nprompt: '{{ report }} today:'\nanswers: [' fair', ' foul']\n"
        "label: outcome\nlabels: [dry, wet]\nnum_validation: 2\n"
    )
    data = PromptDataModule(str(task), batch_size=2)
    with pytest.warns(UserWarning, match=r"train\.jsonl: all 7 training rows have the label 'dry'\."):
        make_trainer(max_steps=1).fit(spectator, datamodule=data)
    assert data.num_classes == 2
    assert data.sample_text().endswith(" today:[[ fair]]")

    data = PromptDataModule(str(task), prompt="{{ report }}\nGood?\n", answers=["Yes", "No"], batch_size=2)
    with pytest.warns(UserWarning, match="have the label 'dry'"):
        make_trainer(max_steps=1).fit(spectator, datamodule=data)
    assert data.sample_text().endswith("\nGood?\n[[Yes]]")


@pytest.mark.filterwarnings("ignore:.*prompts of the .* split were cut")  # the spectator's context is short
def test_the_packaged_task_needs_nothing(make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule) -> None:
    make_trainer(max_steps=2, limit_val_batches=1).fit(spectator, datamodule=PromptDataModule("sentiment"))
    assert [len(ids) for ids in spectator.train_ids] == [16, 16]


def copa_row(index: int) -> dict[str, object]:
    choices = {"choice1": "The roof held all night.", "choice2": "I stayed."}
    return {"premise": f"Rain {index}.", "question": "effect", "label": index % 2, **choices}


def test_language_modeling_trains_on_the_right_answer_and_evaluates_all(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    make_spectator: Callable[..., L.LightningModule],
) -> None:
    rows = [copa_row(index) for index in range(12)]
    data = PromptDataModule("copa", str(write_rows(train=rows)), num_validation=4, batch_size=8)
    make_trainer(max_steps=1).fit(make_spectator(), datamodule=data)
    train, validation = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert train["objective"] == validation["objective"] == "language_modeling"
    assert train["answer_ids"].shape[1] == 1
    assert not train["label"].any()
    assert validation["answer_ids"].shape[1] == 2
    assert validation["label"].tolist() == [id % 2 for id in validation["id"].tolist()]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # of a machine with one core
def test_workers_build_the_same_batches(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    make_spectator: Callable[..., L.LightningModule],
) -> None:
    folder = str(write_rows(train=20))
    seen = []
    for num_workers in (0, 2):
        spectator = make_spectator()
        data = PromptDataModule("sst2", folder, num_validation=4, batch_size=4, num_workers=num_workers)
        make_trainer(max_steps=6).fit(spectator, datamodule=data)
        seen.append((spectator.train_ids, spectator.eval_ids))
    assert seen[0] == seen[1]


def test_overfitting_repeats_the_same_batches(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    data = PromptDataModule("sst2", str(write_rows(train=20)), num_validation=4, batch_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You requested to overfit")
        make_trainer(max_epochs=3, overfit_batches=2).fit(spectator, datamodule=data)
    assert len(spectator.train_ids) == 6
    assert spectator.train_ids[:2] == spectator.train_ids[2:4] == spectator.train_ids[4:]


class Witness(L.Callback):
    """Writes down what each rank saw, and with how many batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        lines = [" ".join(map(str, ids)) for ids in (*pl_module.train_ids, [], *pl_module.eval_ids)]
        (self.folder / f"rank{trainer.global_rank}").write_text("\n".join(lines))

    def read(self, rank: int) -> tuple[list[list[int]], list[list[int]]]:
        train, evaluation = (self.folder / f"rank{rank}").read_text().split("\n\n")
        return tuple([[int(id) for id in line.split()] for line in part.splitlines()] for part in (train, evaluation))


def test_two_ranks_see_the_batches_of_one(
    tmp_path: Path,
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    make_spectator: Callable[..., L.LightningModule],
) -> None:
    folder = str(write_rows(train=30))
    alone = make_spectator()
    settings = {"num_validation": 7, "eval_batch_size": 3, "seed": 5}
    make_trainer(max_steps=8).fit(alone, datamodule=PromptDataModule("sst2", folder, batch_size=4, **settings))

    witness = Witness(tmp_path)
    trainer = make_trainer(max_steps=8, devices=2, strategy="ddp_fork", callbacks=[witness])
    trainer.fit(make_spectator(), datamodule=PromptDataModule("sst2", folder, batch_size=2, **settings))
    (train0, val0), (train1, val1) = (witness.read(rank) for rank in range(2))
    assert [sorted(a + b) for a, b in zip(train0, train1, strict=True)] == [sorted(ids) for ids in alone.train_ids]
    assert len(val0) == len(val1)
    assert sorted(flat(val0 + val1)) == sorted(flat(alone.eval_ids))


@pytest.mark.parametrize(("answers", "multiple"), [(["No", "Yes"], 1), (["No", "Yes, great"], 1), (["No", "Yes"], 11)])
def test_the_largest_batch(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    spectator: L.LightningModule,
    answers: list[str],
    multiple: int,
) -> None:
    sizes = {"batch_size": 4, "num_validation": 4, "pad_to_multiple_of": multiple}
    data = PromptDataModule("sst2", str(write_rows(train=16)), answers=answers, **sizes)
    make_trainer(max_epochs=1).fit(spectator, datamodule=data)
    batches = list(data.train_dataloader())
    inputs = [batch["input_ids"].flatten(0, 1) for batch in batches]
    positions = {batch["answer_ids"].shape[2] for batch in batches}
    found = data.largest_batch()
    assert found[:2] == (max(map(len, inputs)), max(ids.shape[1] for ids in inputs))
    assert found[2] == (1 if positions == {1} else max(positions) + 1)
    assert data.largest_batch(1) == (found[0] // 4, *found[1:])
    assert all(ids.shape[1] % multiple == 0 for ids in inputs)
    if multiple > 1:  # for training only
        assert any(batch["input_ids"].shape[-1] % multiple for batch in data.val_dataloader())
