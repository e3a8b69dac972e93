"""Pending updates: folding, saving and resampling."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.directions.basis import Basis
from zolightning.directions.slices import Slice
from zolightning.evaluation.perturbed import Perturbed
from zolightning.optim import LOZO, ZOMOPI, SubspaceMeZO, SubspaceOptimizer, SubZero
from zolightning.optim.cores import lift_in_pieces
from zolightning.optim.probing import of_whole_parameters

METHODS = [
    partial(LOZO, lr=0.05, rank=2),
    partial(SubZero, lr=0.05, rank=3),
    partial(SubspaceMeZO, lr=0.05, rank=3),
    partial(ZOMOPI, lr=0.05, rank=3, power_rank=2, vector_lr=0.05),
]


class Net(nn.Module):
    """Tied input and output embeddings, a layer with a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.layer, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight
            self.ids = torch.randint(20, (6,))
        self.to(dtype)

    def forward(self) -> Tensor:
        return F.cross_entropy(self.head(self.layer(self.embedding(self.ids)).tanh()).float(), self.ids.flip(0))


@pytest.fixture(params=METHODS, ids=lambda method: method.func.__name__)
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


def train(net: Net, optimizer: SubspaceOptimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.estimate(net)
        optimizer.step()


def attached(method: Any, net: Net, fold_every_step: bool = False, **kwargs: Any) -> SubspaceOptimizer:
    optimizer = method(net.parameters(), **kwargs)
    optimizer.attach(net)
    optimizer.fold_every_step = fold_every_step
    return optimizer


@torch.no_grad()
def effective_loss(net: Net, optimizer: SubspaceOptimizer) -> float:
    """The loss with what is pending."""
    with Perturbed(of_whole_parameters(optimizer, optimizer.offsets())):
        return net().item()


class TestPending:
    def test_folding_changes_no_loss(self, method: Any) -> None:
        net = Net()
        optimizer = attached(method, net)
        stored = net().item()
        train(net, optimizer, 5)
        pending = effective_loss(net, optimizer)
        assert abs(pending - stored) > 1e-2
        optimizer.fold()
        assert net().item() == pytest.approx(pending, rel=1e-5) == pytest.approx(effective_loss(net, optimizer))
        optimizer.fold()
        assert net().item() == pytest.approx(pending, rel=1e-5)

    def test_saved_weights_are_folded_and_fit_a_fresh_model(self, method: Any) -> None:
        net, fresh = Net(), Net()
        optimizer = attached(method, net)
        train(net, optimizer, 5)
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        fresh.load_state_dict(net.state_dict())
        assert fresh().item() == pytest.approx(effective_loss(net, optimizer), rel=1e-5)
        assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())
        assert torch.equal(net.state_dict()["head.weight"], net.state_dict()["embedding.weight"])
        assert not torch.equal(net.state_dict()["head.weight"], net.head.weight)

    def test_after_detaching_the_module_is_plain(self, method: Any) -> None:
        net = Net()
        optimizer = attached(method, net)
        train(net, optimizer, 5)
        saved = net.state_dict()
        optimizer.detach()
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, saved[name], msg=name)
            assert value.data_ptr() == dict(net.named_parameters(remove_duplicate=False))[name].data_ptr()
        assert not any(module._state_dict_hooks for module in net.modules())

    def test_the_module_can_be_copied_in_mid_interval(self, method: Any) -> None:
        net = Net()
        optimizer = attached(method, net)
        train(net, optimizer, 2)
        assert net().item() == copy.deepcopy(net)().item()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_slices(self, method: Any, dtype: torch.dtype) -> None:
        net, fresh = Net(dtype), Net(dtype)
        optimizer = attached(method, net)
        rows = torch.tensor([1, 3, 4, 6])
        optimizer.restrict({net.layer.weight: Slice(1, rows)})
        train(net, optimizer, 3)
        fresh.load_state_dict(net.state_dict())
        moved = (fresh.layer.weight != Net(dtype).layer.weight).any(dim=0)
        assert moved.nonzero().flatten().tolist() == rows.tolist()
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        assert fresh().item() == pytest.approx(effective_loss(net, optimizer), rel=tolerance)
        optimizer.detach()
        assert torch.equal(net.layer.weight, fresh.layer.weight)


