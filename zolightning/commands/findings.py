"""What ``doctor`` says of what it has measured: the figures, and what to change."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zolightning.callbacks import LearningRateProbe
from zolightning.commands.rounding import Survival
from zolightning.commands.tables import print_table
from zolightning.messages import aligned, counted, rough_duration, some

_LARGEST_Z = 4.0  # the largest element of a perturbation, in standard deviations
_ROOM = 4.0  # the factor by which numbers may grow in training


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose names differ only in numbers."""

    name: str  # their name, with ``*`` in place of the numbers
    dtype: torch.dtype  # their dtype
    numel: int  # number of elements of all of them
    largest: float  # largest absolute value of an element
    # distance between neighbouring numbers of this dtype at an element of average size; the largest of all
    spacing: float
    perturbation: Survival  # how much of ``eps z`` rounding leaves in the weights that are read
    update: Survival  # how much of ``lr g z`` rounding leaves in the weights that are stored

    @property
    def dtype_name(self) -> str:
        return _name(self.dtype)


class Output(NamedTuple):
    """The largest number in the output of a submodule, with the submodule's name and the output's dtype."""

    value: float
    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Examination:
    """The measurements made before a run."""

    groups: Sequence[ParameterGroup]  # the parameters that train, in groups
    eps: float  # the perturbation scale
    update_precision: str  # how updates are added to weights
    loss: float  # the loss of the last measured step
    # RMS of the difference of two losses of a step; None where all of them are at the same weights
    difference: float | None
    noise: float  # standard deviation of the error that rounding adds to a loss
    output: Output  # the largest output of a submodule
    step_seconds: float  # duration of a step
    steps: int  # number of steps of the run
    lr: float  # the learning rate with which the run would begin
    measured_lr: float | None  # the learning rate that LearningRateProbe has measured; None if it found none
    cost: float  # rise of the loss by the noise of the whole run at that rate, as a share of the loss
    sets_lr: bool  # whether the run itself begins with the measured rate


def print_report(overview: Mapping[str, str], seen: Examination) -> None:
    """Prints the overview of a run, texts by their titles, then the measurements, then what should be changed."""
    print(aligned(overview))
    rows = [
        {
            "parameters": group.name,
            "number": f"{group.numel:,}",
            "dtype": group.dtype_name,
            "max |w|": group.largest,
            "eps z": _percent(group.perturbation.share),
            "size": _percent(group.perturbation.size),
            "lr g z": _percent(group.update.share),
            "size ": _percent(group.update.size),
        }
        for group in seen.groups
    ]
    print_table(
        f"What rounding leaves of a perturbation eps z (eps {seen.eps:g}) and of an update lr g z (lr {seen.lr:.2g}, "
        f"{seen.update_precision}):\nshare of the elements that move, and size of the move relative to the intended "
        "one\n(-: does not move, or is of low rank and added to outputs, so that no weight is rounded)",
        rows,
    )
    seconds, output = seen.step_seconds, seen.output.value
    largest = f"{output:,.0f}" if output >= 1000 else f"{output:.3g}"
    differ = "" if seen.difference is None else f"two losses of a step differ by {seen.difference:.2g}, "
    lines = {
        "loss": f"{seen.loss:.4f}; {differ}rounding moves each by {seen.noise:.2g}",
        "largest output": f"{largest} of {seen.output.name}; float16 ends at 65,504",
        "a step takes": f"{seconds:.2g} s; {counted(seen.steps, 'step')} {rough_duration(seconds * seen.steps)}, "
        "without validations",
        "learning rate": _rate(seen),
    }
    print(f"\n{aligned(lines)}\n")
    for line in list(findings(seen)) or ["No problem was found."]:
        print(f"* {line}")


