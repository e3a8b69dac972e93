"""Models in GGUF, the file format of llama.cpp."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zolightning.models.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(
    path: Path, dtype: torch.dtype, attention: str | None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads a GGUF file as an ordinary model, its quantized weights unpacked so that they can be trained."""
    from transformers import AutoTokenizer, GgufConfig

    model = load_model(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        attn_implementation=attention,
        # without it the model counts as quantized, and refuses to be saved or converted to another dtype
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
