"""Adapters in a model of transformers: LoRA on linear maps, or a prefix before the text.

LoRA adapters are made by PEFT directly, because the methods of transformers for that may require a version of PEFT that
is not released yet.
"""

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zolightning.layers import is_conv1d
from zolightning.messages import some
from zolightning.network.head import refuse_sharded
from zolightning.network.plain_tensors import as_plain, from_plain
from zolightning.network.prefix import add_prefix, prefix_of, remove_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AdapterSettings = dict[str, Any]
"""The settings of PEFT's config that differ from their defaults, as plain values for checkpoints."""

LORA, PREFIX = "LORA", "PREFIX_TUNING"
ADAPTER = "default"  # what PEFT calls an adapter that is given no name
_ALWAYS = ("peft_type", "r", "lora_alpha")
# Where an adapter comes from and what follows from its model
_NO_SETTINGS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("fan_in_fan_out", "target_modules"),
)


def lora_settings(rank: int, alpha: float, target_modules: list[str]) -> AdapterSettings:
    """The settings of plain LoRA on the linear maps with these dotted names."""
    return {"peft_type": LORA, "r": rank, "lora_alpha": alpha, "target_modules": sorted(target_modules)}


def adapter_settings(model: "PreTrainedModel") -> AdapterSettings | None:
    """The settings of the model's adapter, or None if it has none."""
    config = adapter_config(model)
    if config is None:
        return None
    values, defaults = (json.loads(json.dumps(each.to_dict(), default=sorted)) for each in (config, type(config)()))
    settings = {
        name: value
        for name, value in values.items()
        if name in _ALWAYS or (name not in _NO_SETTINGS and value != defaults[name])
    }
    if settings["peft_type"] == PREFIX:
        return settings
    from peft.tuners.tuners_utils import BaseTunerLayer

    # PEFT shortens long lists of targets in its own configuration.
    targets = sorted(name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return settings | {"target_modules": targets}


def differences(present: AdapterSettings, wanted: AdapterSettings) -> str:
    """The settings in which an adapter differs from the wanted one, in a few words."""
    names = sorted(name for name in present.keys() | wanted.keys() if present.get(name) != wanted.get(name))
    if "peft_type" in names:
        names = ["peft_type"]

    def value(settings: AdapterSettings, name: str) -> str:
        found = settings.get(name)
        return some(found) if isinstance(found, list) else repr(found)

    return "; ".join(f"{name} {value(present, name)}, not {value(wanted, name)}" for name in names)


def adapter_parameters(model: "PreTrainedModel") -> list[nn.Parameter]:
    """The parameters of the model's adapter; none if it has none."""
    if (prefix := prefix_of(model)) is not None:
        return list(prefix.parameters())
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


def fixed_factors(model: "PreTrainedModel") -> dict[str, dict[str, str]]:
    """The first matrices of LoRA adapters that do not train, by name, as plain values: a scope may have chosen them."""
    return {
        name: as_plain(parameter)
        for name, parameter in model.named_parameters()
        if ".lora_A." in name and not parameter.requires_grad
    }


@torch.no_grad()
def load_fixed_factors(model: "PreTrainedModel", saved: Mapping[str, Mapping[str, str]]) -> None:
    """Puts back what :func:`fixed_factors` described, into the adapters of those settings."""
    for name, values in saved.items():
        parameter = model.get_parameter(name)
        parameter.copy_(from_plain(values).view(parameter.shape))


def add_adapter(model: "PreTrainedModel", settings: AdapterSettings) -> None:
    """Adds an adapter to a model without one: LoRA, which has no effect at first, or a prefix of random tokens.

    Other parameters stay as trainable as they are. The adapter's initial values depend on the seed of
    ``seed_everything`` (or 0), those of a prefix also on the model, its dtype and its device; the state of torch's
    generators does not change.

    Raises:
        ValueError: if the model's weights are sharded over ranks already, or it takes no prefix.
    """
    refuse_sharded(model, "An adapter is to be added to")
    if settings["peft_type"] == PREFIX:
        from peft import PrefixTuningConfig

        prefix = add_prefix(model, settings["num_virtual_tokens"])
        config = PrefixTuningConfig(
            num_virtual_tokens=prefix.num_tokens,
            num_layers=prefix.num_layers,
            num_attention_heads=prefix.num_heads,
            token_dim=prefix.num_heads * prefix.head_size,
            num_transformer_submodules=1,
            base_model_name_or_path=model.name_or_path,
            task_type=_task_type(model),
        )
        model.peft_config = {ADAPTER: config}  # type: ignore[dict-item]  # declared without PEFT
        return
    from peft import LoraConfig

    targets = settings["target_modules"]
    inject_lora(
        model,
        LoraConfig(
            **{name: value for name, value in settings.items() if name != "peft_type"},
            base_model_name_or_path=model.name_or_path,
            fan_in_fan_out=is_conv1d(model.get_submodule(targets[0])),
            task_type=_task_type(model),
        ),
    )


def remove_adapter(model: "PreTrainedModel") -> None:
    """Removes the adapter from the model, without merging it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if prefix_of(model) is not None:
        remove_prefix(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config


def merge_adapter(model: "PreTrainedModel") -> None:
    """Merges a LoRA adapter into the model's weights, rounded to their dtype, and removes it.

    Raises:
        ValueError: if the model has none, or a sum is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if adapter_config(model) is None or prefix_of(model) is not None:
        raise ValueError("`merge` is for LoRA adapters, but the model has none.")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    remove_adapter(model)


def restore_adapter(model: "PreTrainedModel", settings: AdapterSettings | None) -> None:
    """Adds or removes an adapter so that weights saved with these settings can be loaded."""
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


def adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear map that can have an adapter, or has one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, nn.Linear | BaseTunerLayer) or is_conv1d(module)


def adapter_config(model: "PreTrainedModel") -> Any:
    """PEFT's configuration of the model's adapter, or None if it has none."""
    return getattr(model, "peft_config", {}).get(ADAPTER)


def _task_type(model: "PreTrainedModel") -> str | None:
    """The task type by which PEFT's own loaders choose the base model's class of transformers."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def inject_lora(model: "PreTrainedModel", config: Any) -> None:
    """Adds LoRA adapters with PEFT, without changing ``requires_grad`` of other parameters or torch's generators.

    Raises:
        ValueError: if PEFT refuses the targets, or would adapt fused experts in their place.
    """
    from peft import inject_adapter_in_model

    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        inject_adapter_in_model(config, model, ADAPTER)
    if config.target_parameters:  # PEFT takes names such as `down_proj` for those that experts once had, in any layer
        raise ValueError(
            f"PEFT adapts {some(sorted(config.target_parameters))} of all experts of a {type(model).__name__} in place "
            "of linear maps with the names that experts had, which is not supported: name others, such as attention's."
        )
    for parameter, requires_grad in trainable.items():
        parameter.requires_grad_(requires_grad)
