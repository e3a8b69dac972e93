"""``check_method`` finds what is wrong with a method, and nothing with those of the package."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import METHODS
from zolightning.directions.low_rank import LowRank
from zolightning.directions.perturbation import Perturbation
from zolightning.evaluation import perturbed, row_groups
from zolightning.optim import MeZO, StepRecord, SubZero
from zolightning.optim.check_method import check_method
from zolightning.optim.dense import DenseDescent, DenseOptimizer
from zolightning.optim.estimators import TwoSided

SOUND = ("mezo-momentum", "mezo-adam", "hizoo", "sparse-mezo-fixed", "lozo-momentum", "zo-mopi")


@pytest.mark.parametrize("name", SOUND)
def test_methods_of_the_package_pass(name: str) -> None:
    check_method(METHODS[name])


class Forgetful(MeZO):
    """Keeps in an attribute what the next step needs."""

    mean = 0.0

    def transform_grads(self, group: dict[str, Any], projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        self.mean = 0.9 * self.mean + 0.1 * projected_grads[0]
        return (projected_grads[0] - 0.1 * self.mean,)


class OfThePresentRate(MeZO):
    """Does not read the learning rate of the record."""

    def gradient_scale(self, group: dict[str, Any], lr: float) -> float:
        return -float(group["lr"])


class Unnamed(MeZO):
    """Keeps an argument under another name."""

    def __init__(self, params: Any, damping: float = 1.0, **settings: Any) -> None:
        self._d = damping
        super().__init__(params, **settings)


class Drawing(MeZO):
    """Draws numbers that no seed of a run determines."""

    def gradient_scale(self, group: dict[str, Any], lr: float) -> float:
        return -lr * (1 + torch.rand(1).item())


class Restless(MeZO):
    """Moves weights in an estimate."""

    def perturbations(self, query: int, sign: int) -> Any:
        for group in self.param_groups:
            group["params"][0].detach().add_(1.0)
        return super().perturbations(query, sign)


class Rounding(DenseDescent):
    """Adds updates in the precision of the weights."""

    def update_parameters(self, weights: Any, states: Any, gradients: Any, group: dict[str, Any], lr: float) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.view(-1).add_(gradient.of_elements(weight.view(-1)).to(weight.dtype), alpha=-lr)


class OfAllParameters(DenseOptimizer):
    """Moves what is frozen or at rest."""

    def update(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            coefficients = {0: -lr * record.projected_grads[0]}
            named = self.named(group, frozen=True)
            for weight, move in zip(
                named, self.directions_of(named, record.seed, record.step, coefficients), strict=True
            ):
                weight.detach().view(-1).add_(move.of_elements(weight.view(-1)).to(weight.dtype))


class Ascending(MeZO):
    """Steps along the gradient."""

    def gradient_scale(self, group: dict[str, Any], lr: float) -> float:
        return lr


class OneWay:
    """A perturbation whose opposite is itself."""

    def __init__(self, direction: Any) -> None:
        self.add_to, self.add_to_rows = direction.add_to, direction.add_to_rows

    def opposite(self, negated: Any) -> "OneWay":
        return self


class OneWayMeZO(MeZO):
    def perturbations(self, query: int, sign: int) -> Any:
        return {parameter: OneWay(change) for parameter, change in super().perturbations(query, sign).items()}


class DiagonalCore(LowRank):
    """A low-rank perturbation that writes a core of its own."""

    def write_core(self, out: Tensor) -> Tensor:
        super().write_core(out)
        return out.mul_(torch.eye(len(out), dtype=out.dtype))

    def opposite(self, negated: Any) -> "DiagonalCore":
        return DiagonalCore(*vars(super().opposite(negated)).values())


class Diagonal(SubZero):
    """Moves along the diagonals of cores only, as TeZO does (arXiv 2501.19057)."""

    def perturbations_of(self, queries: Any, sign: int) -> Any:
        found = super().perturbations_of(queries, sign)
        for changes in found.values():
            for parameter, change in changes.items():
                if isinstance(change, LowRank):
                    changes[parameter] = DiagonalCore(*vars(change).values())
        return found

    def core_step(self, gradients: Tensor, states: Any, group: dict[str, Any]) -> Tensor:
        return torch.diag_embed(gradients.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("host", ["cpu", "none"])
def test_a_perturbation_of_ones_own_is_used_wherever_it_is_read(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbed, "HOST", host)  # with another one cores are made together, as on a GPU
    monkeypatch.setattr(row_groups, "HOST", host)
    check_method(partial(Diagonal, lr=1e-2, rank=3))


class Talkative(TwoSided):
    """Gives more projected gradients than there are queries."""

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        return super().projected_grads(losses, eps).repeat(2)


def dense(cls: Any) -> Any:
    return lambda params: cls(params, {"lr": 1e-2, "eps": 1e-3})


FAULTS: Mapping[str, tuple[Any, str]] = {
    "Forgetful": (partial(Forgetful, lr=1e-2), r"resumed after step 1 of 8 .*attributes: `mean`"),
    "OfThePresentRate": (partial(OfThePresentRate, lr=1e-2), "its records, applied .*`record.lr`"),
    "Unnamed": (partial(Unnamed, lr=1e-2), "argument `damping` is neither"),
    "Drawing": (partial(Drawing, lr=1e-2), "two runs with the same seed"),
    "Restless": (partial(Restless, lr=1e-2), "an estimate changed `table.weight`"),
    "Rounding": (dense(Rounding), "small updates of a bfloat16 weight"),
    "OfAllParameters": (dense(OfAllParameters), r"moved the part of `hidden.weight` that is frozen"),
    "Ascending": (partial(Ascending, lr=1e-2), "the loss rose from"),
    "OneWayMeZO": (partial(OneWayMeZO, lr=1e-2), "the loss of query 0 and sign -1"),
    "MeZO": (partial(MeZO, lr=1e-2, estimator=Talkative()), "Talkative gave 2 losses and 2 projected gradients"),
}


@pytest.mark.filterwarnings("ignore:All losses of a step were equal")  # along both signs of OneWay
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name: str) -> None:
    method, message = FAULTS[name]
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        check_method(method)


class Trusting(MeZO):
    """Takes for granted that all parameters have state as soon as one of them has."""

    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        if self.state:
            [self.state[parameter]["momentum_buffer"] for _, _, parameter in self.trainable()]
        return super().perturbations(query, sign)


def test_an_error_of_the_methods_own_says_in_what_situation() -> None:
    with pytest.raises(KeyError, match="momentum_buffer") as error:
        check_method(partial(Trusting, lr=1e-2, momentum=0.9))
    assert error.value.__notes__ == [
        "(Raised in `check_method`, while a block whose state was dropped when it came to rest moved again.)"
    ]
