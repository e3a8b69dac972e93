"""MeZO, MeZO-Adam and ZO-AdaMM against restatements of their definitions."""

import math
import statistics
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer_steps import MakeProblem, run, standard
from zolightning.kernels.noise import NoiseKind, key
from zolightning.optim import MeZO, MeZOAdam, ZOAdaMM
from zolightning.optim.estimators import OneSided, Population
from zolightning.optim.share import Share

STEPS = 25
train = partial(run, steps=STEPS)


def z_of(module: nn.Module, step: int, query: int = 0, kind: NoiseKind = "gaussian") -> dict[str, Tensor]:
    return {
        name: standard(parameter.shape, key(0, step, query, name), kind).double()
        for name, parameter in module.named_parameters()
    }


def loss_at(module: nn.Module, scale: float, z: dict[str, Tensor]) -> float:
    """The loss at ``W + scale z``, by plain arithmetic."""
    moved = {name: parameter.detach() + scale * z[name] for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, moved, ()).item()


def assert_followed(module: nn.Module, reference: nn.Module) -> None:
    """Weights agree within what 20-bit coefficients change: 2^-20 of each move, none of which is above 1."""
    for (name, parameter), expected in zip(module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=STEPS * 2e-6, msg=name)


@torch.no_grad()
def projected_grad(module: nn.Module, z: dict[str, Tensor], eps: float) -> float:
    return (loss_at(module, eps, z) - loss_at(module, -eps, z)) / (2 * eps)


