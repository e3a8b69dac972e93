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
    """An optimizer that can be told to move only some blocks of its parameters; by default it moves all of them.

    :meth:`set_blocks` defines the blocks once, and :meth:`activate` says which of them move from then on. Parameters in
    no block always move. In a plain loop::

        optimizer.attach(model)
        optimizer.set_blocks([layer.parameters() for layer in model.layers])
        for step, batch in enumerate(batches):
            optimizer.activate([step // 100 % len(model.layers)])
            optimizer.estimate(lambda: loss_of(model, batch))
            optimizer.step()

    The indices of the active blocks are saved with the hyperparameters and in each record, so a replay moves the same
    blocks and drops the same state.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        # Changed in place only: wrappers of optimizers copy references to them (Fabric's does).
        self.blocks: list[frozenset[nn.Parameter]] = []
        self._at_rest: set[nn.Parameter] = set()
        super().__init__(params, defaults)

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the blocks that move, in ascending order; empty if all parameters move."""
        return tuple(self.param_groups[0].get("blocks", ()))

    @property
    def drops_left_state(self) -> bool:
        """Whether a block loses its state when it becomes inactive."""
        return bool(self.param_groups[0].get("left_state") != "keep")

    def set_blocks(self, blocks: Sequence[Iterable[nn.Parameter]], left_state: LeftState = "reset") -> None:
        """Divides parameters into blocks; all of them move until :meth:`activate` is called.

        Args:
            blocks: the parameters of each block; no parameter may be in two.
            left_state: what happens to the state of a block that becomes inactive. "reset" drops it (momentum, moments,
                curvature, and the extra bits of half-precision weights, which are then rounded stochastically: small
                updates are not lost on average, but some noise is added), so that the method's memory is that of the
                active blocks. "keep" keeps it for the next time.

        Raises:
            ValueError: if a block has no trainable parameter, shares one with another block, or has one that is not
                the optimizer's; or if blocks are active already.
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
        """Moves only these blocks from now on; without any index, all parameters.

        Pending updates are added to the weights first. Blocks that become inactive lose their state, unless
        :meth:`set_blocks` was told to keep it. Call it between two steps, and not more than once: a record only holds
        the blocks that were active in its step.

        Args:
            blocks: indices of blocks.
            weight: multiplies the learning rates for as long as these blocks are active.

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
        """Adds pending updates to the stored weights; most methods have none."""

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drops the state of parameters that do not move for a while."""
        if self.drops_left_state:
            for parameter in parameters:
                self.state.pop(parameter, None)

    def moves(self, parameter: nn.Parameter) -> bool:
        return super().moves(parameter) and parameter not in self._at_rest

    def at_rest(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of everything that is trainable but in no active block."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter in self._at_rest:
                    yield self._names[parameter], parameter

    def is_beside(self, parameter: nn.Parameter) -> bool:
        """Whether there are blocks and the parameter is in none of them, so that it always moves."""
        return bool(self.blocks) and not any(parameter in block for block in self.blocks)

    @contextmanager
    def only(self, block: int) -> Iterator[None]:
        """A context in which only one block moves, so that it can be probed; no state is dropped."""
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
