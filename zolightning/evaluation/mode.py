"""The mode in which losses are evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Puts every submodule into evaluation mode, and back into the mode each was in; yields all submodules."""
    modules = submodules(module)
    training = [m for m in modules if m.training]
    for submodule in training:
        _set_training(submodule, False)
    try:
        yield modules
    finally:
        for submodule in training:
            _set_training(submodule, True)


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


def _set_training(module: nn.Module, value: bool) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        module.training = value
    else:
        vars(module)["training"] = value  # past nn.Module's own attribute access, which takes longer
