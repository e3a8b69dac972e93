"""Evaluations that share a run of the network give the losses of separate runs, or say why they cannot."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.estimators import OneSided
from zolightning.optim import LOZO, ZOMOPI, MeZO, StepRecord, SubZero, ZerothOrderOptimizer

Method = Callable[..., ZerothOrderOptimizer]

IDS = torch.tensor([[3, 9, 4, 7, 5], [8, 8, 2, 1, 6], [5, 0, 9, 9, 3]])
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
LLAMA_SIZES = SIZES | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES = {
    "opt": SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt2": SIZES,
    "llama": LLAMA_SIZES,
    "qwen3": LLAMA_SIZES,
    "gemma3_text": LLAMA_SIZES,
}
METHODS = {
    "lozo": partial(LOZO, rank=2, lr=1e-2, vector_lr=1e-3),
    "subzero": partial(SubZero, rank=4, lr=1e-2, vector_lr=1e-3, num_queries=2),
    "mopi": partial(ZOMOPI, rank=4, power_rank=2, lr=1e-2, vector_lr=1e-3, num_queries=2),
    "mopi-one-sided": partial(ZOMOPI, rank=4, power_rank=2, lr=1e-2, num_queries=3, estimator=OneSided()),
    "mezo": partial(MeZO, lr=1e-3, num_queries=2),
}


class Counting(nn.Module):
    """Holds a network, and keeps how many rows each of its runs has."""

    def __init__(self, net: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.net = net
        self.batch_size = batch_size
        self.rows: list[int] = []
        first = next(module for module in net.modules() if not list(module.children()))
        first.register_forward_pre_hook(lambda _, inputs: self.rows.append(len(inputs[0])))

    def loss(self) -> Tensor:
        raise NotImplementedError


class LanguageModel(Counting):
    """A causal language model of random weights, and the loss of predicting three sequences."""

    def __init__(self, architecture: str, dtype: torch.dtype, **changes: Any) -> None:
        special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
        config = AutoConfig.for_model(architecture, vocab_size=13, **special, **ARCHITECTURES[architecture] | changes)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            super().__init__(AutoModelForCausalLM.from_config(config).to(dtype).eval(), len(IDS))

    def loss(self) -> Tensor:
        logits = self.net(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten())


class Regressor(Counting):
    """A network of random weights, made by `make_net`, and its squared error on random inputs."""

    def __init__(self, make_net: Callable[[], nn.Module], *shape: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            super().__init__(make_net().double().eval(), shape[0])
            self.inputs = torch.randn(shape).double()

    def loss(self) -> Tensor:
        return (self.net(self.inputs) - 0.5).square().mean()


class Scaled(nn.Sequential):
    """A network that owns a parameter itself, beside those of its layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.linspace(1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def run(make: Callable[[], Counting], method: Method, size: int, steps: int = 3) -> list[StepRecord]:
    """Records of some steps, the last of which has stacked all it can."""
    module = make()
    optimizer = method(module.parameters(), seed=4)
    optimizer.attach(module, size)
    records = []
    for _ in range(steps):
        module.rows.clear()
        records.append(optimizer.estimate(module.loss))
        optimizer.step()
    count = records[-1].forward_passes
    if steps > 1:  # the first one audits and checks
        assert module.rows == [module.batch_size * min(size, count - at) for at in range(0, count, size)]
    return records


def assert_close(found: list[StepRecord], expected: list[StepRecord], loss: float, grad: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=loss)
        assert one.projected_grads == pytest.approx(other.projected_grads, rel=grad, abs=grad)
        assert (one.step, one.forward_passes, one.refresh) == (other.step, other.forward_passes, other.refresh)


@pytest.fixture(autouse=True)
def warn_only_where_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*evaluations_per_forward")
        warnings.filterwarnings("ignore", message="`update_precision`")
        warnings.filterwarnings("ignore", message=".*perturbed in place")
        yield


class TestSameLosses:
    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    @pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama", "qwen3"])
    def test_of_language_models(self, architecture: str, method: Method) -> None:
        """Embeddings that are tied (opt, gpt2) or not, biases, transposed weights (gpt2), norms, shared positions."""
        make = partial(LanguageModel, architecture, torch.float64)
        expected = run(make, method, 1)
        assert len({record.loss for record in expected}) == 3  # the weights move
        for size in (2, 4):
            assert_close(run(make, method, size), expected, loss=1e-9, grad=1e-6)

    @pytest.mark.parametrize("tied", [True, False])
    def test_in_float32(self, tied: bool) -> None:
        """1e-6 of a loss of 2.6 over 2 eps = 2e-3 makes 1e-3 of a projected gradient."""
        make = partial(LanguageModel, "llama", torch.float32, tie_word_embeddings=tied)
        for method in METHODS.values():
            assert_close(run(make, method, 4, steps=2), run(make, method, 1, steps=2), loss=1e-6, grad=4e-3)

    def test_in_bfloat16(self) -> None:
        make = partial(LanguageModel, "gpt2", torch.bfloat16)
        for method in METHODS.values():
            found, expected = run(make, method, 4, steps=2), run(make, method, 1, steps=2)
            assert found[0].loss == pytest.approx(expected[0].loss, rel=1e-3)

    def test_of_every_method(self, method: Method) -> None:
        make = partial(Regressor, mlp, 6, 4)
        assert_close(run(make, method, 3), run(make, method, 1), loss=1e-9, grad=1e-6)

    @pytest.mark.parametrize(
        "make_net",
        [
            lambda: nn.Sequential(
                nn.Conv1d(2, 12, 1), nn.BatchNorm1d(12), nn.PReLU(12), nn.Flatten(), nn.Linear(24, 2)
            ),
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.RMSNorm(3)),
            lambda: Scaled(nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 3)),
        ],
        ids=["convolution", "norm", "scaled"],
    )
    def test_of_other_functions(self, make_net: Callable[[], nn.Module]) -> None:
        """With 6 rows and 2 groups the 12 channels of a batch norm's statistics must not be taken for rows."""
        make = partial(Regressor, make_net, 6, 2, 2)
        for method in (METHODS["mopi"], METHODS["mezo"]):
            assert_close(run(make, method, 2), run(make, method, 1), loss=1e-9, grad=1e-6)

    def test_where_only_biases_train(self) -> None:
        def make() -> Regressor:
            module = Regressor(mlp, 6, 4)
            module.net[0].weight.requires_grad_(False)
            module.net[3].weight.requires_grad_(False)
            return module

        assert_close(run(make, METHODS["mezo"], 4), run(make, METHODS["mezo"], 1), loss=1e-9, grad=1e-6)

    def test_of_batches_of_changing_size(self) -> None:
        def losses(size: int) -> list[StepRecord]:
            module = Regressor(mlp, 6, 4)
            optimizer = MeZO(module.parameters(), lr=1e-2, num_queries=2, seed=0)
            optimizer.attach(module, size)
            records = []
            for rows in (6, 1, 4, 3):
                module.inputs = torch.linspace(-1, 1, rows * 4).double().view(rows, 4)
                records.append(optimizer.estimate(module.loss))
                optimizer.step()
            return records

        assert_close(losses(4), losses(1), loss=1e-9, grad=1e-6)


