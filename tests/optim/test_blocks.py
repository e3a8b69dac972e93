"""Blocks of parameters that move in turn: nothing else moves, and records, checkpoints and memory know of it."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from optimizer_steps import assert_same, attached, weights
from zolightning.optim import LOZO, HiZOO, MeZO, MeZOAdam, StepRecord, ZerothOrderOptimizer

Method = Callable[..., ZerothOrderOptimizer]
pytestmark = pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")

BLOCKS = (("matrix",), ("images",))  # the vector is in none: it always moves
TURNS = [0, 0, 1, 1, 1, 0]


def in_blocks(method: Method, problem: nn.Module, blocks: tuple[tuple[str, ...], ...] = BLOCKS) -> ZerothOrderOptimizer:
    optimizer = attached(method, problem)
    optimizer.set_blocks([[problem.get_parameter(name) for name in names] for names in blocks])
    return optimizer


def run(problem: nn.Module, optimizer: ZerothOrderOptimizer, turns: list[int]) -> list[StepRecord]:
    records = []
    for block in turns:
        optimizer.activate([block])
        records.append(optimizer.estimate(problem))
        optimizer.step()
    return records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method(method: Method, make_problem: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    problem = make_problem(dtype)
    optimizer = in_blocks(method, problem)
    optimizer.fold_every_step = False  # of subspace methods: what is pending is folded when a block is left
    records = run(problem, optimizer, TURNS[:2])
    assert problem.images not in optimizer.state
    saved, stored = copy.deepcopy((optimizer.state_dict(), problem.state_dict()))
    optimizer.activate([1])
    before = weights(problem)  # in half precision the matrix has been rounded
    records += run(problem, optimizer, TURNS[2:5])
    assert_same(weights(problem), before, but=("images", "vector"))
    # One block is all that a method keeps, but for what of the first weights was small.
    assert optimizer.state.get(problem.matrix, {}).keys() <= {"threshold", "mask"}
    records += run(problem, optimizer, TURNS[5:])
    assert [record.blocks for record in records] == [(block,) for block in TURNS]

    replayed = make_problem(dtype)
    replayer = in_blocks(method, replayed)
    for record in records:
        replayer.apply(record)
    replayer.detach()

    resumed = make_problem(dtype)
    resumed.load_state_dict(stored)
    resumer = in_blocks(method, resumed)
    resumer.fold_every_step = False
    resumer.load_state_dict(saved)
    assert resumer.active == (0,)
    assert run(resumed, resumer, TURNS[2:]) == records[2:]

    for found in (replayed, resumed):
        assert_same(weights(found), weights(problem))


def test_state_of_blocks_that_are_left_can_be_kept(make_problem: Callable[..., nn.Module]) -> None:
    problem = make_problem()
    optimizer = attached(partial(MeZOAdam, lr=0.01), problem)
    optimizer.set_blocks([[problem.matrix], [problem.images]], left_state="keep")
    run(problem, optimizer, TURNS)
    assert [optimizer.state[parameter]["step"] for parameter in problem.parameters()] == [3, 3, 6]


def test_curvature_is_kept_of_active_blocks_only(make_problem: Callable[..., nn.Module]) -> None:
    """It begins anew with each visit; what is in no block moves as by MeZO."""
    problem = make_problem()
    optimizer = in_blocks(partial(HiZOO, lr=0.02, smoothing=0.1), problem)
    run(problem, optimizer, TURNS[:5])
    kept = {name for name, parameter in problem.named_parameters() if "curvature" in optimizer.state.get(parameter, {})}
    assert kept == {"images"}
    vector = problem.vector.detach().clone()
    (record,) = run(problem, optimizer, [0])
    direction = optimizer.directions(optimizer.param_groups[0], 0, record.step, {0: -0.02 * record.projected_grads[0]})
    direction[problem.vector].accumulate(vector)
    assert torch.equal(problem.vector, vector)
    curvature = optimizer.state[problem.matrix]["curvature"]
    assert (curvature - 1).abs().max() > 0.1 and problem.images not in optimizer.state

    (gradient,) = torch.autograd.grad(problem(), problem.matrix)
    expected = torch.zeros(())
    for query in range(1, 21):
        direction = torch.zeros_like(gradient)
        group = optimizer.param_groups[0]
        optimizer.directions(group, group["seed"], group["step"], {query: 1.0})[problem.matrix].accumulate(direction)
        expected += (gradient * direction / curvature.view(4, 3).sqrt()).sum().square() / 20
    found = []
    optimizer.register_estimate_pre_hook(lambda _, squared_grad: found.append(squared_grad(0, 20)))
    optimizer.estimate(problem)
    assert found == [pytest.approx(expected.item(), rel=1e-3)], "the metric of the inverse curvature"


@pytest.mark.parametrize("method", [partial(MeZO, lr=1e-2), partial(LOZO, lr=1e-2, rank=2)])
def test_the_squared_gradient_of_a_block(make_problem: Callable[..., nn.Module], method: Method) -> None:
    """That of autograd along the method's own directions: differences are exact for a quadratic."""
    problem = make_problem(torch.float64)
    optimizer = in_blocks(method, problem)
    run(problem, optimizer, [1])
    (gradient,) = torch.autograd.grad(problem(), problem.matrix)
    expected = torch.zeros(())
    for query in range(1, 21):  # a step has query 0
        direction = torch.empty_like(gradient)
        with optimizer.only(0), torch.no_grad():
            optimizer.perturbations(query, 1)[problem.matrix].add_to(torch.zeros_like(gradient), direction)
        expected = expected + (gradient * direction / 1e-3).sum().square() / 20
    found = []
    hook = optimizer.register_estimate_pre_hook(lambda _, squared_grad: found.append(squared_grad(0, 20)))
    before = weights(problem)
    record = optimizer.estimate(problem)
    hook.remove()
    assert_same(weights(problem), before)
    assert found == [pytest.approx(expected.item(), rel=1e-6)]
    # Twenty squares of Gaussian numbers, each of standard deviation sqrt(2) times the mean: 32 % of it
    lifted = gradient if isinstance(optimizer, MeZO) else gradient @ optimizer.basis(problem.matrix).right
    assert found == [pytest.approx(lifted.square().sum().item(), rel=0.64)]
    assert (record.blocks, record.forward_passes) == ((1,), 42)
    optimizer.step()
    assert optimizer.estimate(problem).forward_passes == 2
    optimizer.register_estimate_pre_hook(lambda _, squared_grad: found.append(squared_grad(0, 1)))
    optimizer.estimate(lambda: problem() + float("inf"), skip_nonfinite=True)
    assert found[1:] == [0.0], "a loss that is not finite says nothing of a block"


