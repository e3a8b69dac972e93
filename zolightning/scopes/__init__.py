"""Scopes: callbacks that choose the parameters that train, and parts, which choose parameters of a layer.

In the order of reading:

* By names: ``scope``, ``train_parameters``, ``train_head``, ``prefix_tuning``.
* By layers: ``layer_scope``, ``train_layers``, ``random_layer``, ``dominant_layer``; ``parts`` and
  ``massive_direction`` say what trains of a layer.
* By what forward passes show: ``calibration`` runs them; ``activation_profile`` and ``rules`` find the dominant layer,
  ``signal`` serves ``train_by_signal``, ``input_moments`` and ``token_mask`` look at single tokens.
"""

from zolightning.scopes.dominant_layer import DominantLayer
from zolightning.scopes.massive_direction import MassiveDirection
from zolightning.scopes.parts import MLP, LoRA, OutlierChannels, Part, WholeLayer, WithoutOutlierChannels
from zolightning.scopes.prefix_tuning import PrefixTuning
from zolightning.scopes.random_layer import RandomLayer
from zolightning.scopes.scope import Scope
from zolightning.scopes.train_by_signal import TrainBySignal
from zolightning.scopes.train_head import TrainHead
from zolightning.scopes.train_layers import TrainLayers
from zolightning.scopes.train_parameters import TrainParameters

__all__ = [
    "MLP",
    "DominantLayer",
    "LoRA",
    "MassiveDirection",
    "OutlierChannels",
    "Part",
    "PrefixTuning",
    "RandomLayer",
    "Scope",
    "TrainBySignal",
    "TrainHead",
    "TrainLayers",
    "TrainParameters",
    "WholeLayer",
    "WithoutOutlierChannels",
]
