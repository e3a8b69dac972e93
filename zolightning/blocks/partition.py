"""Divides parameters into blocks: by layers, or by patterns."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from zolightning.checks import require_choice, require_patterns
from zolightning.layers import find_layers
from zolightning.messages import some

Others = Literal["blocks", "always", "never"]


@dataclass(frozen=True)
class Blocks:
    """Trainable parameters, divided into blocks."""

    parameters: Mapping[str, Sequence[nn.Parameter]]  # of each block, by its name
    never: Sequence[nn.Parameter] = ()  # that never move

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the blocks."""
        return tuple(self.parameters)


def find_blocks(
    module: nn.Module,
    trainable: Iterable[nn.Parameter],
    patterns: Sequence[str] | None = None,
    others: Others = "blocks",
    layers_name: str | None = None,
) -> Blocks:
    """Divides the trainable parameters of a module into blocks; a tied parameter is in one block only.

    Without patterns, every layer with trainable parameters is a block, ``layer_0`` and so on. Of the other parameters,
    those of ``nn.Embedding`` are the block ``embeddings``, and the rest (head, final norm) are the block ``head``. A
    head that is tied to the embeddings is in ``embeddings``.

    With patterns, one for each block, a parameter belongs to the first one that matches somewhere in its dotted name;
    those that match none are the block ``others``. If `others` is not "blocks", what is outside of the layers or
    patterns is not a block: "always" moves it in every step, and "never" freezes it.

    Raises:
        ValueError: if there are no layers, nothing in them trains, a pattern matches no parameter that an earlier one
            does not match too, or there are fewer than two blocks.
    """
    require_choice("others", others, get_args(Others))
    if patterns is not None:
        require_patterns(patterns)
    wanted = set(trainable)
    named = {name: parameter for name, parameter in module.named_parameters() if parameter in wanted}
    blocks = _of_layers(module, named, layers_name) if patterns is None else _of_patterns(named, patterns)
    inside = {parameter for block in blocks.values() for parameter in block}
    outside = [parameter for parameter in named.values() if parameter not in inside]
    if others == "blocks" and patterns is not None:
        blocks["others"] = outside
    elif others == "blocks":
        tables = {p for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
        embeddings = [parameter for parameter in outside if parameter in tables]
        head = [parameter for parameter in outside if parameter not in tables]
        blocks = {"embeddings": embeddings, **blocks, "head": head}
    blocks = {name: block for name, block in blocks.items() if block}
    if len(blocks) < 2:
        raise ValueError(
            f"Blocks take turns, but what trains is divided into {len(blocks) or 'none'}: {', '.join(blocks) or 'none'}"
            f" (`others` is {others!r}). Train more (the scope), give `patterns`, or leave blocks out."
        )
    return Blocks(blocks, outside if others == "never" else ())


def _of_layers(
    module: nn.Module, named: Mapping[str, nn.Parameter], layers_name: str | None
) -> dict[str, list[nn.Parameter]]:
    stack = find_layers(module, layers_name)
    blocks: dict[str, list[nn.Parameter]] = {}
    taken: set[nn.Parameter] = set()
    wanted = set(named.values())
    for index in range(len(stack)):
        # Layers may share parameters (ALBERT): these are the first one's.
        block = [p for p in stack.parameters(index).values() if p in wanted and p not in taken]
        blocks[f"layer_{index}"] = block
        taken.update(block)
    return blocks


def _of_patterns(named: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    blocks: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in patterns}
    for name, parameter in named.items():
        first = next((pattern for pattern in patterns if re.search(pattern, name)), None)
        if first is not None:
            blocks[first].append(parameter)
    for pattern, block in blocks.items():
        if not block:
            raise ValueError(
                f"`patterns` has '{pattern}', which matches nothing that trains and that no earlier pattern matches. "
                f"Some of what trains: {some(list(named)[:: max(1, len(named) // 5)])}."
            )
    return blocks
