"""Linear probes after each layer, which show after how many layers a network could end for a task."""

from dataclasses import dataclass

from torch import Tensor

from zolightning.callbacks.linear_probing import CS, TOLERANCE
from zolightning.network.logistic_regression import strongest_validated


@dataclass(frozen=True)
class LayerProbe:
    """A probe of the head's input if the network ends after some layers, in five-fold cross-validation.

    Attributes:
        num_layers: number of layers that are left.
        loss: mean cross-entropy over the folds.
        standard_error: that of `loss` over the folds.
        accuracy: mean accuracy over the folds.
    """

    num_layers: int
    loss: float
    standard_error: float
    accuracy: float


def probe_layer(num_layers: int, inputs: Tensor, rows: Tensor) -> LayerProbe:
    """Fits a probe to the head's inputs after `num_layers` layers.

    The penalty is chosen as :class:`~zolightning.callbacks.LinearProbing` chooses it.

    Args:
        num_layers: number of layers that are left.
        inputs: the head's inputs, (N, H).
        rows: the right rows of the head, (N,).
    """
    classes, targets = rows.cpu().unique(return_inverse=True)
    _, found = strongest_validated(inputs.double().cpu(), targets, len(classes), CS, TOLERANCE)
    return LayerProbe(num_layers, found.loss, found.error, found.accuracy)
