"""The mode in which losses are evaluated."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from zolightning.evaluation.submodules import submodules


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts every submodule into evaluation mode, and back into the mode each was in."""
    with all_in_evaluation_mode(submodules(module)):
        yield


@contextmanager
def all_in_evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts each of these modules into evaluation mode, but none of their submodules, and back."""
    training = [module for module in modules if module.training]
    for submodule in training:
        _set_training(submodule, False)
    try:
        yield
    finally:
        for submodule in training:
            _set_training(submodule, True)


def _set_training(module: nn.Module, value: bool) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        module.training = value
    else:
        vars(module)["training"] = value  # bypasses nn.Module's own attribute access, which takes longer
