"""The base class of LightningModules around networks that read text: what PromptDataModule needs of them."""

from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from zolightning.models.pretrained_module import PretrainedModule
from zolightning.models.suitability import embeddings_of
from zolightning.network.prefix import prefix_of
from zolightning.scopes import PrefixTuning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextModule(PretrainedModule):
    """A pretrained network that reads tokens."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer."""
        return cast("PreTrainedTokenizerBase", self.preprocessor)

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """The side on which prompts are padded, that of the tokenizer."""
        return "left" if self.tokenizer.padding_side == "left" else "right"

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens, that model and tokenizer are made for, without the length of a prefix.

        A prefix that PrefixTuning is going to add counts too, because examples are made before it is added.
        """
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for name, module in self.model.named_modules() if longest else ():
            if name.endswith(".position_embeddings") and getattr(module, "padding_idx", None) is not None:
                longest -= module.padding_idx + 1  # those of RoBERTa and its kin begin after that of padding
        callbacks: Any = getattr(self._trainer, "callbacks", ())
        to_come = [callback.num_virtual_tokens for callback in callbacks if isinstance(callback, PrefixTuning)]
        prefix = prefix_of(self.model)
        taken = sum(to_come) if prefix is None else prefix.num_tokens
        return min(longest or self.tokenizer.model_max_length, self.tokenizer.model_max_length) - taken

    @property
    def num_embeddings(self) -> int:
        """The number of tokens that the model knows; the tokenizer may have more, which no text should contain."""
        return len(embeddings_of(self.model))

    def logits_both_ways(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of a network that reads a text both ways, for tokens and their mask, both (rows, length).

        Position ids, which count from the left, are the network's own. A network that tells two texts apart by token
        types, as BERT does, gets the number of separators before each token.
        """
        types = {}
        num_types = getattr(self.model.config, "type_vocab_size", 1)
        if num_types > 1 and "token_type_ids" in self.tokenizer.model_input_names:
            separators = (input_ids == self.tokenizer.sep_token_id).long()
            types["token_type_ids"] = (separators.cumsum(dim=-1) - separators).clamp(max=num_types - 1)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
