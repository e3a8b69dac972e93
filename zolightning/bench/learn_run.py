"""A run of ``learn``: trained until its limits are used up, validated on the way, tested where it was best."""

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, LambdaCallback

from zolightning.bench.learn_entries import callbacks, make
from zolightning.bench.learn_results import Key, Line, Unit, write
from zolightning.bench.options import CLOCKS
from zolightning.callbacks import SaveLast
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.checkpoints.resume import callback_states
from zolightning.optim import NonFiniteLossError, WarmupDecay, ZerothOrderOptimizer

_NEVER = 2**62  # batches or steps
_BACKPROPAGATION = 3  # forwards a step: the backward takes about two of them


@dataclass(frozen=True)
class Limits:
    """What each run may use; it goes on until it has used all of it."""

    limits: Mapping[Unit, float]  # numbers of forwards, or of seconds of training, or both
    clock: str  # "wall", or "cpu" for the time of this process on all cores, which others on the machine hardly change
    validations: int  # number of validations within the first limit, besides one before it and one at the end of each
    # value of ``time.monotonic()`` after which no step is begun; the next command goes on. None: no end
    end: float | None = None


class Stopped(Exception):
    """The command's time is over, and the run's last step is saved."""


def train(key: Key, config: Namespace, limits: Limits, device: str, output: Path, folder: Path) -> None:
    """Makes a run, from its last checkpoint where there is one, and appends its validations and tests to a CSV file.

    Checkpoints are in `folder`, which is removed when the run is finished.

    Raises:
        Stopped: the command's time was over first.
    """
    L.seed_everything(key.seed, verbose=False)
    config = config.clone()
    if "seed" in config.data.init_args:
        config.data.init_args.seed = key.seed
    made = make(config, "model", "data", "trainer")
    module, data = made.model, made.data
    settings = made.trainer.as_dict() | {"accelerator": "gpu" if device == "cuda" else "cpu"}
    settings |= {"enable_model_summary": False, "plugins": [AtomicCheckpointIO()], "callbacks": []}
    evaluator = L.Trainer(**settings | {"enable_checkpointing": False})
    meter, last = Meter(key, limits, output, folder), folder / "last.ckpt"
    deadline = Deadline(limits.end)
    settings |= {
        "max_steps": callback_states(last)[meter.state_key]["length"] if last.exists() else meter.length,
        "val_check_interval": _NEVER,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "callbacks": [
            # before others probe, find bases or draw subspaces
            LambdaCallback(on_fit_start=meter.start, on_train_batch_start=meter.start),
            *callbacks(config),
            meter,
            deadline,
            SaveLast(folder, every_n_minutes=3),
        ],
    }
    trainer = L.Trainer(**settings)
    if not last.exists():
        meter.add(None, 0, evaluator.validate(module, data, verbose=False)[0])
    try:
        resumed: dict[str, Any] = {"ckpt_path": last, "weights_only": True} if last.exists() else {}
        trainer.fit(module, data, **resumed)
    except NonFiniteLossError as error:
        print(f"{key.entry}: {error}")
        write(output, key, meter.line("diverged", trainer.global_step, math.nan, math.nan))
    except SystemExit as error:  # of SaveLast, which others may have told to stop, too
        if not deadline.has_passed:
            raise
        raise Stopped from error
    tests = []
    for found in meter.found():
        if found.step == 0:  # without adapters and whatever else came later
            module = make(config, "model").model
        path = meter.path(found.step) if found.step else None
        metrics = evaluator.test(module, data, ckpt_path=path, verbose=False, weights_only=True)[0]
        quality = (round(metrics[f"test/{name}"], 6) for name in ("loss", "accuracy"))
        tests.append(Line("test", found.step, found.forwards, found.seconds, *quality))
    write(output, key, *tests)  # at once: a run with tests is finished
    rmtree(folder, ignore_errors=True)


