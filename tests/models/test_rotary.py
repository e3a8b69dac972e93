"""A half precision of the Trainer makes the network that transformers loads in that precision, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from zolightning.models import CausalLM


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@torch.no_grad()
def test_logits_of_a_long_text(
    architecture: str,
    precision: Any,
    make_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """With frequencies of rotary embeddings in half precision, tokens far from the first would have other positions."""
    make_model(architecture).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    plugin = HalfPrecision(precision)
    module = plugin.convert_module(CausalLM(str(tmp_path)))
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.randint(2, 37, (1, 60))
    assert torch.equal(module.model(ids).logits, expected(ids).logits)
