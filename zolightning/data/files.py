"""Reads files of rows (JSON lines, CSV, Parquet) and folders of images."""

import bz2
import gzip
import json
import lzma
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

Unit = Literal["line", "row"]

# by what the file's name ends with; JSON lines may be compressed
_OPEN: dict[str, Callable[..., Any]] = {
    ".jsonl": open,
    ".jsonl.gz": gzip.open,
    ".jsonl.bz2": bz2.open,
    ".jsonl.xz": lzma.open,
}
_DELIMITERS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
ENDINGS = (*_OPEN, *_DELIMITERS, ".parquet")
_NULLS = ("", "NA", "N/A", "NULL", "null", "NaN", "nan")  # in a column of numbers or of truth values

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")

# Other names of a split's file, and other endings of files that hold rows.
_ALIASES = {"train": ["train", "training"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}
_SHARD = re.compile(r"-\d+-of-\d+$")  # how the names of a split's files end on the hub
_UTF16 = "not UTF-8 (it looks like UTF-16): save the file as UTF-8"
_OTHER_ENDINGS = (".ndjson", ".json", ".xlsx", ".txt", ".gz", ".zst", ".zip")


def find_rows(folder: Path, name: str) -> Path | None:
    """The file of a split in a folder: its name, "train", "validation" or "test", with one of `ENDINGS`.

    Where there is none, it is the folder of that name, which holds images.

    Raises:
        ValueError: if there are two, or one of another name that looks like it.
    """
    found = [path for ending in ENDINGS if (path := folder / f"{name}{ending}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has {found[0].name} and {found[1].name}: which of them? Keep one.")
    if found:
        return found[0]
    if (folder / name).is_dir():
        return folder / name
    if advice := _misnamed(folder, name):
        raise ValueError(advice)
    return None


def unit_of(path: Path) -> Unit:
    """What a row is called in messages: a line that an editor shows, or a row of a table."""
    return "line" if ".jsonl" in path.name else "row"


def read_rows(path: Path, example: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields the rows of what :func:`find_rows` found, with their numbers, counted from 0.

    Empty lines of JSON are left out; errors say what a row should be like by an `example`, a field that rows have.
    CSV and Parquet files are read by pyarrow. A column of a CSV file holds numbers or truth values if all of its cells
    are written as these are (7, but not 007), otherwise texts. Each image in a folder is a row with the fields `image`,
    its path from the folder's parent, and `label`, the name of its subfolder, if it is in one.

    Raises:
        ValueError: if the file, or a line of it, cannot be read; says which.
    """
    if path.is_dir():
        yield from enumerate(_images(path))
        return
    opened = next((open_file for ending, open_file in _OPEN.items() if path.name.endswith(ending)), None)
    if opened is None:
        delimiter = next((mark for ending, mark in _DELIMITERS.items() if path.name.endswith(ending)), None)
        yield from enumerate(_read_parquet(path) if delimiter is None else _read_csv(path, delimiter))
        return
    number = -1
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    yield number, _parse(line, example)
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read after line {number + 1}: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{path}, line {number + 1}: {error}.") from None


def _images(folder: Path) -> Iterator[dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not paths:
        raise ValueError(
            f"{folder} is a folder without images ({', '.join(IMAGE_ENDINGS)}), and there is no file of rows, such as "
            f"{folder.name}.jsonl, next to it."
        )
    for path in paths:
        row = {"image": str(path.relative_to(folder.parent))}
        yield row if path.parent == folder else row | {"label": path.parent.name}


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa  # as long to import as a small file to read
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        _refuse_twice(path, table.column_names)
        return table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _read_csv(path: Path, delimiter: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import csv

    options = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        _refuse_utf16(path)
        with csv.open_csv(path, parse_options=options) as reader:
            fields = list(reader.schema)
        names = [field.name for field in fields]
        for field in fields:
            if pa.types.is_binary(field.type):
                raise ValueError(f"{path}, column `{field.name}`: not UTF-8.")
        _refuse_twice(path, names)
        if len(names) == 1 and any(mark in names[0] for mark in ",;\t|"):
            raise ValueError(f"{path} has one column, {names[0]!r}: its values must be separated by {delimiter!r}.")
        as_texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        table = csv.read_csv(path, parse_options=options, convert_options=as_texts)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    for name, column in zip(names, table.columns, strict=True):
        if delimiter == "\t" and any("\t" in text and "\n" in text for text in column.to_pylist()):
            raise ValueError(
                f"{path}, column `{name}`: a quotation mark begins a value that spans several rows. Write the rows to "
                "a .jsonl file, or double the mark and put the value in such marks."
            )
    columns = [_typed(column.to_pylist()) for column in table.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _typed(texts: Sequence[str]) -> Sequence[Any]:
    """The values of a column: numbers, or truth values, if all texts are such or empty; else the texts."""
    values: list[Any] = []
    for text in texts:
        values.append(_value_of(text.strip()))
        if values[-1] is None and text not in _NULLS:
            return texts
    kinds = {isinstance(value, bool) for value in values if value is not None}
    return values if len(kinds) < 2 else texts


def _value_of(text: str) -> bool | int | float | None:
    """A truth value, or a number that reads as the text does (7, but not 007 or 7.0e0); None for any other text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError, OverflowError):
            if str(kind(text)) == text and math.isfinite(kind(text)):
                return kind(text)
    return None


def _refuse_twice(path: Path, names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path} has the column `{twice[0]}` twice.")


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read: {str(error).splitlines()[0].rstrip('.')}.")


def _refuse_utf16(path: Path) -> None:
    if not path.name.endswith(".gz"):
        with path.open("rb") as file:
            if b"\0" in file.read(1000):
                raise ValueError(f"{path}: {_UTF16}.")


def _misnamed(folder: Path, name: str) -> str | None:
    """What to do about files in the folder that look like this split under another name, or None if there are none."""
    files = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith((*ENDINGS, *_OTHER_ENDINGS)))
    found = [file for file in files if _SHARD.sub("", file.split(".")[0].lower()) in _ALIASES[name]]
    folders = [alias for alias in _ALIASES[name] if (folder / alias).is_dir()]
    if folders and not found and (folder / "train").is_dir():
        return f"{folder} has no folder {name}, but found {folders[0]}: rename it to {name}."
    if not found:
        return None
    known = next((ending for ending in ENDINGS if found[0].lower().endswith(ending)), None)
    if found[0].endswith(".ndjson"):
        known = ".jsonl"
    advice = f"write its rows to {name}.jsonl, one JSON object a line"
    if known:
        advice = f"{'rename it to' if len(found) == 1 else 'join their rows in'} {name}{known}"
    return f"{folder} has no file {name}.jsonl, .csv or .parquet, but found {' and '.join(found[:2])}: {advice}."


def _parse(line: bytes, field: str) -> Mapping[str, Any]:
    if b"\0" in line:
        raise ValueError(_UTF16)
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no character") from None
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"not JSON ({error}){_advice(line)}") from None
    if not isinstance(row, dict):
        start = line.decode().strip()[:80]
        raise ValueError(f'must be an object like {{"{field}": ...}}, got {start}{_advice(line)}')
    return row


def _advice(line: bytes) -> str:
    text = line.strip()
    if text.startswith(b"["):
        return "; write each object of the array on its own line, without the brackets around them"
    if text.endswith(b","):
        return "; there is no comma between the lines of a JSON lines file"
    return ""
