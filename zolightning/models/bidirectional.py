"""Running networks that read a text both ways, such as BERT, on the prompts of a batch."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_on_prompts(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", input_ids: Tensor, attention_mask: Tensor
) -> Any:
    """The network's output for rows of tokens; position ids, which count from the left, are its own.

    Networks that tell two texts apart by token types, as BERT does, get the number of separators before each token.

    Args:
        model: a model of transformers.
        tokenizer: its tokenizer.
        input_ids: (rows, length).
        attention_mask: (rows, length), 0 on padding.
    """
    types = {}
    num_types = getattr(model.config, "type_vocab_size", 1)
    if num_types > 1 and "token_type_ids" in tokenizer.model_input_names:
        separators = (input_ids == tokenizer.sep_token_id).long()
        types["token_type_ids"] = (separators.cumsum(dim=-1) - separators).clamp(max=num_types - 1)
    return model(input_ids=input_ids, attention_mask=attention_mask, **types)
