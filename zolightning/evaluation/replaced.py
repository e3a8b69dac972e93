"""Temporarily replaces methods of one module instance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn


@contextmanager
def replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A context in which `method` is called instead of the module's method of this name."""
    attributes = vars(module)  # past nn.Module's own attribute access, which takes longer
    own = attributes.get(name)
    attributes[name] = method
    try:
        yield
    finally:
        del attributes[name]
        if own is not None:
            attributes[name] = own


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which a module has another ``forward``, with the signature of its own, which ``generate`` reads."""
    with replaced(module, "forward", wraps(module.forward)(lambda *args, **kwargs: forward(*args, **kwargs))):
        yield
