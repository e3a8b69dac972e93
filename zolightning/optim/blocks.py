"""Parameters in blocks, of which only some move at a time (block coordinate descent)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from zolightning.messages import some
from zolightning.optim.checks import require_choice
from zolightning.optim.named_parameters import NamedParameters

LeftState = Literal["reset", "keep"]
LEFT_STATES: tuple[str, ...] = ("reset", "keep")


class BlockwiseParameters(NamedParameters):
    """An optimizer that may move only some blocks of its parameters at a time; without blocks it moves them all.

    Blocks are given once, by :meth:`set_blocks`; then :meth:`activate` says which of them move. Parameters in no block
    always move. In a plain loop::

        optimizer.attach(model)
        optimizer.set_blocks([layer.parameters() for layer in model.layers])
        for step, batch in enumerate(batches):
            optimizer.activate([step // 100 % len(model.layers)])
            optimizer.estimate(lambda: loss_of(model, batch))
            optimizer.step()

    The indices of the active blocks are saved with the hyperparameters, and each record has them, so that a replay
    moves and drops the same.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        # Changed in place only: wrappers of optimizers copy references to them (Fabric's does).
        self.blocks: list[frozenset[nn.Parameter]] = []
        self._at_rest: set[nn.Parameter] = set()
        super().__init__(params, defaults)

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the blocks that move, in ascending order; none where all parameters do."""
        return tuple(self.param_groups[0].get("blocks", ()))

    @property
    def drops_left_state(self) -> bool:
        """Whether the state of a block is dropped when it is left."""
        return bool(self.param_groups[0].get("left_state") != "keep")

    def set_blocks(self, blocks: Sequence[Iterable[nn.Parameter]], left_state: LeftState = "reset") -> None:
        """Divides parameters into blocks; until :meth:`activate` all of them move.

        Args:
            blocks: the parameters of each block, of which none is in two.
            left_state: what becomes of a block's state when others become active. "reset" drops it: momentum, moments,
                curvature, and what completes half-precision weights to fp32, so that these are rounded once a visit,
                stochastically: small updates are not lost, but some noise is added. A method's memory is then that of
                the active blocks. "keep" keeps all of it for the next visit.

        Raises:
            ValueError: if a block has no parameter that trains, or one that is in another block or is not the
                optimizer's; or if some are active already.
        """
        require_choice("left_state", left_state, LEFT_STATES)
        if self.active:
            raise ValueError(f"Blocks {list(self.active)} are active already: set blocks before the first step.")
        found = [frozenset(block) for block in blocks]
        own = {parameter for group in self.param_groups for parameter in group["params"]}
        taken: set[nn.Parameter] = set()
        for index, block in enumerate(found):
            if not any(parameter.requires_grad for parameter in block):
                raise ValueError(f"Block {index} of {len(found)} has no parameter that trains.")
            if not block <= own:
                shapes = some([str(tuple(parameter.shape)) for parameter in block - own])
                raise ValueError(f"Block {index} has parameters that the optimizer does not train, of shape {shapes}.")
            if block & taken:
                shared = some(sorted(self._names[parameter] for parameter in block & taken))
                raise ValueError(f"Block {index} shares parameters with an earlier one: {shared}.")
            taken |= block
        self.blocks[:] = found
        self.param_groups[0]["left_state"] = left_state

    def activate(self, blocks: Iterable[int], weight: float = 1.0) -> None:
        """Moves only these blocks from now on; no index at all moves everything.

        What is pending is added to the weights first. The state of blocks that are left is dropped unless
        :meth:`set_blocks` was told to keep it; that of blocks which stay active stays. To be called between steps, once
        at most, because records have only what was active in a step.

        Args:
            blocks: indices of blocks.
            weight: multiplies the learning rates meanwhile, which records have as they are then.

        Raises:
            ValueError: if there is no such block.
        """
        blocks = tuple(sorted(set(blocks)))
        self._require_blocks(blocks)
        self.param_groups[0]["block_weight"] = weight
        if blocks != self.active:
            self.fold()
            self.param_groups[0]["blocks"] = blocks
            self._rest()
            self.release(self._at_rest)

    def fold(self) -> None:
        """Adds to the stored weights what a method keeps beside them: nothing, in most methods."""

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Frees what is kept of parameters that do not move for a while."""
        if self.drops_left_state:
            for parameter in parameters:
                self.state.pop(parameter, None)

    def moves(self, parameter: nn.Parameter) -> bool:
        return super().moves(parameter) and parameter not in self._at_rest

    def at_rest(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of everything that trains, and does not move now."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter in self._at_rest:
                    yield self._names[parameter], parameter

    def is_beside(self, parameter: nn.Parameter) -> bool:
        """Whether there are blocks and a parameter is in none of them: it moves whichever of them are active."""
        return bool(self.blocks) and not any(parameter in block for block in self.blocks)

    @contextmanager
    def only(self, block: int) -> Iterator[None]:
        """Within this context nothing but one block moves, to look at it: nothing is left and nothing dropped."""
        self._at_rest.update(p for group in self.param_groups for p in group["params"])
        self._at_rest.difference_update(self.blocks[block])
        try:
            yield
        finally:
            self._rest()
            self.release(self._at_rest)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`NamedParameters.load_state_dict`.

        Raises:
            ValueError: also if the state is of a run with blocks, and they have not been set.
        """
        self._require_blocks(state_dict["param_groups"][0].get("blocks", ()))
        super().load_state_dict(state_dict)
        self._rest()

    def _rest(self) -> None:
        active = self.active
        self._at_rest.clear()
        if active:
            self._at_rest.update(*(block for index, block in enumerate(self.blocks) if index not in active))

    def _require_blocks(self, blocks: Iterable[int]) -> None:
        for index in blocks:
            if not 0 <= index < len(self.blocks):
                raise ValueError(
                    f"Block {index} is to be active, and there are {len(self.blocks)}. Set the blocks of the run "
                    "first: `set_blocks`, or under a Trainer the callback BlockCoordinateDescent."
                )
