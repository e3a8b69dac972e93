"""Makes an optimizer move a few blocks at a time, and switches them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zolightning.blocks.bandit import LearnedProbabilities
from zolightning.blocks.orders import Cyclic, Order, Turn
from zolightning.blocks.partition import Blocks
from zolightning.checks import require_choice, require_integer
from zolightning.directions.shards import whole
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.blocks import LeftState
from zolightning.rank_zero import rank_zero_warn


class BlockSchedule:
    """Makes a zeroth-order method move a few blocks at a time, and switches to other blocks every `interval` steps.

    Under a Trainer :class:`~zolightning.callbacks.BlockCoordinateDescent` does this. In a plain loop::

        optimizer = MeZO(model.parameters(), lr=1e-5)
        optimizer.attach(model)
        schedule = BlockSchedule(find_blocks(model, model.parameters()), RandomPermutation(), interval=100)
        schedule.attach(optimizer)
        for batch in batches:
            optimizer.estimate(lambda: loss_of(model, batch))  # activates other blocks every 100 steps
            optimizer.step()

    Args:
        blocks: see :func:`~zolightning.blocks.find_blocks`.
        order: how the next blocks are chosen; :class:`~zolightning.blocks.Cyclic` if None.
        interval: number of steps until other blocks move.
        blocks_per_step: number of blocks that move at a time.
        left_state: what happens to the state of blocks that become inactive, "reset" or "keep"
            (:meth:`~zolightning.optim.ZerothOrderOptimizer.set_blocks`).

    Attributes:
        visit: number of the present visit, ``step // interval``; -1 before the first step.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        blocks: Blocks,
        order: Order | None = None,
        interval: int = 1,
        blocks_per_step: int = 1,
        left_state: LeftState = "reset",
    ) -> None:
        require_schedule(interval, blocks_per_step, left_state)
        self.blocks = blocks
        self.order = Cyclic() if order is None else order
        self.order.check(len(blocks), blocks_per_step)
        self.interval = interval
        self.blocks_per_step = blocks_per_step
        self.left_state: LeftState = left_state
        self.visit = -1
        self._squares: list[float] = []  # squared projected gradients of the visit's steps
        self._hooks: list[RemovableHandle] = []

    def attach(self, optimizer: ZerothOrderOptimizer) -> None:
        """Divides the optimizer's parameters into blocks, and switches blocks during its further steps."""
        never = [self.blocks.never] if self.blocks.never else []  # a block that no order knows of
        optimizer.set_blocks([*self.blocks.parameters.values(), *never], self.left_state)
        in_blocks = {parameter for block in (*self.blocks.parameters.values(), *never) for parameter in block}
        company = self.blocks_per_step > 1 or any(p not in in_blocks for _, _, p in optimizer.trainable())
        if company and isinstance(self.order, LearnedProbabilities) and not self.order.queries:
            rank_zero_warn(
                f"`queries` of {type(self.order).__name__} is 0, but no block moves alone, so that its score includes "
                "the others' part of the projected gradient. Use 1, which probes each block alone when its visit ends."
            )
        self._hooks += [
            optimizer.register_estimate_pre_hook(self.begin),
            optimizer.register_step_post_hook(self._end),
        ]

    def detach(self) -> None:
        """Stops switching; the active blocks stay active."""
        while self._hooks:
            self._hooks.pop().remove()

    def begin(self, optimizer: ZerothOrderOptimizer, squared_grad: Callable[[int, int], float]) -> None:
        """A hook before each estimate: activates the next blocks when a visit begins."""
        group = optimizer.param_groups[0]
        visit = group["step"] // self.interval
        if visit == self.visit and optimizer.active:
            return
        if self._squares:
            self.order.learn(optimizer.active, sum(self._squares) / len(self._squares), squared_grad)
            self._squares = []

        def norm(block: int) -> float:
            optimizer.fold()
            return _norm(parameters[block])

        parameters = list(self.blocks.parameters.values())
        turn = Turn(visit, group["seed"], len(parameters), self.blocks_per_step, norm, squared_grad)
        chosen = self.order.choose(turn)
        optimizer.activate(chosen, sum(map(self.order.weight, chosen)) / len(chosen))
        self.visit = visit

    def _end(self, optimizer: ZerothOrderOptimizer, *_: Any) -> None:
        found = optimizer.record.projected_grads if optimizer.record is not None else ()
        if found:  # none in a step that was skipped
            self._squares.append(sum(g * g for g in found) / len(found))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the optimizer's state, and the settings, which are compared."""
        own = {"visit": self.visit, "squares": list(self._squares), "order": self.order.state_dict()}
        return own | {"settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: if it comes from a schedule with different settings; naming one.
        """
        require_same_settings(self._settings(), state["settings"])
        self.visit, self._squares = state["visit"], list(state["squares"])
        self.order.load_state_dict(state["order"])

    def _settings(self) -> dict[str, Any]:
        of_blocks = {"others": "never" if self.blocks.never else "moving", "blocks": list(self.blocks.names)}
        return schedule_settings(self.order, self.interval, self.blocks_per_step, self.left_state) | of_blocks


def schedule_settings(order: Order, interval: int, blocks_per_step: int, left_state: LeftState) -> dict[str, Any]:
    """The settings of a schedule that do not depend on the network, by name."""
    of_order = {f"order.{name}": value for name, value in order.settings().items()}
    own = {"interval": interval, "blocks_per_step": blocks_per_step, "left_state": left_state}
    return {"order": type(order).__name__} | of_order | own


def require_same_settings(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises a ValueError that names a setting of a schedule which differs from the checkpoint's."""
    for name, value in own.items():
        if (there := saved.get(name)) != value:
            raise ValueError(
                f"The blocks differ from those of the checkpoint's run: `{name}` is {value!r}, was {there!r}. Resume "
                "with the same value, or start a new run."
            )


def require_schedule(interval: int, blocks_per_step: int, left_state: str) -> None:
    """Raises a ValueError for arguments of :class:`BlockSchedule` that are wrong for any blocks."""
    require_integer("blocks.interval", interval)
    require_integer("blocks_per_step", blocks_per_step)
    require_choice("left_state", left_state, get_args(LeftState))


@torch.no_grad()
def _norm(parameters: Sequence[nn.Parameter]) -> float:
    wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in parameters]
    norms = [torch.linalg.vector_norm(whole(p), dtype=dtype) for p, dtype in zip(parameters, wide, strict=True)]
    return math.hypot(*torch.stack([norm.to(norms[0].device) for norm in norms]).tolist())  # one wait for all
