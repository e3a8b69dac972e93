"""When pending updates are added to the weights: counted, replayed, and before they are too large to perturb."""

import json
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.directions.low_rank import LowRank
from zolightning.optim import LOZO, ZOMOPI, StepRecord, SubspaceMeZO, SubspaceOptimizer, SubZero

METHODS = [
    partial(LOZO, lr=0.05, rank=2, momentum=0.5),
    partial(SubZero, lr=0.05, rank=3, betas=(0.9, 0.95)),
    partial(ZOMOPI, lr=0.05, rank=3, power_rank=2, vector_lr=0.05),
]


class Net(nn.Module):
    """Two layers, and a loss that is `scale` times larger."""

    def __init__(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        super().__init__()
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        self.inputs, self.scale = draw(5, 6).to(dtype), scale
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(draw(parameter.shape) * 0.3)

    def forward(self) -> Tensor:
        return self.scale * (self.layers(self.inputs).double() - 0.5).square().mean()


@pytest.fixture(params=METHODS, ids=lambda method: method.func.__name__)
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


def attached(
    method: Callable[..., SubspaceOptimizer], net: Net, every_step: bool = True, **kwargs: Any
) -> SubspaceOptimizer:
    optimizer = method(net.named_parameters(), **kwargs)
    optimizer.attach(net)
    optimizer.fold_every_step = every_step
    return optimizer


def train(
    net: Net, optimizer: SubspaceOptimizer, steps: range, resampled: tuple[int, ...] = (), folded: tuple[int, ...] = ()
) -> list[StepRecord]:
    """Steps, before some of which bases are drawn, and after some of which everything is folded."""
    records = []
    for step in steps:
        if step in resampled:
            optimizer.resample()
        records.append(optimizer.estimate(net))
        optimizer.step()
        if step in folded:
            optimizer.fold()
    return records


def assert_same_bits(net: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_plain_loop_has_the_trained_weights_after_every_step(method: Any) -> None:
    """As one in which nothing is folded but at the end of an interval, up to rounding; in float64 nearly none."""
    eager, lazy = Net(torch.float64), Net(torch.float64)
    optimizer, waiting = attached(method, eager), attached(method, lazy)
    waiting.fold_every_step = False
    for step in range(9):
        train(eager, optimizer, range(step, step + 1), resampled=(4, 8))
        train(lazy, waiting, range(step, step + 1), resampled=(4, 8))
        assert not optimizer.offsets() and waiting.offsets()
        saved = lazy.state_dict()
        for name, parameter in eager.named_parameters():
            torch.testing.assert_close(parameter.detach(), saved[name], rtol=1e-7, atol=1e-9)
    assert optimizer.param_groups[0]["folds"] == 9 and waiting.param_groups[0]["folds"] == 2


@pytest.mark.parametrize(
    ("dtype", "every_step"),
    [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)],
)
class TestTheSameBits:
    def test_replayed(self, method: Any, dtype: torch.dtype, every_step: bool) -> None:
        net, replayed = Net(dtype), Net(dtype)
        optimizer = attached(method, net, every_step, seed=3)
        records = train(net, optimizer, range(11), resampled=(4, 8), folded=(1, 6, 7))
        lines = [json.dumps(asdict(record)) for record in records]
        fresh = attached(method, replayed, seed=9)
        for line in lines:
            fresh.apply(StepRecord(**json.loads(line)))
        optimizer.detach(), fresh.detach()
        assert_same_bits(replayed, net)
        assert fresh.param_groups[0]["folds"] == optimizer.param_groups[0]["folds"] == (11 if every_step else 5)

    def test_resumed(self, method: Any, dtype: torch.dtype, every_step: bool) -> None:
        for stop in (2, 3, 6):
            net, restored = Net(dtype), Net(dtype)
            optimizer = attached(method, net, every_step, seed=3)
            train(net, optimizer, range(stop), resampled=(4,), folded=(1,))
            fresh = attached(method, restored, every_step, seed=9)
            restored.load_state_dict(net.state_dict())
            fresh.load_state_dict(optimizer.state_dict())
            rest = range(stop, 9)
            assert train(restored, fresh, rest, (4,), (6,)) == train(net, optimizer, rest, (4,), (6,))
            optimizer.detach(), fresh.detach()
            assert_same_bits(restored, net)

    def test_what_waits_in_a_checkpoint_is_there_in_a_plain_loop(
        self, method: Any, dtype: torch.dtype, every_step: bool
    ) -> None:
        net, restored = Net(dtype), Net(dtype)
        optimizer = attached(method, net, False, seed=3)
        train(net, optimizer, range(3))
        restored.load_state_dict(net.state_dict())
        if every_step:
            fresh = attached(method, restored)
            fresh.load_state_dict(optimizer.state_dict())
        else:  # names come after the state
            fresh = method(restored.parameters())
            fresh.load_state_dict(optimizer.state_dict())
            fresh.attach(restored)
        for name, value in net.state_dict().items():
            assert torch.equal(restored.state_dict()[name], value)
            assert torch.equal(dict(restored.named_parameters())[name], value)


class TestLargeCores:
    """What half precision makes of ``core + eps z`` where the core is large."""

    @staticmethod
    def cosine(rms: float, folding: bool, autocast: bool = False) -> float:
        """Of the direction that both sides of an evaluation differ by, and the one that was meant."""
        dtype, eps = torch.float32 if autocast else torch.bfloat16, 1e-3
        w = nn.Parameter(torch.zeros(64, 48, dtype=dtype))
        optimizer = SubspaceMeZO([("w", w)], lr=rms, eps=eps, rank=16, seed=1)
        optimizer.fold_every_step = False
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            optimizer.estimate(lambda: w.double().sum())
            record = optimizer.record
            object.__setattr__(record, "projected_grads", (1.0,))  # a step of `rms` in each element
            optimizer.step()
            if folding:
                optimizer.estimate(lambda: w.double().sum())
        sides = []
        for sign in (1, -1):
            change = optimizer.perturbations(0, sign)[w]
            assert isinstance(change, LowRank)
            sides.append(change.write_core(torch.empty(16, 48, dtype=torch.bfloat16)).double())
        meant = torch.zeros(16, 48)
        direction = optimizer.perturbations(0, 1)[w].direction
        direction.accumulate(meant)
        return F.cosine_similarity((sides[0] - sides[1]).flatten(), meant.double().flatten(), dim=0).item()

    @pytest.mark.parametrize("rms", [0.003, 0.03, 0.1, 0.3, 1.0, 3.0])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_they_are_folded_before_directions_are_lost(self, rms: float, autocast: bool) -> None:
        assert self.cosine(rms, folding=True, autocast=autocast) > 0.99

    def test_what_would_be_lost_otherwise(self) -> None:
        assert self.cosine(0.3, folding=False) < 0.97
        assert self.cosine(3.0, folding=False) < 0.6

    def test_small_ones_and_wide_ones_wait(self) -> None:
        for dtype, lr, folds in ((torch.bfloat16, 1e-4, 0), (torch.bfloat16, 1.0, 1), (torch.float32, 1.0, 0)):
            w = nn.Parameter(torch.zeros(8, 6, dtype=dtype))
            optimizer = SubspaceMeZO([("w", w)], lr=lr, rank=4)
            optimizer.fold_every_step = False
            optimizer.estimate(lambda w=w: w.double().sum())
            optimizer.step()
            assert optimizer.param_groups[0]["folds"] == 0
            assert optimizer.estimate(lambda w=w: w.double().sum()).folds == folds

    def test_a_fold_frees_them(self) -> None:
        """Though their largest elements have been asked for."""
        w = nn.Parameter(torch.zeros(8, 6, dtype=torch.bfloat16))
        optimizer = SubspaceMeZO([("w", w)], lr=1e-4, rank=4)
        optimizer.fold_every_step = False
        optimizer.estimate(lambda: w.double().sum())
        optimizer.step()
        core = weakref.ref(optimizer.state[w]["core"])
        optimizer.fold()
        assert core() is None

    def test_stacked_evaluations_see_the_same_directions(self) -> None:
        """After a large step nothing is pending, and losses are those of separate evaluations in a plain loop."""
        method = partial(SubspaceMeZO, lr=1.0, eps=1e-3, rank=4, num_queries=2, seed=2)
        net, plain = Net(torch.bfloat16, scale=100.0), Net(torch.bfloat16, scale=100.0)

        def loss(net: Net) -> Tensor:
            return net.scale * (net.layers(net.inputs).double() - 0.5).square().mean()

        stacked, separate = method(net.named_parameters()), method(plain.named_parameters())
        stacked.attach(net, 4)
        separate.attach(plain)
        stacked.fold_every_step = False
        stacked.estimate(partial(loss, net))
        stacked.step()
        plain.load_state_dict(net.state_dict())
        separate.load_state_dict(stacked.state_dict())
        found, expected = stacked.estimate(partial(loss, net)), separate.estimate(partial(loss, plain))
        assert found.folds == 1 and not stacked.offsets()
        assert found.losses == pytest.approx(expected.losses, rel=0.01)

    def test_whether_one_is_large_is_found_again(self) -> None:
        """By a run that is resumed, one that has the records of the steps, and a replay: the same folds and bits."""
        make = partial(SubspaceMeZO, lr=0.02, eps=1e-3, rank=4, seed=2)
        net = Net(torch.bfloat16)
        optimizer = attached(make, net, False)
        records, saved = [], []
        for step in range(12):
            saved.append(deepcopy((net.state_dict(), optimizer.state_dict())))
            records += train(net, optimizer, range(step, step + 1))
        counts = [record.folds for record in records]
        assert 1 < counts[-1] < 10  # some steps are followed by a fold, others are not
        trained = deepcopy(net.state_dict())
        for stop in range(12):
            resumed = Net(torch.bfloat16)
            fresh = attached(make, resumed, False)
            resumed.load_state_dict(saved[stop][0])
            fresh.load_state_dict(saved[stop][1])
            fresh.expect(records[stop : stop + 3])
            assert train(resumed, fresh, range(stop, 12)) == records[stop:]
            for name, value in trained.items():
                assert torch.equal(resumed.state_dict()[name], value)
        replayed = Net(torch.bfloat16)
        fresh = attached(make, replayed)
        for record in records:
            fresh.apply(record)
        for name, value in trained.items():
            assert torch.equal(replayed.state_dict()[name], value)


@pytest.mark.parametrize("every_step", [True, False])
def test_autocast_is_for_the_network(method: Any, every_step: bool) -> None:
    """Where no operation of the loss is one that autocast changes, it changes no bit of bases, updates and folds."""
    found = []
    for enabled in (True, False):
        net = Net()
        optimizer = attached(method, net, every_step, lr=1e-4, num_queries=2, align_queries=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for step in range(6):
                if step == 3:
                    optimizer.resample()
                optimizer.estimate(lambda net=net: sum(p.double().square().sum() for p in net.parameters()))
                optimizer.step()
            found.append({name: value.clone() for name, value in net.state_dict().items()})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]) and value.isfinite().all(), name


