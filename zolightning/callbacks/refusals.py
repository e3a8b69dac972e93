"""Refuses, before the first step, Trainer settings and modules that cannot be trained by forward passes.

Each function raises a MisconfigurationException with the setting, the value found and what is accepted.

Classes are recognised by the names of their bases, because ``lightning`` and ``pytorch_lightning`` are the same code
under two names, and their classes are different objects.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

_WHOLE_PARAMETERS = ("SingleDeviceStrategy", "DDPStrategy")  # strategies under which each rank holds all of them
_SHARDING = ("zo_fsdp", "ZerothOrderFSDP")  # strategies under which each rank holds some rows
_ACCEPTED = "'auto', 'ddp' or 'zo_ddp', or 'zo_fsdp' for ranks that share the weights"
_UNFIT_STRATEGIES = {  # part of a name, lower-case and without underscores: why not
    "fsdp": "shards parameters as flat tensors without names, and directions depend on names",
    "modelparallel": "shards parameters, and saves the states of optimizers that read gradients only",
    "deepspeed": "shards optimizer states and runs the optimizer itself, and zeroth-order training has its own",
    "xla": "compiles what a step does, which is untested with weights that change between evaluations",
}
_UNFIT_PRECISIONS = ("bitsandbytes", "transformerengine", "deepspeed", "fsdp", "xla")
_PRECISIONS = "'32-true', '64-true', 'bf16-true', '16-true' or 'bf16-mixed'"


def refuse_unsupported(trainer: Any) -> None:
    """Refuses a Trainer's strategy, precision, options and callbacks."""
    refuse_strategy(trainer.strategy)
    refuse_precision(trainer.precision_plugin)
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"`trainer.accumulate_grad_batches` is {trainer.accumulate_grad_batches}, but zeroth-order training has no "
            "gradients to accumulate. Use a larger batch with `micro_batch_size` of ZerothOrder."
        )
    _refuse_callbacks(trainer.callbacks)
    if (trainer.gradient_clip_val or 0) > 0:  # nothing else makes Lightning clip
        raise MisconfigurationException(
            f"`trainer.gradient_clip_val` is {trainer.gradient_clip_val}, but zeroth-order training has no gradients "
            "to clip. Use `clip` of the method, which bounds the projected gradient."
        )
    methods = [callback for callback in trainer.callbacks if "ZerothOrder" in class_names(callback)]
    if len(methods) > 1:
        raise MisconfigurationException(
            f"`trainer.callbacks` has {len(methods)} ZerothOrder callbacks, but a run has only one method. Keep one of "
            "them."
        )
    if methods and methods[0].cuda_graphs:
        refuse_graphs(trainer.strategy.root_device)
    if methods and any(name in _SHARDING for name in class_names(trainer.strategy)):
        _refuse_options_with_shards(methods[0])
        _refuse_callbacks_with_shards(trainer.callbacks)


def _refuse_callbacks(callbacks: Iterable[Any]) -> None:
    for callback in callbacks:
        if "GradientAccumulationScheduler" in class_names(callback):
            raise MisconfigurationException(
                "`trainer.callbacks` has a GradientAccumulationScheduler, but zeroth-order training has no gradients "
                "to accumulate. Use a larger batch with `micro_batch_size` of ZerothOrder."
            )
        if "StochasticWeightAveraging" in class_names(callback):
            raise MisconfigurationException(
                "`trainer.callbacks` has a StochasticWeightAveraging, which changes learning rates by epochs, and "
                "recomputes the statistics of batch norms in a last epoch that accumulates gradients: zeroth-order "
                "training does neither. Use WeightAveraging or EMAWeightAveraging."
            )


def refuse_strategy(strategy: Any) -> None:
    """Refuses a strategy that shards parameters or runs the optimizer, given as an object or by the Trainer's name."""
    names = [strategy] if isinstance(strategy, str) else class_names(strategy)
    found = repr(strategy) if isinstance(strategy, str) else names[0]
    if any(name in _SHARDING for name in names):
        return
    for name in names:
        for part, reason in _UNFIT_STRATEGIES.items():
            if part in name.lower().replace("_", ""):
                raise MisconfigurationException(f"`trainer.strategy` is {found}, which {reason}. Use {_ACCEPTED}.")
    if not isinstance(strategy, str) and not any(name in _WHOLE_PARAMETERS for name in names):
        raise MisconfigurationException(
            f"`trainer.strategy` is {found}, but zeroth-order training runs under 'auto', 'ddp', 'zo_ddp', 'zo_fsdp' "
            "and strategies derived from SingleDeviceStrategy or DDPStrategy."
        )


