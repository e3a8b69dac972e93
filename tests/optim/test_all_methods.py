"""What every method keeps to. A method is put through all of it by one row in the table of tests/conftest.py."""

import json
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zolightning.optim import NonFiniteLossError, StepRecord, ZerothOrderOptimizer
from zolightning.optim.subspace import SubspaceOptimizer

Method = Callable[..., ZerothOrderOptimizer]
MakeProblem = Callable[..., nn.Module]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE_AND_NARROW = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")


def bits(tensor: Tensor) -> Tensor:
    """The stored bits, also under a context that perturbs what is read."""
    with torch._C.DisableTorchFunction():
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        return tensor.detach().clone().view(integer)


def stored(problem: nn.Module) -> dict[str, Tensor]:
    return {name: bits(parameter) for name, parameter in problem.named_parameters()}


def weights(problem: nn.Module) -> dict[str, Tensor]:
    """All of the training: what a checkpoint has, where an attached method keeps a part of it elsewhere."""
    with torch._C.DisableTorchFunction():
        return {name: bits(weight) for name, weight in problem.state_dict().items()}


def attached(method: Method, problem: nn.Module, params: Any = None, **kwargs: Any) -> ZerothOrderOptimizer:
    optimizer = method(problem.named_parameters() if params is None else params, **kwargs)
    optimizer.attach(problem)
    return optimizer


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]) is (name not in but), name


def assert_same_state(found: ZerothOrderOptimizer, expected: ZerothOrderOptimizer) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for index in one["state"].keys() | other["state"].keys():
        twins, entries = (state["state"].get(index, {}) for state in (one, other))
        assert twins.keys() == entries.keys()
        for name, value in entries.items():
            twin = twins[name]
            if isinstance(value, Tensor):
                assert twin.dtype == value.dtype and torch.equal(twin, value)
            else:
                assert twin == value


def run(problem: nn.Module, optimizer: ZerothOrderOptimizer, steps: int) -> list[StepRecord]:
    records = []
    for _ in range(steps):
        records.append(optimizer.estimate(problem))
        optimizer.step()
    return records