class TestResampling:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_network_computes_the_same_before_and_after(self, method: Any, dtype: torch.dtype) -> None:
        net = Net(dtype)
        optimizer = attached(method, net)
        train(net, optimizer, 5)
        before, basis = effective_loss(net, optimizer), optimizer.basis(net.layer.weight)
        optimizer.resample()
        assert effective_loss(net, optimizer) == pytest.approx(before, rel=1e-5 if dtype == torch.float32 else 0.03)
        after = optimizer.basis(net.layer.weight)
        assert all(
            old is None or not torch.equal(old, new)
            for old, new in ((basis.left, after.left), (basis.right, after.right))
        )
        assert optimizer.param_groups[0]["refresh"] == 1

    def test_the_direction_of_the_update_is_that_of_the_evaluation(self, method: Any) -> None:
        """On the steps right before and right after new bases alike, for methods that move along what they evaluate."""
        if method.func is ZOMOPI:
            method = partial(method, power_rank=3, momentum=0.0, num_queries=1)
        net = Net(torch.float64)
        optimizer = attached(method, net, eps=1e-3)
        for step in range(6):
            if step in (2, 4):
                optimizer.resample()
            record = optimizer.estimate(net)
            moves = {}
            for parameter, change in optimizer.perturbations(0, 1).items():
                pending = optimizer.perturbations(0, 0).get(parameter)
                moves[parameter] = [torch.zeros_like(parameter) for _ in range(2)]
                change.add_to(torch.zeros_like(parameter), moves[parameter][0])
                if pending is not None:
                    pending.add_to(torch.zeros_like(parameter), moves[parameter][1])
            before = copy.deepcopy(net.state_dict())
            optimizer.step()
            after, sign = net.state_dict(), -torch.tensor(record.projected_grads[0]).sign()
            for name, parameter in net.named_parameters():
                evaluated = (moves[parameter][0] - moves[parameter][1]).flatten()
                moved = (after[name] - before[name]).flatten()
                cosine = sign * torch.cosine_similarity(evaluated, moved, dim=0)
                # One step of power iteration sets the singular values of the noise to 1, and so turns it.
                assert cosine > (0.7 if method.func is ZOMOPI and parameter.ndim == 2 else 0.99999), (step, name)

    def test_bases_depend_on_seed_refresh_and_name_only(self, method: Any) -> None:
        net = Net()
        optimizer = attached(method, net)
        train(net, optimizer, 3)
        optimizer.resample()
        fresh = attached(method, Net())
        fresh.param_groups[0]["refresh"] = 1
        found, expected = optimizer.basis(net.layer.weight), fresh.basis(fresh.param_groups[0]["params"][1])
        for side in ("left", "right"):
            one, other = getattr(found, side), getattr(expected, side)
            assert (one is None and other is None) or torch.equal(one, other)

    def test_bases_that_were_asked_for_before_attaching_are_those_of_the_names(self, method: Any) -> None:
        net, named = Net(), Net()
        optimizer, expected = method(net.parameters()), attached(method, named)
        assert optimizer.names[net.layer.weight] != expected.names[named.layer.weight]
        optimizer.basis(net.layer.weight)
        optimizer.attach(net)
        found = optimizer.basis(net.layer.weight).by_side
        for side, factor in expected.basis(named.layer.weight).by_side.items():
            assert torch.equal(found[side], factor)

    def test_nothing_is_left_over_without_a_core(self, method: Any) -> None:
        net = Net()
        optimizer = attached(method, net)
        optimizer.resample()
        optimizer.fold()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), Net().parameters(), strict=True))
        assert optimizer.momentum_kept is None


@pytest.mark.parametrize("first", [0, 6, 14])
def test_a_lift_in_pieces(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Of a whole matrix and of a rank's rows, which may begin within a piece; three rows at a time."""
    monkeypatch.setattr("zolightning.optim.cores._CHUNK", 7)
    monkeypatch.setattr("zolightning.optim.cores.chunk_size", lambda _: 6)
    basis, core = Basis(torch.randn(9, 3), torch.randn(2, 2)), torch.randn(3, 2)
    pieces = list(lift_in_pieces(basis, core, weight := torch.zeros(18 - first), first))
    for start, piece in pieces:
        weight[start : start + len(piece)] += piece
    torch.testing.assert_close(weight, basis.lift(core).flatten()[first:])
    assert [start for start, _ in pieces] == {0: [0, 6, 12], 6: [0, 6], 14: [0]}[first]


class TestMomentum:
    @staticmethod
    def kept(transport: str, anchor: int, rows: int = 256, columns: int = 64, rank: int = 16) -> float:
        w = nn.Parameter(torch.zeros(rows, columns))
        target = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1)) @ torch.randn(
            3, columns, generator=torch.Generator().manual_seed(2)
        )
        optimizer = SubspaceMeZO([w], lr=1e-3, rank=rank, momentum=0.9, num_queries=4)
        optimizer.param_groups[0].update(transport=transport, anchor=anchor)
        for _ in range(20):
            optimizer.estimate(lambda: (w - target).square().mean())
            optimizer.step()
        optimizer.resample()
        return optimizer.momentum_kept

    def test_share_that_a_resampling_leaves(self) -> None:
        """r / m = 1/16 of it without an anchor; all of it with as many anchors as there are directions."""
        assert self.kept("project", 0) == pytest.approx(1 / 16, rel=0.15)
        assert self.kept("project", 16) == pytest.approx(1, rel=1e-4)
        assert 0.3 < self.kept("project", 4) < self.kept("project", 8) < 1
        assert self.kept("reset", 0) == 0
        assert self.kept("keep", 0) == pytest.approx(1, rel=1e-4)

    @pytest.mark.parametrize("seed", range(4))
    def test_adams_steps_stay_bounded_where_elements_had_no_gradient_yet(self, seed: int) -> None:
        """One number of the noise in five is 0, and the momentum of other elements is mixed into such a one."""
        net = Net()
        before = copy.deepcopy(net)
        optimizer = LOZO(net.named_parameters(), lr=1e-3, rank=2, betas=(0.9, 0.95), vector_lr=0.0, seed=seed)
        optimizer.attach(net)
        for step in range(3):
            if step:
                optimizer.resample()
            optimizer.estimate(net)
            optimizer.step()
        for own, other in zip(net.parameters(), before.parameters(), strict=True):
            assert (own - other).abs().max() < 0.1

    def test_it_is_taken_along_when_frozen_or_just_restored(self) -> None:
        def momentum(restore: bool) -> Tensor:
            net = Net()
            optimizer = attached(partial(SubspaceMeZO, rank=3, momentum=0.9), net)
            train(net, optimizer, 3)
            optimizer.resample()
            if restore:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = attached(partial(SubspaceMeZO, rank=3, momentum=0.9), net)
                optimizer.load_state_dict(state)
            optimizer.resample()
            return optimizer.state[net.layer.weight]["momentum_buffer"]

        assert torch.equal(momentum(restore=True), momentum(restore=False))


