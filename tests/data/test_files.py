"""Files of rows: every format gives the same rows, and what cannot be read is named."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from zolightning.data.files import ENDINGS, find_rows, read_rows
from zolightning.data.source import read_folder
from zolightning.data.task_files import load_task

ROWS = [
    {"sentence": "a warm, clever soup", "label": 1, "idx": 0},
    {"sentence": 'cold\nand "slow"', "label": 0, "idx": 1},
    {"sentence": "\N{GRINNING FACE} 007", "label": 1, "idx": 2},
]


def write_lines(open_file: Callable) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open_file(path, "wb") as file:
            file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())

    return write


def write_table(delimiter: str, open_file: Callable = open) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open_file(path, "wt", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
            table.writeheader()
            table.writerows(ROWS)

    return write


WRITERS = {
    ".jsonl": write_lines(open),
    ".jsonl.gz": write_lines(gzip.open),
    ".jsonl.bz2": write_lines(bz2.open),
    ".jsonl.xz": write_lines(lzma.open),
    ".csv": write_table(","),
    ".csv.gz": write_table(",", gzip.open),
    ".tsv": write_table("\t"),
    ".tsv.gz": write_table("\t", gzip.open),
    ".parquet": lambda path: parquet.write_table(pa.Table.from_pylist(ROWS), path),
}


def test_every_ending_has_a_case() -> None:
    assert set(WRITERS) == set(ENDINGS)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    WRITERS[ending](tmp_path / f"train{ending}")
    split = read_folder(tmp_path, "train", load_task("sst2"))
    assert [split.row(index) for index in range(len(split))] == ROWS
    assert list(split.labels) == [1, 0, 1]
    assert split.where(1).endswith("line 2" if "jsonl" in ending else "row 1")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"train{ending}"
    WRITERS[ending](path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train\S*(, (line|row) \d| cannot be read)"):
        list(read_folder(tmp_path, "train", load_task("sst2")).rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence,label\nsoup,7\n", r"train.csv, row 0: label 7 in field `label` must be one of \[0, 1\]"),
        ("sentence,label\nsoup,1\nrain,x\n", r"row 0: label '1' .* \[0, 1\] \(this one is a text; so are all values"),
        ("sentence,label\nsoup,\n", "train.csv, row 0: field `label` is missing or null"),
        ("text,label\nsoup,1\n", "train.csv, row 0: field `sentence` is missing or null; there are `text`, `label`"),
        ("sentence,label\nsoup,1\nrain,1,2\n", "train.csv cannot be read: CSV parse error"),
        ("sentence,label\ncaf\udce9,1\n", "train.csv, column `sentence`: not UTF-8"),
        ("", "train.csv cannot be read: Empty CSV file"),
        ("sentence;label\nsoup;1\n", "train.csv has one column, 'sentence;label': its values must be separated by ','"),
        ("sentence,label,label\nsoup,1,0\n", "train.csv has the column `label` twice"),
        ("s\0e\0n\0,\0", r"train.csv: not UTF-8 \(it looks like UTF-16\): save the file as UTF-8"),
        ("sentence,label\n", "train.csv has no rows"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path, "train", load_task("sst2"))


def test_a_quotation_mark_that_swallows_rows(tmp_path: Path) -> None:
    """In a file of tabs that were written as they are, as those of GLUE."""
    (tmp_path / "train.tsv").write_text('sentence\tlabel\n"warm\t1\ncold\t0\na "slow" one\t1\n')
    with pytest.raises(ValueError, match="column `sentence`: a quotation mark begins a value that spans"):
        list(read_rows(tmp_path / "train.tsv", "sentence"))


def test_two_files_of_one_split(tmp_path: Path) -> None:
    for ending in (".jsonl", ".csv"):
        WRITERS[ending](tmp_path / f"test{ending}")
    with pytest.raises(ValueError, match=r"has test.jsonl and test.csv: which of them\? Keep one"):
        find_rows(tmp_path, "test")


def test_lines_before_a_broken_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl.gz"
    WRITERS[".jsonl.gz"](path)
    rows = read_rows(path, "sentence")
    assert next(rows) == (0, ROWS[0])


def test_a_column_of_a_csv_file_is_of_numbers_only_where_they_read_as_they_are_written(tmp_path: Path) -> None:
    """Else prompts and references would hold 7 for 007."""
    lines = [
        "count,share,flag,code,version,when,spaced,gap,hole",
        '12,0.5,true,007,1.10,2020-01-01,"1 ",007,NA',
        "-3,2.0,false,12,2.5,2021-12-31,2,,4",
    ]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    (first, second) = (row for _, row in read_rows(tmp_path / "train.csv", "count"))
    numbers = {"count": 12, "share": 0.5, "flag": True, "spaced": 1}
    assert first == numbers | {"code": "007", "version": "1.10", "when": "2020-01-01", "gap": "007", "hole": None}
    numbers = {"count": -3, "share": 2.0, "flag": False, "spaced": 2}
    assert second == numbers | {"code": "12", "version": "2.5", "when": "2021-12-31", "gap": "", "hole": 4}
    assert [type(value) for value in second.values()] == [int, float, bool, str, str, str, int, str, int]


def test_a_parquet_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    texts = pa.array([b"caf\xe9"]).view(pa.string())
    parquet.write_table(pa.table({"sentence": texts}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read: 'utf-8' codec"):
        next(read_rows(tmp_path / "train.parquet", "sentence"))


def test_a_column_of_bytes_may_stand_beside_texts(tmp_path: Path) -> None:
    """Such as images."""
    rows = [{"image": b"\xff\xd8", "label": 1}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert [row for _, row in read_rows(tmp_path / "train.parquet", "label")] == rows
