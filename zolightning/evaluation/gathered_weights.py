"""The tensors that a network reads in place of parameters that are sharded over ranks (FSDP2).

``fully_shard`` (torch.distributed.fsdp) replaces a parameter by a DTensor, which is updated and saved. Whenever the
module's forward runs, it puts an ordinary tensor with all elements in the place of the DTensor: the same object each
time, whose memory is allocated and freed. That tensor is perturbed, whole, on every rank.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.shards import is_sharded
from zolightning.messages import some


class Gathered:
    """Maps the sharded parameters of a module to the gathered tensors that its forwards read instead.

    Args:
        module: a module in which ``fully_shard`` may have been applied to submodules. Their parameters are gathered
            once here, one submodule after the other, so create this on all ranks.

    Raises:
        ValueError: if a parameter is sharded over ranks but no forward gathers it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._read: dict[nn.Parameter, nn.Parameter] = {}
        self._sharded: list[Any] = []  # FSDPModule
        self._roots: list[Any] = []  # those inside no other one
        stored = {parameter: name for name, parameter in module.named_parameters() if is_sharded(parameter)}
        if not stored:
            return
        from torch.distributed.fsdp import FSDPModule

        self._sharded = [submodule for submodule in module.modules() if isinstance(submodule, FSDPModule)]
        inner = {below for submodule in self._sharded for below in submodule.modules() if below is not submodule}
        self._roots = [submodule for submodule in self._sharded if submodule not in inner]
        owned = [(owner, name, p) for owner in module.modules() for name, p in owner._parameters.items() if p in stored]
        for submodule in self._sharded:
            submodule.unshard()
            for owner, name, parameter in owned:
                now = owner._parameters[name]
                if now is not parameter and now is not None:
                    self._read[parameter] = now
            submodule.reshard()
        if left := [name for parameter, name in stored.items() if parameter not in self._read]:
            raise ValueError(
                f"{some(left)} are sharded over ranks, but no forward gathers them: use `fully_shard`, without tensor "
                "parallelism (`tensor_parallel_size` 1)."
            )

    def __bool__(self) -> bool:
        return bool(self._read)

    def read(self, parameter: nn.Parameter) -> nn.Parameter:
        """The tensor that forwards read in place of a parameter; the parameter itself if it is not sharded."""
        return self._read.get(parameter, parameter)

    def give_back(self) -> None:
        """Frees parameters that forwards have left gathered, which would be stale after an update of the shards.

        FSDP2 keeps the outermost module's parameters gathered for a backward pass, and all of them if a forward fails.
        It also records every forward for that backward pass.
        """
        for root in self._roots:
            # A method of torch 2.13; before the first forward the attribute that it reads does not exist.
            with suppress(AttributeError):
                root.reset_iter_state()
        for submodule in self._sharded:
            submodule.reshard()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks that share the parameters, so that all of them decide alike."""
        mesh = next(iter(self._read)).device_mesh  # type: ignore[attr-defined]  # of a DTensor
        total = value.to(mesh.device_type, copy=True)
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(total, group=group)
        return total
