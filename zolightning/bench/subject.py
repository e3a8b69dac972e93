"""What a benchmark is about: a model and its prompts, pretrained or by shape, on a device."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from zolightning.bench.lengths import draw_prompts
from zolightning.bench.shapes import PREFIX, model_of_shape
from zolightning.data import load_task
from zolightning.data.encoding import Example, encode
from zolightning.data.sampling import sample
from zolightning.data.source import read_folder
from zolightning.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "32-true": "float32",
    "bf16-true": "bfloat16",
    "16-true": "float16",
}


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, and the tokenizer that it was trained with; None for a model by shape."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    context_length: int

    @classmethod
    def load(cls, name: str, precision: str, device: torch.device) -> "Subject":
        """Loads what ``model.model_name`` accepts, or makes a model by shape of a name that begins with ``config:``."""
        dtype = DTYPES[precision]
        if name.startswith(PREFIX):
            model = model_of_shape(name.removeprefix(PREFIX), getattr(torch, dtype), device)
            return cls(model, None, model.config.get_text_config().max_position_embeddings)
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bench loads a model for each of its rows
        module = CausalLM(name, dtype=dtype).to(device)
        return cls(module.model, module.tokenizer, module.context_length)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self.model.config.get_text_config().vocab_size

    @property
    def pad_id(self) -> int:
        """The token that pads rows. It is masked out, so any will do for a model without tokenizer."""
        return (self.tokenizer and self.tokenizer.pad_token_id) or 0

    def examples(self, folder: Path | None, lengths: str, batches: int, batch_size: int) -> list[Example]:
        """Real prompts where there is a tokenizer, drawn ones of real lengths otherwise.

        Args:
            folder: rows of SST-2 for a tokenizer; the sentiment set of the package if not given.
            lengths: lengths of drawn prompts: those of a task in :data:`~zolightning.bench.lengths.LENGTHS`, or a
                number of tokens.
            batches: number of whole batches to make; fewer, or all rows, if there are too few.
            batch_size: examples a batch.
        """
        if self.tokenizer is None:
            return draw_prompts(lengths, batches * batch_size, self.vocabulary)
        task = load_task("sst2" if folder else "sentiment")
        folder = folder or task.folder
        assert folder is not None  # the package's set comes with its rows
        split = read_folder(folder, "train", task)
        chosen = sample(split, batches * batch_size, seed=0)
        whole = len(chosen) // batch_size * batch_size
        return [
            encode(
                self.tokenizer,
                *task.render(split.row(index)),
                label=split.labels[index],
                id=split.ids[index],
                max_length=self.context_length,
            )
            for index in chosen[: whole or None]
        ]
