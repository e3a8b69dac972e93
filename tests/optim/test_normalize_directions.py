"""How far a step with projected gradient 1 moves a weight, over ranks, scopes and bases, for every kind of method."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zolightning.directions.basis import Basis
from zolightning.optim import LOZO, ZOMOPI, StepRecord, SubspaceMeZO, SubspaceOptimizer, SubZero, ZOMuon
from zolightning.optim.bases import Matrix

SHAPES = {"tall": (512, 48), "wide": (40, 600), "thin": (12, 512), "vector": (50,)}
LR, EPS = 0.1, 0.01

# A method of each kind, and the RMS of its step along a drawn basis without the option.
METHODS: dict[str, tuple[Callable[..., SubspaceOptimizer], Callable[[int, int, int], float]]] = {
    "lozo": (LOZO, lambda m, n, r: 1 / math.sqrt(r)),
    "lozo-adam": (partial(LOZO, betas=(0.9, 0.99)), lambda m, n, r: 1 / math.sqrt(r)),
    "subzero": (SubZero, lambda m, n, r: 1.0),
    "subzero-paper": (partial(SubZero, scaling="paper"), lambda m, n, r: r / math.sqrt(m * n)),
    "subzero-adam": (partial(SubZero, betas=(0.9, 0.99)), lambda m, n, r: r / math.sqrt(m * n)),
    "subspace-mezo": (SubspaceMeZO, lambda m, n, r: math.sqrt(r / m)),
    "zo-muon": (partial(ZOMuon, orthogonalization="svd"), lambda m, n, r: math.sqrt(r / (m * n))),
    "zo-mopi": (partial(ZOMOPI, power_rank=1, momentum=0.0), lambda m, n, r: math.sqrt(1 / (m * n))),
}


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def given(matrix: Matrix, side: str) -> Basis:
    """Orthogonal columns of unequal lengths, fewer than wanted, on the side of the "rows" or "columns"."""
    columns = max(1, min(matrix.rank, getattr(matrix, side)) // 2)
    torch.manual_seed(matrix.rows)
    lengths = torch.linspace(0.1, 3, columns)
    return Basis(
        **{
            {"rows": "left", "columns": "right"}[side]: torch.linalg.qr(torch.randn(getattr(matrix, side), columns)).Q
            * lengths
        }
    )


@pytest.mark.parametrize("basis", ["drawn", "inputs", "outputs"])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("name", METHODS)
def test_the_rms_of_a_step_is_lr_and_that_of_a_perturbation_eps(name: str, rank: int, basis: str) -> None:
    """Exactly so where columns are orthogonal, for with signs as noise all cores have one length."""
    method, plain = METHODS[name]
    if name == "zo-mopi" and basis != "drawn":  # the length of one direction among columns of unequal lengths varies
        method = partial(method, power_rank=rank)

    def first_step(scope: list[str], normalize_directions: bool) -> dict[str, tuple[Tensor, float]]:
        """What becomes of weights that are zero, and what is to be expected of their RMS without the option."""
        weights = {key: nn.Parameter(torch.zeros(SHAPES[key])) for key in scope}
        fixed = {"lr": LR, "eps": EPS, "vector_lr": LR, "noise": "rademacher", "num_queries": 1, "seed": 0}
        optimizer = method(weights.items(), rank=rank, normalize_directions=normalize_directions, **fixed)
        found = optimizer.split(optimizer.param_groups[0])[0]
        if basis != "drawn":
            side = {"inputs": "columns", "outputs": "rows"}[basis]
            optimizer.resample({weight: given(matrix, side) for weight, matrix in found.values()})
        for key, change in optimizer.perturbations(0, 1).items():
            change.add_to(torch.zeros_like(key), perturbed := torch.empty_like(key))
            if normalize_directions:
                assert rms(perturbed) == pytest.approx(EPS, rel=tolerance(key))
        optimizer.apply(StepRecord(0, 0, (LR,), (1.0,), (0.0, 0.0), 2, optimizer.param_groups[0]["refresh"]))
        optimizer.fold()
        return {
            key: (weight.detach(), plain(*found[key][1]) if key in found else 1.0) for key, weight in weights.items()
        }

    def tolerance(weight: Tensor) -> float:
        """Five standard deviations of the length of LOZO's Gaussian factor, else rounding."""
        is_random = name.startswith("lozo") and basis == "drawn" and weight.ndim > 1
        return 5 / math.sqrt(weight.shape[1] * rank) if is_random else 1e-4

    moved = first_step(list(SHAPES), normalize_directions=True)
    for weight, _ in moved.values():
        assert rms(weight) == pytest.approx(LR, rel=tolerance(weight))
    assert torch.equal(first_step(["wide"], normalize_directions=True)["wide"][0], moved["wide"][0])
    if basis == "drawn":
        for weight, expected in first_step(list(SHAPES), normalize_directions=False).values():
            assert rms(weight) == pytest.approx(LR * expected, rel=tolerance(weight))


def test_newton_schulz_is_as_long_within_its_accuracy() -> None:
    weight = nn.Parameter(torch.zeros(64, 48))
    optimizer = ZOMuon([("w", weight)], lr=LR, rank=8, num_queries=4, normalize_directions=True, seed=0)
    optimizer.apply(StepRecord(0, 0, (LR,), (1.0, -2.0, 0.5, 3.0), (0.0,) * 8, 8))
    optimizer.fold()
    assert 0.68 < rms(weight) / LR < 1.20
