"""The LightningModule that fine-tunes an encoder-decoder, such as T5, on prompts with candidate answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from zolightning.data.answer_index import AnswerIndex
from zolightning.data.batch import Batch
from zolightning.data.encoding import Example
from zolightning.data.examples import example_of
from zolightning.data.language_modeling import PlainText
from zolightning.data.row import Row
from zolightning.data.seq2seq import encode_pair
from zolightning.data.task import Task
from zolightning.models.causal_lm import CausalLM
from zolightning.models.head_features import inputs_of
from zolightning.models.scoring import of_label, token_log_probs
from zolightning.models.suitability import refuse_unsuitable_pair


class Seq2SeqLM(CausalLM):
    """A pretrained encoder-decoder, such as T5, of which the encoder reads prompts and the decoder writes answers.

    It trains, chooses, generates and is rewarded like :class:`~zolightning.models.CausalLM`, with the same settings. An
    answer is a text by itself, which ends with the tokenizer's end-of-text token; the score of a candidate is the mean
    log-probability of its tokens, this one included. Each prompt is encoded once, whatever the number of its
    candidates.
    """

    network_class = "AutoModelForSeq2SeqLM"
    padding_side = "right"

    def encode(self, task: Task, row: Row, max_length: int, chat: bool) -> Example:
        """A row in tokens, in place of :func:`~zolightning.data.examples.example_of`."""
        if isinstance(task, PlainText):
            raise ValueError("Seq2SeqLM needs a prompt and an answer, but plain text has none: use CausalLM")
        return example_of(task, row, self.tokenizer, max_length, chat, encode_pair)

    def answer_log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return target_log_probs(self.model, batch)

    @torch.no_grad()
    def head_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The head's inputs from which it predicts each token of the right answers, (K, H), and these tokens, (K,)."""
        return target_features(self.model, self.head, batch)

    def refuse_unsuitable(self) -> None:
        config = self.model.config
        if self.model.dtype is torch.float16 and "t5" in config.model_type:
            raise MisconfigurationException(
                f"`model_name` is a {type(self.model).__name__}, whose values float16 cannot hold: use bfloat16 or "
                "float32 (`trainer.precision`)."
            )
        if getattr(config, "decoder_start_token_id", None) is None:
            raise MisconfigurationException(
                f"`model_name` is a {type(self.model).__name__} without `decoder_start_token_id` in config.json, with "
                "which its decoder begins an answer: add it."
            )
        refuse_unsuitable_pair(self.model, lambda batch: target_log_probs(self.model, cast(Batch, batch))[0])


def target_log_probs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each answer token, (B, C, A), and the mask of those that exist.

    Args:
        model: a model of transformers with an encoder and a decoder.
        batch: a batch whose rows are prompts (R is 1); prompts and answers are padded on the right.
    """
    answer_ids = batch["answer_ids"]
    mask = answer_ids >= 0
    index = AnswerIndex.of_batch(batch)

    # each token is predicted from those before it, the first one from the token that all answers start with
    read = answer_ids.clamp(min=0).roll(1, dims=-1)
    read[..., 0] = model.config.decoder_start_token_id
    with _candidates_of_a_prompt(model.get_decoder(), answer_ids.shape[1]):
        logits = model(
            input_ids=batch["input_ids"][:, 0],
            attention_mask=batch["attention_mask"][:, 0],
            decoder_input_ids=read,
            use_cache=False,
        ).logits.flatten(0, 1)
    if index.tokens is None:
        return token_log_probs(logits, answer_ids.flatten()).view_as(mask), mask
    slots = index.tokens[2]
    log_probs = token_log_probs(logits[slots], answer_ids.flatten()[slots])
    return log_probs.new_zeros(mask.numel()).scatter(0, slots, log_probs).view_as(mask), mask


def target_features(model: Any, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The inputs of the output layer, (K, H), from which it predicts the K tokens of the right answers, and these."""
    with inputs_of(head) as read:
        target_log_probs(model, batch)
    answer = of_label(batch["answer_ids"], batch["label"])
    hidden = of_label(read[0].unflatten(0, batch["answer_ids"].shape[:2]), batch["label"])
    return hidden[answer >= 0], answer[answer >= 0]


@contextmanager
def _candidates_of_a_prompt(decoder: nn.Module, count: int) -> Iterator[None]:
    """A context in which a decoder takes ids of (B, count, A), and repeats the encoder's output for B prompts.

    The network is then called once, with inputs of B rows, so that evaluations can share a run of it.
    """

    with decoder.register_forward_pre_hook(_Spread(count), with_kwargs=True):
        yield


@dataclass(frozen=True)
class _Spread:
    """The hook of this context. CUDA graphs hold hooks that are values, as dataclasses are, and no others."""

    count: int

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = {"input_ids": kwargs["input_ids"].flatten(0, 1)}
        if self.count > 1:
            encoded = ("encoder_hidden_states", "encoder_attention_mask")
            rows |= {name: kwargs[name].repeat_interleave(self.count, dim=0) for name in encoded}
        return args, kwargs | rows
