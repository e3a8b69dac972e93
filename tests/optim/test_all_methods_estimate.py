"""What every method keeps to while it estimates: it leaves weights and generators alone, and refuses bad losses."""

import pytest
import torch
from torch import Tensor, nn

from conftest import METHODS
from optimizer_steps import (
    METHODS_AND_DTYPES,
    MakeProblem,
    Method,
    assert_same,
    assert_same_state,
    attached,
    bits,
    run,
    weights,
)
from zolightning.optim import NonFiniteLossError, SparseMeZO, StepRecord, ZerothOrderOptimizer
from zolightning.optim.subspace import SubspaceOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")

# These differ from another row of the same class in what becomes of an estimate, and not in the estimate.
SAME_ESTIMATES = [
    *("mezo-momentum", "mezo-weight-decay", "mezo-normalize", "mezo-clip", "mezo-native", "mezo-low-byte"),
    *("mezo-adam-weight-decay", "hizoo-centered", "lozo-momentum", "subzero-momentum", "subzero-adam"),
    *("subspace-mezo-momentum", "zo-muon-svd", "zo-muon-momentum", "zo-mopi-native"),
]
ESTIMATES = {name: method for name, method in METHODS.items() if name not in SAME_ESTIMATES}


def stored(problem: nn.Module) -> dict[str, Tensor]:
    return {name: bits(parameter) for name, parameter in problem.named_parameters()}