def test_what_is_pending_of_a_frozen_matrix_is_read_alike_after_a_restore(method: Any) -> None:
    """From scratch memory as before: nobody writes to the weight, in place of which a copy would have to be kept."""

    def losses(restore: bool) -> tuple[float, ...]:
        net = Net()
        train(net, optimizer := attached(method, net), 3)
        net.layer.weight.requires_grad_(False)
        if restore:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = attached(method, net)
            optimizer.load_state_dict(state)
        optimizer.estimate(net)  # the first one finds out where parameters are read
        version = net.layer.weight._version
        record = optimizer.estimate(net)
        assert net.layer.weight._version == version and optimizer.is_pending(net.layer.weight)
        return record.losses

    assert losses(restore=True) == losses(restore=False)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "layer.weight",
            Basis(right=torch.ones(7, 2)),
            r"The right factor .* must have 8 rows and 1 to 8 columns, got",
        ),
        (
            "layer.weight",
            Basis(left=torch.ones(8, 9)),
            r"The left factor .* must have 8 rows .* got the shape \(8, 9\)",
        ),
        ("layer.weight", Basis(right=torch.ones(8)), r"got the shape \(8,\)"),
        ("layer.weight", Basis(), "The basis given for `layer.weight` has no factor"),
        ("layer.bias", Basis(right=torch.ones(8, 2)), "A basis is given for `layer.bias`, which this method does not"),
    ],
)
def test_given_bases_have_to_fit(name: str, given: Basis, message: str) -> None:
    net = Net()
    optimizer = attached(partial(LOZO, lr=0.05, rank=2), net)
    with pytest.raises(ValueError, match=message):
        optimizer.resample({net.get_parameter(name): given})
    assert not optimizer.state and optimizer.param_groups[0]["refresh"] == 0


@pytest.mark.parametrize(
    "method",
    [
        partial(LOZO, lr=0.05, rank=4, momentum=0.9),
        partial(SubspaceMeZO, lr=0.05, rank=4, betas=(0.9, 0.9)),
        partial(ZOMOPI, lr=0.05, rank=4, power_rank=4, momentum=0.0, vector_lr=0.05),
    ],
)
def test_given_bases_may_change_their_number_of_columns(method: Any) -> None:
    """As those from activations do, where a batch has few tokens: momentum in another shape starts from zero."""
    net = Net()
    optimizer = attached(method, net)
    for columns in (4, 2, 3):
        optimizer.resample({net.layer.weight: Basis(right=torch.eye(8)[:, :columns])})
        before = net.layer.weight.detach().clone()
        train(net, optimizer, 1 if method.func is ZOMOPI else 2)
        optimizer.fold()
        moved = net.layer.weight.detach() - before
        assert torch.linalg.matrix_rank(moved) == columns and not moved[:, columns:].any()
        if method.func is ZOMOPI:  # one direction for each, all of them alike
            assert moved.norm().item() == pytest.approx(0.05 * columns**0.5, rel=1e-4)


def test_thin_matrices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("zolightning.optim.subspace.rank_zero_info", said.append)
    net = Net()
    SubspaceMeZO(net.parameters(), rank=12).attach(net)
    SubspaceMeZO(net.parameters(), rank=8).attach(net)
    assert said == ["`rank` is 12, but lower in 1 matrix with fewer rows or columns: layer.weight 8."]