def findings(seen: Examination) -> Iterator[str]:
    """What should be changed, the most important first."""
    yield from _of_numbers(seen)
    yield from _of_the_loss(seen)
    yield from _of_the_rate(seen)
    unread = [group for group in seen.groups if group.perturbation.share < 0.5]
    if unread:
        said = [f"{g.name} ({g.perturbation.share:.0%} move; {g.dtype_name} steps by {g.spacing:.1g})" for g in unread]
        yield (
            f"Perturbations are lost: with `method.eps` {seen.eps:g} most elements of {some(said)} are read as if "
            "nothing had been added. Their gradients are hardly measured, and their updates are mostly noise: raise "
            "`method.eps`, use --trainer.precision 32-true, or leave them out of the `scope`."
        )
    lost = [group for group in seen.groups if group.update.size < 0.9 or group.update.share < 0.5]
    if lost:
        said = [f"{group.name} ({group.update.size:.0%} is kept)" for group in lost]
        advice = "set `method.update_precision` to exact"
        if seen.update_precision == "exact":
            advice = "steps are too small: raise `method.lr`, or `method.vector_lr` where norms and biases have theirs"
        yield f"Updates are lost with `method.update_precision` {seen.update_precision}: {some(said)}; {advice}."


def _of_numbers(seen: Examination) -> Iterator[str]:
    for group in seen.groups:
        largest, most = group.largest + _LARGEST_Z * seen.eps, torch.finfo(group.dtype).max
        if largest * _ROOM > most:
            yield (
                f"{group.name} reaches {largest:,.0f} when perturbed, but {group.dtype_name} ends at {most:,.0f}: use "
                "--trainer.precision bf16-true."
            )
    most = torch.finfo(seen.output.dtype).max
    if seen.output.value * _ROOM > most:
        yield (
            f"{seen.output.name} outputs {seen.output.value:,.0f}, but {_name(seen.output.dtype)} ends at {most:,.0f}: "
            "the loss may become NaN. Use --trainer.precision bf16-true."
        )


def _of_the_loss(seen: Examination) -> Iterator[str]:
    if seen.difference is None:
        return
    if not seen.difference:
        yield (
            "The loss is the same whatever is added to the weights: it does not depend on what trains, or "
            f"`method.eps` ({seen.eps:g}) is too small. Nothing can be learned."
        )
    elif math.sqrt(2) * seen.noise > seen.difference / 2:  # a quarter of the variance of projected gradients
        yield (
            f"Rounding moves each loss by {seen.noise:.2g}, and two losses of a step differ by {seen.difference:.2g}: "
            "much of each projected gradient is noise. Raise `method.eps`, or use --trainer.precision 32-true."
        )


def _of_the_rate(seen: Examination) -> Iterator[str]:
    steps = counted(seen.steps, "step")
    probe = ", or --lr_probe LearningRateProbe" if seen.steps > LearningRateProbe().num_steps else ""
    if seen.measured_lr is None:
        yield (
            "No learning rate was found: however large steps were, the loss did not rise. Check what trains, and the "
            "loss."
        )
    elif seen.sets_lr:
        return
    elif seen.lr > 3 * seen.measured_lr:
        times = seen.lr / seen.measured_lr
        yield (
            f"`method.lr` {seen.lr:.2g} is {times:,.0f} times what was measured for {steps}: the noise of the run "
            f"would cost {seen.cost * times**2:.2g} times the loss. Try {seen.measured_lr:.2g}{probe}."
        )
    elif seen.lr < seen.measured_lr / 10:
        yield (
            f"`method.lr` {seen.lr:.2g} is {seen.measured_lr / seen.lr:,.0f} times smaller than what was measured for "
            f"{steps}, in which little will be learned. Try {seen.measured_lr:.2g}{probe}."
        )


def _rate(seen: Examination) -> str:
    if seen.measured_lr is None:
        return f"{seen.lr:.3g}; none could be measured"
    low, high = (seen.measured_lr * math.sqrt(factor) for factor in (0.1, 10.0))
    return (
        f"{seen.measured_lr:.2g} measured for {counted(seen.steps, 'step')}, try {low:.2g} to {high:.2g}, where the "
        f"noise of the run costs {seen.cost / 10:.1%} to {seen.cost * 10:.0%} of the loss; now {seen.lr:.2g}"
    )


def _percent(share: float) -> str | None:
    return None if math.isnan(share) else f"{share:.1%}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
