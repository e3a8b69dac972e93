"""The mode in which losses are evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Puts every submodule into evaluation mode, and back into the mode each was in; yields all submodules."""
    modules = list(module.modules())
    training = [m for m in modules if m.training]
    for submodule in training:
        submodule.training = False
    try:
        yield modules
    finally:
        for submodule in training:
            submodule.training = True
