"""A summary of a run, printed when it begins and kept beside its curves."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from zolightning.callbacks.block_coordinate_descent import BlockCoordinateDescent
from zolightning.callbacks.run_memory import memory_plan
from zolightning.callbacks.subspace_resampling import SubspaceResampling
from zolightning.checkpoints.keep_ledger import KeepLedger
from zolightning.checkpoints.save_last import SaveLast
from zolightning.memory import trained_by, weight_bytes
from zolightning.messages import aligned, in_units
from zolightning.network.quantization import num_weights
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.settings import constructor_arguments, settings_of
from zolightning.partners import callbacks_of, find_callbacks, methods_of, tensorboards
from zolightning.rank_zero import rank_zero_info
from zolightning.scopes.scope import scopes_of
from zolightning.strategies.ranks import layout_of


class RunOverview(Callback):
    """Summarizes a run before its first step, on the screen and in TensorBoard.

    * Printed: the method and its settings, the scope, how many parameters train, the memory that the run will take
      (:mod:`zolightning.memory`), the forward passes of a step, and where the run goes.
    * The same as the text ``run`` in TensorBoard, and the settings as hyperparameters, to compare runs by, with the
      best value of the monitored metric if a ModelCheckpoint has one. Other loggers get the settings at the beginning.
    * The metrics of every validation, also of one before the fit, are logged under ``by_forward_passes/`` too, with the
      number of forward passes as the step, to compare methods with different numbers of evaluations.

    A run that does not fit into the memory of its GPU is refused, with the sizes of alternatives. The size of a forward
    pass is known if the datamodule has ``largest_batch``, as PromptDataModule does.

    Args:
        command: how the run was started, for the overview.

    Raises:
        MisconfigurationException: when training starts, if weights, state and scratch are more than a GPU has free.
    """

    def __init__(self, command: str | None = None) -> None:
        self.command = command
        self._settings: dict[str, Any] = {}
        self._began = 0.0
        self._validated_before: dict[str, Any] = {}  # metrics of a validation that came before the fit

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._began = time.time()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        lines = overview(trainer, pl_module)
        is_resumable = any(isinstance(callback, SaveLast | KeepLedger) for callback in callbacks_of(trainer))
        if self.command is not None and "folder" in lines and is_resumable:
            lines["resume"] = f"zolightning fit --config {quote(lines['folder'] + '/config.yaml')} --ckpt_path last"
        rank_zero_info(aligned(lines))
        if self.command is not None:
            lines["command"] = self.command
        self._settings = _settings(trainer, pl_module)
        if trainer.global_step == 0:
            _log_by_forward_passes(trainer, self._validated_before)
        boards = tensorboards(trainer)
        for logger in trainer.loggers:
            if logger not in boards:
                logger.log_hyperparams(self._settings)
        for logger in boards:
            table = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
            # From here on time counts in `metrics.json` and reports: probes before the first step are a part of the run
            logger.experiment.add_text("run", f"| | |\n|-|-|\n{table}", trainer.global_step, self._began)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            _log_by_forward_passes(trainer, trainer.callback_metrics)
        else:
            self._validated_before = dict(trainer.callback_metrics)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = next(iter(find_callbacks(trainer, ModelCheckpoint)), None)
        score = None if best is None else best.best_model_score
        metrics = {} if best is None or score is None else {f"best/{best.monitor}": float(score)}
        for logger in tensorboards(trainer):  # which writes nothing for an empty dictionary
            logger.log_hyperparams(self._settings, metrics or None, trainer.global_step)


def _log_by_forward_passes(trainer: L.Trainer, metrics: Mapping[str, Any]) -> None:
    for method in methods_of(trainer):
        for logger in tensorboards(trainer):
            for name, value in metrics.items():
                if name.startswith("val"):
                    forwards = method.param_groups[0]["forward_passes"]
                    logger.experiment.add_scalar(f"by_forward_passes/{name}", float(value), forwards)


def overview(trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
    """The summary of a run: texts by their titles, in order.

    Raises:
        MisconfigurationException: if weights, state and scratch are more than a GPU has free.
    """
    lines: dict[str, str] = {}
    count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        if not isinstance(optimizer, ZerothOrderOptimizer):
            lr = optimizer.param_groups[0].get("lr")
            lines["method"] = name if lr is None else f"backpropagation by {name}, lr {lr:g}"
            weights = in_units(weight_bytes(module))
            lines["memory"] = f"weights {weights}, gradients and the optimizer's state, activations"
            continue
        lines["method"] = ", ".join([name, *(f"{key} {value}" for key, value in _unlike_defaults(optimizer).items())])
        lines["step"] = _evaluations(trainer, optimizer)
        never = {parameter for blocks in find_callbacks(trainer, BlockCoordinateDescent) for parameter in blocks.never}
        trained = [weight for weight in trained_by(optimizer) if weight.weight not in never]
        count = sum(math.prod(weight.shape) for weight in trained)
        planned = memory_plan(trainer, module, optimizer, trained)
        peak = "" if planned.activations is None else f"; {in_units(planned.peak)} at the peak"
        lines["memory"] = f"{planned}{peak}"
    scopes = [type(scope).__name__ for scope in scopes_of(trainer)]
    total = num_weights(module)
    chosen = ", ".join(scopes) or ("all parameters" if count == total else "unfrozen parameters")
    lines["scope"] = f"{chosen}: {count:,} of {total:,} parameters train"
    for blocks in find_callbacks(trainer, BlockCoordinateDescent):
        lines["blocks"] = blocks.describe()
    if trainer.world_size > 1:
        lines["ranks"] = str(layout_of(trainer))
    folder = trainer.log_dir  # a broadcast: once, on every rank
    if folder is not None and trainer.loggers:
        lines["folder"] = folder
        if tensorboards(trainer):
            lines["curves"] = f"tensorboard --logdir {quote(str(Path(folder).parent))}"
    return lines


def _evaluations(trainer: L.Trainer, optimizer: ZerothOrderOptimizer) -> str:
    """How many forward passes a step takes, and how they run."""
    forwards = len(optimizer.estimator.probes(optimizer.num_queries)) * optimizer.estimator.forwards
    how = "" if optimizer.evaluator.graphs is None else " by CUDA graphs"
    if (parts := layout_of(trainer).perturbation_parallel_size) > 1:
        how += f", {-(-forwards // parts)} of them on the first rank"
    return f"{forwards} forward passes{how}; a few more in the first step, to find where parameters are read"


def _unlike_defaults(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    """The settings that were chosen: the learning rate, and those that differ from the class's defaults."""
    defaults: dict[str, Any] = {}
    with suppress(TypeError):  # a method whose settings have no defaults: all are shown
        defaults = settings_of(type(optimizer)([nn.Parameter(torch.zeros(1, 1))]))  # type: ignore[call-arg]
    found = settings_of(optimizer)
    others = (key for key in found if key not in ("class", "dtype", "lr"))
    chosen = {key: found[key] for key in others if key not in defaults or found[key] != defaults[key]}
    return {"lr": f"{found['lr']:g}"} | chosen


