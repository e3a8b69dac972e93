"""The published MeZO recipe, restated plainly, to compare our steps with.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333: algorithm 1 and the choices
of its released code (https://github.com/princeton-nlp/MeZO), none of them improved. Only the speed and the memory of
this module are of interest; training is done by :class:`zolightning.optim.MeZO`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolightning.data.encoding import Example


class PublishedMeZO:
    """Two losses between four passes over the parameters, each of which draws the same noise anew.

    A pass seeds torch's generator, draws ``torch.normal(0, 1)`` in the dtype of each parameter, and replaces the old
    tensor by a new one.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, eps: float, seed: int = 0) -> None:
        self.parameters = list(parameters)
        self.lr = lr
        self.eps = eps
        self._random = np.random.RandomState(seed)

    @torch.no_grad()
    def step(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """Takes a step and returns the loss at the positive side, as the released code does."""
        seed = int(self._random.randint(1_000_000_000))
        self._add_noise(seed, 1, self.eps)
        loss_plus = evaluate()
        self._add_noise(seed, -2, self.eps)
        loss_minus = evaluate()
        self._add_noise(seed, 1, self.eps)
        projected_grad = ((loss_plus - loss_minus) / (2 * self.eps)).item()
        self._add_noise(seed, projected_grad, -self.lr)
        return loss_plus

    def _add_noise(self, seed: int, multiple: float, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters:
            noise = torch.normal(
                mean=0.0, std=1.0, size=parameter.shape, dtype=parameter.dtype, device=parameter.device
            )
            parameter.data = parameter.data + multiple * noise * scale


class PublishedBatch(TypedDict):
    """B examples with C candidates each: a row is a prompt followed by one of its candidates."""

    input_ids: Tensor  # (B * C, T), padded on the left to a multiple of 8
    attention_mask: Tensor  # (B * C, T), 0 on padding
    is_answer: Tensor  # (B * C, T), whether the token belongs to the candidate
    label: Tensor  # (B,), index of the right candidate


def published_batch(examples: Sequence[Example], pad_id: int) -> PublishedBatch:
    """Stacks examples with equally many candidates."""
    rows = [(example.prompt_ids, answer) for example in examples for answer in example.answer_ids]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    width = -(-width // 8) * 8
    padding = [width - len(prompt) - len(answer) for prompt, answer in rows]
    return PublishedBatch(
        input_ids=torch.tensor([[pad_id] * pad + p + a for pad, (p, a) in zip(padding, rows, strict=True)]),
        attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
        is_answer=torch.tensor([[False] * (width - len(answer)) + [True] * len(answer) for _, answer in rows]),
        label=torch.tensor([example.label for example in examples]),
    )


def published_loss(model: nn.Module, batch: PublishedBatch) -> Tensor:
    """Cross-entropy of the gold candidates over all candidates' mean log-likelihoods.

    All logits of all rows are made and normalised, in the dtype of the model, and the answers' picked afterwards.
    """
    input_ids, is_answer = batch["input_ids"], batch["is_answer"][:, 1:]
    logits = model(input_ids=input_ids, attention_mask=batch["attention_mask"], use_cache=False).logits
    log_probs = F.log_softmax(logits[:, :-1], dim=-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1).float()
    scores = (log_probs * is_answer).sum(dim=-1) / is_answer.sum(dim=-1)
    return F.cross_entropy(scores.view(len(batch["label"]), -1), batch["label"])
