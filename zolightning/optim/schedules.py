"""A learning rate schedule: linear warm-up, constant, linear decay."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zolightning.checks import require_integer
from zolightning.rank_zero import rank_zero_warn

_GIVEN = ("total_steps", "warmup", "decay", "final")


class WarmupDecay(LRScheduler):
    """Linear warm-up, a constant stretch, linear decay ("warmup-stable-decay", MiniCPM, arXiv 2404.06395).

    At a constant rate the noise of the estimates keeps the loss above its minimum by an amount proportional to the
    rate; a decay lets it settle. The default is linear decay over the whole run, to a rate of 0 after its last step.

    A resumed run uses the arguments given now, not those of its checkpoint, so that a longer run has a longer schedule;
    a warning names the differences.

    Args:
        optimizer: the optimizer; the ``lr`` of each group is its highest rate.
        total_steps: length of the run in steps; None takes the Trainer's.
        warmup: share of the run in which the rate rises linearly.
        decay: share of the remaining steps, at the end, in which it falls linearly.
        final: the rate after the last step, as a multiple of the highest.

    Raises:
        ValueError: naming the argument, its value and what is accepted; in the first :meth:`step`, if the length of the
            run is not known.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: float = 0.0,
        decay: float = 1.0,
        final: float = 0.0,
    ) -> None:
        if total_steps is not None:
            require_integer("total_steps", total_steps)
        for name, share in (("warmup", warmup), ("decay", decay), ("final", final)):
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {share!r}.")
        self.total_steps = total_steps
        self.warmup = warmup
        self.decay = decay
        self.final = final
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The rate of each group in the next step."""
        if self.total_steps is None:
            if self.last_epoch == 0:  # a Trainer's scheduler is made before its run is known
                return list(self.base_lrs)
            raise ValueError(
                "`total_steps` of WarmupDecay is None, and no Trainer has set it. Give the number of steps of the run."
            )
        return [lr * self._factor(self.last_epoch, self.total_steps) for lr in self.base_lrs]

    def fit_to(self, trainer: Any) -> None:
        """Sets `total_steps` to the length of a Trainer's run if it is None.

        Raises:
            ValueError: if the run has no known length.
        """
        if self.total_steps is not None:
            return
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                "`total_steps` of WarmupDecay is None, and the length of the run is unknown. Set `trainer.max_steps`, "
                "or `total_steps`."
            )
        self.total_steps = int(steps)
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        given = {name: getattr(self, name) for name in _GIVEN}
        if others := [f"`{name}` {state_dict[name]!r}" for name in _GIVEN if state_dict[name] != given[name]]:
            now = ", ".join(f"`{name}` {value!r}" for name, value in given.items())
            rank_zero_warn(
                f"The schedule continues as given now, with {now}; the checkpoint's run had {', '.join(others)}."
            )
        super().load_state_dict(state_dict | given)

    def _factor(self, step: int, total_steps: int) -> float:
        rising = round(self.warmup * total_steps)
        if step < rising:
            return (step + 1) / rising
        falling = round(self.decay * (total_steps - rising))
        gone = max(0, step - (total_steps - falling))
        return 1 - (1 - self.final) * min(1, gone / falling) if falling else 1.0
