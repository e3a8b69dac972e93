"""Generates texts with a language model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zolightning.checks import require_integer, require_positive, require_share
from zolightning.evaluation.randomness import Generators
from zolightning.evaluation.replaced import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: fields of transformers' GenerationConfig. By default it is the likeliest one.

    Settings in the model's generation_config.json, such as a repetition penalty, have no effect. Only the tokens that
    begin and end a text, and those that are never written, are taken from it.

    Args:
        do_sample: draw each token from the model's distribution, instead of taking the likeliest.
        temperature: divides the logits before tokens are drawn.
        top_k: draw among this many of the likeliest tokens; 0 among all.
        top_p: draw among the likeliest tokens that make up this share of the probability.
        num_beams: number of beams: texts that are continued side by side, of which the likeliest is taken in the end.

    Raises:
        ValueError: if a field is out of range, or would have no effect.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        require_positive("decoding.temperature", self.temperature)
        require_integer("decoding.top_k", self.top_k, least=0)
        require_integer("decoding.num_beams", self.num_beams)
        require_share("decoding.top_p", self.top_p)
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError(
                "`decoding.do_sample` is False, so `temperature`, `top_k` and `top_p` have no effect: set it to True, "
                "or leave them out."
            )

    def fields(self) -> dict[str, Any]:
        """The fields that have an effect, for transformers' GenerationConfig."""
        found: dict[str, Any] = {"do_sample": self.do_sample, "num_beams": self.num_beams}
        if self.do_sample:
            found |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return found


@contextmanager
def drawn_from(number: int, device: torch.device) -> Iterator[None]:
    """A context in which random numbers are a function of the run's seed and `number`, whatever was drawn before."""
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    with Generators([device]).rewound(seed, number) as start:
        start()
        yield


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    stop: str,
    decoding: Decoding | None = None,
) -> list[str]:
    """Continues prompts, all of a batch together.

    A row ends with the first token whose text contains `stop`, even if it has other characters too, or with the model's
    own end-of-text token.

    The prompts are (B, P), padded on the left, or on the right if an encoder reads them, with a mask that is 0 on
    padding. Returns B texts without outer spaces. Sampling draws from torch's generators.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    start = 1 if model.config.is_encoder_decoder else prompt_ids.shape[1]  # a decoder's texts begin with one token

    def has_stopped(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        # by the text: a token that merges a line break with other characters has an id of its own
        texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return torch.tensor([stop in text for text in texts], device=ids.device)

    pad = next(id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if id is not None)
    tokens = _tokens_of(model) | {"pad_token_id": pad}
    fields = (decoding or Decoding()).fields()
    # A model has settings of its own, which transformers would use where none are given.
    with replaced(model, "generation_config", GenerationConfig()):
        written = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, **tokens, **fields),
            stopping_criteria=StoppingCriteriaList([has_stopped]),
        )
    texts = tokenizer.batch_decode(written[:, start:], skip_special_tokens=True)
    return [text.split(stop)[0].strip() for text in texts]


def _tokens_of(model: Any) -> dict[str, Any]:
    """The tokens that begin and end a model's texts, and those that it never writes, as fields of GenerationConfig."""
    names = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")
    never = ("bad_words_ids", "suppress_tokens")
    return {name: getattr(model.generation_config, name) for name in names + never}
