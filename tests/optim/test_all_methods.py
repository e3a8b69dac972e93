"""What every method keeps to, and refuses. A method is put through it by one row in the table of tests/conftest.py."""

import copy
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from conftest import METHODS
from optimizer_steps import MakeProblem, Method, assert_same, assert_same_state, attached, run, weights
from zolightning.optim import StepRecord

BY_CLASS: dict[str, Any] = {made.func.__name__: made for made in METHODS.values()}
WIDE_AND_NARROW = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")


class TestStep:
    def test_it_descends(self, method: Method, make_problem: MakeProblem) -> None:
        problem = make_problem()
        before = problem().item()
        run(problem, optimizer := attached(method, problem), 60)
        optimizer.detach()
        assert problem().item() < 0.6 * before

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

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
    @pytest.mark.parametrize("made", BY_CLASS.values(), ids=BY_CLASS)
    def test_copies_go_on_as_the_originals_do(self, made: Method, copied: Any, make_problem: MakeProblem) -> None:
        problem = make_problem(torch.bfloat16)
        optimizer = attached(made, problem)
        optimizer.fold_every_step = False  # so that updates of subspace methods are waiting
        run(problem, optimizer, 3)
        twin, its_optimizer = copied((problem, optimizer))
        assert_same(weights(twin), weights(problem))
        its_optimizer.attach(twin)
        assert run(twin, its_optimizer, 2) == run(problem, optimizer, 2)
        assert_same(weights(twin), weights(problem))
        assert_same_state(its_optimizer, optimizer)

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

    def test_without_an_estimate_it_says_so_and_changes_nothing(
        self, method: Method, make_problem: MakeProblem
    ) -> None:
        problem, closures = make_problem(), []
        optimizer = attached(method, problem)
        before = weights(problem)
        with pytest.raises(RuntimeError, match=r"has no estimate to apply"):
            optimizer.step(lambda: closures.append(1))
        assert_same(weights(problem), before)
        assert len(closures) == 1
        optimizer.estimate(problem)
        assert optimizer.step(lambda: 5) == 5
        after = weights(problem)
        assert_same(after, before, but=("matrix", "images", "vector"))
        with pytest.raises(RuntimeError, match=r"has no estimate to apply"):
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
        for _ in range(4):
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


@pytest.mark.parametrize("method", BY_CLASS.values(), ids=BY_CLASS)
class TestBadInput:
    """Of each class: what it refuses is the same with all options."""

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

    def test_parameters_made_of_other_tensors(self, method: Method, make_problem: MakeProblem) -> None:
        problem = make_problem()
        problem.odd = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
        with pytest.raises(ValueError, match=r"Parameter `odd` is a TwoTensor, .*Freeze it"):
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
