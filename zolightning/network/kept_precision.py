"""What of a network stays float32 in half precision: what transformers loads so, whatever the dtype of the weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

_ALWAYS = ("inv_freq", "embed_positions")  # ends of the names of rotary embeddings' frequencies and tables


@contextmanager
def exact_parts(network: nn.Module) -> Iterator[None]:
    """A context in which a network of transformers may be converted to another dtype, except its exact parts.

    Rounded to bfloat16, frequencies of rotary embeddings would turn the keys of the 500th token up to a radian too far
    or not far enough, and biases that choose among experts (DeepSeek-V3) would choose others. Transformers does not
    round these, nor some routers, rates of decay and attention sinks, when it loads a model in half precision.
    """
    names = {dtype: _names(network, dtype) for dtype in (torch.bfloat16, torch.float16)}
    exact = [
        (owner, name, f"{path}.{name}", tensor.detach())
        for path, owner in network.named_modules()
        for name, tensor in chain(owner.named_parameters(recurse=False), owner.named_buffers(recurse=False))
        if tensor.dtype == torch.float32 and names[torch.float16].search(f"{path}.{name}")
    ]
    yield
    for owner, name, path, values in exact:
        made = getattr(owner, name)
        if made.dtype in names and names[made.dtype].search(path):
            made.data = values.to(made.device)


def _names(network: nn.Module, dtype: torch.dtype) -> re.Pattern[str]:
    """What the names of exact parts match, where the other weights have `dtype`."""
    lists = ["_keep_in_fp32_modules_strict", *(["_keep_in_fp32_modules"] if dtype == torch.float16 else [])]
    listed = [name.replace("*", ".*") for kept in lists for name in getattr(network, kept, None) or ()]
    return re.compile("|".join([*listed, *[f"{name}$" for name in _ALWAYS]]))
