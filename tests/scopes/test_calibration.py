"""The calibration batches: which examples, and that the run does not notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torchmetrics.classification import BinaryAccuracy

from zolightning import CausalLM
from zolightning.data import PromptDataModule
from zolightning.scopes.calibration import calibration_batches, calibration_forward, read_examples


class Look(Callback):
    """Asks for calibration batches before training, and records what training sees."""

    def __init__(self, num_prompts: int | None) -> None:
        self.num_prompts = num_prompts
        self.calibration: list[Any] = []
        self.seen: list[Any] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.num_prompts is not None:
            self.calibration = calibration_batches(trainer, pl_module, self.num_prompts)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self.seen.append(batch)


@pytest.fixture
def look(make_trainer: Callable[..., L.Trainer], make_module: Callable[..., L.LightningModule]) -> Callable[..., Look]:
    def run(loader: Any, num_prompts: int | None, **options: Any) -> Look:
        callback = Look(num_prompts)
        torch.manual_seed(3)
        trainer = make_trainer(max_epochs=1, callbacks=callback, limit_train_batches=3)
        trainer.fit(make_module(), loader, **options)
        return callback

    return run


def rows(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    """The prompts without their padding."""
    return [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("num_prompts", [1, 3, 4, 99])
def test_the_first_examples_as_they_are_stored(
    num_prompts: int, look: Callable[..., Look], make_loader: Callable[..., DataLoader]
) -> None:
    stored = rows(list(make_loader()))
    run = look(make_loader(shuffle=True), num_prompts)
    assert rows(run.calibration) == stored[:num_prompts]
    assert max(len(batch["label"]) for batch in run.calibration) <= 3


@pytest.mark.parametrize("kind", ["shuffled", "sampled", "own generator", "batch sampler"])
def test_training_does_not_notice(kind: str, look: Callable[..., Look], make_loader: Callable[..., DataLoader]) -> None:
    def loader() -> DataLoader:
        if kind == "shuffled":
            return make_loader(shuffle=True)
        if kind == "sampled":
            return make_loader(sampler=RandomSampler(range(12)))
        if kind == "own generator":
            return make_loader(shuffle=True, generator=torch.Generator().manual_seed(1))
        plain = make_loader()
        sampler = BatchSampler(RandomSampler(range(12)), 3, drop_last=False)
        return DataLoader(plain.dataset, batch_sampler=sampler, collate_fn=plain.collate_fn)

    before = rows(look(loader(), None).seen)
    after = look(loader(), 5)
    assert rows(after.seen) == before
    assert [len(rows([batch])) for batch in after.calibration] == [3, 2]


def test_batches_that_are_ready(look: Callable[..., Look], make_batches: Callable[..., Any]) -> None:
    batches = make_batches(size=2)
    assert rows(look(DataLoader(batches, batch_size=None), 3).calibration) == rows(batches[:2])


def test_a_stream(look: Callable[..., Look], make_loader: Callable[..., DataLoader]) -> None:
    plain = make_loader()

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(plain.dataset)

    run = look(DataLoader(Stream(), batch_size=3, collate_fn=plain.collate_fn), 4)
    assert rows(run.calibration) == rows(list(plain))[:6]


def test_batches_pass_the_hooks_of_the_module(
    make_trainer: Callable[..., L.Trainer],
    make_module: Callable[..., Any],
    make_loader: Callable[..., DataLoader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = make_module()
    for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
        monkeypatch.setattr(type(module), name, lambda _, batch, index, name=name: batch | {name: index})
    look = Look(1)
    make_trainer(max_steps=1, callbacks=look).fit(module, make_loader())
    assert [*look.calibration[0]] == [*look.seen[0]] != [*next(iter(make_loader()))]


def test_examples_are_read_in_the_precision_of_the_run(
    make_trainer: Callable[..., L.Trainer], make_regression: Callable[..., L.LightningModule], regression_data: Any
) -> None:
    class Read(Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.found = read_examples(trainer, pl_module, lambda batch: (batch[0].dtype, torch.get_default_dtype()))

    make_trainer(max_steps=1, callbacks=(look := Read()), precision="bf16-true").fit(
        make_regression(), regression_data()
    )
    assert set(look.found) == {(torch.bfloat16, torch.bfloat16)}


def test_no_examples(look: Callable[..., Look]) -> None:
    with pytest.raises(ValueError, match=r"`num_prompts` is 4, but the training data \(DataLoader\) hold no example"):
        look(DataLoader([]), 4)


def test_several_loaders(look: Callable[..., Look], make_loader: Callable[..., DataLoader]) -> None:
    for loaders in ({"a": make_loader()}, [make_loader(), make_loader()]):
        with pytest.raises(ValueError, match=rf"one training dataloader, got {type(loaders).__name__}"):
            look(loaders, 4)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_prompts_of_the_data_module(
    batch_size: int, tmp_path: Path, write_tiny_model: Callable[..., Path], make_trainer: Callable[..., L.Trainer]
) -> None:
    for split in ("train", "test"):
        lines = [f'{{"sentence": "soup number {i}", "label": {i % 2}}}' for i in range(20)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    data = PromptDataModule(
        "sst2", path=str(tmp_path), num_train=9, num_validation=4, num_test=4, batch_size=batch_size
    )
    run = Look(7)
    model = CausalLM(str(write_tiny_model(tmp_path / "model")))
    make_trainer(max_steps=1, callbacks=run, limit_val_batches=0).fit(model, datamodule=data)
    examples = data.train_dataloader().dataset.examples
    assert [id for batch in run.calibration for id in batch["id"].tolist()] == [example.id for example in examples[:7]]
    assert [len(batch["id"]) for batch in run.calibration] == ([2, 2, 2, 1] if batch_size == 2 else [5, 2])


@pytest.mark.parametrize("name", ["batch_idx", "index", "_", None])
def test_the_index_of_a_batch_may_have_any_name(
    name: str | None, make_module: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module()
    seen: list[Any] = []

    def training_step(self: Any, batch: Any, *index: int) -> Tensor:
        seen.append((batch, *index))
        return torch.zeros(())

    arguments = "self, batch" if name is None else f"self, batch, {name}"
    step = eval(f"lambda {arguments}: training_step({arguments})", {"training_step": training_step})
    monkeypatch.setattr(type(module), "training_step", step)
    calibration_forward(module, "batch")
    assert seen == [("batch",) if name is None else ("batch", 0)]


def test_the_module_keeps_no_trace(make_module: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an accuracy, a counter and a running mean, which would count examples that no step was taken on.

    The batch is not changed either.
    """
    module = make_module()
    module.accuracy, module.seen = BinaryAccuracy(), 0
    module.register_buffer("mean", torch.zeros(5000))  # above the size that is copied beforehand
    batch = {"weight": torch.zeros(2)}

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.accuracy.update(torch.ones(4), torch.ones(4))
        self.seen += 1
        self.mean.add_(1.0)
        batch.pop("weight").add_(1.0)
        return self.mean.mean()

    monkeypatch.setattr(type(module), "training_step", training_step)
    assert calibration_forward(module, batch).item() == 1.0
    assert not batch["weight"].any()
    assert (module.seen, module.accuracy.update_count, module.mean.abs().sum().item()) == (0, 0, 0.0)
    assert not module.accuracy.tp.any()
