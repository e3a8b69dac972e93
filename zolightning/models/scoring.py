"""Log-probabilities, scores and losses of the candidate answers of a batch.

The losses are those of MeZO (Malladi et al. 2023, arXiv:2305.17333, appendix E). All numbers are float32 whatever
the dtype of the model, because a zeroth-order step subtracts two losses that differ in the third digit.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolightning.data.answer_index import AnswerIndex
from zolightning.data.batch import Batch
from zolightning.models.attention_masks import attention_mask_for


def answer_log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each answer token, (B, C, A), and the mask of those that exist.

    Where an answer is shorter than others, the log-probability is 0. Absent candidates are not run.
    """
    answer_ids = batch["answer_ids"]
    answer_length = answer_ids.shape[2]
    if batch["input_ids"].shape[1] == 1 and answer_length == 1:
        logits = last_logits(model, batch["input_ids"][:, 0], batch["attention_mask"][:, 0], count=1)
        return single_token_log_probs(logits[:, 0], answer_ids)

    index = AnswerIndex.of_batch(batch)
    input_ids, attention_mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    if index.rows is not None:
        input_ids, attention_mask = input_ids[index.rows], attention_mask[index.rows]
    logits = last_logits(model, input_ids, attention_mask, count=answer_length + 1)
    mask = answer_ids >= 0
    # an answer token is predicted at the position before its own
    if index.tokens is None:
        return token_log_probs(logits[:, :-1].flatten(0, 1), answer_ids.flatten()).view_as(mask), mask
    rows, places, slots = index.tokens
    log_probs = token_log_probs(logits[rows, places], answer_ids.flatten()[slots])
    return log_probs.new_zeros(mask.numel()).scatter(0, slots, log_probs).view_as(mask), mask


def single_token_log_probs(logits: Tensor, answer_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each answer of one token, (B, C, 1), and their mask, by the logits, (B, vocabulary)."""
    mask = answer_ids >= 0
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return log_probs.gather(-1, answer_ids[:, :, 0].clamp(min=0)).unsqueeze(-1).masked_fill(~mask, 0.0), mask


def candidate_scores(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean log-likelihood of each candidate's tokens, (B, C); -inf for absent candidates."""
    length = mask.sum(dim=-1)
    return (log_probs.sum(dim=-1) / length.clamp(min=1)).masked_fill(length == 0, float("-inf"))


def calibrated_scores(log_probs: Tensor, mask: Tensor, free: Tensor) -> Tensor:
    """Returns by how much the prompt raises the log-likelihood of each candidate, (B, C); -inf for absent ones.

    It is compared with the prompt without its content (surface form competition, Holtzman et al. 2021,
    arXiv:2104.08315, domain conditional PMI). As in MeZO's ``--sfc`` and ``--icl_sfc``, log-probabilities are summed
    over a candidate's tokens, not averaged: `log_probs` after the prompt, (B, C, A), of which the tokens in `mask`
    exist, and `free` after the content-free prompt, (B, C, any number).
    """
    gains = log_probs.sum(dim=-1) - free.sum(dim=-1)
    return gains.masked_fill(~mask.any(dim=-1), float("-inf"))


def classification_loss(scores: Tensor, label: Tensor) -> Tensor:
    """Returns the cross-entropy of the gold candidates, the scores serving as logits; mean over examples."""
    return F.cross_entropy(scores, label)


def language_modeling_loss(log_probs: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """Returns the negative log-likelihood of the gold answers; mean over all their tokens in the batch."""
    return -of_label(log_probs, label).sum() / of_label(mask, label).sum()


def of_label(values: Tensor, label: Tensor) -> Tensor:
    """What belongs to the right candidate of each example: (B, ...) of (B, C, ...)."""
    return values[torch.arange(len(label), device=label.device), label]


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each token, (K,), given the logits at its place, (K, vocabulary)."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def last_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
    """Returns the logits of the last `count` positions of left-padded rows, (rows, count, vocabulary)."""
    optional = {
        # some architectures would count the padding as positions
        "position_ids": (attention_mask.cumsum(dim=-1) - 1).clamp(min=0) + _first_position(model),
        # Logits that nobody reads cost up to a fifth of the forward pass and most of its memory. Indices give a copy;
        # with a slice, torch multiplies row by row and copies a frozen head for each (10 times the forward).
        "logits_to_keep": torch.arange(input_ids.shape[1] - count, input_ids.shape[1], device=input_ids.device),
        "use_cache": False,
    }
    accepted = inspect.signature(type(model).forward).parameters
    arguments = {name: value for name, value in optional.items() if name in accepted}
    if getattr(getattr(model, "config", None), "use_cache", False) and "kwargs" in accepted:
        arguments["use_cache"] = False  # which Granite's mixtures of experts do not name
    mask = attention_mask_for(model, attention_mask) if "position_ids" in accepted else attention_mask
    return model(input_ids=input_ids, attention_mask=mask, **arguments).logits[:, -count:]


def _first_position(model: nn.Module) -> int:
    """The position of a text's first token: 0, but after that of padding in RoBERTa and its kin."""
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding is None else padding + 1
