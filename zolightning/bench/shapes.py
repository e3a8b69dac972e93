"""Models by their shape, with random weights: nothing is downloaded, and time and memory are those of the original.

Sizes are those of the published ``config.json`` files. What such a model learns or scores means nothing.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "config:"


def _llama(
    vocabulary: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
    } | others


def _qwen3(width: int, mlp: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    rest = {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": tied, "max_position_embeddings": 40960}
    return _llama(151936, width, mlp, layers, heads, 8) | rest


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(512, 64, 128, 3, 4, 2, tie_word_embeddings=True),  # of no original: to try a command out
    "small": _llama(4096, 512, 1536, 8, 8, 8, tie_word_embeddings=True),  # of no original: many tokens in little time
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True, max_position_embeddings=8192),
    "smollm2-1.7b": _llama(49152, 2048, 8192, 24, 32, 32, tie_word_embeddings=True, max_position_embeddings=8192),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, max_position_embeddings=8192),
    "mistral-7b": _llama(32000, 4096, 14336, 32, 32, 8, max_position_embeddings=32768),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
}


def model_of_shape(
    name: str, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", seed: int = 0
) -> "PreTrainedModel":
    """A model in eval mode whose matrices are drawn from N(0, 0.02), on the device and in the dtype that it stays in.

    Args:
        name: a key of :data:`SHAPES`.
        dtype: dtype of all parameters, which are made in it, not converted.
        device: device of the parameters; ``meta`` makes shapes only.
        seed: seed of the weights; torch's own generators are left as they were.

    Raises:
        ValueError: there is no shape of this name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in SHAPES:
        raise ValueError(f"`model` must name one of {', '.join(SHAPES)} after '{PREFIX}', got {name!r}.")
    device = torch.device(device)
    config = AutoConfig.for_model(**SHAPES[name], initializer_range=0.02)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
