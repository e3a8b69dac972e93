"""LoRA adapters inside a model of transformers, by PEFT.

PEFT alone makes, saves and removes them. The methods of the same names that transformers gives its models ask for a
version of PEFT that may not be out yet.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from zolightning.directions.shards import is_sharded
from zolightning.layers import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "default"  # what PEFT calls an adapter that is given no name


class AdapterSettings(TypedDict):
    """What makes an adapter again: plain values, for checkpoints."""

    rank: int
    alpha: float
    target_modules: list[str]  # dotted names in the model, sorted


def adapter_settings(model: "PreTrainedModel") -> AdapterSettings | None:
    """The settings of the model's adapter, or None if it has none."""
    config = _config(model)
    if config is None:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    # PEFT shortens long lists of targets in its own configuration.
    targets = sorted(name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return AdapterSettings(rank=config.r, alpha=config.lora_alpha, target_modules=targets)


def add_adapter(model: "PreTrainedModel", settings: AdapterSettings) -> None:
    """Adds an adapter, which changes nothing at first, to a model without one.

    Which of the other parameters are trainable is as before. The adapter's values depend on the seed of
    ``seed_everything`` (or 0), and torch's generators take no notice.

    Raises:
        ValueError: if the model's weights are sharded over ranks already.
    """
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "A LoRA adapter is to be added to a model whose weights are sharded over ranks already, as they are from a "
            "validation on: set `validate_first` to False, or use a strategy under which every rank holds all of them "
            "('zo_ddp')."
        )
    from peft import LoraConfig, inject_adapter_in_model

    targets = settings["target_modules"]
    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],  # type: ignore[arg-type]  # PEFT takes any number
        target_modules=targets,
        base_model_name_or_path=model.name_or_path,
        fan_in_fan_out=is_conv1d(model.get_submodule(targets[0])),
        task_type="CAUSAL_LM" if model.can_generate() and not model.config.is_encoder_decoder else None,
    )
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        inject_adapter_in_model(config, model, _NAME)
    for parameter, requires_grad in trainable.items():
        parameter.requires_grad_(requires_grad)


def remove_adapter(model: "PreTrainedModel") -> None:
    """Takes the adapter, and all that it has learnt, out of the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config


def save_adapter(model: "PreTrainedModel", folder: str | Path) -> None:
    """Writes the adapter in PEFT's format, for ``PeftModel.from_pretrained(base_model, folder)``."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # Without the embeddings: no adapter changes them, and to see that they are the base model's PEFT would ask the hub.
    weights = get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    folder = Path(folder)
    _config(model).save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def restore_adapter(model: "PreTrainedModel", settings: AdapterSettings | None) -> None:
    """Makes the model one that weights saved with these settings fit: with that adapter, or without any."""
    present = adapter_settings(model)
    if present == settings:
        return
    if present is not None:
        remove_adapter(model)
    if settings is not None:
        add_adapter(model, settings)


def default_targets(model_type: str) -> list[str]:
    """The last parts of the names of the linear maps that PEFT adapts in this architecture; empty if unknown."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, []))


def _config(model: "PreTrainedModel") -> Any:
    """The ``LoraConfig`` of the model's adapter, or None if it has none."""
    return getattr(model, "peft_config", {}).get(_NAME)


def adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear map that can have an adapter, or has one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, nn.Linear | BaseTunerLayer) or is_conv1d(module)