def refuse_precision(precision: Any) -> None:
    """Refuses a precision that scales gradients or replaces layers, given as a plugin or by the Trainer's name."""
    is_name = isinstance(precision, str | int)
    value = str(precision) if is_name else precision.precision
    names = [value.replace("-", "")] if is_name else class_names(precision)
    if value in ("16", "16-mixed"):
        raise MisconfigurationException(
            f"`trainer.precision` is '{value}', which scales gradients, but zeroth-order training has none. "
            "Use 'bf16-mixed', 'bf16-true', '16-true' or '32-true'."
        )
    if any(part in name.lower() for name in names for part in _UNFIT_PRECISIONS):
        raise MisconfigurationException(
            f"`trainer.precision` is {value!r}, which is not supported by zeroth-order training. Use {_PRECISIONS}."
        )


def _refuse_options_with_shards(callback: Any) -> None:
    """Under sharded weights (FSDP2), refuses options of ZerothOrder that would make ranks run different forwards."""
    defaults = {"micro_batch_size": None, "evaluations_per_forward": 1, "keep_prefix_gib": 0.0, "cuda_graphs": False}
    for name, default in defaults.items():
        if (value := getattr(callback, name)) != default:
            raise MisconfigurationException(
                f"`{name}` is {value}, but under 'zo_fsdp' all ranks must run the same forwards of the whole network. "
                f"Leave it at {default}, or use a strategy under which every rank holds all weights ('zo_ddp')."
            )


def _refuse_callbacks_with_shards(callbacks: Sequence[Any]) -> None:
    """Under sharded weights (FSDP2), refuses callbacks that read whole weights."""
    if any("SubspaceResampling" in class_names(callback) and callback.bases for callback in callbacks):
        raise MisconfigurationException(
            "`bases` of SubspaceResampling are taken from activations, but under 'zo_fsdp' it is not known which "
            "operations read a weight. Leave it at None, or use a strategy under which every rank holds all weights "
            "('zo_ddp')."
        )
    if averaging := [type(each).__name__ for each in callbacks if "WeightAveraging" in class_names(each)]:
        raise MisconfigurationException(
            f"`trainer.callbacks` has a {averaging[0]}, which averages whole weights, but under 'zo_fsdp' a rank holds "
            "only rows of them. Leave it out, or use a strategy under which every rank holds all ('zo_ddp')."
        )


def refuse_module(module: L.LightningModule) -> None:
    """Refuses modules whose ``training_step`` cannot be evaluated several times on one batch."""
    name = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} has `automatic_optimization=False`, so its `training_step` trains by itself, but ZerothOrder "
            "needs one that only returns a loss. Remove one of the two; in a `training_step` of your own, call "
            "`zolightning.zeroth_order_step`."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"`training_step` of {name} takes `dataloader_iter` and fetches its own batches, but a zeroth-order step "
            "evaluates one batch several times. Let it take `batch` instead."
        )
    for parameter_name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise MisconfigurationException(
                f"`{parameter_name}` of {name} has no shape yet, as in nn.LazyLinear. Run one forward pass, "
                "`module(example)`, before `trainer.fit`."
            )


def made_scheduler(make: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    """Makes a scheduler; refuses one that needs a metric, or changes more of a method than its learning rate."""
    method = type(optimizer).__name__
    try:
        scheduler = make(optimizer)
    except ValueError as error:  # torch's, about an argument, or a method without a momentum to change
        raise MisconfigurationException(f"`lr_scheduler` does not go with {method}: {error}") from error
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau):
        raise MisconfigurationException(
            f"`lr_scheduler` is {name}, which needs a metric, but schedulers are stepped after every training step. "
            "Use one that depends on the step alone, such as WarmupDecay or CosineAnnealingLR."
        )
    set_ones = [group["momentum"] for group in optimizer.param_groups if group.get("momentum")]
    if set_ones and optimizer.defaults.get("momentum") == 0:
        raise MisconfigurationException(
            f"`lr_scheduler` is {name}, which has set `momentum` to {set_ones[0]:g}, but {method} has none set: "
            "momentum takes 4 bytes per weight. Give the scheduler `cycle_momentum=False`, or the method a `momentum`."
        )
    return scheduler


def refuse_graphs(device: torch.device) -> None:
    """Refuses `cuda_graphs` on a device that has none."""
    if device.type != "cuda":
        raise MisconfigurationException(
            f"`cuda_graphs` is True, but the run is on '{device.type}', which has none. Use `trainer.accelerator` "
            "'gpu' with a CUDA device, or leave `cuda_graphs` at False."
        )


def class_names(thing: object) -> list[str]:
    """Names of the classes that an object is an instance of, its own first."""
    return [base.__name__ for base in type(thing).__mro__]