class TestUnderZerothOrder:
    @pytest.mark.parametrize("micro_batch_size", [None, 3])
    def test_the_same_training(
        self,
        make_regression: Callable[..., L.LightningModule],
        regression_data: Callable[..., DataLoader],
        make_trainer: Callable[..., L.Trainer],
        micro_batch_size: int | None,
    ) -> None:
        """Micro-batches of 3, 3 and 1 examples: a network that runs several times in an evaluation."""

        def fit(size: int) -> dict[str, Tensor]:
            module, rows = make_regression(), []
            module.net[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
            callback = ZerothOrder(
                partial(ZOMOPI, rank=3, power_rank=2, num_queries=2, lr=1e-2, seed=3),
                micro_batch_size=micro_batch_size,
                evaluations_per_forward=size,
            )
            trainer = make_trainer(max_steps=5, callbacks=[callback, SubspaceResampling(interval=2)])
            trainer.fit(module, regression_data(5, 7))
            parts = [7] if micro_batch_size is None else [3, 3, 1]
            assert rows[-4 * len(parts) // size :] == [size * part for part in parts] * (4 // size)
            return module.state_dict()

        stacked, expected = fit(4), fit(1)
        for name in expected:
            torch.testing.assert_close(stacked[name], expected[name], rtol=1e-4, atol=1e-4)

    def test_a_network_is_needed(
        self, regression_data: Callable[..., DataLoader], make_trainer: Callable[..., L.Trainer]
    ) -> None:
        class TwoNetworks(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 1)

            def training_step(self, batch: Any) -> Tensor:
                return (self.head(self.body(batch[0])) - batch[1]).square().mean()

            def configure_optimizers(self) -> None: ...

        callback = ZerothOrder(partial(MeZO, lr=1e-3), evaluations_per_forward=2)
        with pytest.raises(ValueError, match=r"one submodule that holds all .* its children are body, head"):
            make_trainer(max_steps=1, callbacks=[callback]).fit(TwoNetworks(), regression_data())

    def test_bad_values(self) -> None:
        with pytest.raises(ValueError, match="`evaluations_per_forward` must be at least 1, got 0"):
            ZerothOrder(MeZO, evaluations_per_forward=0)


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
            case "some rows":
                return self.linear(x[: len(x) * 5 // 8])
            case "scalar":
                return (self.linear(x) - 0.5).square().mean()
            case "unseen":
                with torch._C.DisableTorchFunction():
                    return self.linear(x)
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
            ("scalar", r"returns a tensor of shape \(\) for .* a loss must be computed outside"),
            ("unseen", "such parameters cannot be stacked"),
            ("not called", "does not call the Reader"),
            ("parameter in the input", "other inputs in each evaluation"),
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
