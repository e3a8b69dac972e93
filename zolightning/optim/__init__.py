"""Zeroth-order methods, each a ``torch.optim.Optimizer`` in a file of its own."""

from zolightning.optim.base import NonFiniteLossError, StepRecord, ZerothOrderOptimizer
from zolightning.optim.mezo import MeZO
from zolightning.optim.mezo_adam import MeZOAdam

__all__ = ["MeZO", "MeZOAdam", "NonFiniteLossError", "StepRecord", "ZerothOrderOptimizer"]
