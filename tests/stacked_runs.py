"""Networks that count the rows of their runs, steps of methods on them, and comparisons of their records."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from tape import Tape
from zolightning.optim import EGGROLL, LOZO, ZOMOPI, MeZO, StepRecord, SubZero, ZerothOrderOptimizer
from zolightning.optim.estimators import OneSided, TwoSided

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
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
METHODS = {
    "lozo": partial(LOZO, rank=2, lr=1e-2, vector_lr=1e-3),
    "subzero": partial(SubZero, rank=4, lr=1e-2, vector_lr=1e-3, num_queries=2),
    "mopi": partial(ZOMOPI, rank=4, power_rank=2, lr=1e-2, vector_lr=1e-3, num_queries=2),
    "mopi-one-sided": partial(ZOMOPI, rank=4, power_rank=2, lr=1e-2, num_queries=3, estimator=OneSided()),
    "mezo": partial(MeZO, lr=1e-3, num_queries=2),
    "eggroll": partial(EGGROLL, rank=2, lr=1e-3, num_queries=2, estimator=TwoSided()),
}

WARN_ONLY_WHERE_EXPECTED = pytest.mark.filterwarnings(
    "error:.*evaluations_per_forward", "ignore:`update_precision`", "ignore:.*perturbed in place"
)


class Counting(nn.Module):
    """Holds a network, and keeps how many rows each of its runs has."""

    def __init__(self, net: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.net = net
        self.batch_size = batch_size
        self.rows = Tape()
        first = next(module for module in net.modules() if not list(module.children()))
        first.register_forward_pre_hook(lambda _, inputs: self.rows.append(len(inputs[0])))

    def loss(self) -> Tensor:
        raise NotImplementedError


class LanguageModel(Counting):
    """A causal language model of random weights, and the loss of predicting three sequences."""

    def __init__(self, architecture: str, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> None:
        special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
        config = AutoConfig.for_model(architecture, vocab_size=13, **special, **ARCHITECTURES[architecture] | changes)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            super().__init__(AutoModelForCausalLM.from_config(config).to(device, dtype).eval(), len(IDS))
        self.ids = IDS.to(device)

    def loss(self) -> Tensor:
        logits = self.net(input_ids=self.ids, attention_mask=torch.ones_like(self.ids), use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), self.ids[:, 1:].flatten())


class Regressor(Counting):
    """A network of random weights, made by `make_net`, and its squared error on random inputs."""

    def __init__(self, make_net: Callable[[], nn.Module], *shape: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            super().__init__(make_net().double().eval(), shape[0])
            self.inputs = torch.randn(shape).double()

    def loss(self) -> Tensor:
        return (self.net(self.inputs) - 0.5).square().mean()


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
