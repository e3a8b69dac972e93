"""ConMeZO against a restatement of its definition."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer_steps import MakeProblem, run, standard
from zolightning.directions.cone import ConeDirection
from zolightning.directions.dense import negated
from zolightning.directions.slices import Slice
from zolightning.kernels.noise import key
from zolightning.optim import ConMeZO, MeZO
from zolightning.optim.probing import losses_along
from zolightning.optim.share import WHOLE

STEPS, QUERIES = 12, 2


def noise(module: nn.Module, step: int, query: int) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {name: standard(p.shape, key(0, step, query, name), "gaussian").double() for name, p in named}


def restated(module: nn.Module, angle: float, momentum: float, lr: float, eps: float, weight_decay: float) -> None:
    """Trains in plain float64, all weights and directions as one vector."""

    def flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in shapes])

    def loss_at(weights: Tensor) -> float:
        parts = weights.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(module, named, ()).item()

    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    weights = flat(dict(module.named_parameters())).detach()
    m = torch.zeros_like(weights)
    decays = flat({name: torch.full(shape, weight_decay * (len(shape) >= 2)) for name, shape in shapes.items()})
    for step in range(STEPS):
        estimate = torch.zeros_like(weights)
        for query in range(QUERIES):
            z = flat(noise(module, step, query))
            if step:
                z = math.sin(angle) * z + math.cos(angle) * math.sqrt(len(m)) * m / m.norm()
            g = (loss_at(weights + eps * z) - loss_at(weights - eps * z)) / (2 * eps)
            estimate += g * z / QUERIES
        weights = weights * (1 - lr * decays) - lr * estimate
        m = momentum * m + (1 - momentum) * estimate
    torch.nn.utils.vector_to_parameters(weights, module.parameters())


@pytest.mark.parametrize(("angle", "piece"), [(1.35, 2**16), (0.8, 4)])
def test_the_method(make_problem: MakeProblem, monkeypatch: pytest.MonkeyPatch, angle: float, piece: int) -> None:
    """Also if weights are moved in several pieces, as large ones are."""
    monkeypatch.setattr("zolightning.optim.con_mezo.chunk_size", lambda _: piece)
    monkeypatch.setattr("zolightning.directions.cone.chunk_size", lambda _: piece)
    module, reference = make_problem(torch.float64), make_problem(torch.float64)
    options = {"lr": 0.02, "eps": 1e-2, "angle": angle, "momentum": 0.7, "weight_decay": 0.5}
    restated(reference, **options)
    optimizer = ConMeZO(module.named_parameters(), num_queries=QUERIES, **options)
    optimizer.attach(module)
    run(module, optimizer, STEPS)
    for (name, parameter), expected in zip(module.named_parameters(), reference.parameters(), strict=True):
        # Coefficients have 20 bits, and the directions of later steps follow from weights that differ by that.
        torch.testing.assert_close(parameter, expected, rtol=0, atol=STEPS * 2e-6, msg=name)
    plain = make_problem(torch.float64)
    run(plain, MeZO(plain.named_parameters(), lr=0.02, eps=1e-2, num_queries=QUERIES), STEPS)
    assert (plain.matrix - reference.matrix).abs().max() > 1e-3  # so that MeZO would have gone elsewhere


def test_at_a_right_angle_it_is_mezo(make_problem: MakeProblem) -> None:
    module, plain = make_problem(), make_problem()
    run(module, ConMeZO(module.named_parameters(), lr=0.02, angle=math.pi / 2), STEPS)
    run(plain, MeZO(plain.named_parameters(), lr=0.02), STEPS)
    for parameter, expected in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_more_queries_than_numbers_find_the_gradient(make_problem: MakeProblem) -> None:
    """By least squares, along directions that lean alike."""
    module = make_problem(torch.float64)
    optimizer = ConMeZO(module.named_parameters(), lr=1e-2, angle=0.8, num_queries=80, align_queries=True)
    optimizer.attach(module)
    for _ in range(2):
        before = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        run(module, optimizer, 1)
        moved = before - torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        assert F.cosine_similarity(moved, before + 0.5, dim=0).item() == pytest.approx(1, abs=1e-6)


class Table(nn.Module):
    """Reads a table by rows, so that few of its rows are perturbed at a time."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 24).view(6, 4).to(dtype))

    def forward(self) -> Tensor:
        return F.embedding(torch.tensor([4, 1, 1]), self.table).double().square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_the_other_sign_have_the_same_bits(dtype: torch.dtype) -> None:
    module = Table(dtype)
    optimizer = ConMeZO(module.named_parameters(), lr=0.02, angle=0.8, eps=0.1)
    run(module, optimizer, 2)
    weight, rows = module.table.detach(), torch.tensor([5, 0])
    whole, few, other = torch.empty_like(weight), torch.empty(2, 4, dtype=dtype), torch.empty_like(weight)
    for sign in (1, -1):
        change, opposite = (optimizer.perturbations(0, s)[module.table] for s in (sign, -sign))
        change.add_to(weight, whole)
        change.add_to_rows(weight, rows, few)
        assert torch.equal(few, whole[rows])
        opposite.opposite(negated).add_to(weight, other)
        assert torch.equal(other, whole)


