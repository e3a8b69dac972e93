"""A run goes on as if it had not been stopped where an epoch ends, and loaders draw what they would have drawn."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from checkpoint_runs import AS_EXPECTED, EVERY_6, Run, Validated

pytestmark = [
    *AS_EXPECTED,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]
MakeRun = Callable[..., Run]
EPOCH = 7  # batches


class Noisy(Dataset):
    """Draws random numbers for each example, as augmentations do."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index][0] + 0.1 * torch.randn(4), self.data[index][1]


class Pairs(Validated):
    """Trains on the examples of two loaders together."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(tuple(map(torch.cat, zip(*batch, strict=True))), batch_idx)


def shuffled(data: Any) -> Any:
    return StatefulDataLoader(data, batch_size=4, shuffle=True)


def by_rank(data: Any) -> Any:
    """Shuffled by a sampler that is told the epoch, as Lightning's are where there are several ranks."""
    return StatefulDataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=1, rank=0))


def divided(data: Any) -> Any:
    """Shuffled by torchdata's sampler, within the one that Lightning puts around it where there are several ranks."""
    sampler = DistributedSamplerWrapper(shuffled(data).sampler, num_replicas=1, rank=0)
    return StatefulDataLoader(data, batch_size=4, sampler=sampler)


def cycled(data: Any) -> Any:
    return CombinedLoader([shuffled(data), shuffled(torch.utils.data.Subset(data, range(12)))], "max_size_cycle")


def plain(data: Any) -> Any:
    return DataLoader(data, batch_size=4, shuffle=True)


def of_its_own(kind: Any) -> Any:
    """Loaders with a generator that nothing else draws from."""

    def loader(data: Any) -> Any:
        return kind(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))

    return loader


def noisy(data: Any) -> Any:
    return shuffled(Noisy(data))


class Ends(Callback):
    """The steps after which an epoch ended."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.found.append(trainer.global_step)


class Estimates(Callback):
    """Has the loaders made before a run is restored, as a scheduler over all steps does."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert trainer.estimated_stepping_batches == 3 * EPOCH


EPOCHS = {"max_steps": -1, "max_epochs": 3, "callbacks": [Estimates()]}


def make(make_run: MakeRun, folder: str, loader: Any, **options: Any) -> Run:
    ends = Ends()
    run = make_run(folder, **options | {"callbacks": [ends, *options.get("callbacks", ())]})
    run.ends = ends
    if loader is cycled:
        run.module = Pairs()
    return run


def fit(run: Run, loader: Any, path: Any = None, validate: bool = True) -> Run:
    L.seed_everything(5, verbose=False)
    loaders = [loader(run.data), StatefulDataLoader(run.data, batch_size=4)][: 1 + validate]
    run.trainer.fit(run.module, *loaders, ckpt_path=path, weights_only=True if path else None)
    return run


@pytest.mark.parametrize(
    ("loader", "at", "options"),
    [
        (shuffled, 3, {"limit_train_batches": 3}),
        (shuffled, 3, {"limit_train_batches": 3, "reload_dataloaders_every_n_epochs": 1}),
        (cycled, EPOCH, {}),
        (cycled, EPOCH, EVERY_6),
        (cycled, 5, EVERY_6),  # after the shorter one has begun again
        (plain, EPOCH, {}),
        (plain, EPOCH, EVERY_6),
        (noisy, 3, {}),
        (noisy, EPOCH, {}),  # a validation is due, for which its loader draws
        (shuffled, 10, EPOCHS),
        (shuffled, EPOCH, EPOCHS),
        (by_rank, 3, {}),
        (by_rank, EPOCH + 3, {}),
        (by_rank, 2 * EPOCH, {}),
        (divided, 3, {}),
        (divided, EPOCH + 3, {}),
        (divided, 2 * EPOCH, {}),
        (of_its_own(StatefulDataLoader), 3, {}),
        (of_its_own(StatefulDataLoader), EPOCH, {}),
        (of_its_own(DataLoader), EPOCH, {}),
    ],
)
def test_from_the_last_batch(make_run: MakeRun, loader: Any, at: int, options: dict[str, Any]) -> None:
    whole, stopped, resumed = (make(make_run, name, loader, **options) for name in ("whole", "run", "run"))
    fit(whole, loader)
    stopped.module.in_step.at[at - 1] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        fit(stopped, loader)
    fit(resumed, loader, "last").assert_ends_as(whole)
    assert stopped.watch.grads | resumed.watch.grads == whole.watch.grads
    assert stopped.watch.epochs | resumed.watch.epochs == whole.watch.epochs
    assert stopped.watch.validated | resumed.watch.validated == whole.watch.validated
    assert stopped.ends.found + resumed.ends.found == whole.ends.found


