"""The forward hooks of modules, to put them back: a network may hook its layers when an output is first asked for.

Networks of transformers do so for ``output_hidden_states``, and remember it in an attribute. If that were undone after
an evaluation and the hooks were not, the next one would hook the layers again, and find each hidden state twice.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_REGISTRIES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)

Hooks = Mapping[int, Sequence[Mapping[int, Any]]]


class ForwardHooks:
    """The forward hooks of some modules."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        own = [vars(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)]  # they take none
        self._registries = [tuple(held[name] for name in _REGISTRIES) for held in own]

    def now(self) -> Hooks:
        """The hooks that there are, equal to an earlier result if none has come or gone."""
        return {place: [*map(dict, held)] for place, held in enumerate(self._registries) if held[0] or held[1]}

    def restore(self, hooks: Hooks) -> None:
        """Makes them those that there were."""
        for place, held in enumerate(self._registries):
            for registry, before in zip(held, hooks.get(place, [{}] * len(held)), strict=True):
                if registry != before:
                    registry.clear()
                    registry.update(before)