def test_the_weight_of_blocks_multiplies_their_learning_rates(make_problem: Callable[..., nn.Module]) -> None:
    problem = make_problem()
    optimizer = in_blocks(partial(MeZO, lr=0.5), problem)
    optimizer.lr_scale = 0.5
    optimizer.activate([0], weight=0.125)
    assert optimizer.estimate(problem).lr == (0.5 * 0.5 * 0.125,)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((("matrix",), ("vector", "matrix")), "Block 1 shares parameters with an earlier one: matrix."),
        ((("matrix",), ()), "Block 1 of 2 has no parameter that trains: leave it out"),
    ],
)
def test_refused_blocks(make_problem: Callable[..., nn.Module], blocks: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        in_blocks(partial(MeZO, lr=0.1), make_problem(), blocks)


def test_a_checkpoint_of_blocks_needs_them(make_problem: Callable[..., nn.Module]) -> None:
    problem = make_problem()
    optimizer = in_blocks(partial(MeZO, lr=0.1), problem)
    optimizer.activate([1])
    with pytest.raises(ValueError, match="Block 1 cannot be activated: there are 0"):
        attached(partial(MeZO, lr=0.1), problem).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"Blocks \[1\] are active already"):
        optimizer.set_blocks([[problem.matrix]])
    with pytest.raises(ValueError, match="Block 2 cannot be activated: there are 2"):
        optimizer.activate([2])
