"""Tensors as plain values, without loss, for what is kept as JSON."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zolightning.directions.shards import whole


def as_plain(tensor: Tensor) -> dict[str, str]:
    """The elements of a floating-point tensor in base64, as the value of one key: the dtype in which they are stored.

    All ranks of a tensor that is sharded over ranks must call this.
    """
    kind = "float64" if tensor.dtype == torch.float64 else "float32"
    elements = whole(tensor.detach()).to("cpu", getattr(torch, kind)).contiguous()
    return {kind: base64.b64encode(elements.numpy().tobytes()).decode("ascii")}


def from_plain(saved: Mapping[str, Any]) -> Tensor:
    """The elements that :func:`as_plain` described, in one dimension."""
    kind = "float64" if "float64" in saved else "float32"
    return torch.from_numpy(np.frombuffer(base64.b64decode(saved[kind]), kind).copy())
