"""Zeroth-order methods: each is a ``torch.optim.Optimizer``, in a file of its own."""

from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.grzo import GRZO
from zolightning.optim.hizoo import HiZOO
from zolightning.optim.lozo import LOZO
from zolightning.optim.mezo import MeZO
from zolightning.optim.mezo_adam import MeZOAdam
from zolightning.optim.record import NonFiniteLossError, StepRecord
from zolightning.optim.schedules import WarmupDecay
from zolightning.optim.sparse_mezo import SparseMeZO
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.optim.subspace_mezo import SubspaceMeZO
from zolightning.optim.subzero import SubZero
from zolightning.optim.zo_mopi import ZOMOPI
from zolightning.optim.zo_muon import ZOMuon

__all__ = [
    "GRZO",
    "LOZO",
    "ZOMOPI",
    "HiZOO",
    "MeZO",
    "MeZOAdam",
    "NonFiniteLossError",
    "SparseMeZO",
    "StepRecord",
    "SubZero",
    "SubspaceMeZO",
    "SubspaceOptimizer",
    "WarmupDecay",
    "ZOMuon",
    "ZerothOrderOptimizer",
]
