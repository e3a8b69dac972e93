"""What a network reads in the place of parameters that ranks share: FSDP2 gathers them as each module runs.

``fully_shard`` (torch.distributed.fsdp) leaves a DTensor where a parameter was, and puts an ordinary tensor with all
of its elements in its place whenever the module's forward runs: the same object each time, whose memory comes and goes.
That one is perturbed, whole, on every rank; the DTensor is what is updated and saved.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.shards import is_sharded
from zolightning.messages import some


class Gathered:
    """The parameters that the forwards of a module read, by those that it owns between them.

    Args:
        module: to some of whose submodules ``fully_shard`` may have been applied. Their parameters are gathered once,
            one submodule after the other: to be called on all ranks.

    Raises:
        ValueError: if a parameter is spread over ranks and forwards do not gather it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._read: dict[nn.Parameter, nn.Parameter] = {}
        self._sharded: list[Any] = []  # FSDPModule
        self._roots: list[Any] = []  # those that are in no other one
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
                f"{some(left)} are sharded over ranks, and no forward gathers them: use `fully_shard`, without tensor "
                "parallelism (`tensor_parallel_size` 1)."
            )

    def __bool__(self) -> bool:
        return bool(self._read)

    def read(self, parameter: nn.Parameter) -> nn.Parameter:
        """What forwards read in the place of a parameter: itself where it is not shared."""
        return self._read.get(parameter, parameter)

    def give_back(self) -> None:
        """Frees what forwards have left gathered, which would not follow when shards change.

        FSDP2 leaves the outermost module's parameters gathered for a backward, and all of them where a forward fails;
        and it notes every forward, for the same backward.
        """
        for root in self._roots:
            # Of torch 2.13; before the first forward there is nothing to be reset, nor an attribute that it looks at.
            with suppress(AttributeError):
                root.reset_iter_state()
        for submodule in self._sharded:
            submodule.reshard()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks that share parameters, so that all of them draw the same conclusions."""
        mesh = next(iter(self._read)).device_mesh  # type: ignore[attr-defined]  # of a DTensor
        total = value.to(mesh.device_type, copy=True)
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(total, group=group)
        return total
