"""NCCL for ``torch.distributed``, on the emulated device: one process for each of ``EMULATED_DEVICES``."""

import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

Backend = torch._C._distributed_c10d.Backend


class _IsNCCL(type):
    def __instancecheck__(cls, backend: Any) -> bool:
        return isinstance(backend, Backend) and backend.name() == "nccl"


class ProcessGroupNCCL(metaclass=_IsNCCL):
    """Makes the backend, and tells torch which one it is."""

    NCCL_CTA_POLICY_ZERO = 0

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.backend, self._timeout = "nccl", c10d.default_pg_timeout
            self.config, self.is_high_priority_stream = SimpleNamespace(cta_policy=0), is_high_priority_stream

    def __new__(cls, store: Any, rank: int, size: int, options: Options) -> Any:
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=options._timeout)
        return _device.make_collectives(gloo, int(os.environ.get("LOCAL_RANK", rank)))


def install(device: Any) -> None:
    """Puts it in its place, for the rest of the process, with what FSDP asks of memory on the device."""
    global _device
    _device = device
    c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = ProcessGroupNCCL  # type: ignore[attr-defined, misc]
    c10d._NCCL_AVAILABLE = True  # type: ignore[attr-defined]
    c10d.default_pg_nccl_timeout = c10d.default_pg_timeout  # type: ignore[attr-defined]
    torch.cuda.nccl.version = lambda: (2, 27, 3)

    resize, clone = torch.UntypedStorage.resize_, torch.UntypedStorage.clone

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return resize(storage, size)
        device.resize_storage(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), size)
        return storage

    def cloned(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return clone(storage)
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return whole.clone().untyped_storage()

    torch.UntypedStorage.resize_, torch.UntypedStorage.clone = resize_, cloned
