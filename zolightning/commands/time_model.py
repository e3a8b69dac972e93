"""Measures and models the time of a training step as a function of how many parameters it moves."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from zolightning.commands.timing import round_robin
from zolightning.layers import LayerStack, mlp_of
from zolightning.optim import MeZO
from zolightning.scopes.scope import trainable_as

Evaluate = Callable[[], Tensor]


@dataclass(frozen=True)
class StepTimeModel:
    """``T = 2 F + gamma |S|``: seconds of a two-sided step of one query that moves \\|S\\| parameters.

    The cost model of Dominant-Layer ZO (arXiv 2606.05516, equations 3 to 11).
    """

    forward: float  # F, seconds of one evaluation of the loss
    per_parameter: float  # gamma, seconds that a step spends on each parameter: perturbing it twice and updating it
    r_squared: float  # share of the variance of the measured times that the model explains

    @classmethod
    def fit(cls, parameters: Sequence[int], seconds: Sequence[float]) -> "StepTimeModel":
        """The least squares fit to measured steps.

        Raises:
            ValueError: with fewer than two different numbers of parameters.
        """
        if len(set(parameters)) < 2:
            raise ValueError(f"A line needs two different numbers of parameters, got {list(parameters)}.")
        slope, intercept = statistics.linear_regression(parameters, seconds)
        r_squared = statistics.correlation(parameters, seconds) ** 2
        return cls(intercept / 2, slope, r_squared)

    def seconds(self, parameters: int) -> float:
        """The predicted time of a step."""
        return 2 * self.forward + self.per_parameter * parameters


@dataclass(frozen=True)
class MeasuredStep:
    """The median time of a step that moves only one scope."""

    scope: str
    parameters: int
    seconds: float


@dataclass(frozen=True)
class StepTimes:
    """Measured steps and the model fitted to them."""

    forward: float  # seconds of one evaluation of the loss, timed by itself
    steps: tuple[MeasuredStep, ...]  # from the smallest scope to the largest
    model: StepTimeModel  # fitted to `steps`


def growing_parts(module: nn.Module, stack: LayerStack) -> dict[str, list[nn.Parameter]]:
    """Parts of a network by name, smallest first.

    All of them begin at the first layer, so that their steps run the same forwards: layers below the first one that
    moves may be computed once a step instead of once an evaluation.
    """
    chosen: dict[str, list[nn.Parameter]] = {}
    with suppress(ValueError):  # a layer need not have one MLP
        chosen["MLP of layer 0"] = mlp_of(stack.layers[0]).parameters()
    chosen["layer 0"] = list(stack.parameters(0).values())
    for count in sorted({len(stack) // 4, len(stack) // 2, len(stack)} - {0, 1}):
        name = "all layers" if count == len(stack) else f"layers 0 to {count - 1}"
        chosen[name] = [p for index in range(count) for p in stack.parameters(index).values()]
    return chosen | {"whole model": list(module.parameters())}


def measure_step_times(
    module: nn.Module,
    parts: dict[str, list[nn.Parameter]],
    evaluate: Evaluate,
    repeats: int,
) -> StepTimes:
    """Times MeZO steps that move each part in turns, and fits the model to their medians.

    The steps are whole but for one thing: their projected gradients are set to zero, so that the weights stay.
    """
    optimizer = MeZO(module.parameters())
    optimizer.attach(module)

    def step(parameters: list[nn.Parameter]) -> None:
        chosen = set(parameters)
        with trainable_as({parameter: parameter in chosen for parameter in module.parameters()}):  # as a scope does
            record = optimizer.estimate(evaluate)
            optimizer.apply(replace(record, projected_grads=tuple(0.0 for _ in record.projected_grads)))

    work: dict[str, Callable[[], object]] = {"": torch.no_grad()(evaluate)}
    work |= {name: partial(step, parameters) for name, parameters in parts.items()}
    medians = {name: statistics.median(seconds) for name, seconds in round_robin(work, repeats).items()}
    steps = tuple(
        MeasuredStep(name, sum(p.numel() for p in set(parameters)), medians[name]) for name, parameters in parts.items()
    )
    model = StepTimeModel.fit([step.parameters for step in steps], [step.seconds for step in steps])
    return StepTimes(medians[""], steps, model)
