"""Rotary embeddings: their frequencies stay float32, as transformers makes them, whatever the dtype of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def exact_frequencies(module: nn.Module) -> Iterator[None]:
    """A context in which dtypes of a module may be converted, except frequencies or tables of rotary embeddings.

    Rounded to bfloat16 they would turn the keys of the 500th token up to a radian too far or not far enough.
    Transformers does not round them when it loads a model in half precision.
    """
    frequencies = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if name.endswith(("inv_freq", "embed_positions"))
    ]
    yield
    for owner, name, buffer in frequencies:
        made = owner.get_buffer(name)
        if made.dtype != buffer.dtype:
            setattr(owner, name, buffer.to(made.device))
