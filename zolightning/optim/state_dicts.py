"""State dicts of a module that have other values than its parameters: weights with the updates that are pending."""

from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zolightning.directions.shards import is_sharded
from zolightning.optim.deferred import defer


def substitute_in_state_dicts(
    module: nn.Module,
    parameters: Container[nn.Parameter],
    is_due: Callable[[nn.Parameter], bool],
    substitute: Callable[[nn.Parameter], Tensor],
) -> list[RemovableHandle]:
    """Has ``state_dict()`` of a module, or of any part of it, hold other tensors in the place of some parameters.

    Args:
        module: the module.
        parameters: those of its parameters that may have a substitute.
        is_due: whether one of them has it now.
        substitute: the tensor in the place of a parameter, of its shape and dtype; computed when it is read where that
            is wanted (:func:`~zolightning.optim.deferred.deferring`).

    Returns:
        Handles, whose ``remove()`` undoes it.
    """

    return [
        # An object for each: torch marks it by an attribute. No closure: a module is copied and pickled with its hooks.
        owner.register_state_dict_post_hook(partial(_write, is_due, substitute))
        for owner in module.modules()
        # TorchScript takes no hooks: what its modules own is written by the one around them.
        if not isinstance(owner, torch.jit.ScriptModule) and any(p in parameters for _, p in _own(owner))
    ]


def _write(
    is_due: Callable[[nn.Parameter], bool],
    substitute: Callable[[nn.Parameter], Tensor],
    owner: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _: Any,
) -> None:
    for name, parameter in _own(owner):
        if prefix + name in state_dict and is_due(parameter):
            compute = partial(substitute, parameter)
            state_dict[prefix + name] = compute() if is_sharded(parameter) else defer(compute, like=parameter)


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that no other module with hooks owns: a module's own, and those of TorchScript within."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, child in module._modules.items():
        if isinstance(child, torch.jit.ScriptModule):
            for rest, parameter in child.named_parameters(remove_duplicate=False):
                yield f"{name}.{rest}", parameter
