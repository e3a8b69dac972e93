"""A half precision of the Trainer makes the network that transformers loads in that precision, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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
    assert_as_loaded(tmp_path, precision)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@torch.no_grad()
def test_logits_of_a_mixture_of_experts(
    precision: Any, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With biases of experts in half precision, which differ by little, others would be chosen."""
    config = DeepseekV3Config(
        **{"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.3},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias += 5 + 0.01 * torch.arange(8)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert_as_loaded(tmp_path, precision)


def assert_as_loaded(folder: Path, precision: Any) -> None:
    plugin = HalfPrecision(precision)
    module = plugin.convert_module(CausalLM(str(folder)))
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.randint(2, 37, (1, 60))
    assert torch.equal(module.model(ids).logits, expected(ids).logits)
    dtypes, wanted = ({n: tensor.dtype for n, tensor in each.state_dict().items()} for each in (module.model, expected))
    assert dtypes == wanted