@pytest.mark.parametrize("loader", [shuffled, of_its_own(DataLoader)])
def test_a_new_run_reads_what_it_would_without_it(make_run: MakeRun, loader: Any) -> None:
    run, without = (make(make_run, name, loader, max_steps=EPOCH + 2) for name in ("run", "without"))
    without.trainer.callbacks.remove(without.last)
    assert fit(run, loader).watch.grads == fit(without, loader).watch.grads


def test_from_within_a_validation(make_run: MakeRun) -> None:
    """Its loader has drawn a random number, and draws it again when the validation begins again, however often."""
    whole, first, second, resumed = (make(make_run, name, noisy, **EVERY_6) for name in ("whole", "run", "run", "run"))
    fit(whole, noisy)
    for run, path in ((first, None), (second, "last")):
        run.module.in_validation.at[6, 1] = lambda: os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit):
            fit(run, noisy, path)
    fit(resumed, noisy, "last").assert_ends_as(whole)
    assert first.watch.grads | resumed.watch.grads == whole.watch.grads


@pytest.mark.parametrize("options", [{}, {"max_steps": -1, "max_epochs": 3}], ids=["steps", "epochs"])
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("loader", "limit"), [(shuffled, EPOCH), (shuffled, 3), (plain, EPOCH), (of_its_own(DataLoader), EPOCH)]
)
def test_from_a_checkpoint_of_an_epochs_end(
    make_run: MakeRun, tmp_path: Path, loader: Any, limit: int, validate: bool, options: dict[str, Any]
) -> None:
    saved = ModelCheckpoint(tmp_path / "ends", "{step}", save_on_train_epoch_end=True, save_top_k=-1)
    whole = make(make_run, "whole", loader, limit_train_batches=limit, callbacks=[saved], **options)
    resumed = make(make_run, "run", loader, limit_train_batches=limit, **options)
    fit(whole, loader, validate=validate)
    fit(resumed, loader, tmp_path / f"ends/step={limit}.ckpt", validate).assert_ends_as(whole)
    assert resumed.watch.grads == {step: grads for step, grads in whole.watch.grads.items() if step > limit}
    assert resumed.ends.found == whole.ends.found[1:]
    logged = [run.trainer.fit_loop.epoch_loop._batches_that_stepped for run in (whole, resumed)]
    assert logged[0] == logged[1]


def test_a_shorter_loader_that_begins_again_is_warned_of(make_run: MakeRun) -> None:
    def uneven(data: Any) -> Any:
        short = shuffled(torch.utils.data.Subset(data, range(4)))
        return CombinedLoader([shuffled(data), short], "max_size")

    class First(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[0], batch_idx)

    def run(steps: int) -> Run:
        made = make_run(max_steps=steps)
        made.module = First()
        return made

    fit(run(3), uneven)
    with pytest.warns(UserWarning, match="of mode 'max_size', in which a shorter loader was exhausted"):
        fit(run(4), uneven, "last")


def test_a_validation_that_was_due_where_another_callback_saved(make_run: MakeRun, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=6, save_top_k=-1)
    whole, resumed = make_run("whole", callbacks=[saved], **EVERY_6).fit(), make_run(**EVERY_6)
    resumed.fit(tmp_path / "steps/step=6.ckpt")
    assert resumed.watch.validated == whole.watch.validated


