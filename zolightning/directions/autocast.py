"""Switches autocast off for the package's own matrix products: autocast is meant for the network's products."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast converts the factors of products on this device; None if it is disabled."""
    kind = device.type  # "meta" has no autocast
    is_enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_enabled else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products on this device keep the dtype of their factors."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
