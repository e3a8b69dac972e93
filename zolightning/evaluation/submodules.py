"""The submodules of a module, and whether it still has the same ones with the same parameters."""

from collections.abc import Sequence
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch
from torch import nn

_keys, _values = methodcaller("keys"), methodcaller("values")  # for `map`, which then runs no Python code


def submodules(module: nn.Module) -> list[nn.Module]:
    """``list(module.modules())``, but faster: torch's nested generators take longer than a small network's forward."""
    found: dict[nn.Module, None] = {}
    waiting = [module]
    while waiting:
        submodule = waiting.pop()
        if submodule not in found:
            found[submodule] = None
            waiting += [child for child in reversed(submodule._modules.values()) if child is not None]
    return list(found)


def hold_the_same(registries: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether mappings hold the same objects under the same names as others."""
    names, other_names = (list(map(list, map(_keys, each))) for each in (registries, others))
    members, other_members = (chain.from_iterable(map(_values, each)) for each in (registries, others))
    return names == other_names and all(map(is_, members, other_members))


class Submodules:
    """All submodules of a module.

    Attributes:
        modules: the module and all those in it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = submodules(module)
        # TorchScript returns new objects at each access
        self._owners = [submodule for submodule in self.modules if not isinstance(submodule, torch.jit.ScriptModule)]
        self._held = [dict(registry.items()) for registry in self._registries()]

    def are_same(self) -> bool:
        """Whether these are still all submodules, each with the same parameters under the same names."""
        return hold_the_same(self._registries(), self._held)

    def _registries(self) -> list[Any]:
        return [*[module._modules for module in self.modules], *[module._parameters for module in self._owners]]