def test_the_steps_of_curves_after_an_early_stop(make_run: MakeRun) -> None:
    """A run that is told to stop validates, which another one does not at this step."""
    stopped = make_run(**EVERY_6)
    stopped.module.in_step.at[2] = lambda: setattr(stopped.trainer, "should_stop", True)
    assert stopped.fit().trainer.global_step == 3 and 3 in stopped.watch.validated
    resumed, whole = make_run(**EVERY_6).fit("last"), make_run("whole", **EVERY_6).fit()
    resumed.assert_ends_as(whole)
    assert resumed.watch.batches == whole.watch.batches


def test_a_run_of_epochs_goes_on_from_its_weights_and_not_from_their_average(make_run: MakeRun) -> None:
    whole, first, more = (
        make_run(name, callbacks=[EMAWeightAveraging(decay=0.9)], max_steps=-1, max_epochs=epochs)
        for name, epochs in (("whole", 3), ("run", 1), ("run", 3))
    )
    whole.fit(validate=False)
    first.fit(validate=False)
    more.fit("last", validate=False).assert_ends_as(whole)


class StopsAtEnd(Callback):
    """Gets a signal when the last batch is over."""

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("validate", [True, False])
def test_a_signal_after_the_last_step_leaves_an_epoch_unfinished(make_run: MakeRun, validate: bool) -> None:
    """That was saved before Lightning counted it: a run of more steps goes on in it."""
    stopped = make(make_run, "run", shuffled, max_steps=10, callbacks=[StopsAtEnd()])
    with pytest.raises(SystemExit):
        fit(stopped, shuffled, validate=validate)
    whole, resumed = make(make_run, "whole", shuffled), make(make_run, "run", shuffled)
    fit(whole, shuffled, validate=validate)
    fit(resumed, shuffled, "last", validate).assert_ends_as(whole)
    assert stopped.watch.epochs | resumed.watch.epochs == whole.watch.epochs


def test_a_validation_after_the_last_step_comes_once_although_the_run_trains_for_more(make_run: MakeRun) -> None:
    """The run was stopped by a signal in that step."""
    stopped, ended = (make(make_run, "run", shuffled, max_steps=-1, max_epochs=2) for _ in range(2))
    stopped.module.in_step.at[2 * EPOCH - 1] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        fit(stopped, shuffled)
    assert set(fit(ended, shuffled, "last").watch.validated) == {2 * EPOCH}
    whole, resumed = (make(make_run, folder, shuffled, max_steps=-1, max_epochs=3) for folder in ("whole", "run"))
    fit(whole, shuffled)
    fit(resumed, shuffled, "last").assert_ends_as(whole)
    assert set(resumed.watch.validated) == {3 * EPOCH}


@pytest.mark.parametrize("more", [{"max_epochs": 4}, {"max_steps": 24}], ids=["epochs", "steps"])
@pytest.mark.parametrize("validate", [True, False])
def test_a_run_that_had_ended_is_started_again_and_then_for_more(
    make_run: MakeRun, validate: bool, more: dict[str, Any]
) -> None:
    """Started again it saves what Lightning has at the end of training: all epochs are counted."""

    def of_epochs(folder: str, **options: Any) -> Run:
        limits = {"limit_train_batches": 6, "max_steps": -1, "max_epochs": -1}
        return make(make_run, folder, shuffled, **limits | EVERY_6 | options)

    whole, resumed = of_epochs("whole", **more), of_epochs("run", **more)
    fit(whole, shuffled, validate=validate)
    ended = [of_epochs("run", max_epochs=2) for _ in range(3)]
    for run, path in zip(ended, (None, "last", "last"), strict=True):
        fit(run, shuffled, path, validate)
        assert run.trainer.fit_loop.epoch_loop._batches_that_stepped == 12
    fit(resumed, shuffled, "last", validate).assert_ends_as(whole)
    assert resumed.watch.epochs == {step: epoch for step, epoch in whole.watch.epochs.items() if step > 12}
    logged = [run.trainer.fit_loop.epoch_loop._batches_that_stepped for run in (whole, resumed)]
    assert logged[0] == logged[1]