class TestTheScaleOfTheLoss:
    """With Adam's decays it cancels, for matrices as for what has no subspace."""

    @staticmethod
    def moves(scale: float, **kwargs: Any) -> list[Tensor]:
        net, start = Net(torch.float64, scale), Net(torch.float64)
        optimizer = attached(partial(SubZero, lr=1e-3, rank=3), net, **kwargs)
        train(net, optimizer, range(5))
        return [(p - q).detach() for p, q in zip(net.parameters(), start.parameters(), strict=True)]

    def test_it_cancels(self) -> None:
        for one, other in zip(*(self.moves(scale, betas=(0.9, 0.95)) for scale in (1.0, 30.0)), strict=True):
            assert other.norm() == pytest.approx(one.norm().item(), rel=0.05)

    def test_it_does_not_without(self) -> None:
        for one, other in zip(*(self.moves(scale) for scale in (1.0, 1.1)), strict=True):
            assert other.norm() > 1.05 * one.norm()

    def test_vectors_take_the_steps_of_adam(self) -> None:
        """With the gradients that their directions estimate; torch's Adam is the comparison."""
        net, other = Net(torch.float64), Net(torch.float64)
        optimizer = attached(partial(SubZero, lr=1e-2, rank=3, betas=(0.9, 0.95), vector_lr=3e-3), net)
        vectors = [p for p in other.parameters() if p.ndim == 1]
        adam = torch.optim.Adam(vectors, lr=3e-3, betas=(0.9, 0.95))
        own = [p for p in net.parameters() if p.ndim == 1]
        for _ in range(6):
            record = optimizer.estimate(net)
            for parameter, twin in zip(own, vectors, strict=True):
                twin.grad = torch.zeros_like(twin)
                optimizer.perturbations(0, 1)[parameter].accumulate(twin.grad)
                twin.grad *= record.projected_grads[0] / optimizer.param_groups[0]["eps"]
            optimizer.step()
            adam.step()
        for parameter, twin in zip(own, vectors, strict=True):
            torch.testing.assert_close(parameter, twin, rtol=1e-4, atol=1e-7)


