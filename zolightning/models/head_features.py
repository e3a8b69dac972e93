"""The inputs of a network's head, which are the features of a linear probe."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zolightning.data.batch import Batch
from zolightning.models.scoring import last_logits, of_label


@contextmanager
def inputs_of(head: nn.Module) -> Iterator[list[Tensor]]:
    """A context that collects the first argument of each call of a module."""
    read: list[Tensor] = []
    with head.register_forward_pre_hook(lambda _, args: read.append(args[0])):
        yield read


def answer_features(model: nn.Module, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The inputs of a causal language model's head from which it predicts the tokens of the right answers.

    Returns:
        The inputs, (K, H), times what the network multiplies its logits by, and the tokens, (K,).
    """
    label = batch["label"]
    answer = of_label(batch["answer_ids"], label)  # (B, A), at the end of the row
    row = label if batch["input_ids"].shape[1] > 1 else torch.zeros_like(label)
    input_ids, attention_mask = (of_label(batch[name], row) for name in ("input_ids", "attention_mask"))
    is_prompt = answer.shape[1] == 1  # else the answer is in the row
    count = answer.shape[1] + (not is_prompt)
    written: list[Tensor] = []
    with inputs_of(head) as read, head.register_forward_hook(lambda *call: written.append(call[2])):
        logits = last_logits(model, input_ids, attention_mask, count)
    hidden = read[0][:, -count:][:, : answer.shape[1]]
    is_token = answer >= 0
    return hidden[is_token] * _scale(logits[:, -1].float(), written[0][:, -1].float()), answer[is_token]


def _scale(logits: Tensor, outputs: Tensor) -> Tensor:
    """What a network multiplies its head's outputs by: 1 for most, not for Cohere and Granite.

    Where it bounds them instead (Gemma 2), the factor that comes closest.
    """
    return (logits * outputs).sum() / (outputs * outputs).sum()
