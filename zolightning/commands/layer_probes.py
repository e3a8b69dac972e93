"""Linear probes after each layer, which show after how many layers a network could end for a task."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from zolightning.callbacks.linear_probing import CS, TOLERANCE
from zolightning.network.logistic_regression import strongest_validated


@dataclass(frozen=True)
class LayerProbe:
    """A probe of the head's input if the network ends after some layers, in five-fold cross-validation.

    Attributes:
        num_layers: number of layers that are left.
        loss: mean cross-entropy over the folds.
        error: standard error of `loss` over the folds.
        accuracy: mean accuracy over the folds.
    """

    num_layers: int
    loss: float
    error: float
    accuracy: float


@dataclass(frozen=True)
class LayerProbes:
    """Probes of several layers.

    Attributes:
        probes: from the first layer to the last.
    """

    probes: tuple[LayerProbe, ...]

    @property
    def best(self) -> LayerProbe:
        """The probe with the least loss."""
        return min(self.probes, key=lambda probe: probe.loss)

    def save(self, path: Path) -> None:
        """Writes JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def probe_layers(
    features: Mapping[int, tuple[Tensor, Tensor]], on_probe: Callable[[], object] = lambda: None
) -> LayerProbes:
    """Fits a probe to the head's inputs after each of several numbers of layers.

    The penalty of each is chosen as :class:`~zolightning.callbacks.LinearProbing` chooses it.

    Args:
        features: by the number of layers: the head's inputs, (N, H), and the right rows of the head, (N,).
        on_probe: called after each probe.
    """
    probes = []
    for count, (inputs, rows) in features.items():
        classes, targets = rows.cpu().unique(return_inverse=True)
        _, found = strongest_validated(inputs.double().cpu(), targets, len(classes), CS, TOLERANCE)
        probes.append(LayerProbe(count, found.loss, found.error, found.accuracy))
        on_probe()
    return LayerProbes(tuple(probes))
