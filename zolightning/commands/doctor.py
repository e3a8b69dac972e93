"""``zolightning doctor``: measures, before a run begins, what may go wrong in it."""

import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from zolightning.callbacks import LearningRateProbe, ZerothOrder
from zolightning.callbacks.refusals import refuse_unsupported
from zolightning.callbacks.run_overview import overview
from zolightning.commands.configured_trainer import ConfiguredTrainer
from zolightning.commands.findings import Examination, Output, ParameterGroup, print_report
from zolightning.commands.quiet import quiet, silent_callbacks
from zolightning.commands.rounding import Survival, loss_noise, perturbation_survival, spacing, update_survival
from zolightning.evaluation.losses import LossAndTerms, loss_and_terms
from zolightning.optim import StepRecord, ZerothOrderOptimizer
from zolightning.partners import zeroth_order_optimizer
from zolightning.scopes.calibration import calibration_batches, calibration_forward


def examine(
    trainer: ConfiguredTrainer,
    model: L.LightningModule,
    datamodule: L.LightningDataModule | None = None,
    num_steps: int = 8,
    num_examples: int = 32,
) -> None:
    """Examines a run before it begins, and says what to change; trains and writes nothing.

    Takes the first steps of the run that the configuration describes, at a learning rate of 0, and prints for each
    kind of parameter the share of perturbations and of updates that survives rounding; how large the differences of
    losses are compared with the rounding of a loss; the largest output; the time of a step, and memory; a range of
    learning rates (LearningRateProbe); and what to change. Weights are afterwards as they were, to the bit.

    Args:
        trainer: the Trainer with the settings and callbacks of the run, of which one device is used.
        model: any module that could be trained.
        datamodule: the data to train on.
        num_steps: steps to measure with; if the run has a LearningRateProbe, its setting is used instead.
        num_examples: examples that learning rates are tried on, likewise; the default takes about 100 forwards.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
        MisconfigurationException: if there is no `method`, the first loss is not finite, or the number of steps is not
            known.
    """
    probe = LearningRateProbe(num_steps, num_examples)
    callbacks = silent_callbacks(trainer)
    if not any(isinstance(callback, ZerothOrder) for callback in callbacks):
        raise MisconfigurationException(
            "`method` is not given, but `doctor` examines zeroth-order methods. Name one, such as MeZO."
        )
    refuse_unsupported(trainer)
    sets_lr = any(isinstance(callback, LearningRateProbe) for callback in callbacks)
    callbacks += [] if sets_lr else [probe]
    probe = next(callback for callback in callbacks if isinstance(callback, LearningRateProbe))
    with quiet(), tqdm(desc="steps", total=probe.num_steps, disable=trainer.progress_bar_callback is None) as bar:
        doctor = _Doctor(probe, sets_lr, bar)
        runner = trainer.without_traces(
            callbacks=[*callbacks, doctor],
            min_steps=None,  # the steps after those that measure would train
            min_epochs=None,
            limit_val_batches=0,
        )
        runner.fit(model, datamodule)
    print_report(doctor.overview, doctor.examination)