def seen_gradient(optimizer: ZerothOrderOptimizer, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """The mean of ``z z' gradient``: for directions ``s L Z R'`` it is ``s^2 L L' gradient R R'``; masked if z is."""
    if isinstance(optimizer, SparseMeZO) and parameter.ndim > 1:
        smallest = parameter.detach().abs().flatten().argsort()[: round(0.9 * parameter.numel())]
        moves = torch.zeros(parameter.numel()).index_fill(0, smallest, 1.0)
        return gradient * moves.view(parameter.shape)
    if not isinstance(optimizer, SubspaceOptimizer):
        return gradient
    matrix = optimizer.matrix(parameter, optimizer.param_groups[0]["rank"])
    if matrix is None:
        return gradient
    basis = optimizer.basis(parameter)
    gradient = optimizer.direction_scale(matrix) ** 2 * gradient.reshape(matrix[:2])
    if basis.left is not None:
        gradient = basis.left @ basis.left.T @ gradient
    return gradient if basis.right is None else gradient @ basis.right @ basis.right.T


class TestEstimate:
    @METHODS_AND_DTYPES
    def test_weights_keep_every_bit_throughout(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype
    ) -> None:
        problem, seen = make_problem(dtype), []
        optimizer = attached(method, problem, eps=0.1)
        run(problem, optimizer, 2)  # with whatever state the method keeps
        before, before_folded = stored(problem), weights(problem)

        def loss() -> Tensor:
            assert_same(stored(problem), before)
            assert_same(weights(problem), before_folded)
            seen.append(problem().item())
            return problem()

        record = optimizer.estimate(loss)
        assert_same(stored(problem), before)
        assert_same(weights(problem), before_folded)
        assert len(set(seen)) == record.forward_passes == len(seen)

    @pytest.mark.parametrize(("dtype", "error"), [(torch.float32, ValueError), (torch.bfloat16, KeyboardInterrupt)])
    def test_an_error_in_any_evaluation_leaves_everything_alone(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype, error: type[BaseException]
    ) -> None:
        problem, untouched = make_problem(dtype), make_problem(dtype)
        optimizer, reference = (attached(method, p) for p in (problem, untouched))
        run(problem, optimizer, 1), run(untouched, reference, 1)
        for failing in range(1, reference.record.forward_passes + 1):
            calls = []

            def loss(failing: int = failing, calls: list = calls) -> Tensor:
                calls.append(1)
                if len(calls) == failing:
                    raise error
                return problem()

            with pytest.raises(error):
                optimizer.estimate(loss)
            with pytest.raises(RuntimeError, match="no estimate"):
                optimizer.step()
            assert_same(weights(problem), weights(untouched))
            assert_same_state(optimizer, reference)
        assert run(problem, optimizer, 1) == run(untouched, reference, 1)

    def test_it_does_not_record_for_autograd(self, method: Method, make_problem: MakeProblem) -> None:
        problem, recorded = make_problem(), []

        def loss() -> Tensor:
            value = problem()
            recorded.append(value.requires_grad or torch.is_grad_enabled())
            return value

        run(problem, optimizer := attached(method, problem), 1)
        optimizer.estimate(loss)
        optimizer.step()
        assert recorded and not any(recorded)
        assert all(parameter.grad is None and parameter.requires_grad for parameter in problem.parameters())

    def test_torch_generators_are_neither_read_nor_written(self, method: Method, make_problem: MakeProblem) -> None:
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before, problem = torch.get_rng_state(), make_problem()
            run(problem, attached(method, problem), 3)
            assert torch.equal(torch.get_rng_state(), before)
            results.append(weights(problem))
        assert_same(*results)

    @pytest.mark.parametrize("method", ESTIMATES.values(), ids=ESTIMATES)
    def test_projected_gradients_point_along_the_gradient(self, method: Method, make_problem: MakeProblem) -> None:
        """The mean of ``g z`` over N = 300 queries at a fixed point: the gradient, or what the subspace shows of it.

        In d = 29 dimensions its error relative to the gradient is sqrt((d + 1) / N) = 0.32 (test_estimators.py), which
        makes a cosine of 1 / sqrt(1 + 0.1) = 0.953; at 4 deviations of the squared error (4 sqrt(2 / d) = 1.05 of
        it) still 0.911.
        """
        problem = make_problem(torch.float64)
        optimizer = attached(method, problem, eps=1e-3, num_queries=10)
        gradient = torch.cat([seen_gradient(optimizer, p, p.detach() + 0.5).flatten() for p in problem.parameters()])
        total = torch.zeros_like(gradient)
        for step in range(30):
            record = optimizer.estimate(problem)
            for query, projected_grad in enumerate(record.projected_grads):
                z, perturbations = [], optimizer.perturbations(query, 1)
                for parameter in problem.parameters():
                    out = torch.empty(parameter.shape, dtype=torch.float64)
                    perturbations[parameter].add_to(torch.zeros_like(out), out)
                    z.append(out.flatten() / 1e-3)
                total += projected_grad * torch.cat(z)
            optimizer.apply(StepRecord(step, 0, record.lr, (), record.losses, 0))
        assert torch.cosine_similarity(total, gradient, dim=0) > 0.91

    def test_new_parameters_are_audited_when_they_first_take_part(
        self, method: Method, make_problem: MakeProblem
    ) -> None:
        problem, calls = make_problem(), []
        problem.vector.requires_grad_(False)
        optimizer = attached(method, problem)

        def loss() -> Tensor:
            calls.append(1)
            return problem()

        def evaluations() -> int:
            calls.clear()
            record = optimizer.estimate(loss)
            optimizer.step()
            return len(calls) - record.forward_passes

        assert evaluations() == 5 and evaluations() == 0
        problem.vector.requires_grad_(True)
        assert evaluations() == 5 and evaluations() == 0


class TestNonFinite:
    @pytest.mark.parametrize(("first", "value"), [(True, float("nan")), (False, float("inf"))])
    def test_it_raises_and_changes_nothing(
        self, method: Method, make_problem: MakeProblem, value: float, first: bool
    ) -> None:
        problem, untouched = make_problem(), make_problem()
        optimizer, reference = (attached(method, p) for p in (problem, untouched))
        if not first:
            run(problem, optimizer, 2), run(untouched, reference, 2)
        with pytest.raises(NonFiniteLossError, match=f"at step {0 if first else 2}"):
            optimizer.estimate(lambda: problem() * value)
        with pytest.raises(RuntimeError, match="no estimate"):
            optimizer.step()
        assert_same(weights(problem), weights(untouched))
        assert_same_state(optimizer, reference)
        assert run(problem, optimizer, 2) == run(untouched, reference, 2)
        assert_same(weights(problem), weights(untouched))

    def test_a_single_bad_evaluation_is_enough(self, method: Method, make_problem: MakeProblem) -> None:
        problem, calls = make_problem(), []
        optimizer = attached(method, problem)
        run(problem, optimizer, 1)

        def last_is_bad() -> Tensor:
            calls.append(1)
            return problem() * (float("nan") if len(calls) == optimizer.record.forward_passes else 1)

        with pytest.raises(NonFiniteLossError):
            optimizer.estimate(last_is_bad)

    def test_skipping_counts_the_step_and_goes_on(self, method: Method, make_problem: MakeProblem) -> None:
        problem = make_problem()
        optimizer = attached(method, problem)
        for bad in (True, False, True, False):
            before = weights(problem)
            state = {parameter: dict(entries) for parameter, entries in optimizer.state.items()}
            record = optimizer.estimate(lambda bad=bad: problem() * (float("nan") if bad else 1), skip_nonfinite=True)
            optimizer.step()
            assert (record.projected_grads == ()) is bad
            assert_same(weights(problem), before, but=() if bad else ("matrix", "images", "vector"))
            if bad:
                assert {parameter: dict(entries) for parameter, entries in optimizer.state.items()} == state
        assert optimizer.param_groups[0]["step"] == 4
        assert optimizer.param_groups[0]["forward_passes"] == 4 * record.forward_passes
