"""Where rows come from: a folder of JSON lines, or the Hugging Face hub."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zolightning.data.task import HubDataset, Task


@dataclass(frozen=True)
class Split:
    """The rows of one split that a task can use, in the order of their source.

    Args:
        origin: The file or data set, for messages.
        unit: What a row is called there.
        ids: Where each row stands in its source, counted from 0.
        candidates: Index of the right answer of each row, the first of several.
        rows: The rows themselves, by id.
    """

    origin: str
    unit: Literal["line", "row"]
    ids: Sequence[int]
    candidates: Sequence[int]
    rows: Any

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, index: int) -> Mapping[str, Any]:
        return self.rows[self.ids[index]]

    def where(self, index: int) -> str:
        """Names a row as an editor (line 1 first) or `datasets` (row 0 first) would."""
        return f"{self.origin}, {self.unit} {self.ids[index] + (self.unit == 'line')}"


NO_LABEL = -1  # the candidate of a row without one

# Other names of a split's file, and the endings of files that hold rows.
_ALIASES = {"train": ["train", "training"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")


def read_folder(folder: Path, name: str, task: Task, labelled: bool = True) -> Split:
    """Reads ``<folder>/<name>.jsonl`` and checks every row against the task.

    Args:
        folder: Where the file is.
        name: "train", "validation" or "test".
        task: Says which fields a row needs.
        labelled: Whether every row needs a label. Otherwise the candidate of one without is `NO_LABEL`.

    Raises:
        ValueError: The file is missing or empty, or a line of it does not fit the task; says which line.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(
            misnamed(folder, name)
            or f"{path} does not exist: `data.path` must be a folder with train.jsonl, test.jsonl and, unless "
            "validation rows are to be taken from train.jsonl, validation.jsonl."
        )
    rows: dict[int, Mapping[str, Any]] = {}
    candidates: list[int] = []
    with path.open("rb") as file:
        for id, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = _parse(line, min(task.label_fields))
                task.check_fields(row, task.fields if labelled else task.template_fields)
                candidate = _candidate(row, task, labelled)
            except ValueError as error:
                raise ValueError(f"{path}, line {id + 1}: {error}.") from None
            if candidate is not None:
                rows[id] = row
                candidates.append(candidate)
    return _not_empty(Split(str(path), "line", list(rows), candidates, rows), task)


def misnamed(folder: Path, name: str) -> str | None:
    """What to do about files in the folder that look like this split under another name, or None if there are none."""
    files = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(_ENDINGS))
    found = [file for file in files if file.split(".")[0].lower() in _ALIASES[name] and file != f"{name}.jsonl"]
    if not found:
        return None
    rename = found[0].endswith((".jsonl", ".ndjson"))
    advice = f"rename it to {name}.jsonl" if rename else f"write its rows to {name}.jsonl, one JSON object a line"
    return f"{folder} has no {name}.jsonl, but found {found[0]}: {advice}."


def read_hub(hub: HubDataset, name: str, task: Task) -> Split:
    """Loads the split `name` of a hub data set, from the local cache if it is there.

    Raises:
        ConnectionError: The hub cannot be reached, or has no such data set.
        ValueError: The columns or labels of the data set do not fit the task.
    """
    origin = f"{hub.path}{f'/{hub.name}' if hub.name else ''}, split {name}"
    dataset = _load_dataset(hub, name, task)
    if missing := sorted(task.fields - set(dataset.column_names)):
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"{origin}: field `{missing[0]}` is missing; there are {columns}.")
    try:
        labels = dataset.select_columns(sorted(task.right_fields))
        candidates = {id: _candidate(row, task) for id, row in enumerate(labels)}
    except ValueError as error:
        raise ValueError(f"{origin}: {error}.") from None
    kept = {id: candidate for id, candidate in candidates.items() if candidate is not None}
    return _not_empty(Split(origin, "row", list(kept), list(kept.values()), dataset), task)


def _candidate(row: Mapping[str, Any], task: Task, labelled: bool = True) -> int | None:
    """The index of the right answer; NO_LABEL where there is none and need not be one, None for a row to leave out."""
    if not labelled and any(row.get(field) is None for field in task.label_fields):
        return NO_LABEL
    right = task.right(row)
    return right if right is None else right[0]


def _parse(line: bytes, label: str) -> Mapping[str, Any]:
    if b"\0" in line:
        raise ValueError("not UTF-8 (it looks like UTF-16): save the file as UTF-8")
    try:
        row = json.loads(line)
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
        raise ValueError(f'must be an object like {{"{label}": ...}}, got {start}{_advice(line)}')
    return row


def _advice(line: bytes) -> str:
    text = line.strip()
    if text.startswith(b"["):
        return "; write each object of the array on a line of its own, without the brackets around them"
    if text.endswith(b","):
        return "; there is no comma between the lines of a JSON lines file"
    return ""


def _not_empty(split: Split, task: Task) -> Split:
    if not len(split):
        left_out = getattr(task, "skip_labels", ())
        skipped = f" with a label other than {list(left_out)}" if left_out else ""
        raise ValueError(f"{split.origin} has no rows{skipped}.")
    return split


def _load_dataset(hub: HubDataset, name: str, task: Task) -> Any:
    import datasets  # a second of import time that folders do not need
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(hub.path, timeout=10)
    except (HfHubHTTPError, ValueError):
        pass  # the hub is there; `load_dataset` will say what is wrong
    except Exception:  # the errors of the HTTP library, which is not the same in all versions of huggingface_hub
        # as if HF_HUB_OFFLINE were set: cached data still load, and without them there is no minute of retries
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(hub.path, hub.name, split=name, revision=hub.revision)
    except ConnectionError:
        reason = "it cannot be reached, and they are not in the local cache."
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
    raise ConnectionError(
        f"Task {task.name} takes its rows, {hub.path}, from the Hugging Face hub: {reason} "
        "Without the hub, `--data.path` takes a folder with rows as JSON lines."
    )
