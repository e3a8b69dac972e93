"""A direction for each example: losses of single examples, each at weights of its own, against a loop over examples."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stacked_runs import LanguageModel
from zolightning.evaluation.examples import MicroBatch
from zolightning.optim import LOZO, ZOMOPI, MeZO, SubZero, ZerothOrderOptimizer
from zolightning.optim.estimators import PerExample

EPS = 1e-3
MAKERS: dict[str, Callable[..., ZerothOrderOptimizer]] = {
    "lozo": partial(LOZO, rank=2, lr=0.1, vector_lr=0.1),
    "lozo-matrices": partial(LOZO, rank=1, lr=0.1, vector_lr=0.0, noise="rademacher"),
    "subzero": partial(SubZero, rank=2, lr=0.1),
    "zo-mopi": partial(ZOMOPI, rank=2, power_rank=1, lr=0.1),
    "mezo": partial(MeZO, lr=0.1),
}


class Tokens(LanguageModel):
    """Predicts sequences of tokens, of which the first ones are padding; the loss is a mean over sequences."""

    def __init__(self, architecture: str = "llama", dtype: torch.dtype = torch.float64, count: int = 6) -> None:
        super().__init__(architecture, dtype)
        draw = torch.Generator().manual_seed(8)
        self.ids = torch.randint(2, 13, (count, 7), generator=draw)
        self.mask = (torch.arange(7) >= torch.randint(0, 4, (count, 1), generator=draw)).long()

    def loss(self, rows: slice = slice(None)) -> Tensor:
        ids, mask = self.ids[rows], self.mask[rows]
        logits = self.net(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -2]
        return F.cross_entropy(logits.double(), ids[:, -1])

    def in_examples(self, numbers: Mapping[int, int] | None = None, size: int = 6) -> list[MicroBatch]:
        """Micro-batches of some examples: by number, the row of each."""
        rows = list((numbers or {i: i for i in range(len(self.ids))}).items())
        return [
            MicroBatch(
                partial(self.loss, slice(part[0][1], part[-1][1] + 1)),
                {number: partial(self.loss, slice(row, row + 1)) for number, row in part},
            )
            for part in (rows[start : start + size] for start in range(0, len(rows), size))
        ]


def attached(net: Tokens, method: str, num_queries: int = 6, **options: Any) -> ZerothOrderOptimizer:
    options = {"eps": EPS, "seed": 4, "estimator": PerExample(), "num_queries": num_queries} | options
    optimizer = MAKERS[method](net.named_parameters(), **options)
    optimizer.attach(net)
    return optimizer


def in_a_loop(net: Tokens, optimizer: ZerothOrderOptimizer, queries: list[int]) -> list[float]:
    """Projected gradients of examples, each by two forwards at weights that are written out."""
    stored = {name: parameter.detach() for name, parameter in net.named_parameters()}
    found = []
    for row, query in enumerate(queries):
        losses = []
        for sign in (1, -1):
            changes, moved = optimizer.perturbations(query, sign), {}
            for name, parameter in net.named_parameters():
                moved[name] = torch.empty_like(stored[name])
                if parameter in changes:
                    changes[parameter].add_to(stored[name], moved[name])
                else:
                    moved[name].copy_(stored[name])
            with torch.no_grad():
                losses.append(torch.func.functional_call(_Loss(net), {f"net.{n}": v for n, v in moved.items()}, (row,)))
        found.append(((losses[0] - losses[1]) / (2 * EPS)).item())
    return found


class _Loss(nn.Module):
    def __init__(self, net: Tokens) -> None:
        super().__init__()
        self.net = net

    def forward(self, row: int) -> Tensor:
        return self.net.loss(slice(row, row + 1))


@pytest.mark.parametrize("size", [6, 4])
@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_projected_grads_are_those_of_a_loop_over_examples(architecture: str, method: str, size: int) -> None:
    net = Tokens(architecture)
    optimizer = attached(net, method)
    for _ in range(2):
        expected = in_a_loop(net, optimizer, list(range(6)))
        net.rows.clear()
        record = optimizer.estimate(net.loss, micro_batches=net.in_examples(size=size))
        assert record.projected_grads == pytest.approx(expected, rel=1e-6, abs=1e-9)
        optimizer.step()
        assert record.forward_passes == 2 and len(record.losses) == 2
    assert net.rows == ([6, 6] if size == 6 else [4, 2, 4, 2])
