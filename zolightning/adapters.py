"""Adapters inside a model of transformers, in the formats of PEFT: LoRA beside linear maps, a prefix before the text.

PEFT makes LoRA adapters, and reads and writes folders. The methods of the same names that transformers gives its models
ask for a version of PEFT that may not be out yet.
"""

import json
import os
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zolightning.directions.shards import is_sharded
from zolightning.layers import is_conv1d
from zolightning.messages import some
from zolightning.prefix import add_prefix, prefix_of, remove_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AdapterSettings = dict[str, Any]
"""What makes an adapter again, for checkpoints: what of PEFT's config is not its default, as plain values."""

LORA, PREFIX = "LORA", "PREFIX_TUNING"
_NAME = "default"  # what PEFT calls an adapter that is given no name
_CONFIG = "adapter_config.json"
_ALWAYS = ("peft_type", "r", "lora_alpha")
# Where an adapter comes from and what follows from its model
_NO_SETTINGS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("fan_in_fan_out", "target_modules"),
)


def lora_settings(rank: int, alpha: float, target_modules: list[str]) -> AdapterSettings:
    """Those of plain LoRA beside the linear maps of these dotted names."""
    return {"peft_type": LORA, "r": rank, "lora_alpha": alpha, "target_modules": sorted(target_modules)}


def adapter_settings(model: "PreTrainedModel") -> AdapterSettings | None:
    """The settings of the model's adapter, or None if it has none."""
    config = _config(model)
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
    """What of an adapter is not as it is wanted, in a few words."""
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


def add_adapter(model: "PreTrainedModel", settings: AdapterSettings) -> None:
    """Adds an adapter to a model without one: LoRA, which changes nothing at first, or a prefix of random tokens.

    Which of the other parameters are trainable is as before. The adapter's values depend on the seed of
    ``seed_everything`` (or 0), a prefix also on the model, its dtype and its device; torch's generators take no notice.

    Raises:
        ValueError: if the model's weights are sharded over ranks already, or it takes no prefix.
    """
    _refuse_sharded(model)
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
        model.peft_config = {_NAME: config}  # type: ignore[dict-item]  # declared without PEFT
        return
    from peft import LoraConfig

    targets = settings["target_modules"]
    _inject(
        model,
        LoraConfig(
            **{name: value for name, value in settings.items() if name != "peft_type"},
            base_model_name_or_path=model.name_or_path,
            fan_in_fan_out=is_conv1d(model.get_submodule(targets[0])),
            task_type=_task_type(model),
        ),
    )


def remove_adapter(model: "PreTrainedModel") -> None:
    """Takes the adapter, and all that it has learnt, out of the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if prefix_of(model) is not None:
        remove_prefix(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config


def merge_adapter(model: "PreTrainedModel") -> None:
    """Adds what a LoRA adapter has learnt to the weights beside it, rounded to their dtype, and takes it out.

    Raises:
        ValueError: if the model has none, or a sum is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if _config(model) is None or prefix_of(model) is not None:
        raise ValueError("`merge` is for LoRA adapters, and the model has none.")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    remove_adapter(model)


