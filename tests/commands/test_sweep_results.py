"""The file of a sweep: it grows by whole lines, survives a kill, and belongs to one set of settings."""

from pathlib import Path

import pytest

from zolightning.commands.sweep_results import ZERO_SHOT, SweepResults, SweepRow

SETTINGS = {"steps": 5, "data": {"task": "sst2", "sizes": [1, 2]}, "model": None}


def row(layer: str, accuracy: float | None = 0.5) -> SweepRow:
    return SweepRow(layer, 10, 5, 1.25, {"val/accuracy": accuracy, "val/loss": 0.7 if accuracy else None})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    results = SweepResults(tmp_path, SETTINGS)
    rows = [row(ZERO_SHOT), row("10"), row("2", None), row("3", 0.1 + 0.2)]
    for each in rows:
        results.append(each)
    again = SweepResults(tmp_path, SETTINGS)
    assert list(again.rows.values()) == rows
    assert again.metric_names == ["val/accuracy", "val/loss"]
    assert [each.layer for each in again.layers()] == ["2", "3", "10"]
    assert (tmp_path / "results.csv").read_text().splitlines()[:2] == [
        "layer,parameters,steps,seconds,val/accuracy,val/loss",
        "zero-shot,10,5,1.250,0.5,0.7",
    ]


def test_a_kill_while_a_line_is_added_leaves_the_lines_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = SweepResults(tmp_path, SETTINGS)
    results.append(row(ZERO_SHOT))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        results.append(row("0"))
    again = SweepResults(tmp_path, SETTINGS)
    assert list(again.rows) == [ZERO_SHOT]
    again.append(row("3"))
    assert results.path.read_text().splitlines()[1:] == ["zero-shot,10,5,1.250,0.5,0.7", "3,10,5,1.250,0.5,0.7"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 6}, "`steps` is 6, was 5"),
        ({"data": {"task": "sst2", "sizes": [1, 3]}}, "`data.sizes.1` is 3, was 2"),
        ({"model": {"name": "x"}}, "`model.name` is 'x', was None"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    SweepResults(tmp_path, SETTINGS)
    SweepResults(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="holds results of different settings") as error:
        SweepResults(tmp_path, SETTINGS | changes)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_results_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("layer\n")
    with pytest.raises(ValueError, match="no settings"):
        SweepResults(tmp_path, SETTINGS)
