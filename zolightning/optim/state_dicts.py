"""Makes a module's ``state_dict()`` hold values other than its parameters: weights with their pending updates."""

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
    """Registers hooks that replace `parameters` that are due in the ``state_dict()`` of a module and its submodules.

    `substitute` makes the tensor that replaces a parameter, of the same shape and dtype; within
    :func:`~zolightning.optim.deferred.deferring` it is called when the tensor is read. The handles remove the hooks.
    """
    return [
        # One object for each: torch sets an attribute on it. No closure: a module is copied and pickled with its hooks.
        owner.register_state_dict_post_hook(partial(_write, is_due, substitute))
        for owner in module.modules()
        # TorchScript takes no hooks: what its modules own is written by the module around them.
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
    """Names and parameters that a module owns itself, and those of the TorchScript modules in it."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, child in module._modules.items():
        if isinstance(child, torch.jit.ScriptModule):
            for rest, parameter in child.named_parameters(remove_duplicate=False):
                yield f"{name}.{rest}", parameter
