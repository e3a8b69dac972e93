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
    """Puts each of these modules into evaluation mode, and back into the mode each was in.

    Modes are set without calling ``train(False)``, which some modules override to do more, to merge adapters into their
    weights for example. Those in training mode that override ``train`` are told before and after that they are still in
    it: what they have computed from their weights in evaluation mode and keep until then (attention biases in timm, the
    norms of DoRA in PEFT) is of other weights than those of the next evaluation.
    """
    modules = list(modules)
    training = [module for module in modules if module.training]
    resting = [module for module in modules if not module.training]
    own = [module for module in training if type(module).train is not nn.Module.train]

    def set_all(value: bool) -> None:
        for module in own:
            module.train()
        for module in training:
            _set_training(module, value)
        for module in resting if own else ():  # which `train` has set as well
            _set_training(module, False)

    try:
        set_all(False)
        yield
    finally:
        set_all(True)


def _set_training(module: nn.Module, value: bool) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        module.training = value
    else:
        vars(module)["training"] = value  # bypasses nn.Module's own attribute access, which takes longer
