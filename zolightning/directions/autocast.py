"""Our own products under autocast, which is for those of the network."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products on this device have the dtype of their factors meanwhile: bases, updates and folds are no layers."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
