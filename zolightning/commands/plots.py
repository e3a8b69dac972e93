"""Curves over layers, as PNG files and in TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from zolightning.commands.sensitivity import Sensitivity
from zolightning.commands.time_model import StepTimes
from zolightning.network.logistic_regression import CrossValidation
from zolightning.scopes.activation_profile import ActivationProfile

# Two series at most share axes: blue and orange differ for the colour-blind too.
_FIRST, _SECOND, _ACCENT, _QUIET = "#1f6fb4", "#e07b00", "#b3261e", "#6b6b6b"


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Writes ``name.png`` and the figure ``name`` of TensorBoard, both into `folder`."""
    FigureCanvasAgg(figure)
    figure.savefig(folder / f"{name}.png", dpi=150)
    with SummaryWriter(str(folder)) as writer:
        writer.add_figure(name, figure, close=False)


def activation_figure(profile: ActivationProfile, selected: int | None, title: str) -> Figure:
    """Maximum and mean of the layers' outputs (the kind of figure 2 of arXiv 2606.05516)."""
    figure, (axes,) = _figure(1, title)
    layers = range(len(profile.layers))
    _line(axes, layers, [layer.max for layer in profile.layers], "maximum", _FIRST)
    _line(axes, layers, [layer.mean for layer in profile.layers], "mean", _SECOND)
    axes.set_yscale("log")
    axes.set_ylabel("|output| of the layer")
    _mark(axes, selected)
    axes.legend(frameon=False)
    return figure


def sensitivity_figure(sensitivity: Sensitivity, selected: int | None, title: str) -> Figure:
    """What perturbing each layer does to the loss (the kind of figure 4 of arXiv 2606.05516)."""
    figure, (above, below) = _figure(2, title)
    layers = [layer.layer for layer in sensitivity.layers]
    rms = [layer.rms for layer in sensitivity.layers]
    errors = [value * sensitivity.relative_error for value in rms]
    above.errorbar(layers, rms, errors, color=_FIRST, marker="o", markersize=4, linewidth=1.5, capsize=2)
    above.set_ylabel("RMS of the projected gradient")
    above.set_title(f"± one standard error, {sensitivity.num_queries} directions a layer", fontsize=9, color=_QUIET)
    _line(below, layers, [layer.mean_change for layer in sensitivity.layers], None, _FIRST)
    below.set_ylabel(f"mean |change of the loss|, eps {sensitivity.eps:g}")
    for axes in (above, below):
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # a marker at the top is whole
        _mark(axes, selected)
    if selected is not None:
        below.legend(frameon=False)
    return figure


def probe_figure(probes: Mapping[int, CrossValidation], title: str) -> Figure:
    """Loss and accuracy of linear probes by the number of layers below them."""
    figure, (above, below) = _figure(2, title)
    losses, errors = ([getattr(probe, name) for probe in probes.values()] for name in ("loss", "error"))
    above.errorbar(list(probes), losses, errors, color=_FIRST, marker="o", markersize=4, linewidth=1.5, capsize=2)
    above.set_ylabel("cross-entropy")
    above.set_title("± one standard error", fontsize=9, color=_QUIET)
    _line(below, list(probes), [probe.accuracy for probe in probes.values()], None, _FIRST)
    below.set_ylabel("accuracy")
    below.set_xlabel("layers")
    return figure


def step_time_figure(times: StepTimes, title: str) -> Figure:
    """Measured steps and the line through them."""
    figure, (axes,) = _figure(1, title)
    sizes = [step.parameters / 1e6 for step in times.steps]
    axes.plot(sizes, [step.seconds for step in times.steps], "o", color=_FIRST, label="measured")
    ends = [0, times.steps[-1].parameters]
    line = [times.model.seconds(parameters) for parameters in ends]
    label = f"2 F + gamma |S|, R² {times.model.r_squared:.3f}"
    axes.plot([end / 1e6 for end in ends], line, color=_SECOND, linewidth=1.5, label=label)
    axes.set_xlabel("parameters that move, in millions")
    axes.set_ylabel("seconds a step, one query")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def sweep_figure(
    metrics: Mapping[str, Mapping[int, float]], zero_shot: Mapping[str, float], count: int, title: str
) -> Figure:
    """One panel a metric: its value after training each layer alone, and before any training.

    Args:
        metrics: values by name of the metric and index of the layer.
        zero_shot: the value of each metric before training.
        count: number of layers of the network, whether trained or not.
        title: the title of the figure.
    """
    figure, panels = _figure(len(metrics), title)
    for axes, (name, values) in zip(panels, metrics.items(), strict=True):
        _line(axes, list(values), list(values.values()), "this layer alone", _FIRST)
        axes.axhline(zero_shot[name], color=_QUIET, linestyle="--", linewidth=1, label="zero-shot")
        axes.set_ylabel(name)
        axes.set_xlim(-0.5, count - 0.5)
    panels[0].legend(frameon=False)
    return figure


def _figure(panels: int, title: str) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(8, 1.2 + 2.8 * panels), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=16, steps=[1, 2, 5, 10], integer=True))
    return figure, list(axes)


def _line(axes: Axes, layers: Sequence[int], values: Sequence[float], label: str | None, color: str) -> None:
    axes.plot(layers, values, color=color, marker="o", markersize=4, linewidth=1.5, label=label)


def _mark(axes: Axes, selected: int | None) -> None:
    if selected is not None:
        axes.axvline(selected, color=_ACCENT, linestyle=":", linewidth=1.2, label=f"selected: layer {selected}")
