"""Callbacks: what is trained, when, and what is recorded.

In the order of reading:

* A method in place of backpropagation: ``zeroth_order``, ``own_optimizer``, ``refusals``, ``step_refusals``,
  ``micro_batches``, ``folding``.
* Subspaces: ``subspace_resampling``, ``activation_bases``, ``momentum_transport``, ``spectra``.
* Blocks: ``block_coordinate_descent``.
* Learning rates: ``learning_rate_control``; ``learning_rate_probe``, ``replayed_walks``.
* Before the first step: ``linear_probing``.
* What is shown and written: ``run_overview``, ``run_memory``, ``run_monitor``, ``step_progress``,
  ``prediction_writer``.
"""

from zolightning.callbacks.activation_bases import ActivationBases
from zolightning.callbacks.block_coordinate_descent import BlockCoordinateDescent
from zolightning.callbacks.learning_rate_control import LearningRateControl
from zolightning.callbacks.learning_rate_probe import LearningRateProbe
from zolightning.callbacks.linear_probing import LinearProbing
from zolightning.callbacks.momentum_transport import MomentumTransport
from zolightning.callbacks.prediction_writer import PredictionWriter
from zolightning.callbacks.run_monitor import RunMonitor
from zolightning.callbacks.run_overview import RunOverview
from zolightning.callbacks.spectra import Spectra
from zolightning.callbacks.step_progress import StepProgressBar
from zolightning.callbacks.subspace_resampling import SubspaceResampling
from zolightning.callbacks.zeroth_order import ZerothOrder
from zolightning.checkpoints.keep_ledger import KeepLedger
from zolightning.checkpoints.save_last import SaveLast
from zolightning.scopes.dominant_layer import DominantLayer
from zolightning.scopes.random_layer import RandomLayer
from zolightning.scopes.train_by_signal import TrainBySignal
from zolightning.scopes.train_layers import TrainLayers
from zolightning.scopes.train_parameters import TrainParameters

__all__ = [
    "ActivationBases",
    "BlockCoordinateDescent",
    "DominantLayer",
    "KeepLedger",
    "LearningRateControl",
    "LearningRateProbe",
    "LinearProbing",
    "MomentumTransport",
    "PredictionWriter",
    "RandomLayer",
    "RunMonitor",
    "RunOverview",
    "SaveLast",
    "Spectra",
    "StepProgressBar",
    "SubspaceResampling",
    "TrainBySignal",
    "TrainLayers",
    "TrainParameters",
    "ZerothOrder",
]
