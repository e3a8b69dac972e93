"""Where rows come from: a folder of files, or the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zolightning.data.classification import ImageClassification
from zolightning.data.files import Unit, find_rows, read_rows, unit_of
from zolightning.data.task import HubDataset, Task


@dataclass(frozen=True)
class Split:
    """The rows of one split that a task can use, in the order of their source."""

    origin: str  # the file or data set, for messages
    unit: Unit  # what a row is called there
    ids: Sequence[int]  # where each row stands in its source, counted from 0
    labels: Sequence[int]  # index of the right answer of each row, the first of several; `NO_LABEL` if it is not known
    rows: Any  # the rows themselves, by id

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, index: int) -> Mapping[str, Any]:
        """A row, as its source has it."""
        return self.rows[self.ids[index]]

    def where(self, index: int) -> str:
        """Names a row as an editor (line 1 first) or `datasets` (row 0 first) would."""
        return f"{self.origin}, {self.unit} {self.ids[index] + (self.unit == 'line')}"


NO_LABEL = -1  # the label of a row whose right answer is not known


def read_folder(folder: Path, name: str, task: Task, labelled: bool = True) -> Split:
    """Reads the file of a split in a folder, such as ``train.jsonl``, and checks every row against the task.

    Unless rows must be `labelled`, the label of one without is `NO_LABEL`.

    Raises:
        ValueError: if the file is missing or empty, or a row of it does not fit the task; says which.
    """
    path = find_rows(folder, name)
    if path is None:
        raise ValueError(
            f"{folder / name}.jsonl, .csv or .parquet does not exist: `data.path` must be a folder with files train, "
            "test and, unless validation rows are to be taken from train, validation."
        )
    unit = unit_of(path)
    rows: dict[int, Mapping[str, Any]] = {}
    labels: list[int] = []
    for id, row in read_rows(path, min(task.fields)):
        try:
            task.check_fields(row, task.fields if labelled else task.template_fields)
            label = _label(row, task, labelled)
        except ValueError as error:
            raise ValueError(f"{path}, {unit} {id + (unit == 'line')}: {error}.") from None
        if label is not None:
            rows[id] = row
            labels.append(label)
    return _not_empty(Split(str(path), unit, list(rows), labels, rows), task)


def read_hub(hub: HubDataset, name: str, task: Task) -> Split:
    """Loads the split `name` of a hub data set, from the local cache if it is there.

    Raises:
        ConnectionError: if the hub cannot be reached, or has no such data set.
        ValueError: if the columns or labels of the data set do not fit the task.
    """
    origin = f"{hub.path}{f'/{hub.name}' if hub.name else ''}, split {name}"
    dataset = _load_dataset(hub, name, task)
    if isinstance(task, ImageClassification):
        dataset = _with_files(dataset, task.image)
    if missing := sorted(task.fields - set(dataset.column_names)):
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"{origin}: field `{missing[0]}` is missing; there are {columns}.")
    try:
        columns_read = dataset.select_columns(sorted(task.right_fields))
        labels = {id: _label(row, task) for id, row in enumerate(columns_read)}
    except ValueError as error:
        raise ValueError(f"{origin}: {error}.") from None
    kept = {id: label for id, label in labels.items() if label is not None}
    return _not_empty(Split(origin, "row", list(kept), list(kept.values()), dataset), task)


def _label(row: Mapping[str, Any], task: Task, labelled: bool = True) -> int | None:
    """The index of the right answer; NO_LABEL if the row has none and needs none, None for a row to leave out."""
    if not labelled and any(row.get(field) in (None, "") for field in task.label_fields):
        return NO_LABEL
    right = task.right(row)
    return right if right is None else right[0]


def _with_files(dataset: Any, column: str) -> Any:
    """A data set whose images are given as files, which take less memory than decoded images."""
    import datasets

    if not isinstance(dataset.features.get(column), datasets.Image):
        return dataset
    return dataset.cast_column(column, datasets.Image(decode=False))


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
        "Without the hub, `--data.path` takes a folder with files of rows."
    )
