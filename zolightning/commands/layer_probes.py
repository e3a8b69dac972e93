"""Linear probes after each layer, which show after how many layers a network could end for a task."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from zolightning.callbacks.linear_probing import CS, TOLERANCE
from zolightning.network.early_exit import exit_after
from zolightning.network.logistic_regression import accuracy, over_folds, strongest_penalty

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    model: "PreTrainedModel",
    features: Callable[[], tuple[Tensor, Tensor]],
    num_layers: Sequence[int],
    on_probe: Callable[[], object] = lambda: None,
) -> LayerProbes:
    """Fits a probe to the head's input after each of several numbers of layers; the model is unchanged afterwards.

    The penalty of each is chosen as :class:`~zolightning.callbacks.LinearProbing` chooses it.

    Args:
        model: the model.
        features: runs the model, and returns the head's inputs, (N, H), and the right rows of the head, (N,).
        num_layers: after how many layers the model ends, for each probe.
        on_probe: called after each probe.
    """
    probes = []
    for count in num_layers:
        with exit_after(model, count):
            found, rows = features()
        found, (classes, targets) = found.double().cpu(), rows.cpu().unique(return_inverse=True)
        c = strongest_penalty(found, targets, len(classes), CS, TOLERANCE)
        losses, accuracies = (
            over_folds(quality, found, targets, len(classes), c, TOLERANCE) for quality in (F.cross_entropy, accuracy)
        )
        error = losses.std().item() / len(losses) ** 0.5 if len(losses) > 1 else 0.0
        probes.append(LayerProbe(count, losses.mean().item(), error, accuracies.mean().item()))
        on_probe()
    return LayerProbes(tuple(probes))
