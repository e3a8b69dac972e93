"""Zeroth-order methods: each is a ``torch.optim.Optimizer``, in a file of its own.

In the order of reading:

* The classes under a method: ``named_parameters`` (with ``blocks``), ``base``; then ``dense``, or ``subspace_weights``
  and ``subspace``.
* Methods with dense directions: ``mezo``, ``mezo_adam``, ``zo_adamm``, ``con_mezo``, ``bszo``, ``hizoo``,
  ``sparse_mezo``. With low-rank ones: ``eggroll``. In subspaces: ``lozo``, ``grzo``, ``subzero``, ``subspace_mezo``,
  ``zo_muon``, ``zo_mopi``.
* A step's losses become a record: ``estimators``, ``probing``, ``per_example``, ``forward_gradient``, ``alignment``,
  ``share``, ``record``, ``evaluate_step``.
* A record becomes an update: ``precision``, ``moments``, ``normalization``, ``curvature``, ``orthogonalization``,
  ``offload``, ``stochastic_rounding``, ``drawn``.
* Subspaces: ``bases``, ``cores``, ``momentum_transport``, ``readback``, ``state_dicts``, ``deferred``.
* Settings: ``common``, ``checks``, ``settings``; ``schedules`` of learning rates; ``samples`` for curves.
* A method of your own: ``check_method``.
"""

from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.bszo import BSZO
from zolightning.optim.con_mezo import ConMeZO
from zolightning.optim.eggroll import EGGROLL
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
from zolightning.optim.zo_adamm import ZOAdaMM
from zolightning.optim.zo_mopi import ZOMOPI
from zolightning.optim.zo_muon import ZOMuon

__all__ = [
    "BSZO",
    "EGGROLL",
    "GRZO",
    "LOZO",
    "ZOMOPI",
    "ConMeZO",
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
    "ZOAdaMM",
    "ZOMuon",
    "ZerothOrderOptimizer",
]
