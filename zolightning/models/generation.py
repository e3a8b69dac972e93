"""Texts that a language model writes."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    stop: str,
) -> list[str]:
    """Continues prompts by the likeliest token, all of a batch together.

    A row ends with the token whose text contains `stop`, also one that merges it with other characters, or with the
    model's own end of a text.

    Args:
        model: One of transformers' that generates.
        tokenizer: The model's.
        prompt_ids: (B, P), padded on the left, or where an encoder reads them on the right.
        prompt_mask: (B, P), 0 on padding.
        max_new_tokens: Tokens to write, at most.
        stop: What ends a text; it is cut off.

    Returns:
        B texts without outer spaces.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    start = 1 if model.config.is_encoder_decoder else prompt_ids.shape[1]  # a decoder's texts begin with one token

    def has_stopped(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        # by the text: a token that merges a line break with other characters has a number of its own
        texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return torch.tensor([stop in text for text in texts], device=ids.device)

    ends = model.generation_config.eos_token_id
    pad = next(id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if id is not None)
    written = model.generate(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad
        ),
        stopping_criteria=StoppingCriteriaList([has_stopped]),
    )
    texts = tokenizer.batch_decode(written[:, start:], skip_special_tokens=True)
    return [text.split(stop)[0].strip() for text in texts]