def _settings(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """The settings by which runs are compared, as plain values."""
    data = getattr(trainer, "datamodule", None)
    settings: dict[str, Any] = {
        "task": getattr(getattr(data, "task", None), "name", None),
        "batch_size": getattr(data, "batch_size", None),
        "precision": trainer.precision,
        "max_steps": trainer.max_steps,
        "trainable": sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
    }
    for scope in scopes_of(trainer):
        settings["scope"] = type(scope).__name__
    for resampling in find_callbacks(trainer, SubspaceResampling):
        settings["resampling.interval"] = resampling.interval
        settings["resampling.bases"] = None if resampling.bases is None else str(resampling.bases)
    for blocks in find_callbacks(trainer, BlockCoordinateDescent):
        settings["blocks.order"] = type(blocks.order).__name__
        settings["blocks.interval"] = blocks.interval
        settings["blocks.blocks_per_step"] = blocks.blocks_per_step
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, ZerothOrderOptimizer):
            shown = constructor_arguments(type(optimizer)) | {"dtype"}  # not the method's own counters
            found = {key: value for key, value in settings_of(optimizer).items() if key in shown}
            settings["cuda_graphs"] = optimizer.evaluator.graphs is not None
            settings |= {"method": type(optimizer).__name__} | {f"method.{key}": found[key] for key in found}
        else:
            settings |= {"method": type(optimizer).__name__, "method.lr": optimizer.param_groups[0].get("lr")}
    return {key: value for key, value in settings.items() if value is not None}
