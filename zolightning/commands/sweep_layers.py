"""``zolightning sweep-layers``: trains each layer alone, to see which one learns the task best."""

import os
import sys
import time
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from tqdm import tqdm

from zolightning.callbacks import TrainLayers, ZerothOrder
from zolightning.callbacks.refusals import refuse_unsupported
from zolightning.checks import require_integer
from zolightning.commands.configured_trainer import SILENT, ConfiguredTrainer
from zolightning.commands.output_folder import output_folder
from zolightning.commands.plots import save_figure, sweep_figure
from zolightning.commands.quiet import quiet, silent_callbacks
from zolightning.commands.slots import SLOTS
from zolightning.commands.sweep_results import ZERO_SHOT, SweepResults, SweepRow
from zolightning.commands.tables import print_table
from zolightning.layers import LayerStack, check_index, find_layers
from zolightning.messages import counted
from zolightning.network.quantization import refuse_quantized
from zolightning.optim import NonFiniteLossError
from zolightning.scopes.scope import Scope


def train_each_layer(
    trainer: ConfiguredTrainer,
    model: L.LightningModule,
    datamodule: L.LightningDataModule | None = None,
    steps: int = 200,
    layers: list[int] | Literal["all"] = "all",
    first_order: bool = False,
    evaluate: Literal["validation", "test"] = "validation",
    layers_name: str | None = None,
    output: str | None = None,
) -> None:
    """Trains each layer alone from the same weights on the same batches, and compares what they learn.

    The method and all else but the number of steps come from the configuration. Each finished layer is a line of
    ``results.csv``; the same command again goes on where it was interrupted.

    Args:
        trainer: the Trainer whose settings each run has, except for steps, logging and checkpoints.
        model: a module with recognisable layers, such as CausalLM; its weights are restored afterwards.
        datamodule: the data to train and to evaluate on.
        steps: training steps of each layer.
        layers: indices of the layers to train, such as ``[0,1,5]``, or ``all``.
        first_order: train by backpropagation and the module's own optimizer instead of the zeroth-order method.
        evaluate: the split whose metrics are reported.
        layers_name: where the layers are, if they are not found: a dotted name or a regular expression.
        output: folder for ``results.csv``, ``settings.json`` and plots; ``sweep-layers`` beside the versions of the run
            if not given.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
        MisconfigurationException: naming a setting of the Trainer under which a sweep makes no sense.
    """
    _Sweep(trainer, model, datamodule, steps, layers, first_order, evaluate, layers_name, output).run()


