"""Reading rows, and what is said about rows that cannot be read."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from zolightning.data.classification import Classification
from zolightning.data.source import NO_LABEL, read_folder, read_hub
from zolightning.data.task import HubDataset, Task
from zolightning.data.task_files import load_task

ROW = {"sentence": "soup", "label": 1}


@pytest.fixture
def task() -> Task:
    return load_task("sst2")


def test_rows_keep_their_place_in_the_file(write_rows: Callable[..., Path]) -> None:
    rows = [{**ROW, "label": label} for label in (0, -1, 1)]
    folder = write_rows(train=[json.dumps(rows[0]), "", json.dumps(rows[1]), json.dumps(rows[2])])
    task = Classification(name="t", prompt="{{ sentence }}", answers=("a", "b"), labels=(0, 1), skip_labels=(-1,))
    split = read_folder(folder, "train", task)
    assert list(split.ids) == [0, 3]
    assert list(split.labels) == [0, 1]
    assert split.row(1) == rows[2]
    assert split.where(1) == f"{folder / 'train.jsonl'}, line 4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'sentence': 1}", "not JSON"),
        ("[1, 2]", r'must be an object like \{"label": ...\}, got \[1, 2\]'),
        ('{"label": 1}', "field `sentence` is missing or null; there are `label`"),
        ('{"sentence": null, "label": 1}', "field `sentence` is missing or null"),
        ('{"sentence": "soup"}', "field `label` is missing or null; there are `sentence`"),
        ('{"sentence": "soup", "label": 2}', r"label 2 in field `label` must be one of \[0, 1\]"),
        (
            '{"sentence": "soup", "label": "1"}',
            r"label '1' in field `label` must be one of \[0, 1\] \(this one is a text;",
        ),
        ('{"sentence": "soup", "label": [1]}', r"label \[1\] in field `label` must be one of"),
        ('{"sentence": "soup", "label": true}', "label True in field `label` must be one of"),
        ('{"sentence": NaN, "label": 1}', "field `sentence` is nan"),
        ('[{"sentence": "soup", "label": 1},', "not JSON.*each object of the array on its own line"),
        ('[{"sentence": "soup", "label": 1}]', "must be an object.*each object of the array on its own line"),
        ('{"sentence": "soup", "label": 1},', "not JSON.*there is no comma between the lines"),
        (r'{"sentence": "so\ud83dup", "label": 1}', "half of a surrogate pair"),
        pytest.param("[" * 100_000, "nested too deeply", id="brackets"),
    ],
)
def test_a_wrong_line_is_named(write_rows: Callable[..., Path], task: Task, line: str, message: str) -> None:
    folder = write_rows(train=[ROW, ROW, line])
    with pytest.raises(ValueError, match=rf"train.jsonl, line 3: .*{message}"):
        read_folder(folder, "train", task)


@pytest.mark.parametrize("letter", [b"\xe9", b"\xed\xa0\x80"])  # Latin-1; half of a surrogate pair
def test_a_line_that_is_not_utf8(tmp_path: Path, task: Task, letter: bytes) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"sentence": "caf%s", "label": 1}\n' % letter)
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: not JSON \('utf-8'"):
        read_folder(tmp_path, "train", task)


def test_a_pair_of_surrogates_is_a_character(write_rows: Callable[..., Path], task: Task) -> None:
    folder = write_rows(train=[r'{"sentence": "\ud83d\ude00", "label": 1}'])
    assert read_folder(folder, "train", task).row(0)["sentence"] == "\N{GRINNING FACE}"


def test_a_file_in_utf16(tmp_path: Path, task: Task) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW), encoding="utf-16")
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: not UTF-8.*save the file as UTF-8"):
        read_folder(tmp_path, "train", task)


@pytest.mark.parametrize(
    ("file", "split", "advice"),
    [
        ("val.jsonl", "validation", "rename it to validation.jsonl"),
        ("dev.jsonl", "validation", "rename it to validation.jsonl"),
        ("Train.csv", "train", "rename it to train.csv"),
        ("dev.ndjson", "validation", "rename it to validation.jsonl"),
        ("test.json", "test", "write its rows to test.jsonl, one JSON object a line"),
        ("train-00000-of-00001.parquet", "train", "rename it to train.parquet"),
        ("test.csv.zip", "test", "write its rows to test.jsonl, one JSON object a line"),
    ],
)
def test_a_file_under_another_name_is_named(tmp_path: Path, task: Task, file: str, split: str, advice: str) -> None:
    (tmp_path / file).touch()
    (tmp_path / "README.md").touch()
    with pytest.raises(ValueError, match=rf"no file {split}\.jsonl, .csv or .parquet, but found {file}: {advice}"):
        read_folder(tmp_path, split, task)


def test_rows_without_labels(write_rows: Callable[..., Path], task: Task) -> None:
    folder = write_rows(test=[{"sentence": "soup"}, ROW, {"sentence": "rain", "label": None}])
    split = read_folder(folder, "test", task, labelled=False)
    assert split.labels == [NO_LABEL, 1, NO_LABEL]
    with pytest.raises(ValueError, match="line 1: field `label` is missing"):
        read_folder(folder, "test", task)


def test_a_missing_file(tmp_path: Path, task: Task) -> None:
    with pytest.raises(ValueError, match=r"test.jsonl, .csv or .parquet does not exist: `data.path` must be a folder"):
        read_folder(tmp_path, "test", task)


def test_an_empty_file(write_rows: Callable[..., Path], task: Task) -> None:
    with pytest.raises(ValueError, match=r"test.jsonl has no rows"):
        read_folder(write_rows(test=0), "test", task)


HUB = HubDataset("some/set", "small")


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets `datasets.load_dataset` return the columns, or raise the exception, without asking for the network."""

    def fake(outcome: dict[str, list] | Exception) -> None:
        def load_dataset(path: str, name: str, split: str, revision: str | None) -> datasets.Dataset:
            assert (path, name, split, revision) == ("some/set", "small", "train", None)
            if isinstance(outcome, Exception):
                raise outcome
            return datasets.Dataset.from_dict(outcome)

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return fake


