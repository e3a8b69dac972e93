"""HiZOO: what its curvature estimates, keeps and does. What all methods share is in test_all_methods*.py."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizer_steps import MakeProblem, assert_same, attached, run, standard, weights
from zolightning.directions.dense import Direction
from zolightning.directions.scaled import FactoredCurvature, FullCurvature, ScaledDirection
from zolightning.evaluation.graph_inputs import Parts
from zolightning.kernels.noise import coefficient, key
from zolightning.optim import HiZOO, MeZO, StepRecord
from zolightning.optim.estimators import TwoSided

STRUCTURES = ("full", "row_column", "scalar")


def quadratic(diagonal: Tensor) -> tuple[nn.Parameter, Tensor]:
    """A parameter and a Hessian with this diagonal."""
    draw = torch.randn(len(diagonal), len(diagonal), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian = 0.3 * (draw + draw.T)
    hessian.diagonal().copy_(diagonal)
    return nn.Parameter(torch.zeros(len(diagonal), dtype=torch.float64)), hessian


class TestEstimate:
    @pytest.mark.parametrize("estimate", ["code", pytest.param("centered", marks=pytest.mark.slow)])
    def test_its_mean_on_a_quadratic(self, estimate: Any) -> None:
        """Of 6000 queries: one has a standard deviation of about trace(H^-1 Q) H, 7 H here, their mean one of 0.09 H.

        With the fourth moment 2.875 of our noise, ``code`` has 15/16 of the diagonal beside the trace.
        """
        queries, eps, alpha = 6000, 1e-3, 0.5
        weight, hessian = quadratic(torch.tensor([0.5, 1.0, 4.0, 2.0], dtype=torch.float64))
        before = torch.tensor([1.0, 0.5, 1.5, 2.0], dtype=torch.float64)
        optimizer = HiZOO([("w", weight)], smoothing=alpha, curvature_estimate=estimate, num_queries=queries, eps=eps)
        optimizer.state[weight]["curvature"] = before.clone()
        z = torch.stack([standard((4,), key(0, 0, query, "w")) for query in range(queries)]) / before.sqrt()
        differences = eps**2 * torch.einsum("qi,ij,qj->q", z, hessian, z)
        losses = torch.stack([differences, torch.zeros(queries)], dim=1).flatten().tolist()
        record = StepRecord(0, 0, (1.0,), (0.0,) * queries, (0.0, *losses), 2 * queries + 1)
        optimizer.apply(record)
        found = (optimizer.state[weight]["curvature"] - (1 - alpha) * before) / alpha
        expected = hessian.diagonal()
        if estimate == "code":
            expected = before * (hessian.diagonal() / before).sum() / 2 + 15 / 16 * expected
        assert ((found - expected).abs() < 4 * 0.09 * before).all(), (found, expected)

    @pytest.mark.slow
    def test_it_makes_a_badly_scaled_problem_easier(self) -> None:
        """Eigenvalues from 1e-4 to 1, the largest the initial curvature: steps in flat directions become longer."""
        diagonal = torch.logspace(-4, 0, 8, dtype=torch.float64)

        def after(method: Any, **options: Any) -> float:
            weight = nn.Parameter(torch.ones(8, dtype=torch.float64))
            optimizer = method([weight], **options)
            for _ in range(600):
                optimizer.estimate(lambda: (diagonal * weight**2).sum() / 2)
                optimizer.step()
            return float((diagonal * weight.detach() ** 2).sum() / 2)

        mezo = min(after(MeZO, lr=lr) for lr in (0.2, 0.4))
        hizoo = after(HiZOO, lr=0.1, smoothing=0.01, curvature_estimate="centered")
        assert hizoo < 0.1 * mezo

    def test_a_float16_model_moves_it_by_the_recommended_smoothing(self, make_problem: MakeProblem) -> None:
        problem = make_problem(torch.float16)
        run(problem, optimizer := attached(HiZOO, problem, lr=1e-3, smoothing=1e-8, eps=1e-2), 10)
        for parameter in problem.parameters():
            curvature = optimizer.state[parameter]["curvature"]
            assert curvature.dtype == torch.float32 and (curvature != 1).any()

    def test_it_stays_within_bounds(self) -> None:
        weight = nn.Parameter(torch.zeros(3, 4))
        optimizer = HiZOO([weight], smoothing=0.9, curvature_estimate="centered", curvature_bounds=(0.25, 8.0))
        for step, loss in enumerate([1e30, -1e30, 1e300, -1e300]):
            optimizer.apply(StepRecord(step, 0, (1e-6,), (1.0,), (0.0, loss, loss), 3))
            curvature = optimizer.state[weight]["curvature"]
            assert curvature.min() >= 0.25 and curvature.max() <= 8
        assert weight.isfinite().all()


class TestStep:
    @pytest.mark.parametrize("curvature", STRUCTURES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_without_smoothing_it_is_mezo(self, make_problem: MakeProblem, curvature: Any, dtype: torch.dtype) -> None:
        problem, reference = make_problem(dtype), make_problem(dtype)
        options = {"lr": 0.02, "num_queries": 2, "weight_decay": 0.1}
        records = run(problem, attached(HiZOO, problem, smoothing=0.0, curvature=curvature, **options), 5)
        expected = run(reference, attached(MeZO, reference, **options), 5)
        assert_same(weights(problem), weights(reference))
        assert [record.projected_grads for record in records] == [record.projected_grads for record in expected]

    def test_the_first_loss_is_that_of_the_stored_weights(self, make_problem: MakeProblem) -> None:
        problem = make_problem()
        (record,) = run(problem, attached(HiZOO, problem, eps=0.1, num_queries=2, lr=1e-9), 1)
        assert record.losses[0] == make_problem()().item()
        assert record.forward_passes == 5

    @pytest.mark.parametrize("plus", [1.25, 0.75])
    def test_probes_have_the_old_curvature_and_steps_the_new_one(self, plus: float) -> None:
        """Of a second difference of either sign, whose absolute value counts."""
        weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        optimizer = HiZOO([("w", weight)], smoothing=0.5, eps=0.5)
        old = torch.tensor([1.0, 2.0, 4.0, 1.5, 0.5, 9.0], dtype=torch.float64)
        optimizer.state[weight]["curvature"] = old.clone()
        perturbed = torch.empty_like(weight)
        optimizer.perturbations(0, -1)[weight].add_to(weight.detach(), perturbed)
        u = standard((6,), key(0, 0, 0, "w")).double()
        torch.testing.assert_close(perturbed.flatten(), -0.5 * u / old.sqrt())
        optimizer.apply(StepRecord(0, 0, (0.25,), (3.0,), (1.0, plus, 1.0), 3))
        new = 0.5 * old + 0.5 * 0.25 / (2 * 0.25) * old * u**2
        torch.testing.assert_close(optimizer.state[weight]["curvature"], new)
        torch.testing.assert_close(weight.detach().flatten(), -0.25 * 3 * u / new.sqrt())

    def test_rows_and_columns_become_the_means_of_a_full_curvature(self) -> None:
        record = StepRecord(0, 0, (1e-3,), (1.0,), (0.0, 1e-6, 1e-6), 3)
        found = {}
        for curvature in ("full", "row_column"):
            weight = nn.Parameter(torch.zeros(4, 6))
            optimizer = HiZOO([("w", weight)], smoothing=0.5, curvature=curvature)
            optimizer.apply(record)
            found[curvature] = optimizer.state[weight]
        full = found["full"]["curvature"].view(4, 6)
        torch.testing.assert_close(found["row_column"]["curvature_columns"], full.mean(0))
        torch.testing.assert_close(found["row_column"]["curvature_rows"], full.mean(1) / full.mean())
        assert found["row_column"].keys() == {"curvature_rows", "curvature_columns"}

    def test_smoothing_by_step(self) -> None:
        weight = nn.Parameter(torch.zeros(1))
        optimizer = HiZOO([weight], smoothing={2: 0.25, 0: 0.5}, curvature="scalar")
        found = []
        for step in range(3):
            optimizer.apply(StepRecord(step, 0, (1e-3,), (1.0,), (1.0, 1.0, 1.0), 3))
            found.append(optimizer.state[weight]["curvature"])
        assert found == [0.5, 0.25, 0.1875]


@pytest.mark.parametrize("factored", [False, True])
def test_any_part_of_a_scaled_direction_is_that_of_the_whole(factored: bool) -> None:
    """Pieces of rows, rows of a table, both signs; a chunk of the factored one has 64 rows."""
    table = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.linspace(0.5, 1.5, 200), torch.linspace(0.2, 2.0, 1024)
    curvature = (rows[:, None] * columns).clamp(0.3, 2.5)
    own = FactoredCurvature(rows, columns, 0.3, 2.5) if factored else FullCurvature(curvature.view(-1))
    keys = torch.tensor([key(0, 0, 0, "w")], dtype=torch.int32)
    plus, minus = (
        ScaledDirection(Direction(keys, torch.tensor([c]), "gaussian", (c,)), own)
        for c in (coefficient(0.1, "gaussian"), coefficient(-0.1, "gaussian"))
    )
    assert plus.is_opposite(minus) and not plus.is_opposite(plus)
    whole, opposite, one, two = (torch.empty_like(table) for _ in range(4))
    plus.add_to(table, whole), minus.add_to(table, opposite)
    torch.testing.assert_close(whole, table + 0.1 * standard(table.shape, key(0, 0, 0, "w")) / curvature.sqrt())
    plus.add_both(table, one, two)
    assert torch.equal(one, whole) and torch.equal(two, opposite)
    piece = torch.empty(30, 1024)
    plus.add_to(table[150:180], piece, start=150 * 1024)
    assert torch.equal(piece, whole[150:180])
    index, gathered = torch.tensor([199, 0, 7, 7]), torch.empty(4, 1024)
    plus.add_to_rows(table, index, gathered)
    assert torch.equal(gathered, whole[index])


def test_a_graph_reads_a_full_curvature_where_it_lies(make_problem: MakeProblem) -> None:
    """One graph serves both signs and all steps; the curvature is not copied, as noise keys are."""
    problem = make_problem()
    optimizer = attached(HiZOO, problem, lr=0.02)
    run(problem, optimizer, 1)
    found = [Parts([optimizer.perturbations(0, sign)], torch.device("cpu")) for sign in (1, -1)]
    assert found[0].key == found[1].key
    curvatures = {optimizer.state[parameter]["curvature"].data_ptr() for parameter in problem.parameters()}
    assert len(curvatures) == 3 and curvatures.isdisjoint(table.data_ptr() for table in found[0].tables)
    (rebuilt,) = found[0].with_tables([table.clone() for table in found[0].tables])
    assert {change.curvature.values.tensor.data_ptr() for change in rebuilt.values()} == curvatures


def test_what_is_in_no_block_has_extra_bits_and_no_curvature_to_measure(make_problem: MakeProblem) -> None:
    problem = make_problem(torch.bfloat16)
    optimizer = attached(HiZOO, problem, smoothing=1e-2)
    optimizer.set_blocks([[problem.matrix]])
    run(problem, optimizer, 2)
    assert optimizer.state[problem.vector].keys() == {"low_word"}
    low, middle, high = optimizer.measurements().values()
    assert low < middle < high


def test_quantiles_are_of_weights_not_of_parameters() -> None:
    """A large matrix and a small one are sampled by equally many elements, and a rank may have none of a third one."""
    large, small, empty = (nn.Parameter(torch.ones(128 * factor, 128)) for factor in (8, 1, 0))
    optimizer = HiZOO([large, small, empty])
    for parameter, curvature in ((large, 1.0), (small, 100.0), (empty, 1.0)):
        optimizer.state[parameter]["curvature"] = torch.full_like(parameter, curvature)
    assert optimizer.measurements() == {"curvature_0.01": 1.0, "curvature_0.5": 1.0, "curvature_0.99": 100.0}


def test_quantiles_of_rows_times_columns() -> None:
    parameter = nn.Parameter(torch.ones(4, 100))
    optimizer = HiZOO([parameter], curvature="row_column")
    columns = torch.tensor([0.5] * 40 + [3.0] * 60)  # products of 0.5 and 1, 3, 6 for 20, 20, 30 and 30 % of weights
    optimizer.state[parameter] |= {"curvature_rows": torch.tensor([1.0, 2, 1, 2]), "curvature_columns": columns}
    assert optimizer.measurements() == {"curvature_0.01": 0.5, "curvature_0.5": 3.0, "curvature_0.99": 6.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smoothing": 1.0}, "`smoothing` must be at least 0 and below 1, got 1.0"),
        ({"smoothing": {0: 0.1, 5: -1.0}}, "`smoothing` must be at least 0 and below 1, got -1.0"),
        ({"smoothing": {10: 0.1}}, "`smoothing` must have a value for step 0"),
        ({"curvature": "diagonal"}, "`curvature` must be one of"),
        ({"curvature_estimate": "paper"}, "`curvature_estimate` must be one of"),
        ({"curvature_estimate": "centered", "curvature": "scalar"}, "must be 'code' with `curvature` 'scalar'"),
        ({"curvature_estimate": "centered", "noise": "rademacher"}, "must be 'code' with `noise` 'rademacher'"),
        ({"estimator": TwoSided()}, r"`estimator` must be ThreePoint\(\), from which HiZOO .*, got TwoSided\(\)\."),
        ({"curvature_bounds": (0.0, 2.0)}, "`curvature_bounds` must be two numbers, one above 0"),
        ({"curvature_bounds": (0.5, float("inf"))}, "`curvature_bounds` must be two numbers, one above 0"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiZOO([nn.Parameter(torch.zeros(2))], **arguments)
