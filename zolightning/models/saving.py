"""Writes models in Hugging Face's format."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from zolightning.network.head import has_untied_head
from zolightning.network.quantization import dequantized_state_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_model(model: "PreTrainedModel", folder: str | Path) -> None:
    """Writes a model for ``from_pretrained``; quantised weights are written as ordinary ones that compute the same."""
    state = dequantized_state_dict(model)
    if has_untied_head(model) and (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        # BERT and its kin have the bias under two names. Transformers would save one, and miss the other on loading.
        state |= {name: tensor.clone() for name, tensor in state.items() if tensor.data_ptr() == bias.data_ptr()}
    model.save_pretrained(folder, state_dict=state)


def share_weights(folder: Path) -> None:
    """Gives the weights of a saved model the permissions of its config, those of any new file.

    safetensors (0.8, for one) writes files that only their owner may read.
    """
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(next(folder.glob("*config.json")), weights)