class TestTorchScript:
    def test_scripted_parts(self, method: Any) -> None:
        """They take no hooks; what is saved is folded nevertheless, of all modules that own parameters."""
        scripted = torch.jit.script(Net().layers)
        net = Net()
        net.layers = nn.Sequential(scripted, nn.Linear(4, 4))
        optimizer = method(net.parameters())
        optimizer.attach(net)
        optimizer.fold_every_step = False
        with pytest.warns(UserWarning, match="perturbed in place"):
            train(net, optimizer, range(3))
        saved, part = net.state_dict(), net.layers.state_dict(prefix="layers.")
        stored = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        optimizer.detach()
        for name, parameter in net.named_parameters():
            assert torch.equal(saved[name], parameter) and torch.equal(part[name], parameter), name
            assert torch.equal(stored[name], parameter) == (parameter.ndim == 1), name

    def test_a_scripted_module_alone(self, method: Any) -> None:
        scripted = torch.jit.script(Net().layers)
        optimizer = method(scripted.named_parameters())
        optimizer.attach(scripted)
        before = [parameter.detach().clone() for parameter in scripted.parameters()]
        with pytest.warns(UserWarning, match="perturbed in place"):
            optimizer.estimate(lambda: scripted(torch.ones(2, 6)).square().mean())
        optimizer.step()
        assert all(not torch.equal(p, q) for p, q in zip(scripted.parameters(), before, strict=True))


def test_a_plain_loop_with_new_subspaces(method: Any) -> None:
    """The loop of SubspaceOptimizer's docstring."""
    model = Net()
    before = model().item()
    optimizer = method(model.named_parameters(), seed=1)
    optimizer.attach(model)
    for step in range(60):
        if step and step % 20 == 0:
            optimizer.resample()
        optimizer.estimate(model)
        optimizer.step()
    optimizer.detach()
    assert optimizer.param_groups[0]["refresh"] == 2 and model().item() < 0.8 * before


def test_a_basis_is_of_matrices_only() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"`layers.0.bias` moves along dense directions and has no basis"):
        SubspaceMeZO(net.named_parameters()).basis(net.layers[0].bias)