@dataclass
class _Sweep:
    """The runs of :func:`train_each_layer`, and their results."""

    trainer: ConfiguredTrainer
    module: L.LightningModule
    datamodule: L.LightningDataModule | None
    steps: int
    layers: list[int] | Literal["all"]
    first_order: bool
    evaluate: Literal["validation", "test"]
    layers_name: str | None
    output: str | None

    def __post_init__(self) -> None:
        require_integer("steps", self.steps)
        refuse_quantized(self.module, "sweep-layers")
        self.stack = find_layers(self.module, self.layers_name)
        self.indices = _chosen(self.stack, self.layers)
        self.callbacks = _callbacks(self.trainer, self.module, self.first_order)
        name = "sweep-layers-first-order" if self.first_order else "sweep-layers"
        self.folder = output_folder(self.trainer, self.output, name)
        # What every layer's run sets itself, and results therefore do not depend on.
        self.replaced = {
            "max_steps": self.steps,
            "max_epochs": -1,
            "fast_dev_run": False,
            "val_check_interval": self.steps + 1,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": self.steps,
            "default_root_dir": self.folder,
            **SILENT,
        }
        self.results = SweepResults(self.folder, self._settings())

    def run(self) -> None:
        """Trains the layers that have no result yet; then prints and draws all results."""
        start = _Tensors(self.module)
        pending = [index for index in self.indices if str(index) not in self.results.rows]
        has_bar = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        with quiet(), tqdm(total=len(pending) * self.steps, unit="step", disable=not has_bar) as bar:
            try:
                if ZERO_SHOT not in self.results.rows:
                    with isolate_rng():
                        self._keep(SweepRow(ZERO_SHOT, 0, 0, 0.0, self._evaluated()))
                for index in pending:
                    start.put_back()
                    with isolate_rng():  # the same batches and the same dropout for each layer
                        self._keep(self._trained(index, bar))
            finally:
                start.put_back()
        if self.trainer.is_global_zero:
            self._report()

    def _trained(self, index: int, bar: "tqdm[Any]") -> SweepRow:
        bar.set_description(f"layer {index}")
        # A method that has trained goes on with further directions in its next fit, and each layer is to have the same.
        kept = [copy(callback) if isinstance(callback, ZerothOrder) else callback for callback in self.callbacks]
        progress = LambdaCallback(on_train_batch_end=lambda *_: bar.update())
        callbacks = [*kept, TrainLayers([index], layers_name=self.layers_name), progress]
        runner = self.trainer.with_settings(**self.replaced, callbacks=callbacks)
        parameters = sum(parameter.numel() for parameter in self.stack.parameters(index).values())
        started = time.perf_counter()
        metrics: dict[str, float | None] = {}
        try:
            runner.fit(self.module, self.datamodule)
        except NonFiniteLossError:
            metrics = dict.fromkeys(self.results.metric_names)
        seconds = time.perf_counter() - started
        return SweepRow(str(index), parameters, runner.global_step, seconds, metrics or self._evaluated())

    def _evaluated(self) -> dict[str, float | None]:
        runner = self.trainer.with_settings(**self.replaced, callbacks=[])
        run = runner.validate if self.evaluate == "validation" else runner.test
        metrics: dict[str, float | None] = {}
        for of_a_loader in run(self.module, self.datamodule, verbose=False):
            metrics |= of_a_loader
        if not metrics:
            raise MisconfigurationException(
                f"`evaluate` is {self.evaluate!r}, but {type(self.module).__name__} logs no metric there: a sweep "
                "compares layers by what is logged."
            )
        return metrics

    def _keep(self, row: SweepRow) -> None:
        if self.trainer.is_global_zero:
            self.results.append(row)
            name = row.layer if row.layer == ZERO_SHOT else f"layer {row.layer}"
            values = ", ".join(
                f"{metric} {'diverged' if value is None else f'{value:.4f}'}" for metric, value in row.metrics.items()
            )
            tqdm.write(f"{name}: {values} ({row.seconds:.0f} s)", file=sys.stdout)
        else:
            self.results.rows[row.layer] = row

    def _report(self) -> None:
        zero_shot, rows = self.results.rows[ZERO_SHOT], self.results.layers()
        table = [{"layer": row.layer, "parameters": row.parameters, "steps": row.steps} | row.metrics for row in rows]
        method = "backpropagation" if self.first_order else "zeroth order"
        title = f"each layer alone, {counted(self.steps, 'step')}, {method}, {self.evaluate}"
        print_table(title, [{"layer": ZERO_SHOT, "parameters": 0, "steps": 0} | zero_shot.metrics, *table])
        curves = {
            name: {int(row.layer): value for row in rows if (value := row.metrics[name]) is not None}
            for name in self.results.metric_names
        }
        known = {name: value for name, value in zero_shot.metrics.items() if value is not None}
        save_figure(sweep_figure(curves, known, len(self.stack), title), self.folder, "sweep")
        print(f"\nwritten to {self.folder}: results.csv, settings.json, sweep.png")

    def _settings(self) -> dict[str, Any]:
        """All that results depend on."""
        config = self.trainer.run_config
        trainer_config = {k: v for k, v in config.get("trainer", {}).items() if k not in self.replaced}
        return {
            "steps": self.steps,
            "first_order": self.first_order,
            "evaluate": self.evaluate,
            "layers": f"{len(self.stack)} x {self.stack.name}",
            "module": type(self.module).__qualname__,
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "model": config.get("model"),
            "data": config.get("data"),
            "trainer": trainer_config,
            **{slot: config.get(slot) for slot in SLOTS},
        }


class _Tensors:
    """A copy, in host memory, of a module's parameters and buffers, those too that its state dict leaves out."""

    def __init__(self, module: L.LightningModule) -> None:
        self._module = module
        self._saved = {name: _to_host(tensor) for name, tensor in module.state_dict().items()}
        self._unsaved = {name: _to_host(b) for name, b in module.named_buffers() if name not in self._saved}

    @torch.no_grad()
    def put_back(self) -> None:
        self._module.load_state_dict(self._saved)
        for name, values in self._unsaved.items():
            self._module.get_buffer(name).copy_(values)


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def _chosen(stack: LayerStack, layers: list[int] | Literal["all"]) -> list[int]:
    if layers == "all":
        return list(range(len(stack)))
    if not layers:
        raise ValueError(f"`layers` is empty. Accepted are 'all' and indices from 0 to {len(stack) - 1}.")
    for index in layers:
        check_index(stack, index, "layers")
    return sorted(set(layers))


def _callbacks(trainer: ConfiguredTrainer, module: L.LightningModule, first_order: bool) -> list[Callback]:
    """The callbacks that take part in training, checked as far as that is possible before it."""
    kept = silent_callbacks(trainer)
    for callback in kept:
        if isinstance(callback, Scope):
            raise MisconfigurationException(
                f"`scope` is {type(callback).__name__}, which chooses what is trained, but so does the sweep. Leave "
                "`scope` out."
            )
    methods = [callback for callback in kept if isinstance(callback, ZerothOrder)]
    if first_order:
        return [callback for callback in kept if callback not in methods]
    if not methods:
        raise MisconfigurationException(
            "No `method` is given to train each layer. Name one, such as MeZO, or set `first_order` to true "
            "to train by the module's own optimizer."
        )
    refuse_unsupported(trainer)
    for callback in methods:
        callback.method(list(module.parameters()))
    return kept
