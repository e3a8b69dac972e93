"""The structure of a network as plain values: how it differs from the pretrained one, and how to restore it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from zolightning.network.adapters import adapter_settings, fixed_factors, load_fixed_factors, restore_adapter
from zolightning.network.early_exit import early_exit, restore_early_exit
from zolightning.network.head import has_untied_head, restore_head
from zolightning.network.quantization import quantization_settings, restore_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pretrained_model(module: nn.Module) -> "PreTrainedModel | None":
    """The outermost model of transformers in a module; None if there is none."""
    from transformers import PreTrainedModel

    return next((submodule for submodule in module.modules() if isinstance(submodule, PreTrainedModel)), None)


def structure_of(model: "PreTrainedModel") -> dict[str, Any]:
    """Adapter, quantisation, head and number of layers of a model, for checkpoints and ledgers."""
    factors = fixed_factors(model)
    return {
        "adapter": adapter_settings(model),
        "quantization": quantization_settings(model),
        "untied_head": has_untied_head(model),
        "num_layers": early_exit(model),
        **({"fixed_factors": factors} if factors else {}),
    }


def restore_structure(model: "PreTrainedModel", saved: Mapping[str, Any]) -> None:
    """Gives a model the structure that :func:`structure_of` described, so that its weights can be loaded.

    Raises:
        ValueError: if the model has fewer layers, or its weights are sharded already where something is to be added.
        MisconfigurationException: if it is quantised in another way.
    """
    restore_early_exit(model, saved.get("num_layers"))
    restore_head(model, saved.get("untied_head", False))
    restore_adapter(model, saved.get("adapter"))
    load_fixed_factors(model, saved.get("fixed_factors", {}))
    restore_quantization(model, saved.get("quantization"))