def round_trip(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def seen_gradient(optimizer: ZerothOrderOptimizer, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """The mean of ``z z' gradient``: for directions ``s L Z R'`` it is ``s^2 L L' gradient R R'``."""
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
    @pytest.mark.parametrize("dtype", DTYPES)
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

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("dtype", DTYPES)
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

    def test_projected_gradients_point_along_the_gradient(self, method: Method, make_problem: MakeProblem) -> None:
        """The mean of ``g z`` over N = 600 queries at a fixed point: the gradient, or what the subspace shows of it.

        In d = 29 dimensions its error relative to the gradient is sqrt((d + 1) / N) = 0.22 (test_estimators.py), which
        makes a cosine of 1 / sqrt(1 + 0.05) = 0.976; at 4 deviations of the squared error (4 sqrt(2 / d) = 1.05 of
        it) still 0.953.
        """
        problem = make_problem(torch.float64)
        optimizer = attached(method, problem, eps=1e-3)
        gradient = torch.cat([seen_gradient(optimizer, p, p.detach() + 0.5).flatten() for p in problem.parameters()])
        total = torch.zeros_like(gradient)
        steps = 600 // optimizer.num_queries
        for step in range(steps):
            record = optimizer.estimate(problem)
            for query, projected_grad in enumerate(record.projected_grads):
                z, perturbations = [], optimizer.perturbations(query, 1)
                for parameter in problem.parameters():
                    out = torch.empty(parameter.shape, dtype=torch.float64)
                    perturbations[parameter].add_to(torch.zeros_like(out), out)
                    z.append(out.flatten() / 1e-3)
                total += projected_grad * torch.cat(z)
            optimizer.apply(StepRecord(step, 0, record.lr, (), record.loss, 0))
        assert torch.cosine_similarity(total, gradient, dim=0) > 0.95

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


class TestStep:
    def test_it_descends(self, method: Method, make_problem: MakeProblem) -> None:
        problem = make_problem()
        before = problem().item()
        run(problem, optimizer := attached(method, problem), 150)
        optimizer.detach()
        assert problem().item() < 0.3 * before

    def test_the_seed_decides(self, method: Method, make_problem: MakeProblem) -> None:
        def trained(seed: int) -> dict[str, Tensor]:
            problem = make_problem()
            run(problem, attached(method, problem, seed=seed), 5)
            return weights(problem)

        assert_same(trained(3), trained(3))
        assert_same(trained(3), trained(4), but=("matrix", "images", "vector"))

    def test_the_seed_is_that_of_seed_everything(
        self, method: Method, make_problem: MakeProblem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "77")
        assert method(make_problem().parameters()).param_groups[0]["seed"] == 77
        assert method(make_problem().parameters(), seed=5).param_groups[0]["seed"] == 5
        monkeypatch.delenv("PL_GLOBAL_SEED")
        assert method(make_problem().parameters()).param_groups[0]["seed"] == 0

    @pytest.mark.parametrize("dtype", WIDE_AND_NARROW)
    def test_neither_order_nor_grouping_of_parameters_matters(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype
    ) -> None:
        problem, reordered = make_problem(dtype), make_problem(dtype)
        first = attached(method, problem)
        matrix, *rest = reordered.named_parameters()
        second = attached(method, reordered, [{"params": rest[::-1]}, {"params": [matrix]}])
        records = run(problem, first, 4)
        # The quadratic sums its terms in the module's order, whatever the optimizer's
        assert run(reordered, second, 4) == [StepRecord(**asdict(record) | {"lr": record.lr * 2}) for record in records]
        assert_same(weights(reordered), weights(problem))

    def test_names_come_from_the_module_where_there_is_one(self, method: Method, make_problem: MakeProblem) -> None:
        named, known, anonymous = make_problem(), make_problem(), make_problem()
        optimizers = [method(named.named_parameters()), method(known.parameters()), method(anonymous.parameters())]
        optimizers[1].attach(known)
        for problem, optimizer in zip((named, known, anonymous), optimizers, strict=True):
            run(problem, optimizer, 2)
            optimizer.detach()
        assert_same(weights(known), weights(named))
        assert_same(weights(anonymous), weights(named), but=("matrix", "images", "vector"))

    @pytest.mark.parametrize("dtype", WIDE_AND_NARROW)
    def test_frozen_parameters_do_not_move_and_do_not_matter(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype
    ) -> None:
        problem, alone = make_problem(dtype), make_problem(dtype)
        problem.matrix.requires_grad_(False)
        optimizer = attached(method, problem)
        before = weights(problem)
        run(problem, optimizer, 3)
        assert_same(weights(problem), before, but=("images", "vector"))
        assert problem.matrix not in optimizer.state
        # The same steps where the frozen matrix is unknown to the optimizer
        others = [(name, parameter) for name, parameter in alone.named_parameters() if name != "matrix"]
        run(alone, attached(method, alone, others), 3)
        assert_same(weights(alone), weights(problem))

    def test_parameters_may_thaw(self, method: Method, make_problem: MakeProblem) -> None:
        problem = make_problem()
        problem.vector.requires_grad_(False)
        optimizer = attached(method, problem)
        run(problem, optimizer, 2)
        before = weights(problem)
        problem.vector.requires_grad_(True)
        run(problem, optimizer, 1)
        assert_same(weights(problem), before, but=("matrix", "images", "vector"))

    def test_groups_have_their_own_learning_rate(self, method: Method, make_problem: MakeProblem) -> None:
        def moved(factor: float) -> tuple[Tensor, Tensor]:
            problem, lr = make_problem(torch.float64), 1e-3
            matrix, images, vector = problem.named_parameters()
            groups = [{"params": [matrix, images], "lr": lr}, {"params": [vector], "lr": factor * lr}]
            before = [p.detach().clone() for p in (problem.matrix, problem.vector)]
            (record,) = run(problem, optimizer := method(groups), 1)
            optimizer.detach()
            assert record.lr == (lr, factor * lr)
            return problem.matrix.detach() - before[0], problem.vector.detach() - before[1]

        (matrix, vector), (same_matrix, farther_vector) = moved(1.0), moved(3.0)
        assert torch.equal(matrix, same_matrix)
        torch.testing.assert_close(farther_vector, 3 * vector, rtol=1e-5, atol=0)  # coefficients have 20 bits

    @pytest.mark.parametrize("dtype", WIDE_AND_NARROW)
    def test_layouts_do_not_matter(self, method: Method, make_problem: MakeProblem, dtype: torch.dtype) -> None:
        problem, contiguous = make_problem(dtype), make_problem(dtype)
        contiguous.images = nn.Parameter(contiguous.images.detach().contiguous())
        contiguous.matrix = nn.Parameter(contiguous.matrix.detach().t().contiguous().t())
        assert not problem.images.is_contiguous() and not contiguous.matrix.is_contiguous()
        strides = [p.stride() for p in problem.parameters()]
        order = ["matrix", "images", "vector"]
        run(problem, optimizer := method(problem.named_parameters()), 3)
        run(contiguous, other := method((name, getattr(contiguous, name)) for name in order), 3)
        optimizer.detach(), other.detach()
        for name in order:
            assert torch.equal(getattr(problem, name), getattr(contiguous, name)), name
        assert [p.stride() for p in problem.parameters()] == strides

    def test_without_an_estimate_nothing_changes(self, method: Method, make_problem: MakeProblem) -> None:
        problem, closures = make_problem(), []
        optimizer = attached(method, problem)
        before = weights(problem)
        assert optimizer.step(lambda: closures.append(1)) is None and len(closures) == 1
        assert_same(weights(problem), before)
        optimizer.estimate(problem)
        assert optimizer.step(lambda: 5) == 5
        after = weights(problem)
        assert_same(after, before, but=("matrix", "images", "vector"))
        optimizer.step()
        assert_same(weights(problem), after)

    @pytest.mark.parametrize("dtype", WIDE_AND_NARROW)
    def test_without_a_learning_rate_nothing_changes(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype
    ) -> None:
        problem = make_problem(dtype)
        optimizer = attached(method, problem)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        before = weights(problem)
        for _ in range(10):
            run(problem, optimizer, 1)
            scheduler.step()
        assert_same(weights(problem), before)

    def test_hooks_of_torch_optimizers(self, method: Method, make_problem: MakeProblem) -> None:
        problem, called = make_problem(), []
        optimizer = attached(method, problem)
        optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        optimizer.register_step_post_hook(lambda *_: called.append("after"))
        optimizer.zero_grad()
        run(problem, optimizer, 1)
        assert called == ["before", "after"]

    def test_groups_may_be_added(self, method: Method, make_problem: MakeProblem) -> None:
        problem, whole = make_problem(), make_problem()
        problem.vector.requires_grad_(False)
        optimizer = method([problem.matrix, problem.images])
        optimizer.attach(problem)
        optimizer.add_param_group({"params": [problem.vector], "lr": 0.5})
        problem.vector.requires_grad_(True)
        reference = method(
            [{"params": [whole.matrix, whole.images]}, {"params": [whole.vector], "lr": 0.5}],
        )
        reference.attach(whole)
        assert run(problem, optimizer, 3) == run(whole, reference, 3)
        assert_same(weights(problem), weights(whole))


class TestNonFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("first", [True, False])
    def test_it_raises_and_changes_nothing(
        self, method: Method, make_problem: MakeProblem, value: float, first: bool
    ) -> None:
        problem, untouched = make_problem(), make_problem()
        optimizer, reference = (attached(method, p) for p in (problem, untouched))
        if not first:
            run(problem, optimizer, 2), run(untouched, reference, 2)
        with pytest.raises(NonFiniteLossError, match=f"at step {0 if first else 2}"):
            optimizer.estimate(lambda: problem() * value)
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


class TestRecords:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_replaying_them_gives_the_same_weights(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype
    ) -> None:
        problem, replayed = make_problem(dtype), make_problem(dtype)
        optimizer = attached(method, problem, [{"params": problem.named_parameters()}], seed=9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        lines = []
        for step in range(12):
            bad = step == 5
            record = optimizer.estimate(lambda bad=bad: problem() * (float("nan") if bad else 1), skip_nonfinite=True)
            optimizer.step()
            scheduler.step()
            lines.append(json.dumps(asdict(record)))
        # A process that knows neither seed nor schedule
        fresh = attached(method, replayed, seed=456)
        fresh.param_groups[0]["lr"] = 123.0
        for line in lines:
            fresh.apply(StepRecord(**json.loads(line)))
        assert_same(weights(replayed), weights(problem))
        for group in (*fresh.param_groups, *optimizer.param_groups):
            for name in ("lr", "seed", "initial_lr"):
                group.pop(name, None)
        assert_same_state(fresh, optimizer)

    def test_a_record_says_what_happened(self, method: Method, make_problem: MakeProblem) -> None:
        problem, losses = make_problem(), []
        optimizer = attached(method, problem, seed=9)
        run(problem, optimizer, 2)

        def loss() -> Tensor:
            losses.append(problem().item())
            return problem()

        record = optimizer.estimate(loss)
        assert record is optimizer.record
        assert (record.step, record.seed, record.lr) == (2, 9, (optimizer.param_groups[0]["lr"],))
        assert len(record.projected_grads) == optimizer.num_queries
        assert record.loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert record.forward_passes == len(losses) == len(optimizer.estimator.probes(optimizer.num_queries))
        assert optimizer.param_groups[0]["step"] == 2
        optimizer.step()
        assert optimizer.param_groups[0]["step"] == 3
        assert optimizer.param_groups[0]["forward_passes"] == 3 * record.forward_passes


class TestStateDict:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_restored_run_goes_on_as_if_nothing_had_happened(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype
    ) -> None:
        problem, restored = make_problem(dtype), make_problem(dtype)
        optimizer = attached(method, problem, seed=9)
        run(problem, optimizer, 4)
        restored.load_state_dict(problem.state_dict())
        fresh = attached(method, restored, lr=123.0, seed=456)
        fresh.load_state_dict(round_trip(optimizer.state_dict()))
        assert_same_state(fresh, optimizer)
        assert run(restored, fresh, 4) == run(problem, optimizer, 4)
        assert_same(weights(restored), weights(problem))
        assert_same_state(fresh, optimizer)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_state_is_kept_wide_and_not_shared(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype
    ) -> None:
        problem, other = make_problem(dtype), make_problem(dtype)
        optimizer = attached(method, problem)
        run(problem, optimizer, 2)
        fresh = attached(method, other)
        fresh.load_state_dict(optimizer.state_dict())
        fresh.estimate(other)  # makes what is not in the state but follows from it
        for parameter, twin in zip(problem.parameters(), other.parameters(), strict=True):
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    assert value.dtype in (torch.float32, torch.int16), name
                    assert value.data_ptr() != fresh.state[twin][name].data_ptr()
        assert optimizer.state_bytes() == fresh.state_bytes()

    def test_hyperparameters_live_in_groups(self, method: Method, make_problem: MakeProblem) -> None:
        optimizer = method(make_problem().parameters())
        assert {"lr", "eps", "step", "seed", "forward_passes"} <= optimizer.defaults.keys()
        assert optimizer.defaults.keys() <= optimizer.param_groups[0].keys()
        assert type(optimizer).__name__ in repr(optimizer)


class TestBadInput:
    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            *[("lr", value) for value in (0.0, -1.0, float("nan"), float("inf"), "1e-3", None)],
            *[("eps", value) for value in (0.0, -1.0, float("nan"), float("inf"))],
            *[("num_queries", value) for value in (0, -1, 1.5, "2")],
            *[("seed", value) for value in (2**63, 1.5, "7")],
            *[("update_precision", value) for value in ("fp32", None)],
            *[("noise", value) for value in ("normal", None)],
            *[("estimator", value) for value in ("two_sided", type(None))],
        ],
    )
    def test_values_are_refused_by_name(
        self, method: Method, make_problem: MakeProblem, argument: str, value: Any
    ) -> None:
        with pytest.raises(ValueError, match=f"`{argument}` must"):
            method(make_problem().parameters(), **{argument: value})

    @pytest.mark.parametrize(("argument", "value"), [("lr", -1.0), ("eps", 0.0), ("weight_decay", -1.0)])
    def test_values_of_groups_too(self, method: Method, make_problem: MakeProblem, argument: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"`{argument}` must"):
            method([{"params": make_problem().parameters(), argument: value}])

    def test_groups_share_eps(self, method: Method, make_problem: MakeProblem) -> None:
        matrix, *rest = make_problem().parameters()
        with pytest.raises(ValueError, match="`eps` must be the same in all parameter groups"):
            method([{"params": [matrix], "eps": 1e-2}, {"params": rest}])

    def test_names_occur_once(self, method: Method, make_problem: MakeProblem) -> None:
        groups = [{"params": make_problem().named_parameters()} for _ in range(2)]
        with pytest.raises(ValueError, match="Two parameters are named `matrix`"):
            method(groups)

    def test_nothing_to_train(self, method: Method, make_problem: MakeProblem) -> None:
        problem = make_problem().requires_grad_(False)
        with pytest.raises(ValueError, match="No parameter is trainable"):
            method(problem.parameters()).attach(problem)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
    def test_parameters_of_other_dtypes(self, method: Method, make_problem: MakeProblem, dtype: torch.dtype) -> None:
        problem = make_problem()
        problem.odd = nn.Parameter(torch.ones(3).to(dtype))
        with pytest.raises(ValueError, match=r"Parameter `odd` has dtype .*Freeze it"):
            method(problem.parameters()).attach(problem)

    def test_frozen_parameters_may_have_any_dtype(self, method: Method, make_problem: MakeProblem) -> None:
        problem = make_problem()
        problem.quantized = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
        optimizer = method([parameter for name, parameter in problem.named_parameters()])
        optimizer.attach(problem)
        loss = problem
        optimizer.estimate(lambda: loss())
        optimizer.step()
        assert torch.equal(problem.quantized, torch.ones(3, dtype=torch.int8))

    @pytest.mark.parametrize("loss", [None, 1.0, torch.ones(2)])
    def test_losses_are_scalar_tensors(self, method: Method, make_problem: MakeProblem, loss: Any) -> None:
        optimizer = method(make_problem().parameters())
        with pytest.raises(TypeError, match="The loss must be a tensor with one element, got"):
            optimizer.estimate(lambda: loss)
