"""The published recipe that the benchmark of a step compares with."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from zolightning.bench.prompts import check_same_loss, our_loss
from zolightning.bench.published import PublishedMeZO, published_batch, published_loss
from zolightning.data.batch import collate
from zolightning.data.encoding import Example


def examples(*rows: tuple[list[int], list[list[int]], int]) -> list[Example]:
    return [Example(id, prompt, answers, label, text="") for id, (prompt, answers, label) in enumerate(rows)]


ONE_TOKEN = examples(([6, 7, 8], [[4], [5]], 0), ([9, 10, 11, 6, 7, 8, 2, 3], [[4], [5]], 1), ([2], [[4], [5]], 1))
RAGGED = examples(([6, 7, 8], [[4, 3], [5]], 1), ([9, 10, 11, 6, 7, 8, 2, 3, 3], [[4, 6], [5]], 0))


def test_published_step_is_the_one_of_the_paper() -> None:
    lr, eps = 0.05, 1e-3
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    inputs = torch.randn(5, 3)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}

    torch.manual_seed(int(np.random.RandomState(8).randint(1_000_000_000)))
    noise = {name: torch.normal(0.0, 1.0, size=weight.shape) for name, weight in before.items()}

    def loss_at(offset: float) -> Tensor:
        weights = {name: before[name] + offset * noise[name] for name in before}
        return functional_call(net, weights, inputs).square().mean()

    projected_grad = (loss_at(eps) - loss_at(-eps)) / (2 * eps)

    loss = PublishedMeZO(net.parameters(), lr, eps, seed=8).step(lambda: net(inputs).square().mean())

    torch.testing.assert_close(loss, loss_at(eps))
    assert abs(projected_grad) > 0.1
    for name, parameter in net.named_parameters():
        # the difference of two fp32 losses over 2 eps has three or four digits
        expected = -lr * projected_grad * noise[name]
        torch.testing.assert_close(parameter.detach() - before[name], expected, rtol=2e-2, atol=1e-5)


def test_published_steps_draw_new_noise() -> None:
    weight = nn.Parameter(torch.zeros(50))
    published = PublishedMeZO([weight], lr=1.0, eps=1e-3)
    moves = []
    for _ in range(2):
        before = weight.detach().clone()
        published.step(lambda: weight.sum())
        moves.append(weight.detach() - before)
    assert torch.cosine_similarity(*moves, dim=0).abs() < 0.6


def test_published_batch_pads_candidates_to_a_multiple_of_eight() -> None:
    batch = published_batch(RAGGED, pad_id=1)
    assert batch["input_ids"].shape == (4, 16)
    assert batch["input_ids"][0].tolist() == [1] * 11 + [6, 7, 8, 4, 3]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 4, 11, 10]
    assert batch["is_answer"].sum(dim=1).tolist() == [2, 1, 2, 1]
    assert batch["label"].tolist() == [1, 0]


@pytest.mark.parametrize("batch", [ONE_TOKEN, RAGGED], ids=["one token", "ragged"])
def test_ours_and_published_have_the_same_loss(model: PreTrainedModel, batch: Sequence[Example]) -> None:
    with torch.no_grad():
        ours = our_loss(model, collate(batch, 1, "classification"))
        published = published_loss(model, published_batch(batch, pad_id=1))
    torch.testing.assert_close(ours, published)


def test_different_losses_are_not_compared(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zolightning.bench.prompts.published_loss", lambda *_: torch.tensor(7.0))
    with pytest.raises(RuntimeError, match=r"published 7\.0.* cannot be compared"):
        check_same_loss(model, ONE_TOKEN, pad_id=1)
