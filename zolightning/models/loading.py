"""Loads pretrained weights, and refuses files that would leave some weights random."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zolightning.messages import differing, some
from zolightning.network.head import belongs_to_head
from zolightning.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CAUSAL = "AutoModelForCausalLM"
ADAPTER = "it is an adapter, not a model. Name its base model here, and the adapter as `adapter`."


def load_model(
    source: Path | str, network_class: str = CAUSAL, num_classes: int | None = None, **options: Any
) -> "PreTrainedModel":
    """``from_pretrained(source, **options)`` of a class of transformers; an error if any weight is missing.

    No code of the folder or repository is run. If a classifier's file has no head for `num_classes`, the head is a new
    one, whose weights depend on the seed of ``seed_everything`` (or 0); torch's generators do not change.

    Raises:
        ValueError: if a weight is missing from the file, or has another shape there, or `source` is an adapter.
    """
    import transformers

    if num_classes is not None:
        options["num_labels"] = num_classes
    with _without_reports(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        loaded: Any = getattr(transformers, network_class).from_pretrained(
            source, output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True, **options
        )
    model, info = loaded
    if getattr(model, "peft_config", None):
        raise ValueError(ADAPTER)
    if num_classes is not None:
        _take_new_head(model, info)
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise ValueError(
            f"the file lacks {len(missing)} weights of {type(model).__name__} ({some(missing)}): "
            f"{_explain(missing, unused)}."
        )
    if info["mismatched_keys"]:
        name, found, wanted = next(iter(info["mismatched_keys"]))
        raise ValueError(
            f"{name} has the shape {tuple(found)} in the file and {tuple(wanted)} in config.json: the two do not "
            "belong together."
        )
    if unused:
        rank_zero_warn(f"{source} has {len(unused)} weights that {type(model).__name__} does not use: {some(unused)}.")
    return model


def load_gguf(
    path: Path, dtype: torch.dtype, attention: str | None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads llama.cpp's format as an ordinary model, its quantized weights unpacked so that they can be trained."""
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


def _take_new_head(model: "PreTrainedModel", info: dict[str, Any]) -> None:
    """Removes a classifier's head from the lists of missing and mismatched weights, and logs that it is new."""
    is_head = partial(belongs_to_head, model)
    new = {name for name in info["missing_keys"] if is_head(name)}
    new |= {name for name, *_ in info["mismatched_keys"] if is_head(name)}
    info["missing_keys"] = {name for name in info["missing_keys"] if name not in new}
    info["mismatched_keys"] = {entry for entry in info["mismatched_keys"] if entry[0] not in new}
    if new:
        info["unexpected_keys"] = {name for name in info["unexpected_keys"] if not is_head(name)}  # the old one
        size = "1 number" if model.config.num_labels == 1 else f"{model.config.num_labels} classes"
        rank_zero_info(f"{type(model).__name__} has a new head of {size}: {some(sorted(new))}.")


def _explain(missing: list[str], unused: list[str]) -> str:
    wanted = set(missing)
    for name in unused:
        prefix, _, rest = name.partition(".")
        if rest in wanted:
            return f"its names begin with '{prefix}.', which has to be removed"
    return "it does not fit config.json, or has no head of this kind (`num_classes` gives a classifier a new one)"


@contextmanager
def _without_reports() -> Iterator[None]:
    """Silences transformers, which lists what is missing line by line before `load_model` says it in one."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def refuse_other_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises a ValueError unless the weights of a checkpoint have the names and shapes of the module's."""
    own, found = ({name: tuple(w.shape) for name, w in each.items()} for each in (module.state_dict(), weights))
    if different := differing(own, found):
        raise ValueError(f"`ckpt_path` is of another model: {different}.")