class TestMeZO:
    @pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
    def test_the_plain_method(self, make_problem: MakeProblem, kind: NoiseKind) -> None:
        module, reference = make_problem(torch.float64), make_problem(torch.float64)
        train(module, MeZO(module.named_parameters(), lr=0.02, eps=1e-2, noise=kind))
        for step in range(STEPS):
            z = z_of(reference, step, kind=kind)
            g = projected_grad(reference, z, 1e-2)
            with torch.no_grad():
                for name, parameter in reference.named_parameters():
                    parameter -= 0.02 * g * z[name]
        assert_followed(module, reference)

    def test_queries_momentum_and_weight_decay(self, make_problem: MakeProblem) -> None:
        module, reference = make_problem(torch.float64), make_problem(torch.float64)
        train(module, MeZO(module.named_parameters(), lr=0.02, num_queries=3, momentum=0.8, weight_decay=0.3))
        momentum = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
        for step in range(STEPS):
            directions = [z_of(reference, step, query) for query in range(3)]
            grads = [projected_grad(reference, z, 1e-3) for z in directions]
            with torch.no_grad():
                for name, parameter in reference.named_parameters():
                    estimate = sum(g * z[name] for g, z in zip(grads, directions, strict=True)) / 3
                    momentum[name] = 0.8 * momentum[name] + 0.2 * estimate
                    parameter *= 1 - 0.02 * (0.3 if parameter.ndim >= 2 else 0)
                    parameter -= 0.02 * momentum[name]
        assert_followed(module, reference)

    def test_one_sided(self, make_problem: MakeProblem) -> None:
        module, reference = make_problem(torch.float64), make_problem(torch.float64)
        train(module, MeZO(module.named_parameters(), lr=0.02, eps=1e-2, num_queries=2, estimator=OneSided()))
        for step in range(STEPS):
            directions = [z_of(reference, step, query) for query in range(2)]
            with torch.no_grad():
                base = reference().item()
                grads = [(loss_at(reference, 1e-2, z) - base) / 1e-2 for z in directions]
                for name, parameter in reference.named_parameters():
                    for g, z in zip(grads, directions, strict=True):
                        parameter -= 0.02 * g * z[name] / 2
        assert_followed(module, reference)

    def test_normalize_and_clip(self, make_problem: MakeProblem) -> None:
        module, reference = make_problem(torch.float64), make_problem(torch.float64)
        optimizer = MeZO(module.named_parameters(), lr=0.02, normalize=True, clip=1.2, rms_decay=0.8, num_queries=2)
        train(module, optimizer)
        squares, weight, clipped = 0.0, 0.0, 0
        for step in range(STEPS):
            directions = [z_of(reference, step, query) for query in range(2)]
            grads = [projected_grad(reference, z, 1e-3) for z in directions]
            if step:
                bound = 1.2 * math.sqrt(squares / weight)
                clipped += sum(abs(g) > bound for g in grads)
                grads = [math.copysign(min(abs(g), bound), g) for g in grads]
            squares = 0.8 * squares + 0.2 * (grads[0] ** 2 + grads[1] ** 2) / 2
            weight = 0.8 * weight + 0.2
            with torch.no_grad():
                for name, parameter in reference.named_parameters():
                    for g, z in zip(grads, directions, strict=True):
                        parameter -= 0.02 * g / math.sqrt(squares / weight) * z[name] / 2
        assert clipped > 2
        assert_followed(module, reference)

    def test_normalized_the_learning_rate_is_the_move(self, make_problem: MakeProblem) -> None:
        module = make_problem(torch.float64)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        train(module, MeZO(module.named_parameters(), lr=2**-7, noise="rademacher", normalize=True), steps=1)
        for parameter, start in zip(module.parameters(), before, strict=True):
            torch.testing.assert_close((parameter - start).abs(), torch.full_like(start, 2**-7))

    def test_a_population_is_normalized_by_the_losses_of_all_ranks(self, make_problem: MakeProblem) -> None:
        """FZOO's released step, ``lr mean_i((l_i - mean) z_i) / std``, of batches of 3 and 5 examples on two ranks."""
        problem, sent = make_problem(torch.float64), []
        options = {"noise": "rademacher", "num_queries": 6, "estimator": Population(), "normalize": True}
        optimizer = MeZO(problem.named_parameters(), lr=0.25, eps=1e-2, rms_decay=0.0, **options)

        def loss(target: float) -> Tensor:
            return problem() + target * torch.stack([p.sum() for p in problem.parameters()]).sum()

        before = {name: parameter.detach().clone() for name, parameter in problem.named_parameters()}
        directions = [z_of(problem, 0, query, "rademacher") for query in range(6)]
        losses = []
        for z in directions:
            moved = {name: weight + 1e-2 * z[name] for name, weight in before.items()}
            quadratic = torch.func.functional_call(problem, moved, ()).item()
            losses.append(quadratic + (3 * 2.0 - 5 * 1.0) / 8 * sum(weight.sum().item() for weight in moved.values()))
        optimizer.estimate(lambda: (loss(2.0), 3), Share(lambda totals: sent.append(totals) or totals))
        optimizer.estimate(lambda: (loss(-1.0), 5), Share(lambda totals: totals + sent[0]))
        optimizer.step()
        mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
        for name, parameter in problem.named_parameters():
            steps = [(one - mean) / deviation * z[name] for one, z in zip(losses, directions, strict=True)]
            torch.testing.assert_close(before[name] - parameter, 0.25 * sum(steps) / 6, rtol=0, atol=5e-6)

    @pytest.mark.filterwarnings("ignore:3 parameters are unused", "ignore:All losses of a step were equal")
    @pytest.mark.parametrize("options", [{"normalize": True}, {"clip": 1.5}, {"normalize": True, "clip": 1.5}])
    def test_a_flat_loss_moves_nothing(self, make_problem: MakeProblem, options: dict[str, Any]) -> None:
        module, untouched = make_problem(), make_problem()
        optimizer = MeZO(module.named_parameters(), lr=1.0, **options)
        for _ in range(3):
            optimizer.estimate(lambda: torch.tensor(2.0))
            optimizer.step()
        for parameter, expected in zip(module.parameters(), untouched.parameters(), strict=True):
            assert torch.equal(parameter, expected)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            *[("momentum", value) for value in (-0.1, 1.0, float("nan"))],
            *[("rms_decay", value) for value in (-0.1, 1.0, float("nan"))],
            *[("clip", value) for value in (0.0, 1.0, float("inf"), float("nan"))],
            *[("weight_decay", value) for value in (-0.1, float("nan"))],
        ],
    )
    @pytest.mark.parametrize("in_group", [False, True])
    def test_bad_values(self, make_problem: MakeProblem, argument: str, value: float, in_group: bool) -> None:
        parameters = list(make_problem().parameters())
        with pytest.raises(ValueError, match=f"`{argument}` must"):
            if in_group:
                MeZO([{"params": parameters, argument: value}])
            else:
                MeZO(parameters, **{argument: value})

    def test_a_hundred_steps_without_a_learning_rate(self, make_problem: MakeProblem) -> None:
        """Where weights are perturbed in place, bf16 loses its last digits in this test."""
        module, untouched = make_problem(torch.bfloat16), make_problem(torch.bfloat16)
        optimizer = MeZO(module.named_parameters(), lr=1e-2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        for _ in range(100):
            optimizer.estimate(module)
            optimizer.step()
            scheduler.step()
        for parameter, expected in zip(module.parameters(), untouched.parameters(), strict=True):
            assert torch.equal(parameter.detach().view(torch.int16), expected.detach().view(torch.int16))

    @pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1, "num_queries": 2}])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_follows_fp32(
        self, make_problem: MakeProblem, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        half = make_problem(dtype)
        wide = make_problem(dtype).float()
        follower = MeZO(wide.named_parameters(), lr=1e-4, **options)
        for record in train(half, optimizer := MeZO(half.named_parameters(), lr=1e-4, **options)):
            follower.apply(record)
        for parameter, expected in zip(half.parameters(), wide.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected.to(dtype), rtol=0, atol=2**-9)  # ties: half a unit
            extra_bits = optimizer.state[parameter].get("master")
            if extra_bits is not None:
                assert torch.equal(extra_bits.view(expected.shape), expected)
                assert torch.equal(parameter, expected.to(dtype))

    @pytest.mark.parametrize(
        ("dtype", "precision", "warns"),
        [
            (torch.bfloat16, "native", True),
            (torch.float16, "native", True),
            (torch.float32, "native", False),
            (torch.bfloat16, "exact", False),
        ],
    )
    def test_losing_updates_is_worth_a_warning(
        self,
        make_problem: MakeProblem,
        recwarn: pytest.WarningsRecorder,
        dtype: torch.dtype,
        precision: str,
        warns: bool,
    ) -> None:
        module = make_problem(dtype)
        MeZO(module.parameters(), update_precision=precision).attach(module)
        messages = [
            str(warning.message) for warning in recwarn if "`update_precision` is 'native'" in str(warning.message)
        ]
        assert len(messages) == warns
        assert not warns or "matrix, images, vector" in messages[0]


class TestZOAdaMM:
    def test_it_is_amsgrad_on_the_estimate(self, make_problem: MakeProblem) -> None:
        module, reference = make_problem(torch.float64), make_problem(torch.float64)
        optimizer = ZOAdaMM(module.named_parameters(), lr=0.02, betas=(0.8, 0.5), weight_decay=0.2)
        train(module, optimizer)
        moments = {name: [torch.zeros_like(p)] * 3 for name, p in reference.named_parameters()}
        has_fallen = False
        for step in range(STEPS):
            z = z_of(reference, step)
            g = projected_grad(reference, z, 1e-3)
            for name, parameter in reference.named_parameters():
                m, v, h = moments[name]
                m, v = 0.8 * m + 0.2 * g * z[name], 0.5 * v + 0.5 * (g * z[name]) ** 2
                moments[name] = [m, v, torch.maximum(h, v)]
                has_fallen |= bool((v < h).any())
                with torch.no_grad():
                    parameter *= 1 - 0.02 * 0.2 * (parameter.ndim > 1)
                    parameter -= 0.02 * m / (moments[name][2].sqrt() + 1e-8)
        assert has_fallen  # so that Adam would have gone elsewhere
        assert_followed(module, reference)

    def test_memory(self, make_problem: MakeProblem) -> None:
        module = make_problem(torch.bfloat16)
        train(module, optimizer := ZOAdaMM(module.named_parameters()), steps=1)
        assert optimizer.state_bytes() == sum(p.numel() for p in module.parameters()) * (12 + 2)


class TestMeZOAdam:
    @pytest.mark.parametrize("weight_decay", [0.0, 0.2])
    def test_it_is_torchs_adamw_on_the_estimate(self, make_problem: MakeProblem, weight_decay: float) -> None:
        module, reference = make_problem(torch.float64), make_problem(torch.float64)
        train(module, MeZOAdam(module.named_parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=weight_decay))
        groups = [
            {"params": [reference.matrix, reference.images], "weight_decay": weight_decay},
            {"params": [reference.vector], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.9), eps=1e-8)
        for step in range(STEPS):
            z = z_of(reference, step)
            g = projected_grad(reference, z, 1e-3)
            for name, parameter in reference.named_parameters():
                parameter.grad = g * z[name]
            adamw.step()
        assert_followed(module, reference)

    @pytest.mark.parametrize(
        ("argument", "value", "named"),
        [
            ("betas", (1.0, 0.9), r"betas\[0\]"),
            ("betas", (0.9, -0.1), r"betas\[1\]"),
            ("denominator_eps", 0.0, "denominator_eps"),
        ],
    )
    def test_bad_values(self, make_problem: MakeProblem, argument: str, value: Any, named: str) -> None:
        with pytest.raises(ValueError, match=f"`{named}` must"):
            MeZOAdam(make_problem().parameters(), **{argument: value})

    def test_memory(self, make_problem: MakeProblem) -> None:
        module = make_problem(torch.bfloat16)
        train(module, optimizer := MeZOAdam(module.named_parameters()), steps=1)
        assert optimizer.state_bytes() == sum(p.numel() for p in module.parameters()) * (8 + 2)


class TinyLanguageModel(nn.Module):
    """One block of causal attention, written out so that forward-mode differentiation goes through."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.position = nn.Embedding(23, 16), nn.Parameter(torch.randn(9, 16) * 0.1)
            self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.norm, self.ahead = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            self.ids = torch.randint(23, (6, 9))

    def forward(self) -> Tensor:
        x = self.embedding(self.ids) + self.position
        queries, keys, values = self.mix(self.norm(x)).chunk(3, dim=-1)
        scores = queries @ keys.mT / 4 + torch.full((9, 9), -torch.inf).triu(1)
        x = x + self.out(scores.softmax(-1) @ values)
        logits = (x + self.ahead(self.norm(x))) @ self.embedding.weight.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())


def test_projected_gradients_are_directional_derivatives_of_a_language_model() -> None:
    model, found, expected = TinyLanguageModel(), [], []
    optimizer = MeZO(model.named_parameters(), eps=1e-3)
    for step in range(30):
        found.append(optimizer.estimate(model).projected_grads[0])
        optimizer.param_groups[0]["step"] = step + 1
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        z = {name: value.float() for name, value in z_of(model, step).items()}
        _, derivative = torch.func.jvp(lambda w: torch.func.functional_call(model, w, ()), (weights,), (z,))
        expected.append(derivative.item())
    assert torch.corrcoef(torch.tensor([found, expected]))[0, 1] > 0.999
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0.05, atol=0.02)