def test_only_the_noise_is_opposite() -> None:
    """Of two points on the same side of the axis, neither is taken for the other's opposite in one forward."""
    torch.manual_seed(2)
    found, x = [], torch.randn(3, 4)
    for together in (1, 2):
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        torch.nn.utils.vector_to_parameters(torch.linspace(-1, 1, 31), net.parameters())
        optimizer = MeZO(net.named_parameters(), lr=0.1)
        optimizer.attach(net, evaluations_per_forward=together)
        run_of = partial(lambda net: net(x).square().mean(), net)
        optimizer.estimate(run_of)  # finds where parameters are read
        moves = [
            {
                p: ConeDirection(z, torch.ones(p.numel()), torch.tensor(0.5))
                for p, z in optimizer.multiples(0, s).items()
            }
            for s in (0.25, -0.25)
        ]
        found.append(losses_along(optimizer, moves, run_of, WHOLE))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert abs(found[0][0] - found[0][1]) > 1e-3


def test_the_norm_is_that_of_what_moves(make_problem: MakeProblem) -> None:
    """Perturbations have the root mean square `eps` for whatever weights move."""
    module = make_problem()
    optimizer = ConMeZO(module.named_parameters(), lr=0.02, eps=1.0, angle=1e-3)
    optimizer.restrict({module.matrix: Slice(0, torch.tensor([0, 2]))})
    run(module, optimizer, 2)
    for frozen in (None, module.images):
        if frozen is not None:
            frozen.requires_grad_(False)
        changes = optimizer.perturbations(0, 1)
        square = count = 0
        for parameter, change in changes.items():
            like = torch.zeros(optimizer.trainable_shape(parameter))
            square += change.of_elements(like.view(-1)).square().sum().item()
            count += like.numel()
        assert math.sqrt(square / count) == pytest.approx(1.0, abs=0.01)  # the noise beside it has 1e-3


def test_memory(make_problem: MakeProblem) -> None:
    module = make_problem(torch.bfloat16)
    run(module, optimizer := ConMeZO(module.named_parameters()), 1)
    sizes = [parameter.numel() for parameter in module.parameters()]
    assert optimizer.state_bytes() == sum(sizes) * (4 + 2) + 4 * len(sizes)


@pytest.mark.parametrize("angle", [0.0, -1.0, 1.6, float("nan")])
def test_angles_that_make_no_cone_are_refused(make_problem: MakeProblem, angle: float) -> None:
    with pytest.raises(ValueError, match="`angle` must be above 0 and at most pi / 2"):
        ConMeZO(make_problem().parameters(), angle=angle)
