"""Functions that multiply by a weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

# Which of their arguments are the weight, the input and the bias.
PRODUCTS = {F.linear: (1, 0, 2), torch.addmm: (2, 1, 0)}


def factors_of(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Weight, input and bias of one of :data:`PRODUCTS`, None where they are not given by position."""
    count = len(args)
    weight, inputs, bias = [args[place] if place < count else None for place in PRODUCTS[func]]
    return weight, inputs, bias