class _Doctor(Callback):
    """Records the steps in which `probe` measures, when no weight moves, and examines the run after them."""

    overview: dict[str, str]
    examination: Examination

    def __init__(self, probe: LearningRateProbe, sets_lr: bool, bar: "tqdm[Any]") -> None:
        self._probe, self._bar = probe, bar
        self._sets_lr = sets_lr  # whether the probe is the run's own
        self._records: list[StepRecord] = []
        self._seconds: list[float] = []
        self._began = 0.0
        self._steps = math.inf  # of the run

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.overview = overview(trainer, pl_module)
        self._steps = self._probe.total_steps or trainer.estimated_stepping_batches
        if not self._sets_lr:
            self._fit_into(self._steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batch = calibration_batches(trainer, pl_module, self._probe.num_examples)[0]
        self._evaluate = partial(_evaluated, trainer, pl_module, trainer.precision_plugin.convert_input(batch))
        self._output = _largest_output(pl_module, self._evaluate)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._began = _now(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer = zeroth_order_optimizer(trainer, self)
        self._bar.update()
        if optimizer.record is not None and optimizer.record.projected_grads:
            self._records.append(optimizer.record)
        if not optimizer.param_groups[0]["lr_scale"]:
            self._seconds.append(_now(trainer) - self._began)
            return
        trainer.should_stop = True
        self.examination = self._examined(trainer, optimizer)

    def _fit_into(self, steps: float) -> None:
        """Measures in fewer steps where the run is short: it has one left after those in which nothing moves."""
        if steps < 2:
            raise MisconfigurationException(
                "`doctor` measures in the steps before a run's last one, but the run has 1 step. Set "
                "`trainer.max_steps` to 2 or more."
            )
        self._probe.num_steps = self._bar.total = int(min(self._probe.num_steps, steps - 1))
        if math.isfinite(steps):  # the run itself will train in all of its steps
            self._probe.total_steps = int(steps) + self._probe.num_steps

    def _examined(self, trainer: L.Trainer, optimizer: ZerothOrderOptimizer) -> Examination:
        groups = optimizer.param_groups
        scale = groups[0]["lr_scale"]
        rates = [group.get("initial_lr", group["lr"]) * (scale if self._sets_lr else 1.0) for group in groups]
        squares = [g * g for record in self._records for g in record.projected_grads]
        size = math.sqrt(sum(squares) / len(squares))
        last = self._records[-1]
        typical = replace(last, projected_grads=tuple(math.copysign(size, g) for g in last.projected_grads))
        read, kept = perturbation_survival(optimizer, self._evaluate), update_survival(optimizer, typical, rates)
        begins = groups[0].get("initial_lr", groups[0]["lr"])
        return Examination(
            groups=_in_groups({name: parameter for _, name, parameter in optimizer.trainable()}, read, kept),
            eps=groups[0]["eps"],
            update_precision=optimizer.update_precision,
            loss=last.loss,
            difference=_difference(optimizer, self._records),
            noise=loss_noise(optimizer, self._evaluate),
            output=self._output,
            step_seconds=statistics.median(self._seconds[1:] or self._seconds or [math.nan]),  # the first is slower
            steps=int(self._steps),
            lr=rates[0],
            measured_lr=None if scale == 1.0 else begins * scale,  # the probe leaves it where it has found none
            cost=self._probe.noise,
            sets_lr=self._sets_lr,
        )


def _evaluated(trainer: L.Trainer, module: L.LightningModule, batch: Any) -> LossAndTerms:
    """The loss of a batch, in the precision of the run."""
    with trainer.precision_plugin.train_step_context():
        return loss_and_terms(calibration_forward(module, batch))


def _largest_output(module: nn.Module, evaluate: Any) -> Output:
    """The largest output of all submodules in one evaluation of the loss.

    Raises:
        MisconfigurationException: if the loss is not finite, with the first submodule whose output is not.
    """
    names = {submodule: name or type(module).__name__ for name, submodule in module.named_modules()}
    seen: list[Output] = []

    def look(submodule: nn.Module, _: Any, outputs: Any) -> None:
        for output in tree_leaves(outputs):
            if submodule in names and isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                seen.append(Output(output.abs().max().item(), names[submodule], output.dtype))

    handle = register_module_forward_hook(look)
    try:
        loss, _ = evaluate()
    finally:
        handle.remove()
    if not loss.isfinite():
        first = next((output for output in seen if not math.isfinite(output.value)), None)
        where = "" if first is None else f", and {first.name} is the first to output {first.value:g} ({first.dtype})"
        raise MisconfigurationException(
            f"The loss is {loss.item():g} before the first step{where}. In float16 try --trainer.precision bf16-true; "
            "in other precisions look at the model and the data."
        )
    finite = [output for output in seen if math.isfinite(output.value)]  # a mask may be infinite
    return max(finite, default=Output(0.0, type(module).__name__, torch.float32))


def _difference(optimizer: ZerothOrderOptimizer, records: Sequence[StepRecord]) -> float | None:
    """RMS of the difference of two losses of a step; None where all of them are at the same weights."""
    estimator, eps = optimizer.estimator, optimizer.param_groups[0]["eps"]
    if estimator.reads_examples:  # the losses of an example, which is alone on its direction
        squares = [(2 * eps * g) ** 2 for record in records for g in record.projected_grads]
    elif any(sign for _, sign in estimator.probes(optimizer.num_queries)):
        squares = [2 * statistics.variance(record.losses) for record in records]
    else:
        return None
    return math.sqrt(statistics.fmean(squares))


def _in_groups(
    parameters: Mapping[str, nn.Parameter], read: Mapping[str, Survival], kept: Mapping[str, Survival]
) -> list[ParameterGroup]:
    """Groups parameters whose names differ only in numbers (of layers), and which have one dtype."""
    members: dict[tuple[str, torch.dtype], list[str]] = {}
    for name, parameter in parameters.items():
        short = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        members.setdefault((short, parameter.dtype), []).append(name)
    return [
        ParameterGroup(
            name=group,
            dtype=dtype,
            numel=sum(parameters[name].numel() for name in names),
            largest=max(parameters[name].detach().abs().max().item() for name in names),
            spacing=max(spacing(parameters[name]) for name in names),
            perturbation=sum((read[name] for name in names if name in read), Survival()),
            update=sum((kept[name] for name in names), Survival()),
        )
        for (group, dtype), names in members.items()
    ]


def _now(trainer: L.Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
