"""A fingerprint of weights that is exact to the bit."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zolightning.directions.shards import is_sharded, whole


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters of a module by name, shared ones once, and the buffers that are saved with it."""
    saved = module.state_dict().keys()
    return dict(module.named_parameters()) | {name: b for name, b in module.named_buffers() if name in saved}


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bits of tensors: 64 hexadecimal digits; see :func:`digests`."""
    found = digests(tensors)
    lines = [f"{name} {tensor.dtype} {tuple(tensor.shape)} {found[name]}\n" for name, tensor in tensors.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 over the bits of each tensor: 64 hexadecimal digits.

    Tensors are hashed in parallel, at about 2 GB/s per core. If some are sharded over ranks, all ranks must call this,
    and they are gathered one by one.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        one_by_one = any(map(is_sharded, tensors.values()))
        hashes = map(_hash, tensors.values()) if one_by_one else pool.map(_hash, tensors.values())
        return dict(zip(tensors, hashes, strict=True))


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bits of a tensor as bytes, uint8, one-dimensional, on its device."""
    if is_traceable_wrapper_subclass(tensor):  # made of others, as quantised weights of torchao are
        names, _ = tensor.__tensor_flatten__()
        return torch.cat([flat_bytes(getattr(tensor, name)) for name in names])
    data = tensor.detach().contiguous()
    # A single element counts as contiguous with any stride, but with one other than 1 it has no view as bytes.
    return data.as_strided((data.numel(),), (1,)).view(torch.uint8)


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(flat_bytes(whole(tensor).cpu()).numpy().data).hexdigest()