def save_adapter(model: "PreTrainedModel", folder: str | Path, head: Mapping[str, Tensor] | None = None) -> None:
    """Writes the adapter in PEFT's format, for ``PeftModel.from_pretrained(base_model, folder)``.

    Args:
        model: one with an adapter.
        folder: where to write it.
        head: what else of the model has been trained, by its names there.
    """
    from safetensors.torch import save_file

    folder, head = Path(folder), head or {}
    config = copy(_config(model))
    if head:
        config.modules_to_save = sorted({"pooler" if ".pooler." in name else name.partition(".")[0] for name in head})
    config.save_pretrained(str(folder))
    saved = {**_saved_weights(model), **{f"base_model.model.{name}": weight for name, weight in head.items()}}
    weights = {name: weight.detach().contiguous() for name, weight in saved.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: "PreTrainedModel", adapter: str, head: Mapping[str, Tensor] | None = None) -> None:
    """Puts the adapter of a PEFT folder into a model without one, and freezes all else, as PEFT does.

    Args:
        model: the one that the adapter is for.
        adapter: a folder in PEFT's format, or an id on the Hugging Face hub: LoRA, or a prefix.
        head: what else of the model may be in the folder (PEFT's ``modules_to_save``), by its names in the model.

    Raises:
        ValueError: if it is none, of another kind, or does not fit the model; in one line.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    folder = _folder_of(adapter)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # of JSON, safetensors, pickle or PEFT, for a file that is damaged or of another version
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"`adapter` {adapter!r} cannot be read: {reason}.") from None
    if head:
        config.modules_to_save = None  # PEFT would keep the head twice, beside what it was
    _refuse_kinds(adapter, config)
    misfit = f"`adapter` {adapter!r} does not fit {type(model).__name__} {model.name_or_path!r}"
    if config.peft_type == PREFIX:
        add_adapter(model, {"peft_type": PREFIX, "num_virtual_tokens": config.num_virtual_tokens})
    else:
        _refuse_sharded(model)
        config.base_model_name_or_path, config.inference_mode = model.name_or_path, False
        try:
            _inject(model, config)
        except ValueError as error:  # PEFT's, of names that the model does not have
            raise ValueError(f"{misfit}: {str(error).partition(chr(10))[0]}") from None
    others = {f"base_model.model.{name}": weight.detach() for name, weight in (head or {}).items()}
    own = {**_saved_weights(model), **{name: others[name] for name in others.keys() & weights.keys()}}
    shapes, found = ({name: tuple(w.shape) for name, w in each.items()} for each in (own, weights))
    if different := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise ValueError(
            f"{misfit}: {len(different)} weights have other names or shapes, or are missing there or here "
            f"({some(different)})."
        )
    for name, weight in own.items():
        weight.copy_(weights[name])
    trained = set(adapter_parameters(model))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


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


def adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear map that can have an adapter, or has one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, nn.Linear | BaseTunerLayer) or is_conv1d(module)


def _config(model: "PreTrainedModel") -> Any:
    """PEFT's configuration of the model's adapter, or None if it has none."""
    return getattr(model, "peft_config", {}).get(_NAME)


def _task_type(model: "PreTrainedModel") -> str | None:
    """What tells PEFT's own loaders which class of transformers the base model is of."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _inject(model: "PreTrainedModel", config: Any) -> None:
    """Adds LoRA adapters by PEFT, and nothing that it does beside."""
    from peft import inject_adapter_in_model

    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        inject_adapter_in_model(config, model, _NAME)
    for parameter, requires_grad in trainable.items():
        parameter.requires_grad_(requires_grad)


def _saved_weights(model: "PreTrainedModel") -> Mapping[str, Tensor]:
    """The adapter's weights by the names that they have in PEFT's files; they share memory with the model's."""
    if (prefix := prefix_of(model)) is not None:
        return {"prompt_embeddings": prefix.embedding.weight.detach()}
    from peft import get_peft_model_state_dict

    # Without the embeddings: no adapter changes them, and to see that they are the base model's PEFT would ask the hub.
    weights = get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    return {f"base_model.model.{name}": weight for name, weight in weights.items()}


def _folder_of(adapter: str) -> Path:
    """A local folder with an adapter, fetched from the hub if need be."""
    folder = Path(adapter).expanduser()
    if not folder.is_dir() and not folder.is_absolute() and not adapter.startswith((".", "~")):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(adapter, allow_patterns="adapter_*"))
        except Exception:  # those of the HTTP library, which one depends on the version of the hub client
            raise ValueError(f"`adapter` {adapter!r} is no local folder, and the hub does not give it.") from None
    if not folder.is_dir():
        raise ValueError(f"`adapter` {adapter!r} is a path, but no folder is there.")
    weights = ("adapter_model.safetensors", "adapter_model.bin")
    if not (folder / _CONFIG).is_file() or not any((folder / name).is_file() for name in weights):
        raise ValueError(
            f"`adapter` {adapter!r} is no folder of PEFT's: it needs {_CONFIG} and {weights[0]} (or {weights[1]})."
        )
    return folder


def _refuse_kinds(adapter: str, config: Any) -> None:
    """Raises a ValueError for what would be trained, saved or computed in part only."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in (LORA, PREFIX):
        raise ValueError(f"`adapter` {adapter!r} is of PEFT's type {kind}; {LORA} and {PREFIX} are supported.")
    refused = {"modules_to_save": None, "trainable_token_indices": None, "target_parameters": None, "bias": "none"}
    for name, default in refused.items():
        if kind == LORA and (value := getattr(config, name, default)) not in (default, []):
            raise ValueError(
                f"`adapter` {adapter!r} has {name} {value!r}: it changes more than LoRA adds, which is not supported. "
                "Merge it into its model (peft: merge_and_unload), and start from that."
            )
    initial = getattr(config, "init_lora_weights", True)
    if kind == LORA and not isinstance(initial, bool) and initial != "gaussian":
        raise ValueError(
            f"`adapter` {adapter!r} has init_lora_weights {initial!r}, which changes the weights beside it. Save it "
            "for the original model first (peft: path_initial_model_for_weight_conversion)."
        )


def _refuse_sharded(model: "PreTrainedModel") -> None:
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "An adapter is to be added to a model whose weights are sharded over ranks already, as they are from a "
            "validation on: set `validate_first` to False, or use a strategy under which every rank holds all of them "
            "('zo_ddp')."
        )
