"""Saves adapters to folders in PEFT's format, and loads them from there."""

from collections.abc import Container, Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zolightning.messages import differing
from zolightning.network.adapters import (
    ADAPTER,
    LORA,
    PREFIX,
    adapter_config,
    adapter_parameters,
    add_adapter,
    inject_lora,
)
from zolightning.network.early_exit import early_exit
from zolightning.network.head import refuse_sharded
from zolightning.network.prefix import prefix_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONFIG = "adapter_config.json"
_MERGE = "Merge it into its model (peft: merge_and_unload), and start from that."


def save_adapter(model: "PreTrainedModel", folder: str | Path, head: Mapping[str, Tensor] | None = None) -> None:
    """Writes the adapter in PEFT's format, for ``PeftModel.from_pretrained(base_model, folder)``.

    With it goes the `head`: other weights that have been trained, by their names in the model.

    Raises:
        ValueError: if the model has an early exit, which PEFT's format cannot describe.
    """
    from safetensors.torch import save_file

    if (num_layers := early_exit(model)) is not None:
        raise ValueError(
            f"`num_layers` is {num_layers}, which an adapter's folder cannot record: it would be put into a model "
            "with all layers. Export the merged model (`zolightning export --merge`)."
        )

    folder, head = Path(folder), head or {}
    config = copy(adapter_config(model))
    if head:
        config.modules_to_save = sorted({"pooler" if ".pooler." in name else name.partition(".")[0] for name in head})
    config.save_pretrained(str(folder))
    saved = {**_saved_weights(model), **{f"base_model.model.{name}": weight for name, weight in head.items()}}
    weights = {name: weight.detach().contiguous() for name, weight in saved.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: "PreTrainedModel", adapter: str, head: Mapping[str, Tensor] | None = None) -> None:
    """Puts an adapter, LoRA or a prefix, into a model without one, and freezes all else, as PEFT does.

    It is in a folder in PEFT's format, or on the Hugging Face hub; beside it there may be weights of the `head` (PEFT's
    ``modules_to_save``), by their names in the model.

    Raises:
        ValueError: if there is no adapter, or it is of another kind or does not fit the model; in one line.
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
        config.modules_to_save = None  # otherwise PEFT would keep a second copy of the head
    _refuse_kinds(adapter, config)
    misfit = f"`adapter` {adapter!r} does not fit {type(model).__name__} {model.name_or_path!r}"
    if config.peft_type == PREFIX:
        add_adapter(model, {"peft_type": PREFIX, "num_virtual_tokens": config.num_virtual_tokens})
    else:
        refuse_sharded(model, "An adapter is to be added to")
        config.base_model_name_or_path, config.inference_mode = model.name_or_path, False
        try:
            inject_lora(model, config)
        except ValueError as error:  # PEFT's, of names that the model does not have
            raise ValueError(f"{misfit}: {str(error).partition(chr(10))[0]}") from None
    others = {f"base_model.model.{name}": weight.detach() for name, weight in (head or {}).items()}
    own = {**_saved_weights(model), **{name: others[name] for name in others.keys() & weights.keys()}}
    weights = _without_copies(model, adapter, weights, keep=own)
    shapes, found = ({name: tuple(w.shape) for name, w in each.items()} for each in (own, weights))
    if different := differing(shapes, found):
        raise ValueError(f"{misfit}: {different}.")
    for name, weight in own.items():
        weight.copy_(weights[name])
    trained = set(adapter_parameters(model))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


def _saved_weights(model: "PreTrainedModel") -> Mapping[str, Tensor]:
    """The adapter's weights by the names that they have in PEFT's files; they share memory with the model's."""
    if (prefix := prefix_of(model)) is not None:
        return {"prompt_embeddings": prefix.embedding.weight.detach()}
    from peft import get_peft_model_state_dict

    # Without the embeddings: no adapter changes them, and to see that they are the base model's PEFT would ask the hub.
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {f"base_model.model.{name}": weight for name, weight in weights.items()}


def _without_copies(
    model: "PreTrainedModel", adapter: str, weights: Mapping[str, Tensor], keep: Container[str]
) -> dict[str, Tensor]:
    """An adapter's weights without those of the model that its file repeats, as PEFT does with adapted embeddings.

    Raises:
        ValueError: if one of them is not the model's.
    """
    base = {f"base_model.model.{name}": weight for name, weight in model.state_dict().items()}
    copies = {name: base[name] for name in base.keys() & weights.keys() if name not in keep}
    for name, weight in copies.items():
        found = weights[name].to(weight)
        if found.shape != weight.shape or not torch.equal(found, weight):
            raise ValueError(
                f"`adapter` {adapter!r} has a {name.removeprefix('base_model.model.')} of shape {tuple(found.shape)}, "
                f"which is not the model's: embeddings were resized, or trained along with LoRA; that is not supported."
                f" {_MERGE}"
            )
    return {name: weight for name, weight in weights.items() if name not in copies}


def _folder_of(adapter: str) -> Path:
    """A local folder with an adapter, fetched from the hub if need be."""
    folder = Path(adapter).expanduser()
    if not folder.is_dir() and not folder.is_absolute() and not adapter.startswith((".", "~")):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(adapter, allow_patterns="adapter_*"))
        except Exception:  # those of the HTTP library, which one depends on the version of the hub client
            raise ValueError(f"`adapter` {adapter!r} is not a local folder, and the hub does not provide it.") from None
    if not folder.is_dir():
        raise ValueError(f"`adapter` {adapter!r} is a path, but no folder is there.")
    weights = ("adapter_model.safetensors", "adapter_model.bin")
    if not (folder / _CONFIG).is_file() or not any((folder / name).is_file() for name in weights):
        raise ValueError(
            f"`adapter` {adapter!r} is not a folder of PEFT's: it needs {_CONFIG} and {weights[0]} (or {weights[1]})."
        )
    return folder


def _refuse_kinds(adapter: str, config: Any) -> None:
    """Raises a ValueError for adapters that would be trained, saved or computed only in part."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in (LORA, PREFIX):
        raise ValueError(f"`adapter` {adapter!r} is of PEFT's type {kind}; {LORA} and {PREFIX} are supported.")
    refused = {"modules_to_save": None, "trainable_token_indices": None, "target_parameters": None, "bias": "none"}
    for name, default in refused.items():
        if kind == LORA and (value := getattr(config, name, default)) not in (default, []):
            raise ValueError(
                f"`adapter` {adapter!r} has {name} {value!r}: it changes more than LoRA adds, which is not supported. "
                f"{_MERGE}"
            )
    initial = getattr(config, "init_lora_weights", True)
    if kind == LORA and not isinstance(initial, bool) and initial != "gaussian":
        raise ValueError(
            f"`adapter` {adapter!r} has init_lora_weights {initial!r}, which changes the base weights too. Save it "
            "for the original model first (peft: path_initial_model_for_weight_conversion)."
        )
