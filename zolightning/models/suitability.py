"""Runs a model to check what scoring assumes: that no token sees a later one, and that padding changes nothing."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zolightning.evaluation.mode import evaluation_mode
from zolightning.models.scoring import last_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens. The length is odd, so that a network that pools pairs of tokens (Funnel) pools the last one with padding.
_LENGTH, _PADDING = 9, 3


def embeddings_of(model: "PreTrainedModel") -> Tensor:
    """The embeddings of a model's tokens, (tokens, width).

    Raises:
        MisconfigurationException: if it has no such table.
    """
    try:
        return model.get_input_embeddings().get_parameter("weight")
    except (AttributeError, NotImplementedError):  # of transformers: CANINE hashes characters, for one
        raise MisconfigurationException(
            f"`model_name` is a {type(model).__name__}, which has no table of the embeddings of its tokens. Use a "
            "model that has one."
        ) from None


@torch.no_grad()
def refuse_unsuitable(model: "PreTrainedModel") -> None:
    """Runs a model of transformers twice, over some of its tokens, in the dtype and on the device that it has.

    The first run is a plain one, without what :func:`~zolightning.models.scoring.last_logits` adds.

    Raises:
        MisconfigurationException: if the values exceed float16; attention is bidirectional, so the model would read the
            answer that it scores; or the scores of a text depend on the padding beside it, so on the other texts of a
            batch.
    """
    weight = embeddings_of(model)
    ids = torch.linspace(len(weight) // 2, len(weight) - 1, _LENGTH).long()  # special tokens are among the first
    changed = ids.clone()
    changed[-1] = ids[-2]
    rows = torch.stack([ids, changed]).to(_device_of(model))
    pad = rows.new_zeros(1, _PADDING)
    padded, mask = torch.cat([pad, rows[:1]], dim=1), torch.cat([pad, torch.ones_like(rows[:1])], dim=1)
    with evaluation_mode(model):
        plain = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
        logits, logits_before_changed = model(rows, attention_mask=torch.ones_like(rows), **plain).logits.float()
        (padded_logits,) = last_logits(model, padded, mask, _LENGTH).float()

    _refuse_overflow(model, logits)
    if _difference(logits[:-1], logits_before_changed[:-1]) > _tolerance(model):
        raise MisconfigurationException(
            f"`model_name` is a {type(model).__name__} whose tokens see those after them: it would read the answers "
            "that it scores. Use a causal language model (here: `is_decoder` true in config.json, if it was trained "
            "so), or MaskedLM."
        )
    _refuse_padding(model, logits, padded_logits)


@torch.no_grad()
def refuse_reading_padding(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", logits_of: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Runs a model of transformers that reads both ways with padding and without it, as :func:`refuse_unsuitable` does.

    `logits_of` runs it: it returns the logits, given tokens and their mask, both (rows, length).

    Raises:
        MisconfigurationException: if the values exceed float16, or depend on the padding beside a text; or the model
            lacks the token for padding.
    """
    weight = embeddings_of(model)
    if (tokenizer.pad_token_id or 0) >= len(weight):
        raise MisconfigurationException(
            f"The token for padding of `model_name`, {tokenizer.pad_token!r}, has the id {tokenizer.pad_token_id}, "
            f"but the model has embeddings for {len(weight)} only: resize them (`model.resize_token_embeddings`) and "
            "save the model."
        )
    others = [id for id in range(len(weight)) if id not in tokenizer.all_special_ids]
    chosen = [others[len(others) * i // _LENGTH] for i in range(_LENGTH)]
    if tokenizer.mask_token_id is not None:
        chosen[_LENGTH // 2] = tokenizer.mask_token_id
    if model.config.is_encoder_decoder and tokenizer.eos_token_id is not None:
        chosen[-1] = tokenizer.eos_token_id  # which classifiers of BART's kind look for in every text
    ids = torch.tensor([chosen[i:] + chosen[:i] for i in range(_PADDING)], device=weight.device)
    pad = torch.full((len(ids), _PADDING), tokenizer.pad_token_id or 0, device=weight.device)

    def beside(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([second, first] if tokenizer.padding_side == "left" else [first, second], dim=1)

    with evaluation_mode(model):
        logits = logits_of(ids, torch.ones_like(ids)).float()
        padded_logits = logits_of(beside(ids, pad), beside(torch.ones_like(ids), torch.zeros_like(pad))).float()
    _refuse_overflow(model, logits)
    _refuse_padding(model, logits, padded_logits)


@torch.no_grad()
def refuse_unsuitable_pair(model: "PreTrainedModel", log_probs_of: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """Runs an encoder-decoder on two prompts with two answers each, and on one of these by itself.

    `log_probs_of` runs it: it returns the log-probability of each answer token, (B, C, A), of a batch.

    Raises:
        MisconfigurationException: if it cannot be run like this, or an answer's score depends on others beside it.
    """
    weight = embeddings_of(model)
    ids = torch.linspace(len(weight) // 2, len(weight) - 1, _LENGTH).long().to(_device_of(model))
    kept = torch.arange(_LENGTH, device=ids.device) < _LENGTH - _PADDING
    prompts = torch.stack([ids, ids.where(kept, getattr(model.config, "pad_token_id", 0) or 0)])
    masks = torch.stack([torch.ones_like(ids), kept.long()])
    answers = torch.stack([ids, ids.flip(0).where(kept, -1)])
    short = slice(0, _LENGTH - _PADDING)
    batches = [
        {"input_ids": prompts[:, None], "attention_mask": masks[:, None], "answer_ids": answers.expand(2, -1, -1)},
        {
            "input_ids": prompts[1:, None, short],
            "attention_mask": masks[1:, None, short],
            "answer_ids": answers[1:, None, short],
        },
    ]
    try:
        with evaluation_mode(model):
            together, alone = map(log_probs_of, batches)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise MisconfigurationException(
            f"`model_name` is a {type(model).__name__}, which does not read a prompt and several answers ({reason}). "
            "Use an encoder-decoder such as T5 or BART."
        ) from None
    _refuse_padding(model, alone[0, 0], together[1, 1, short])


def _device_of(model: "PreTrainedModel") -> torch.device:
    """Where a model's inputs go; offloaded weights are fetched to it."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))


def _refuse_overflow(model: "PreTrainedModel", logits: Tensor) -> None:
    if model.dtype is torch.float16 and not torch.isfinite(logits).all():
        raise MisconfigurationException(
            f"`model_name` is a {type(model).__name__} whose values float16 cannot hold: use bfloat16 or float32 "
            "(`trainer.precision`)."
        )


def _refuse_padding(model: "PreTrainedModel", logits: Tensor, padded_logits: Tensor) -> None:
    if _difference(logits, padded_logits) > _tolerance(model):
        raise MisconfigurationException(
            f"`model_name` is a {type(model).__name__}, which does not mask padding: its scores would depend on the "
            "other examples of a batch. Use a model that honours `attention_mask`."
        )


def _tolerance(model: "PreTrainedModel") -> float:
    # Rounding gives 1e-6 (float32) or 1e-3 (bfloat16, SmolLM2-135M). Random weights of a BERT give 9e-4 and 6e-3,
    # trained ones, and padding of an RWKV, about 1.
    return 0.1 if model.dtype.itemsize < 4 else 1e-4


def _difference(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference of logits, in standard deviations of the logits, or in that of a number."""
    scale = one.std() if one.shape[-1] > 1 else one.square().mean().sqrt()
    return ((one - other).square().mean().sqrt() / scale).item()
