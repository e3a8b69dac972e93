"""Runs as long as the papers', which no CPU can do: ``python -m zolightning.bench evidence``.

SST-2 by each method with the settings of its file in ``configs/methods``: 20,000 steps of two forwards, or fewer steps
of more forwards, and AdamW beside them. Validation curves, and the test accuracy of the best checkpoint, are appended
to one CSV file. The same command again goes on: finished runs are passed over, others continue from their last
checkpoint. With a limit of seconds, the runs that are left share the time that is left.
"""

import argparse
import csv
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from zolightning import optim
from zolightning.bench.figures import Value, append
from zolightning.bench.measure import require
from zolightning.callbacks import SaveLast, SubspaceResampling, ZerothOrder
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.data import PromptDataModule
from zolightning.models import CausalLM
from zolightning.optim import estimators
from zolightning.packaged import configs
from zolightning.scopes import DominantLayer

COLUMNS = ("run", "split", "step", "forwards", "train_seconds", "loss", "accuracy")
FIRST_ORDER = "adamw"
# A run's name, and the file in configs/methods that it takes its settings from
METHODS = {
    "mezo": "mezo",
    "dominant_layer": "mezo",
    "lozo": "lozo",
    "subzero": "subzero",
    "zo_muon": "zo_muon",
    "zo_mopi": "zo_mopi",
    FIRST_ORDER: "adamw",
}
STEPS_PER_ADAMW_STEP = 20  # it is done long before


@dataclass(frozen=True)
class Settings:
    """The arguments of the command.

    Attributes:
        model: what ``model.model_name`` accepts.
        data_path: folder of SST-2 as JSON lines.
        device: ``cuda`` or ``cpu``.
        steps: of two forwards; methods with more forwards a step take fewer of them.
        methods: names of :data:`METHODS`.
        seeds: of the rows, their order and the directions.
        lr_factor: multiplies every learning rate.
        validations: of a run, beside the one before it.
        seconds: after which no step is begun; none where None.
        stacked: whether all evaluations of a step share one forward.
        cuda_graphs: whether forwards are replayed from CUDA graphs.
        output: file to append to.
        folder: of the checkpoints.
    """

    model: str
    data_path: Path
    device: str = "cuda"
    steps: int = 20_000
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0,)
    lr_factor: float = 1.0
    validations: int = 20
    seconds: float | None = None
    stacked: bool = False
    cuda_graphs: bool = False
    output: Path = Path("logs/evidence/full-length.csv")
    folder: Path = Path("logs/evidence-runs")


@dataclass(frozen=True)
class Plan:
    """How a run is made.

    Attributes:
        name: by which it is known in the file, and its folder.
        seed: of everything.
        steps: in all.
        forwards: of a step.
        callbacks: beside those of every run; none of them has been used.
        batch_size: examples.
        precision: of the Trainer.
        optimizer: of the module; where there is a ZerothOrder it only says what trains.
    """

    name: str
    seed: int
    steps: int
    forwards: int
    callbacks: Sequence[Callback]
    batch_size: int
    precision: str
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW


