"""Full-length runs, in miniature: curves of every kind of method, stopping, and going on."""

import csv
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from zolightning.bench import evidence
from zolightning.bench.__main__ import main
from zolightning.bench.evidence import METHODS, Settings, plan
from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.packaged import packaged
from zolightning.scopes import DominantLayer

ROWS = {"train": 24, "validation": 8, "test": 8}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows with the fields of SST-2."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in ROWS.items():
        lines = (packaged("zolightning/data/sentiment") / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    return folder


@pytest.fixture
def command(
    rows: Path, tmp_path: Path, write_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, list[dict[str, str]]]]:
    """Runs the command and returns the lines of its file by run."""
    # A random network has no layer that stands out.
    monkeypatch.setattr(evidence, "DominantLayer", partial(DominantLayer, layer=1))
    model = write_tiny_model(tmp_path / "model")

    def run(*arguments: str, output: str = "curves.csv") -> dict[str, list[dict[str, str]]]:
        path = tmp_path / output
        places = ["--output", path, "--folder", path.with_suffix(".runs"), "--model", model, "--data-path", rows]
        main(["evidence", "--device", "cpu", "--validations", "2", *map(str, places), *arguments])
        found = defaultdict(list)
        with path.open() as file:
            for line in csv.DictReader(file):
                found[line["run"]].append(line)
        return dict(found)

    return run


pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def test_curves_of_every_kind_of_method(command: Callable[..., dict[str, list[dict[str, str]]]]) -> None:
    found = command(
        "--steps", "8", "--methods", "dominant_layer", "zo_mopi", "adamw", "--lr-factor", "100", "--stacked"
    )
    steps = {"dominant_layer": (8, 2), "zo_mopi": (2, 8), "adamw": (1, 1)}
    for method, (last, forwards) in steps.items():
        lines = found[f"{method}, 8 steps, seed 0, lr x 100"]
        validated = sorted({0, max(1, last // 2), last})
        assert [(line["split"], int(line["step"])) for line in lines] == [("val", s) for s in validated] + [
            ("test", last)
        ]
        assert all(int(line["forwards"]) == forwards * int(line["step"]) for line in lines)
        assert all(0 <= float(line["accuracy"]) <= 1 and float(line["loss"]) > 0 for line in lines)
        assert lines[0]["loss"] != lines[-2]["loss"], "nothing was trained"
    assert len(found) == len(steps)


def test_a_run_that_was_stopped_goes_on_and_one_that_ended_does_not(
    command: Callable[..., dict[str, list[dict[str, str]]]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--steps", "6", "--methods", "mezo")
    (whole,) = command(*arguments, output="whole.csv").values()
    (begun,) = command(*arguments, "--seconds", "0.05").values()
    assert [line["step"] for line in begun] == ["0"]
    assert "stopped; the same command goes on" in capsys.readouterr().out
    (resumed,) = command(*arguments).values()
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    assert [int(line["step"]) for line in resumed] == [0, 3, 6, 6]
    assert command(*arguments) == {"mezo, 6 steps, seed 0": resumed}


@pytest.mark.parametrize("method", METHODS)
def test_runs_take_their_settings_from_the_configuration(method: str) -> None:
    settings = Settings("nowhere", Path("nowhere"), lr_factor=2.0, stacked=True, cuda_graphs=True)
    one = plan(settings, method, seed=3)
    zeroth = [callback for callback in one.callbacks if isinstance(callback, ZerothOrder)]
    if method == "adamw":
        assert not zeroth and one.optimizer.keywords == {"lr": 4e-5}
        assert (one.steps, one.batch_size, one.precision) == (1000, 8, "bf16-mixed")
        return
    assert one.steps * one.forwards == 40_000
    expected = {"mezo": 2e-5, "dominant_layer": 2e-5, "lozo": 2e-5, "subzero": 6e-5, "zo_muon": 0.2, "zo_mopi": 0.06}
    assert zeroth[0].method.keywords["lr"] == pytest.approx(expected[method])
    is_whole = method != "dominant_layer"
    assert (zeroth[0].evaluations_per_forward, zeroth[0].cuda_graphs) == (one.forwards if is_whole else 1, is_whole)
    intervals = [callback.interval for callback in one.callbacks if isinstance(callback, SubspaceResampling)]
    assert intervals == {"lozo": [50], "subzero": [500], "zo_muon": [100], "zo_mopi": [100]}.get(method, [])
    assert any(isinstance(callback, DominantLayer) for callback in one.callbacks) != is_whole
