"""What LightningModules around networks that read text have in common: what PromptDataModule asks them for."""

from typing import TYPE_CHECKING, Any, Literal, cast

from zolightning.models.pretrained_module import PretrainedModule
from zolightning.prefix import prefix_of
from zolightning.scopes import PrefixTuning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextModule(PretrainedModule):
    """A pretrained network that reads tokens."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's."""
        return cast("PreTrainedTokenizerBase", self.preprocessor)

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """Where prompts are padded: as the tokenizer does."""
        return "left" if self.tokenizer.padding_side == "left" else "right"

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens, that model and tokenizer are made for, less a prefix that stands before it.

        Also one that PrefixTuning is about to add: examples are made before that is there.
        """
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for name, module in self.model.named_modules() if longest else ():
            if name.endswith(".position_embeddings") and getattr(module, "padding_idx", None) is not None:
                longest -= module.padding_idx + 1  # RoBERTa's and its kin's begin after the one of padding
        callbacks: Any = getattr(self._trainer, "callbacks", ())
        to_come = [callback.num_virtual_tokens for callback in callbacks if isinstance(callback, PrefixTuning)]
        prefix = prefix_of(self.model)
        taken = sum(to_come) if prefix is None else prefix.num_tokens
        return min(longest or self.tokenizer.model_max_length, self.tokenizer.model_max_length) - taken

    @property
    def num_embeddings(self) -> int:
        """The number of tokens that the model knows; the tokenizer may have more, which no text should contain."""
        return self.model.get_input_embeddings().get_parameter("weight").shape[0]