def test_hub_rows(fake_hub: Callable[..., None]) -> None:
    fake_hub({"sentence": ["a", "b", "c"], "label": [1, -1, 0]})
    task = Classification(name="t", prompt="{{ sentence }}", answers=("x", "y"), labels=(0, 1), skip_labels=(-1,))
    split = read_hub(HUB, "train", task)
    assert list(split.ids) == [0, 2]
    assert list(split.labels) == [1, 0]
    assert split.row(1) == {"sentence": "c", "label": 0}
    assert split.where(1) == "some/set/small, split train, row 2"


@pytest.mark.parametrize(
    ("outcome", "error", "message"),
    [
        ({"text": ["a"], "label": [1]}, ValueError, "split train: field `sentence` is missing; there are text, label"),
        (
            {"sentence": ["a"], "label": [7]},
            ValueError,
            r"split train: label 7 in field `label` must be one of \[0, 1\]",
        ),
        ({"sentence": [], "label": []}, ValueError, "some/set/small, split train has no rows"),
        (ConnectionError("no"), ConnectionError, "sst2 .*some/set.* cannot be reached.*`--data.path` takes a folder"),
        (datasets.exceptions.DatasetNotFoundError("gone"), ConnectionError, "gone .*`--data.path` takes a folder"),
    ],
)
def test_hub_errors(
    fake_hub: Callable[..., None], task: Task, outcome: object, error: type[Exception], message: str
) -> None:
    fake_hub(outcome)
    with pytest.raises(error, match=message) as caught:
        read_hub(HUB, "train", task)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_an_unreachable_hub_is_asked_once(
    fake_hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    fake_hub({"sentence": ["from the cache"], "label": [1]})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    assert len(read_hub(HUB, "train", task)) == 1
    assert datasets.config.HF_HUB_OFFLINE


def test_an_empty_cell_is_no_label(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("sentence,label\nrain,bad\nsun,\n")
    task = Classification(name="t", prompt="{{ sentence }}", answers=("a", "b"), labels=("bad", "good"))
    assert read_folder(tmp_path, "test", task, labelled=False).labels == [0, NO_LABEL]
    with pytest.raises(ValueError, match=r"row 1: label '' in field `label` must be one of \['bad', 'good'\]"):
        read_folder(tmp_path, "test", task)
