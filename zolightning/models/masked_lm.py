"""The LightningModule that fine-tunes a masked language model on prompts with a mask where the answer stands."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from zolightning.data.batch import Batch
from zolightning.data.bidirectional import encode_masked
from zolightning.data.encoding import Example
from zolightning.data.examples import example_of
from zolightning.data.language_modeling import PlainText
from zolightning.data.row import Row
from zolightning.data.task import Task
from zolightning.models.head_features import inputs_of
from zolightning.models.language_model import LanguageModel
from zolightning.models.scoring import of_label, single_token_log_probs
from zolightning.models.suitability import refuse_reading_padding


class MaskedLM(LanguageModel):
    """A pretrained masked language model, such as BERT or RoBERTa, that chooses among words to put in a prompt.

    The task's prompt has a ``{{ mask }}``, and its answers are one token each, as in LM-BFF (Gao et al., 2021,
    arXiv:2012.15723) and in MeZO's experiments with RoBERTa (Malladi et al., 2023, arXiv:2305.17333, appendix E).

    Example::

        model = MaskedLM("FacebookAI/roberta-large")
        data = PromptDataModule("sst2", prompt="{{ sentence | trim }} It was {{ mask }}.", examples_per_class=16)
        Trainer(max_steps=1000).fit(model, datamodule=data)
    """

    network_class = "AutoModelForMaskedLM"

    def encode(self, task: Task, row: Row, max_length: int, chat: bool) -> Example:
        """A row in tokens, in place of :func:`~zolightning.data.examples.example_of`."""
        if chat:
            raise ValueError("`data.chat` is true, but a masked language model does not chat")
        if isinstance(task, PlainText):
            raise ValueError("MaskedLM needs a prompt with a mask, but plain text has none: use CausalLM")
        return example_of(task, row, self.tokenizer, max_length, chat, encode=encode_masked)

    def refuse_unsuitable(self) -> None:
        refuse_reading_padding(self.model, self.tokenizer, self._logits)

    def answer_log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self._logits(batch["input_ids"][:, 0], batch["attention_mask"][:, 0])
        return single_token_log_probs(logits, batch["answer_ids"])

    @torch.no_grad()
    def head_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The output layer's inputs at the mask of each row, (B, H), and the tokens that belong there, (B,)."""
        with inputs_of(self.head) as read:
            self._logits(batch["input_ids"][:, 0], batch["attention_mask"][:, 0])
        return read[0].squeeze(1), of_label(batch["answer_ids"], batch["label"])[:, 0]

    def _logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits at the mask of each row, (rows, vocabulary)."""
        mask_id = cast(int, self.tokenizer.mask_token_id)
        with _hidden_states_at(self.model.base_model, mask_id):
            return self.logits_both_ways(input_ids, attention_mask).squeeze(1)


@contextmanager
def _hidden_states_at(network: nn.Module, token: int) -> Iterator[None]:
    """A context in which a network returns only the hidden states at a token, which each row has once.

    Logits that nobody reads would cost more than all layers. The token is looked for in the network's input, which may
    hold the rows of several evaluations.
    """

    with network.register_forward_hook(_Select(token), with_kwargs=True):
        yield


@dataclass(frozen=True)
class _Select:
    """The hook of this context. CUDA graphs hold hooks that are values, as dataclasses are, and no others."""

    token: int

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        output.last_hidden_state = _at(output.last_hidden_state, ids == self.token)
        return output


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Selects from `values`, (rows, length, width), the first True place of each row, (rows, 1, width)."""
    place = places.int().argmax(dim=-1)
    return values[torch.arange(len(values), device=values.device), place].unsqueeze(1)
