"""The last step is always saved, and a run that goes on from it equals one that was never stopped."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchdata.stateful_dataloader import StatefulDataLoader

from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.checkpoints.save_last import SaveLast
from zolightning.optim import LOZO, MeZO, NonFiniteLossError

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 with torch 2.13
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
MEZO = partial(MeZO, lr=1e-2, momentum=0.9)


class Plan:
    """What is to be done once, and when; an object of its own, as what a step changes in a module's dictionaries is
    there again for each of its evaluations."""

    def __init__(self) -> None:
        self.at: dict[Any, Callable[[], Any]] = {}

    def do(self, when: Any) -> Any:
        return self.at.pop(when, lambda: None)()


class Validated(L.LightningModule):
    """Logs what its weights are worth, and can be told to do something in a step or in a batch of a validation."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.in_step, self.in_validation = Plan(), Plan()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        factor = self.in_step.do(self.trainer.global_step)
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        return loss if factor is None else factor * loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.in_validation.do((self.trainer.global_step, batch_idx))
        self.log("val/loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(Callback):
    """Keeps the numbers of a run by step."""

    def __init__(self) -> None:
        self.grads: dict[int, tuple[float, ...]] = {}
        self.validated: dict[int, float] = {}
        self.batches: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        record = getattr(trainer.optimizers[0], "record", None)
        self.grads[trainer.global_step] = record.projected_grads if record else ()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        assert trainer.global_step not in self.validated
        self.validated[trainer.global_step] = float(trainer.callback_metrics["val/loss"])
        self.batches.append(trainer.fit_loop.epoch_loop._batches_that_stepped)


class Run:
    """A run of a fresh module, Trainer and loaders, in a folder with earlier ones; 7 batches make an epoch."""

    def __init__(self, make_trainer: Callable[..., L.Trainer], folder: Path, data: Any, **options: Any) -> None:
        method, callbacks = options.pop("method", MEZO), options.pop("callbacks", [])
        self.module, self.watch = Validated(), Watch()
        self.last = SaveLast(folder, **options.pop("last", {}))
        resampling = [SubspaceResampling(interval=4)] if method is not None and method.func is LOZO else []
        zeroth_order = [] if method is None else [ZerothOrder(method), *resampling]
        defaults = {
            "max_steps": 20,
            "enable_checkpointing": True,
            "num_sanity_val_steps": 0,
            "plugins": [AtomicCheckpointIO()],
        }
        self.trainer = make_trainer(callbacks=[self.last, *zeroth_order, self.watch, *callbacks], **defaults | options)
        self.data, self.path = data, folder / "last.ckpt"

    def fit(self, ckpt_path: Any = None, validate: bool = True) -> "Run":
        L.seed_everything(5, verbose=False)
        loaders = [StatefulDataLoader(self.data, batch_size=4) for _ in range(2)]
        self.trainer.fit(self.module, *loaders[: 1 + validate], ckpt_path=ckpt_path)
        return self

    def saved(self) -> dict[str, Any]:
        return torch.load(self.path, weights_only=True)

    def assert_ends_as(self, other: "Run") -> None:
        for (name, one), two in zip(self.module.named_parameters(), other.module.parameters(), strict=True):
            assert torch.equal(one, two), name
        assert self.trainer.global_step == other.trainer.global_step


@pytest.fixture
def make_run(make_trainer: Callable[..., L.Trainer], regression_data: Callable[..., Any], tmp_path: Path) -> Any:
    def make(folder: str = "run", **options: Any) -> Run:
        return Run(make_trainer, tmp_path / folder, regression_data().dataset, **options)

    return make


class StopAfter(Callback):
    """What EarlyStopping and Timer do."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 5


@pytest.mark.parametrize(
    "end",
    [
        {"max_steps": 5},
        {"max_steps": 7},
        {"max_steps": -1, "max_epochs": 2},
        {"callbacks": [StopAfter()]},
    ],
    ids=str,
)
@pytest.mark.parametrize("validate", [False, True])
def test_the_end_of_training(make_run: Any, end: dict[str, Any], validate: bool) -> None:
    """Whatever ends it, with no validation near, and a longer run goes on from there."""
    often = {"val_check_interval": 100, "check_val_every_n_epoch": None}
    short = make_run(**often | end).fit(validate=validate)
    assert short.saved()["global_step"] == short.trainer.global_step
    goal = {"max_steps": -1, "max_epochs": 4} if "max_epochs" in end else {"max_steps": 20}
    resumed, whole = (
        make_run(**goal, **often).fit("last", validate),
        make_run("whole", **goal, **often).fit(None, validate),
    )
    resumed.assert_ends_as(whole)
    assert short.watch.grads | resumed.watch.grads == whole.watch.grads
    assert len(short.watch.grads) + len(resumed.watch.grads) == len(whole.watch.grads)
    if "callbacks" not in end:  # stopping early validates once more
        assert short.watch.validated | resumed.watch.validated == whole.watch.validated


def test_every_so_many_steps(make_run: Any) -> None:
    run, found = make_run(last={"every_n_train_steps": 3}, max_steps=8), []
    run.module.in_step.at = {step: lambda: found.append(run.saved()["global_step"]) for step in (3, 5, 6)}
    run.fit(validate=False)
    assert found == [3, 3, 6] and run.saved()["global_step"] == 8


def test_every_so_many_minutes(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seconds = make_run(last={"every_n_minutes": 0.5}, max_steps=8), [0.0]
    monkeypatch.setattr("zolightning.checkpoints.save_last.time.monotonic", lambda: seconds[0])
    run.module.in_step.at = {
        2: lambda: seconds.__setitem__(0, 29.0),
        4: lambda: seconds.__setitem__(0, 31.0),
        5: lambda: seconds.__setitem__(0, 32.0),
        6: lambda: found.append(run.saved()["global_step"]),
    }
    found: list[int] = []
    run.fit(validate=False)
    assert found == [5]


def kill(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


EVERY_6 = {"val_check_interval": 6, "check_val_every_n_epoch": None}
EVERY_EPOCH = {"max_steps": 21}


@pytest.mark.parametrize(
    ("at", "number", "options"),
    [
        (0, signal.SIGTERM, EVERY_6),
        (4, signal.SIGTERM, EVERY_6 | {"method": partial(LOZO, lr=0.05, rank=2)}),
        (5, signal.SIGTERM, EVERY_6),  # a validation is due after it
        (6, signal.SIGINT, EVERY_6),  # the last of an epoch
        ((6, 0), signal.SIGTERM, EVERY_6),  # in the first batch of a validation
        ((12, 3), signal.SIGINT, EVERY_6),
        ((12, 3), signal.SIGINT, EVERY_6 | {"method": partial(LOZO, lr=0.05, rank=2)}),
        (19, signal.SIGTERM, EVERY_6),  # in the last step
        (3, signal.SIGINT, EVERY_EPOCH),
        (6, signal.SIGTERM, EVERY_EPOCH),  # the last of an epoch, a validation is due
        ((14, 2), signal.SIGTERM, EVERY_EPOCH),
        (4, signal.SIGTERM, EVERY_6 | {"method": None}),  # backpropagation
        ((6, 1), signal.SIGTERM, EVERY_6 | {"method": None}),
    ],
    ids=str,
)
def test_a_run_that_was_told_to_stop_goes_on(
    make_run: Any, capsys: pytest.CaptureFixture[str], at: Any, number: int, options: dict[str, Any]
) -> None:
    handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    stopped = make_run(**options)
    in_validation = isinstance(at, tuple)
    (stopped.module.in_validation if in_validation else stopped.module.in_step).at[at] = partial(kill, number)
    with pytest.raises(SystemExit) as exit_:
        stopped.fit()
    assert exit_.value.code == 128 + number
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers
    step = at[0] if in_validation else at + 1
    assert stopped.saved()["global_step"] == stopped.trainer.global_step == step

    resumed, whole = make_run(**options).fit("last"), make_run("whole", **options).fit()
    resumed.assert_ends_as(whole)
    assert sorted(stopped.watch.grads) + sorted(resumed.watch.grads) == sorted(whole.watch.grads)
    assert stopped.watch.grads | resumed.watch.grads == whole.watch.grads
    assert not stopped.watch.validated.keys() & resumed.watch.validated.keys()
    validated = stopped.watch.validated | resumed.watch.validated
    assert validated == whole.watch.validated
    assert stopped.watch.batches + resumed.watch.batches == whole.watch.batches


def test_what_a_stopped_run_says(make_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(last={"how_to_go_on": "again {folder} from {path}"})
    run.module.in_step.at[2] = kill
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        run.fit()
    (line,) = (record.getMessage() for record in caplog.records if "Stopped" in record.getMessage())
    assert line == (
        f"Stopped by SIGTERM. Step 3, the last complete one, is saved in {run.path}. "
        f"To go on: again {run.trainer.default_root_dir} from {run.path}"
    )


def test_a_second_interrupt_ends_the_run_at_once(make_run: Any) -> None:
    run = make_run()

    def twice() -> None:
        kill(signal.SIGINT)
        time.sleep(0)
        kill(signal.SIGINT)

    run.module.in_step.at[3] = twice
    with pytest.raises(SystemExit) as exit_:  # Lightning's
        run.fit()
    assert exit_.value.code == 1 and run.trainer.global_step == 3 and not run.path.exists()


@pytest.mark.parametrize("at", [4, 6])
def test_an_error_leaves_the_last_complete_step(make_run: Any, at: int) -> None:
    """And the run goes on after it, but for the batch which it was at."""
    run = make_run(**EVERY_6)
    run.module.in_step.at[at] = lambda: float("nan")
    with pytest.raises(NonFiniteLossError):
        run.fit()
    assert run.saved()["global_step"] == at
    for name, weight in run.module.state_dict().items():
        assert torch.equal(run.saved()["state_dict"][name], weight)
    resumed, whole = make_run(**EVERY_6).fit("last"), make_run("whole", **EVERY_6).fit()
    assert sorted(run.watch.grads) + sorted(resumed.watch.grads) == sorted(whole.watch.grads)
    assert (run.watch.batches + resumed.watch.batches) == whole.watch.batches


def test_an_error_in_a_validation(make_run: Any) -> None:
    run = make_run(**EVERY_6)
    run.module.in_validation.at[6, 2] = partial(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        run.fit()
    resumed, whole = make_run(**EVERY_6).fit("last"), make_run("whole", **EVERY_6).fit()
    resumed.assert_ends_as(whole)
    assert run.watch.validated | resumed.watch.validated == whole.watch.validated


def test_an_error_within_an_update_saves_nothing(make_run: Any) -> None:
    """Some weights may have moved, others not."""
    run = make_run()
    run.fit()
    before = run.path.stat().st_mtime_ns

    class Broken(MeZO):
        def update(self, record: Any) -> None:
            super().update(record)
            raise RuntimeError("half an update")

    broken = make_run(method=partial(Broken, lr=1e-2))
    with pytest.raises(RuntimeError, match="half an update"):
        broken.fit()
    assert run.path.stat().st_mtime_ns == before


def test_the_best_checkpoint_is_that_of_the_whole_run(make_run: Any) -> None:
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "method": partial(MeZO, lr=1e-2)}
    folder = make_run().path.parent
    checkpoints = [ModelCheckpoint(folder, "best-{step}", monitor="val/loss", mode="max") for _ in range(2)]
    first = make_run(callbacks=[checkpoints[0]], max_steps=9, **options).fit()
    second = make_run(callbacks=[checkpoints[1]], **options).fit("last")
    validated = first.watch.validated | second.watch.validated
    step = max(validated, key=validated.__getitem__)
    assert step < 9, "the best is to be found in the first part"
    assert checkpoints[1].best_model_path == str(folder / f"best-step={step}.ckpt")
    assert float(checkpoints[1].best_model_score) == validated[step]
    (tested,) = second.trainer.test(
        second.module, StatefulDataLoader(second.data, batch_size=4), ckpt_path="best", verbose=False
    )
    assert tested["test/loss"] == pytest.approx(validated[step], rel=1e-6)


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`dirpath` is .*/file/run, where no file can be written: Not a dir"):
        make_run("file/run").fit()


def test_what_a_killed_process_was_writing_is_removed(make_run: Any) -> None:
    run = make_run(max_steps=1)
    run.path.parent.mkdir()
    (run.path.parent / ".last.ckpt.123.unfinished").write_bytes(b"PK")
    run.fit()
    assert [file.name for file in run.path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "bf16-true"}, ["`trainer.precision` is 'bf16-true'", "'32-true'"]),
        ({"method": partial(LOZO, lr=1e-2)}, ["written by MeZO", "trains with LOZO"]),
        ({"method": None}, ["written by MeZO", "trains with SGD"]),
    ],
)
def test_resuming_another_kind_of_run_is_refused(make_run: Any, options: dict[str, Any], words: list[str]) -> None:
    make_run(max_steps=2).fit()
    with pytest.raises(MisconfigurationException) as raised:
        make_run(**options).fit("last")
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("option", [{"every_n_train_steps": 0}, {"every_n_minutes": -1.0}])
def test_intervals_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` must be positive"):
        SaveLast(**option)