def plan(settings: Settings, method: str, seed: int) -> Plan:
    """The run of a method with the settings of its configuration file."""
    config = yaml.safe_load((configs() / "methods" / f"{METHODS[method]}.yaml").read_text(encoding="utf-8"))
    name = f"{method}, {settings.steps} steps, seed {seed}"
    name += "" if settings.lr_factor == 1 else f", lr x {settings.lr_factor:g}"
    precision = config["trainer"]["precision"]
    if method == FIRST_ORDER:
        lr = config["model"]["optimizer"]["init_args"]["lr"] * settings.lr_factor
        optimizer = partial(torch.optim.AdamW, lr=lr)
        steps = max(1, settings.steps // STEPS_PER_ADAMW_STEP)
        return Plan(name, seed, steps, 1, [], 8, precision, optimizer)
    arguments = dict(config["method"]["init_args"])
    arguments["lr"] *= settings.lr_factor
    estimator: estimators.Estimator = getattr(estimators, arguments.pop("estimator", "TwoSided"))()
    forwards = len(estimator.probes(arguments.get("num_queries", 1)))
    kind = getattr(optim, config["method"]["class_path"])
    # One layer gains more where what lies below it is computed once a step, which leaves both out.
    is_whole = method != "dominant_layer"
    zeroth_order = ZerothOrder(
        partial(kind, estimator=estimator, **arguments),
        evaluations_per_forward=forwards if settings.stacked and is_whole else 1,
        cuda_graphs=settings.cuda_graphs and is_whole,
    )
    callbacks: list[Callback] = [zeroth_order]
    if issubclass(kind, optim.SubspaceOptimizer):
        callbacks.append(SubspaceResampling(**config.get("resampling", {})))
    if not is_whole:
        callbacks.append(DominantLayer())
    return Plan(name, seed, max(1, 2 * settings.steps // forwards), forwards, callbacks, 16, precision)


class Curve(Callback):
    """Appends what every validation and test found to a file.

    Args:
        run: its name there.
        forwards: of a step.
        output: the file.
    """

    def __init__(self, run: str, forwards: int, output: Path) -> None:
        self.run = run
        self.forwards = forwards
        self.output = output
        self.train_seconds = 0.0  # of all steps, validations not counted
        self._started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.train_seconds += time.perf_counter() - self._started

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step if trainer.state.fn == TrainerFn.FITTING else 0
        self._append(trainer, "val", step)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._append(trainer, "test", trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_seconds = state_dict["train_seconds"]

    def _append(self, trainer: L.Trainer, split: str, step: int) -> None:
        found = {name: float(trainer.callback_metrics[f"{split}/{name}"]) for name in ("loss", "accuracy")}
        line: dict[str, Value] = {"run": self.run, "split": split, "step": step, "forwards": step * self.forwards}
        append(self.output, COLUMNS, [line | {"train_seconds": round(self.train_seconds, 2), **found}])
        print(f"{self.run}: {split} after {step} steps, loss {found['loss']:.4f}, accuracy {found['accuracy']:.4f}")


class Deadline(Callback):
    """Stops a run as a cluster would: by SIGTERM, on which :class:`~zolightning.callbacks.SaveLast` saves and ends it.

    Args:
        at: when, by ``time.monotonic()``; never where None.

    Attributes:
        has_passed: whether it stopped the run.
    """

    def __init__(self, at: float | None) -> None:
        self.at = at
        self.has_passed = False

    def on_train_batch_end(self, *_: Any) -> None:
        if self.at is not None and time.monotonic() >= self.at:
            self.has_passed = True
            signal.raise_signal(signal.SIGTERM)


def run(settings: Settings) -> None:
    """Makes the runs that are not finished, one after the other."""
    device = torch.device(settings.device)
    require(device)
    end = None if settings.seconds is None else time.monotonic() + settings.seconds
    plans = [plan(settings, method, seed) for seed in settings.seeds for method in settings.methods]
    plans = [one for one in plans if one.name not in _finished(settings.output)]
    for number, one in enumerate(plans):
        share = None if end is None else (end - time.monotonic()) / (len(plans) - number)
        if share is not None and share <= 0:
            print("The time is over.")
            return
        deadline = Deadline(None if share is None else time.monotonic() + share)
        try:
            train(settings, one, deadline)
        except SystemExit:  # of SaveLast, which others may have told to stop, too
            if not deadline.has_passed:
                raise
            print(f"{one.name}: stopped; the same command goes on.")


def train(settings: Settings, one: Plan, deadline: Deadline) -> None:
    """Makes a run, from its last checkpoint where there is one, and tests its best checkpoint."""
    L.seed_everything(one.seed, verbose=False)
    folder = settings.folder / one.name.replace(", ", "-").replace(" ", "_")
    data = PromptDataModule(
        "sst2", str(settings.data_path), batch_size=one.batch_size, eval_batch_size=64, seed=one.seed
    )
    module = CausalLM(settings.model, one.optimizer)
    best = ModelCheckpoint(folder, "best", monitor="val/accuracy", mode="max", enable_version_counter=False)
    curve = Curve(one.name, one.forwards, settings.output)
    trainer = L.Trainer(
        accelerator="gpu" if settings.device == "cuda" else "cpu",
        devices=1,
        max_steps=one.steps,
        val_check_interval=max(1, one.steps // settings.validations),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        precision=one.precision,  # type: ignore[arg-type]  # read from a file
        callbacks=[*one.callbacks, curve, best, deadline, SaveLast(folder, every_n_minutes=3)],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    if not last.exists():
        trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True if last.exists() else None)
    trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False, weights_only=True)


def _finished(output: Path) -> set[str]:
    """Names of the runs that have been tested."""
    if not output.exists():
        return set()
    with output.open(newline="") as file:
        return {line["run"] for line in csv.DictReader(file) if line["split"] == "test"}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``evidence`` to the benchmarks."""
    parser = commands.add_parser(
        "evidence",
        description=__doc__,
        help="runs as long as the papers'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder, GGUF file or pypi:// address")
    add("--data-path", required=True, type=Path, help="folder of SST-2 as JSON lines")
    add("--device", choices=("cuda", "cpu"), default=Settings.device, help="where to run (default: cuda)")
    add("--steps", type=int, default=Settings.steps, help="of two forwards (default: 20000)")
    add("--methods", nargs="+", choices=METHODS, default=Settings.methods, help="all if not given")
    add("--seeds", nargs="+", type=int, default=Settings.seeds, help="0 if not given")
    add("--lr-factor", type=float, default=Settings.lr_factor, help="multiplies every learning rate")
    add("--validations", type=int, default=Settings.validations, help="of a run (default: 20)")
    add("--seconds", type=float, help="after which no step is begun; the runs share them")
    add("--stacked", action="store_true", help="all evaluations of a step share one forward, but in the dominant layer")
    add("--cuda-graphs", action="store_true", help="forwards are replayed from CUDA graphs, but in the dominant layer")
    add("--output", type=Path, default=Settings.output, help="file to append to")
    add("--folder", type=Path, default=Settings.folder, help="of the checkpoints")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    settings = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    run(Settings(**settings | {name: tuple(settings[name]) for name in ("methods", "seeds")}))