class Meter(Callback):
    """Counts what a run uses, says when to validate and when to stop, and keeps the best weights within each limit.

    Tells the Trainer and its :class:`~zolightning.optim.WarmupDecay` after each step how many steps the run will have.
    """

    def __init__(self, key: Key, limits: Limits, output: Path, folder: Path) -> None:
        self.key = key
        self.limits = limits
        self.output = output
        self.folder = folder
        self.spent: dict[Unit, float] = {"forwards": 0, "seconds": 0.0}
        self.best: dict[Unit, tuple[int, int, float, float]] = {}  # step, forwards, seconds and loss
        self.used_up: list[Unit] = []
        self.length = _NEVER
        self._first: dict[Unit, float] = {}  # what the first step took, and what is done once before it
        self._clock: Callable[[], float] = CLOCKS[limits.clock]
        self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = len(self.used_up) == len(self.limits.limits)  # and only the tests are left

    def start(self, *_: Any) -> None:
        """Starts the clock, at the beginning of a step or of what is done once before the first."""
        self._started = self._clock()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.spent["seconds"] += self._clock() - self._started

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        before = dict(self.spent)
        self.spent["seconds"] += self._clock() - self._started
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, ZerothOrderOptimizer):
            self.spent["forwards"] = optimizer.param_groups[0]["forward_passes"]
        else:
            self.spent["forwards"] += _BACKPROPAGATION
        # Where the next step would pass a limit, this one is the last within it. Times vary, so two are left.
        next_step = {
            "forwards": self.spent["forwards"] - before["forwards"],
            "seconds": 2 * self.spent["seconds"] / max(1, trainer.global_step),
        }
        first, limit = next(iter(self.limits.limits.items()))
        interval = limit / self.limits.validations
        is_due = self.spent[first] // interval > before[first] // interval
        for unit, limit in self.limits.limits.items():
            if unit not in self.used_up and self.spent[unit] + next_step[unit] > limit:
                self.used_up.append(unit)
                is_due = True
        self._estimate_length(trainer)
        trainer.val_check_batch = 1 if is_due else _NEVER
        trainer.should_stop = trainer.should_stop or len(self.used_up) == len(self.limits.limits)

    def _estimate_length(self, trainer: L.Trainer) -> None:
        step, before = trainer.global_step, self.length
        self._first = self._first or dict(self.spent)
        left = 1
        for unit, limit in self.limits.limits.items():
            of_steps = self.spent[unit] if step == 1 else (self.spent[unit] - self._first[unit]) * step / (step - 1)
            if of_steps > 0:
                left = max(left, math.ceil((limit - self.spent[unit]) * step / of_steps))
        self.length = step + left
        trainer.fit_loop.epoch_loop.max_steps = self.length
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, WarmupDecay) and config.scheduler.total_steps == before:
                config.scheduler.total_steps = self.length

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.add(trainer, trainer.global_step, metrics)

    def add(self, trainer: L.Trainer | None, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps a validation, and where it is the best yet the weights of `trainer`, which is None at step 0."""
        line = self.line("val", step, metrics["val/loss"], metrics["val/accuracy"])
        write(self.output, self.key, line)
        group = {} if trainer is None else trainer.optimizers[0].param_groups[0]
        rate = group.get("lr_scale", 1.0) * group.get("lr", self.key.lr)
        print(
            f"{self.key.task}, {self.key.entry}, lr {self.key.lr:g}, seed {self.key.seed}: {line.forwards} forwards, "
            f"{line.seconds:.0f} s, lr now {rate:.2g}, val/loss {line.loss:.4f}, val/accuracy {line.accuracy:.4f}",
            flush=True,
        )
        better = [
            unit
            for unit, limit in self.limits.limits.items()
            if line.spent(unit) <= limit and (unit not in self.best or line.loss < self.best[unit][-1])
        ]
        if better and trainer is not None:
            trainer.save_checkpoint(self.path(step), weights_only=True)
        self.best |= {unit: (step, line.forwards, line.seconds, line.loss) for unit in better}
        for path in self.folder.glob("step-*.ckpt"):
            if path not in map(self.path, (best[0] for best in self.best.values())):
                path.unlink()

    def line(self, split: str, step: int, loss: float, accuracy: float) -> Line:
        """A line of the file: step, forwards and seconds so far, and the results of an evaluation."""
        forwards, seconds = int(self.spent["forwards"]), round(self.spent["seconds"], 2)
        return Line(split, step, forwards, seconds, round(loss, 6), round(accuracy, 6))

    def found(self) -> list[Line]:
        """The best validation within each limit, each of them once, by step from the last to the first."""
        found = sorted(set(self.best.values()), reverse=True)
        return [Line("val", step, forwards, seconds, loss, math.nan) for step, forwards, seconds, loss in found]

    def path(self, step: int) -> Path:
        """The checkpoint of the weights after `step` steps."""
        return self.folder / f"step-{step}.ckpt"

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("spent", "best", "used_up", "length", "_first")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


class Deadline(Callback):
    """Stops a run at a value of ``time.monotonic()`` as a cluster would: with SIGTERM, on which SaveLast saves it."""

    def __init__(self, at: float | None) -> None:
        self.at = at
        self.has_passed = False  # whether the run was stopped

    def on_train_batch_end(self, *_: Any) -> None:
        if self.at is not None and time.monotonic() >= self.at:
            self.has_passed = True
            signal.raise_signal(signal.SIGTERM)
