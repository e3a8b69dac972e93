"""Tokenizers trained on a few sentences, folders of invented rows, and a module that only looks at its batches."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from zolightning.data import PromptDataModule
from zolightning.data.encoding import Example

SENTENCES = [
    "the harbour was quiet and the soup was great",
    "a terrible night, but the morning was great",
    "No one said yes; everybody said no. Yes or No?\nYes\nNo",
    "it was terrible because the rain ran through the roof",
    "Maybe the roof holds, so we stay.",
]


def train_tokenizer(bos: bool = False, eos: bool = False, across_words: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `across_words` lets it merge over word boundaries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    template = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", name_or_path="tiny")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(bos=True)


@pytest.fixture(scope="session")
def eos_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(eos=True)


@pytest.fixture(scope="session")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(across_words=True)


def opinion(index: int) -> dict[str, Any]:
    """An invented row of the sst2 task; lengths differ a lot."""
    return {
        "sentence": f"dish {index} was warm " + "and the soup was great " * (index * 7 % 11),
        "label": index % 2,
        "idx": index,
    }


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``<split>.jsonl`` files from lists of rows or numbers of rows, and returns their folder."""

    def write(**splits: list[Any] | int) -> Path:
        for name, rows in splits.items():
            rows = [opinion(index) for index in range(rows)] if isinstance(rows, int) else rows
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path

    return write


class Spectator(L.LightningModule):
    """Notes the ids of the batches it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, context_length: int | None = 128) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_ids: list[list[int]] = []
        self.eval_ids: list[list[int]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.train_ids.append(batch["id"].tolist())
        return self.weight.square()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.eval_ids.append(batch["id"].tolist())

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.eval_ids.append(batch["id"].tolist())

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[int]:
        return batch["id"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def spectator(tokenizer: PreTrainedTokenizerFast) -> Spectator:
    return Spectator(tokenizer)


@pytest.fixture
def make_spectator(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Spectator]:
    return lambda **kwargs: Spectator(**{"tokenizer": tokenizer, **kwargs})


@pytest.fixture
def make_trainer(make_trainer: Callable[..., L.Trainer]) -> Callable[..., L.Trainer]:
    return partial(make_trainer, num_sanity_val_steps=0)


CHAT_TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn.role }}\n{{ turn.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def encoded(
    tmp_path: Path, make_trainer: Callable[..., L.Trainer], make_spectator: Callable[..., Any]
) -> Callable[..., list[Example]]:
    """The rows of a split in tokens, by their id; every split has the same rows."""

    def read(
        task: dict[str, Any], rows: list[dict], tokenizer: Any, split: str = "train", **settings: Any
    ) -> list[Example]:
        for name in ("train", "validation", "test"):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = PromptDataModule(task, str(tmp_path), batch_size=1, num_train=len(rows), **settings)
        trainer = make_trainer(max_steps=1, limit_val_batches=0)
        module = make_spectator(tokenizer=tokenizer, context_length=None)
        (trainer.test(module, data, verbose=False) if split == "test" else trainer.fit(module, data))
        return sorted(data._examples[split], key=lambda example: example.id)

    return read


@pytest.fixture
def texts(encoded: Callable[..., list[Example]]) -> Callable[..., list[tuple[str, str]]]:
    """Prompts and right answers of the rows of a split, decoded from their tokens, by their id."""

    def read(task: dict[str, Any], rows: list[dict], tokenizer: Any, **settings: Any) -> list[tuple[str, str]]:
        decode = tokenizer.decode
        return [
            (decode(example.prompt_ids), decode(example.answer_ids[example.label]))
            for example in encoded(task, rows, tokenizer, **settings)
        ]

    return read
