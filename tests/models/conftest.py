"""Tiny random models of eight architectures, a tiny pretrained folder, and hand-made batches."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tiny_llama import TINY_LLAMA

WORDS = ["<unk>", "</s>", "a", "plain", "story", "told", "with", "care", "good", "bad", "it", "was"]
VOCABULARY = TINY_LLAMA["vocab_size"]

_SLIDING = {"sliding_window": 4}  # shorter than the test sequences
CONFIGS = {
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.3,
    ),
    "llama": lambda: LlamaConfig(**TINY_LLAMA, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**TINY_LLAMA),
    "qwen3": lambda: Qwen3Config(**TINY_LLAMA),
    "gemma2": lambda: Gemma2Config(**TINY_LLAMA, **_SLIDING),
    "gemma3": lambda: Gemma3TextConfig(**TINY_LLAMA, **_SLIDING, layer_types=["sliding_attention", "full_attention"]),
    "mistral": lambda: MistralConfig(**TINY_LLAMA, **_SLIDING),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
}


@pytest.fixture(params=CONFIGS)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    def make(architecture: str = "llama", attention: str | None = None) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), attn_implementation=attention)
        return model.eval()

    return make


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words split at spaces; no padding token, and padding on the right."""
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.fixture
def tiny_folder(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A tiny Llama with tied embeddings and its tokenizer, in Hugging Face's format."""
    folder = tmp_path / "tiny-llama"
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_batch() -> Callable[..., dict]:
    def make(
        examples: Sequence[tuple[list[int], list[list[int]]]],
        labels: Sequence[int],
        objective: str = "classification",
        prompt_only: bool = False,
    ) -> dict:
        """A batch of (prompt, candidates); `prompt_only` is the layout for answers of one token."""
        num_candidates = max(len(candidates) for _, candidates in examples)
        rows, answers = [], []
        for prompt, candidates in examples:
            padded = candidates + [[]] * (num_candidates - len(candidates))
            answers.append(padded)
            rows.append([prompt] if prompt_only else [prompt + answer for answer in padded])
        return {
            "input_ids": pad_left(rows, 0),
            "attention_mask": pad_left([[[1] * len(row) for row in group] for group in rows], 0),
            "answer_ids": pad_left(answers, -1),
            "label": torch.tensor(labels),
            "id": torch.arange(len(examples)) + 100,
            "objective": objective,
        }

    def pad_left(groups: list[list[list[int]]], fill: int) -> torch.Tensor:
        width = max(len(row) for group in groups for row in group)
        return torch.tensor([[[fill] * (width - len(row)) + row for row in group] for group in groups])

    return make
