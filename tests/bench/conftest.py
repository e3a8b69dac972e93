"""A model of a few words for the benchmarks."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ["<unk>", "</s>", "It", "was", "terrible", "great", "a", "the", "and", "of", "is", "it"]


@pytest.fixture
def model() -> PreTrainedModel:
    # weights far larger than usual, so that a wrong position or mask shows in the loss
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def folder(tmp_path: Path, model: PreTrainedModel) -> Path:
    words = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(tmp_path / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(
        tmp_path / "tiny"
    )
    return tmp_path / "tiny"
