"""Our own products under autocast, which is for those of the network."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of the factors of a product on this device; None where it does nothing."""
    kind = device.type  # "meta" knows no autocast
    is_enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_enabled else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products on this device have the dtype of their factors meanwhile: bases, updates and folds are no layers."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
