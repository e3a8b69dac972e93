"""Parameters in blocks, of which only some move at a time (block coordinate descent)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import nn

from zolightning.messages import some

LeftState = Literal["reset", "keep"]


class ParameterBlocks:
    """The blocks of an optimizer's parameters, and which parameters are at rest because their blocks are not active.

    It is changed in place only: wrappers of optimizers copy references to it (Fabric's does).

    Attributes:
        parameters: the parameters of each block; empty if parameters are not divided into blocks.
        at_rest: the parameters of the blocks that do not move now.
    """

    def __init__(self) -> None:
        self.parameters: list[frozenset[nn.Parameter]] = []
        self.at_rest: set[nn.Parameter] = set()

    def define(self, blocks: Sequence[Iterable[nn.Parameter]], own: Mapping[nn.Parameter, str]) -> None:
        """As ``set_blocks`` of the optimizer, given the names of its `own` parameters."""
        found = [frozenset(block) for block in blocks]
        taken: set[nn.Parameter] = set()
        for index, block in enumerate(found):
            if not any(parameter.requires_grad for parameter in block):
                raise ValueError(f"Block {index} of {len(found)} has no parameter that trains: leave it out.")
            if not block <= own.keys():
                shapes = some([str(tuple(parameter.shape)) for parameter in block - own.keys()])
                raise ValueError(f"Block {index} has parameters that the optimizer does not train, of shapes {shapes}.")
            if block & taken:
                shared = some(sorted(own[parameter] for parameter in block & taken))
                raise ValueError(f"Block {index} shares parameters with an earlier one: {shared}.")
            taken |= block
        self.parameters[:] = found

    def require(self, indices: Iterable[int]) -> None:
        """Raises a ValueError unless there are blocks with these indices."""
        for index in indices:
            if not 0 <= index < len(self.parameters):
                raise ValueError(
                    f"Block {index} cannot be activated: there are {len(self.parameters)} blocks. Set those of the run "
                    "first, with `set_blocks` or, under a Trainer, the callback BlockCoordinateDescent."
                )

    def activate(self, indices: Sequence[int]) -> None:
        """Puts all blocks except these to rest; without any index, no block rests."""
        self.at_rest.clear()
        if indices:
            self.at_rest.update(*(block for index, block in enumerate(self.parameters) if index not in indices))

    def isolate(self, index: int, own: Iterable[nn.Parameter]) -> None:
        """Puts all parameters except those of one block to rest; those in no block rest as well."""
        self.at_rest.update(own)
        self.at_rest.difference_update(self.parameters[index])

    def is_beside(self, parameter: nn.Parameter) -> bool:
        """Whether there are blocks and the parameter is in none of them, so that it always moves."""
        return bool(self.parameters) and not any(parameter in block for block in self.parameters)
