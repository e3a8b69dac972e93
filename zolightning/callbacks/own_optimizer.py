"""What a zeroth-order method takes over from a module's own ``configure_optimizers``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Hooks of a LightningModule that belong to backpropagation; Lightning calls none of them for ZerothOrder.
_UNUSED_HOOKS = (
    "backward",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "on_after_backward",
    "on_before_backward",
    "on_before_zero_grad",
    "optimizer_step",
    "optimizer_zero_grad",
)


@dataclass(frozen=True)
class OwnOptimizer:
    """The optimizer and the schedulers with which a module would train without ZerothOrder.

    Args:
        configured: what its ``configure_optimizers`` returned, in any of the forms that Lightning accepts.

    Raises:
        MisconfigurationException: if that has more than one optimizer.
    """

    configured: Any

    def __post_init__(self) -> None:
        names = [type(optimizer).__name__ for optimizer in self._all(Optimizer)]
        if len(names) > 1:
            raise MisconfigurationException(
                f"`configure_optimizers` returns {len(names)} optimizers ({', '.join(names)}), which take turns on "
                "different losses, but ZerothOrder trains one loss with one method. Return one."
            )

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer; None if the module has none."""
        return next(self._all(Optimizer), None)

    def groups(self, module: L.LightningModule) -> list[dict[str, Any]]:
        """Parameter groups for a method: the trainable parameters that the optimizer holds, in the module's order.

        If some of the optimizer's groups have ``weight_decay`` and others have none, the latter keep 0 and the former
        get the method's. Learning rates are the method's, because those of backpropagation do not apply to it.

        Raises:
            MisconfigurationException: if there is no such parameter.
        """
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not parameters:
            raise MisconfigurationException(
                "No parameter is trainable: all of the module's have `requires_grad=False`. Unfreeze at least one."
            )
        if self.optimizer is None:
            return [{"params": parameters}]
        decays = {p: group.get("weight_decay", 0) for group in self.optimizer.param_groups for p in group["params"]}
        own = [parameter for parameter in parameters if parameter in decays]
        if not own:
            raise MisconfigurationException(
                f"No parameter is trainable: the {type(self.optimizer).__name__} that `configure_optimizers` returns "
                "holds only parameters with `requires_grad=False` or of other modules. Unfreeze or add some."
            )
        decayed = [parameter for parameter in own if decays[parameter]]
        free = [parameter for parameter in own if not decays[parameter]]
        if decayed and free:
            return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        return [{"params": own}]

    def left_out(self, module: L.LightningModule) -> list[nn.Parameter]:
        """The frozen parameters that would train if they thawed: those of the optimizer, or all if there is none."""
        groups = [{"params": module.parameters()}] if self.optimizer is None else self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"] if not parameter.requires_grad]

    def replaced(self, module: L.LightningModule) -> str:
        """The end of a message: the optimizer and schedulers that do not run, and hooks that are not called."""
        names = [type(thing).__name__ for thing in (*self._all(Optimizer), *self._all(LRScheduler))]
        text = f" in place of {' and '.join(names)}" if names else ""
        if self.optimizer is not None and len({group["lr"] for group in self.optimizer.param_groups}) > 1:
            text += ", whose learning rates per group are not taken over"
        hooks = [f"`{hook}`" for hook in _UNUSED_HOOKS if _is_overridden(module, hook)]
        return text + (f"; {', '.join(hooks)} of {type(module).__name__} will not be called" if hooks else "")

    def _all(self, kind: type) -> Iterator[Any]:
        remaining = [self.configured]
        while remaining:
            thing = remaining.pop(0)
            if isinstance(thing, kind):
                yield thing
            elif isinstance(thing, Mapping):
                remaining += thing.values()
            elif isinstance(thing, list | tuple):
                remaining += thing


def _is_overridden(module: L.LightningModule, hook: str) -> bool:
    """Whether a hook is the user's: Lightning's base class is defined in Lightning, under either of its two names."""
    return getattr(type(module), hook).__module__.split(".")[0] not in ("lightning", "pytorch_lightning")
