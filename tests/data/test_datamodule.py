"""The data module in a Trainer."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from pathlib import Path

import datasets
import lightning as L
import numpy as np
import pytest

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
    with pytest.raises(ValueError, match=r"train.jsonl does not exist"):
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
    make_trainer(max_steps=1).fit(spectator, datamodule=data)
    assert data.num_classes == 2
    assert data.sample_text().endswith(" today:[[ fair]]")

    data = PromptDataModule(str(task), prompt="{{ report }}\nGood?\n", answers=["Yes", "No"], batch_size=2)
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


@pytest.mark.parametrize(
    ("max_length", "context_length", "limit"),
    [(30, 128, "30 tokens (`data.max_length`)"), (300, 20, "20 tokens (the model's context length)")],
)
def test_cut_prompts_are_counted(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    make_spectator: Callable[..., L.LightningModule],
    max_length: int,
    context_length: int,
    limit: str,
) -> None:
    data = PromptDataModule("sst2", str(write_rows(train=20)), num_validation=5, max_length=max_length, batch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(max_steps=1).fit(make_spectator(context_length=context_length), datamodule=data)
    batch = next(iter(data.train_dataloader()))
    num_cut = sum(example.truncated for example in data._examples["train"])
    expected = f"{num_cut} of 15 prompts of the train split were cut to {limit}."
    assert [str(warning.message) for warning in caught].count(expected) == 1
    assert 0 < num_cut < 15
    assert batch["input_ids"].shape[-1] <= int(limit.split()[0])


def test_a_model_without_a_limit(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    make_spectator: Callable[..., L.LightningModule],
) -> None:
    data = PromptDataModule("sst2", str(write_rows(train=20)), num_validation=5)
    make_trainer(max_steps=1).fit(make_spectator(context_length=None), datamodule=data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`data.batch_size` must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "`data.eval_batch_size` must be at least 1, got -1"),
        ({"num_train": 0}, "`data.num_train` must be at least 1"),
        ({"num_validation": 0}, "`data.num_validation` must be at least 1"),
        ({"num_test": 0}, "`data.num_test` must be at least 1"),
        ({"examples_per_class": 0}, "`data.examples_per_class` must be at least 1"),
        ({"max_length": 0}, "`data.max_length` must be at least 1"),
        ({"pad_to_multiple_of": 0}, "`data.pad_to_multiple_of` must be at least 1"),
        ({"num_workers": -1}, "`data.num_workers` must be at least 0"),
        ({"seed": -1}, r"`data.seed` must be at least 0 and below 2\*\*32, got -1"),
        ({"task": "sst-2"}, "`data.task` must be one of"),
        ({"task": {"prompt": "x"}}, "`data.task`: a task needs the key `name`, `answers`, `labels`"),
        ({"task": {"promt": "x"}}, "`data.task`: a task has no key `promt`"),
        ({"path": "no/such/folder"}, "`data.path` must be a folder of JSON lines, got 'no/such/folder'"),
        ({"prompt": "{{"}, "`data.prompt`: `prompt` is not a Jinja2 template"),
        ({"answers": ["a", "b", "c"]}, "`data.answers`: `labels` must name one label for each of the 3 `answers`"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**{"task": "sentiment", **arguments})


def test_sizes_are_the_tasks_unless_given(tmp_path: Path) -> None:
    task = {"name": "mine", "prompt": "{{ x }}", "answers": ["a", "b"], "labels": [0, 1], "folder": str(tmp_path)}
    data = PromptDataModule(task | {"num_train": 7, "num_test": 5}, num_test=3)
    assert (data.num_train, data.num_validation, data.num_test) == (7, 500, 3)
    assert data.folder == tmp_path


def test_a_task_without_a_source(tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("name: mine\nprompt: '{{ x }}'\nanswers: [a, b]\nlabels: [0, 1]\n")
    with pytest.raises(ValueError, match=r"`data.path` must be a folder of rows, because task mine names no source"):
        PromptDataModule(str(task))


def test_a_row_that_cannot_be_encoded_is_named(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    folder = write_rows(test=[{"sentence": "soup", "label": 0}])
    data = PromptDataModule("sst2", str(folder), answers=[" great", " great"])
    with pytest.raises(ValueError, match=r"Task sst2, .*test.jsonl, line 1: the tokenizer tiny gives two"):
        make_trainer().test(spectator, data, verbose=False)


def test_the_module_must_say_how_to_tokenize(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    data = PromptDataModule("sst2", str(write_rows(test=3)))
    with pytest.raises(RuntimeError, match=r"tokenizes for a model: give both to `Trainer.fit`"):
        data.setup("test")
    del spectator.context_length
    with pytest.raises(TypeError, match=r"Spectator must have .*`context_length` is missing"):
        make_trainer().test(spectator, data, verbose=False)


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


def test_a_validation_file_under_another_name_is_not_passed_over(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    data = PromptDataModule("sst2", str(write_rows(train=20, val=5)), num_validation=5)
    with pytest.raises(ValueError, match=r"no validation\.jsonl, but found val\.jsonl: rename it to validation\.jsonl"):
        make_trainer(max_epochs=1).fit(spectator, datamodule=data)


def test_rows_without_labels_can_be_predicted(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    folder = write_rows(test=[{"sentence": f"dish {index}"} for index in range(5)])
    data = PromptDataModule("sst2", str(folder))
    assert sorted(flat(make_trainer().predict(spectator, data))) == list(range(5))
    assert data.sample_text().endswith("It was")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: field `label` is missing"):
        make_trainer().test(spectator, data)


def test_files_are_checked_without_a_model(write_rows: Callable[..., Path]) -> None:
    folder = write_rows(train=3, test=[{"sentence": "soup", "label": 1}, {"sentence": ["rain"], "label": 0}])
    data = PromptDataModule("sst2", str(folder))
    data.check_rows("train")
    with pytest.raises(ValueError, match=r"Task sst2, .*test\.jsonl, line 2: .*field `sentence` is \['rain'\]"):
        data.check_rows("train", "test")
    with pytest.raises(ValueError, match=r"validation\.jsonl does not exist"):
        data.check_rows("validation")


def test_that_there_are_fewer_rows_than_asked_for_is_said_once(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    spectator: L.LightningModule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[str] = []
    monkeypatch.setattr("zolightning.data.datamodule.rank_zero_info", messages.append)
    folder = write_rows(train=20)
    data = PromptDataModule("sst2", str(folder), num_validation=5, batch_size=4)
    make_trainer().validate(spectator, data, verbose=False)
    make_trainer(max_epochs=1).fit(spectator, datamodule=data)
    assert messages == [f"{folder / 'train.jsonl'}: 20 rows, fewer than the 1005 asked for; all are used."]
    spectator.context_length = None
    make_trainer().validate(spectator, PromptDataModule("sentiment"), verbose=False)
    assert len(messages) == 1


def test_a_token_for_padding_that_the_model_lacks_is_replaced(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    spectator.tokenizer = deepcopy(spectator.tokenizer)
    spectator.num_embeddings = len(spectator.tokenizer)
    spectator.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    data = PromptDataModule("sst2", str(write_rows(train=20, test=5)), num_validation=5, batch_size=4)
    make_trainer(max_epochs=1).fit(spectator, datamodule=data)
    assert max(batch["input_ids"].max() for batch in data.train_dataloader()) < spectator.num_embeddings

    spectator.num_embeddings = 3
    with pytest.raises(ValueError, match=r"test\.jsonl, line 3: the token '.*' has the number"):
        make_trainer().test(spectator, data)


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
