"""Where evaluations cannot share a run of the network they run separately, and say why."""

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stacked_runs import (
    METHODS,
    WARN_ONLY_WHERE_EXPECTED,
    Counting,
    LanguageModel,
    Regressor,
    assert_close,
    mlp,
    run,
)
from zolightning.optim import ZOMOPI, MeZO

pytestmark = WARN_ONLY_WHERE_EXPECTED


class Reader(nn.Module):
    """Reads its weight in ways that do not stack."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "weight alone":
                return x @ (1.0 + self.linear.weight) + self.linear.bias
            case "features first":
                return self.linear(x.T.reshape(-1, 4))
            case "batch statistics":
                hidden = self.linear(x)
                return hidden / hidden.abs().mean(dim=0)
            case "a little of others' rows":
                hidden = self.linear(x)
                return hidden + 0.02 * hidden.mean()
            case "some rows":
                return self.linear(x[: len(x) * 5 // 8])
            case "scalar":
                return (self.linear(x) - 0.5).square().mean()
            case "unseen":
                with torch._C.DisableTorchFunction():
                    return self.linear(x)
            case "by torch.func":
                return torch.vmap(torch.func.grad(lambda row: self.linear(row).square().sum()))(x)
            case _:
                return self.linear(x)


class Oddity(Counting):
    def __init__(self, way: str) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            super().__init__(Reader(way).double(), 6)
            self.inputs = torch.randn(6, 4).double()
        self.way = way
        self.calls = 0

    def loss(self) -> Tensor:
        self.calls += 1
        if self.way == "not called":
            return (self.net.linear(self.inputs) - 0.5).square().mean()
        if self.way == "parameter in the input":
            return (self.net(self.inputs * self.net.linear.bias) - 0.5).square().mean()
        if self.way == "input written anew":
            self.inputs.copy_(self.inputs.clone())
        if self.way == "within torch.func":
            slopes = torch.vmap(torch.func.grad(lambda row: self.net(row[None]).square().sum()))(self.inputs)
            return (slopes - 0.5).square().mean()
        output = self.net(self.inputs)
        return output if self.way == "scalar" else (output - 0.5).square().mean()


class TestFallsBack:
    @pytest.mark.parametrize(
        ("way", "reason"),
        [
            ("weight alone", "reads `linear.weight` without the rows of a batch"),
            ("some rows", "reads `linear.weight`, `linear.bias` without the rows of a batch"),
            ("features first", "losses of Reader for repeated rows, .* are not those of separate runs"),
            ("batch statistics", "losses of Reader for repeated rows, .* are not those of separate runs"),
            ("a little of others' rows", "losses of Reader for repeated rows, .* or not independent"),
            ("scalar", r"returns a tensor of shape \(\) for .* a loss must be computed outside"),
            ("unseen", "such parameters cannot be stacked"),
            ("by torch.func", r"torch.func \(grad, jvp, vmap\) transforms the network"),
            ("within torch.func", r"torch.func \(grad, jvp, vmap\) transforms the network"),
            ("not called", "does not call the Reader"),
            ("parameter in the input", "other inputs in each evaluation"),
            ("input written anew", "an input of the network is changed in place"),
        ],
    )
    def test_with_a_reason_and_the_right_losses(self, way: str, reason: str) -> None:
        found = []
        for size in (1, 2):
            module = Oddity(way)
            optimizer = MeZO(module.parameters(), lr=1e-2, seed=0, num_queries=2)
            optimizer.attach(module, size)
            expected = nullcontext() if size == 1 else pytest.warns(UserWarning, match=reason)
            with expected, warnings.catch_warnings():
                warnings.filterwarnings("default" if size == 2 else "ignore", message=".*evaluations_per_forward")
                records = [optimizer.estimate(module.loss)]
            optimizer.step()
            records.append(optimizer.estimate(module.loss))  # and without another warning
            assert "forward" not in vars(module.net)
            found.append(records)
        assert_close(found[1], found[0], loss=1e-9, grad=1e-6)

    def test_for_gemma_unless_its_norms_stay_as_they_are(self) -> None:
        """Gemma adds 1 to the weights of its norms before it multiplies by them."""
        make = partial(LanguageModel, "gemma3_text", torch.float64)
        frozen = partial(ZOMOPI, rank=4, power_rank=2, lr=1e-2, num_queries=2, vector_lr=0.0)
        assert_close(run(make, frozen, 4), run(make, frozen, 1), loss=1e-9, grad=1e-6)
        with pytest.warns(
            UserWarning, match=r"1 from here on: the network reads `.*norm.weight` without .*`vector_lr` of 0"
        ):
            module = make()
            optimizer = METHODS["mopi"](module.parameters(), seed=4)
            optimizer.attach(module, 4)
            record = optimizer.estimate(module.loss)
        assert [record] == run(make, METHODS["mopi"], 1, steps=1)

    def test_for_attention_with_the_sequence_first(self) -> None:
        """Which ``nn.MultiheadAttention`` is inside, whatever its arguments are."""
        module = Regressor(lambda: nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), 6, 2, 2)
        optimizer = MeZO(module.parameters(), seed=4)
        optimizer.attach(module, 2)
        with pytest.warns(UserWarning, match="reads `self_attn.in_proj_weight`"):
            optimizer.estimate(module.loss)

    @pytest.mark.parametrize("failing", range(1, 5))
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_error_restores_the_network(self, failing: int, error: type[BaseException]) -> None:
        module = Regressor(mlp, 6, 4)
        optimizer = MeZO(module.parameters(), lr=1e-2, seed=0, num_queries=2)
        optimizer.attach(module, 4)
        optimizer.estimate(module.loss)
        before, calls = [parameter.detach().clone() for parameter in module.parameters()], []

        def loss() -> Tensor:
            value = module.loss()
            calls.append(1)
            if len(calls) == failing:
                raise error
            return value

        with pytest.raises(error):
            optimizer.estimate(loss)
        assert "forward" not in vars(module.net)
        assert all(map(torch.equal, module.parameters(), before))
        module.rows.clear()
        assert optimizer.estimate(module.loss).step == 0
        assert module.rows == [24]
