"""Mistakes of somebody who writes a method are named."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from zolightning.directions.basis import Sides
from zolightning.optim import StepRecord, SubspaceOptimizer
from zolightning.optim.dense import DenseOptimizer


class Dense(DenseOptimizer):
    def update(self, record: StepRecord) -> None:
        pass


class WithoutSides(SubspaceOptimizer):
    def __init__(self, params: Any, defaults: Any) -> None:
        super().__init__(params, defaults, rank=2, vector_lr=None)


class WrongSides(WithoutSides):
    sides: ClassVar[Sides] = "rows"  # type: ignore[assignment]  # the mistake


class OneStepForAll(WithoutSides):
    sides = "right"

    def core_step(self, gradients: Tensor, *_: Any) -> Tensor:
        return gradients[0]


@pytest.mark.parametrize(
    ("method", "defaults", "message"),
    [
        (Dense, {"lr": 1e-3}, "`eps` must be a positive number, got None"),
        (Dense, {"eps": 1e-3}, "`lr` must be a positive number, got None"),
        (OneStepForAll, {"eps": 1e-3}, "`lr` must be a positive number, got None"),
        (WithoutSides, {"lr": 1e-3, "eps": 1e-3}, r"`sides` must be one of \('left', 'right', 'both'\), got None"),
        (WrongSides, {"lr": 1e-3, "eps": 1e-3}, r"`sides` must be one of \('left', 'right', 'both'\), got 'rows'"),
    ],
)
def test_what_a_class_lacks(method: Any, defaults: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method([nn.Parameter(torch.zeros(3, 3))], defaults)


def test_steps_of_another_shape_than_the_gradients() -> None:
    weights = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))]
    optimizer = OneStepForAll(weights, {"lr": 1e-3, "eps": 1e-3})
    optimizer.estimate(lambda: sum(weight.square().sum() for weight in weights))
    with pytest.raises(ValueError, match=r"`core_step` of OneStepForAll must .* \(2, 4, 2\), got \(4, 2\)\."):
        optimizer.step()
