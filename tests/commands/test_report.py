"""``zolightning report``: what it reads of runs, and the files that it writes."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from cli_runs import NAME, Runs, printed, refused
from zolightning.commands.event_log import event_files
from zolightning.commands.report import differing_settings
from zolightning.commands.report_curves import Line, _means, curves_svg
from zolightning.commands.report_page import _duration, _median
from zolightning.commands.run_folder import read_run

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]
LOCK = (
    "import fcntl, sys; file = open(sys.argv[1], 'r+b'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
)


class Reader(HTMLParser):
    """Tags, texts and the identifiers of a page; every tag is closed where it must be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, write_tiny_model: Callable[..., Path], fresh_process: None) -> Runs:
    """Version 0 is by MeZO, 1 by backpropagation, and 2 like that of a validation."""
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_model(folder / "model")
    runs = Runs(folder)
    runs("fit", "--test_last", "true")
    runs("fit", "--method", "null", "--trainer.precision", "32-true")
    runs.version(2).mkdir()
    shutil.copy(runs.version(0) / "config.yaml", runs.version(2))
    with SummaryWriter(str(runs.version(2))) as writer:
        writer.add_scalar("val/accuracy", 0.5, 0)
    return runs


@pytest.fixture(scope="module")
def files(runs: Runs) -> tuple[dict[str, Any], list[dict[str, str]], str]:
    """Metrics, curves and page of the two runs that trained."""
    output = runs.folder / "made/page.html"
    said = printed(["report", str(runs.folder / "logs" / NAME), "--output", str(output), "--title", "A <b> & c"])
    assert f"left out: {runs.version(2)} has no curve of a training yet" in said and "page.csv" in said
    assert all(re.search(rf"^{runs.version(number)} +finished +6 ", said, re.MULTILINE) for number in (0, 1))
    with output.with_suffix(".csv").open() as file:
        curves = list(csv.DictReader(file))
    return json.loads(output.with_suffix(".json").read_text()), curves, output.read_text()


def test_curves_are_those_of_tensorboard(runs: Runs, files: Any) -> None:
    _, curves, _ = files
    for version in (0, 1):
        logged = runs.scalars(version)
        found = [row for row in curves if row["run"] == str(runs.version(version)) and row["metric"] == "train/loss"]
        assert [int(row["step"]) for row in found] == [1, 2, 3, 4, 5, 6]
        assert [float(row["value"]) for row in found] == pytest.approx(list(logged["train/loss"].values()), rel=1e-6)
        validated = [row for row in curves if row["run"] == found[0]["run"] and row["metric"] == "val/accuracy"]
        assert [int(row["step"]) for row in validated] == [0, 3, 6]
        assert [row["forward_passes"] for row in validated] == (["0", "6", "12"] if version == 0 else ["", "", ""])
        times = [float(row["seconds"]) for row in validated]
        assert times[0] == 0 < times[1] < times[2]
        expected = [logged["val/accuracy"][step] for step in (0, 2, 5)]
        assert [float(row["value"]) for row in validated] == pytest.approx(expected, rel=1e-6)


def test_metrics_of_a_finished_run(runs: Runs, files: Any) -> None:
    run, logged = files[0]["runs"][0], runs.scalars(0)
    accuracies = {step + 1: value for step, value in logged["val/accuracy"].items() if step}
    assert run["best"]["val/accuracy"] == pytest.approx(max(accuracies.values()))
    assert accuracies[run["best"]["step"]] == pytest.approx(run["best"]["val/accuracy"])
    assert Path(run["best_checkpoint"]).is_file()
    assert run["best_checkpoint"].endswith(f"best-step={run['best']['step']}.ckpt")
    assert run["before_training"]["val/accuracy"] == pytest.approx(logged["val/accuracy"][0])
    assert run["last"]["val/accuracy"] == pytest.approx(accuracies[6])
    assert run["test"] == {tag: pytest.approx(*values.values()) for tag, values in logged.items() if "test/" in tag}
    assert run["peak_memory_gib"] == pytest.approx(max(logged["run/peak_memory_gib"].values()))
    assert (run["state"], run["step"], run["forward_passes"]) == ("finished", 6, 12)
    assert run["overview"]["method"].startswith("MeZO, lr 0.1")
    assert run["overview"]["scope"].startswith("all parameters: ")
    assert run["commands"] == ["zolightning"]
    assert [run["settings"]["method.lr"] for run in files[0]["runs"]] == [0.1, None]
    assert [run["settings"]["method"] for run in files[0]["runs"]] == ["MeZO", None]
    assert "trainer.max_steps" not in run["settings"]


def test_the_page_holds_all_that_it_shows(runs: Runs, files: Any) -> None:
    page = Reader(files[2])
    assert page.open == [] and not {"script", "img", "link", "iframe"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert page.tags.count("svg") == 2 * 3 + 3 + 4  # accuracy, F1 and loss by three axes; and of training
    text = "".join(page.texts)
    for expected in (
        "A <b> & c",
        str(runs.version(0)),
        str(runs.version(1)),
        "AdamW",
        "method.lr",
        "6 of 6",
        "a backward pass is no",
    ):
        assert expected in text, expected


def test_a_fraction_of_a_minute_is_written_as_one() -> None:
    for last, ticks in ((1.6, {"0", "0.4", "0.8", "1.2", "1.6"}), (20_000, {"0", "5k", "10k", "15k", "20k"})):
        plot = Reader(curves_svg([Line(0, [0, last], [1, 2])], "time in minutes", "loss"))
        assert ticks | {"time in minutes", "loss", "A"} <= {text.strip() for text in plot.texts}


@pytest.mark.parametrize("from_zero", [False, True])
def test_an_axis_begins_at_zero_if_asked_to(from_zero: bool) -> None:
    line = Line(9, [5, 6], [2.0, 3.0])  # its colour is used again
    texts = {text.strip() for text in Reader(curves_svg([line], "step", "memory", from_zero=from_zero)).texts}
    assert ("0.0" in texts) == from_zero and "J" in texts


def test_the_name_of_a_metric_is_written_as_it_is() -> None:
    name = 'val/"$\\frac$" < 1 & 2'
    plot = curves_svg([Line(0, [0, 1], [1, 2])], "step", name)
    assert name in {text.strip() for text in Reader(plot).texts}
    assert f'aria-label="{escape(name)} against step"' in plot


def test_a_curve_is_smoothed_by_its_latest_values() -> None:
    assert _means([4.0, 0.0, 4.0, 1.0], 2) == [4.0, 2.0, 2.0, 2.5]


def test_times_and_speeds_of_the_page() -> None:
    assert [_duration(seconds) for seconds in (59.4, 61, 3599, 7325)] == [
        "59 s",
        "1 min 1 s",
        "59 min 59 s",
        "2 h 2 min",
    ]
    run: Any = SimpleNamespace(curves={"speed": [SimpleNamespace(value=value) for value in (4.0, 1.0, 9.0)]})
    assert (_median(run, "speed"), _median(run, "other")) == (4.0, None)


def test_the_ledger_shows_how_far_a_run_is(runs: Runs, tmp_path: Path) -> None:
    folder = shutil.copytree(runs.version(0), tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("max_steps: 6", "max_steps: 600"))
    assert (read_run(folder).step, read_run(folder).state) == (6, "ended")
    ledger = str(folder / "ledger.bin")
    with subprocess.Popen([sys.executable, "-c", LOCK, ledger], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert read_run(folder).state == "running"
        process.communicate("\n")
    events = event_files(folder)
    for file in events[2:]:
        file.unlink()
    events[1].write_bytes(events[1].read_bytes()[:-300])  # in the middle of the last record: as a kill leaves it
    assert (read_run(folder).step, read_run(folder).state) == (6, "interrupted")
    (folder / "ledger.bin").write_bytes(b"no ledger")
    with pytest.warns(UserWarning, match="is not the ledger of a run"):
        assert read_run(folder).state == "not finished"
    shutil.copyfile(runs.version(0) / "ledger.bin", folder / "ledger-v1.bin")  # as a run in the same folder begins
    assert read_run(folder).state == "interrupted"


def test_curves_that_end_before_the_run_are_said(runs: Runs, tmp_path: Path) -> None:
    folder = shutil.copytree(runs.version(0), tmp_path / "run")
    assert (read_run(folder).step, read_run(folder).state) == (6, "finished")
    training = max(event_files(folder), key=lambda file: file.stat().st_size)
    content = training.read_bytes()
    training.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"curves of .* end at step \d, and the run took 6 steps: an event file"):
        assert read_run(folder).state == "finished"


def test_event_files_are_in_the_order_in_which_one_process_began_them(tmp_path: Path) -> None:
    names = [
        f"events.out.tfevents.{name}" for name in ("1700000000.host-2.local.77.9", "1700000000.host-2.local.77.10")
    ]
    names.append("events.out.tfevents.1700000001.host-2.local.9.0")
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in event_files(tmp_path)] == names


def test_pauses_take_no_time_and_repeated_steps_count_once(tmp_path: Path) -> None:
    config: dict[str, Any] = {"checkpoint": {"monitor": "val/loss", "mode": "min"}, "trainer": {"max_steps": 90}}
    config["data"] = {"class_path": "mine.Data", "init_args": {"task": {"of": "a user's own data module"}}}
    for name, lr in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({**config, "method": {"init_args": {"lr": lr}}}))
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("val/loss", 3.0, 0, walltime=1000)
            for start, values in ((1010, {9: 2.0, 19: 1.5}), (5000, {19: 1.0, 29: float("nan")})):
                writer.add_text("run", "| | |\n|-|-|\n| command | zolightning fit |\nof a user", walltime=start)
                for step, value in values.items():
                    writer.add_scalar("val/loss", value, step, walltime=start + step)
    run, other = (read_run(tmp_path / name) for name in "ab")
    found = [(point.step, point.seconds, point.value) for point in run.curves["val/loss"]]
    assert found[:3] == [(0, 0, 3.0), (10, 9, 2.0), (20, 19 + 19, 1.0)]
    assert found[3][:2] == (30, 19 + 29)
    assert run.best is not None and run.best.step == 20
    assert (run.state, run.commands) == ("not finished", ["zolightning fit"])
    assert differing_settings([run, other]) == {"method.lr": [1, 2]}
    printed(["report", str(tmp_path / "a"), "--output", str(tmp_path / "page.html")])
    assert json.loads((tmp_path / "page.json").read_text())["runs"][0]["last"] == {"val/loss": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such"], "There is no folder no/such."),
        (["empty"], "empty is not the folder of a run: it has no config.yaml"),
        (
            ["."],
            ". is not the folder of a run: it has no config.yaml, which `zolightning fit` writes there. Name th",
        ),
        (["silent"], "silent has no curve of a training yet"),
        (["cut"], "cut/config.yaml holds no settings: it is empty or truncated."),
        (["other"], "other/config.yaml is not YAML: 'utf-8' codec can't decode"),
        (["versions"], "versions holds 1 version, but none has trained."),
        (["run", "--output", "page.txt"], "`--output` must end with .html, got page.txt."),
        (["run", "--output", "/proc/x/page.html"], "`--output` is /proc/x, where no file can be written: "),
    ],
)
def test_wrong_folders_take_one_line(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "silent", "cut", "other", "versions/version_0"):
        Path(name).mkdir(parents=True)
    Path("cut/config.yaml").write_bytes(b"")
    Path("other/config.yaml").write_bytes(b"\xff\xfe\x00")
    Path("silent/config.yaml").write_text("trainer: {max_steps: 6}\n")
    Path("run").symlink_to(runs.version(0))
    error = refused(["report", *arguments])
    assert error.startswith(f"error: {message}") and "\n" not in error
    assert not list(tmp_path.glob("*.html")) + list(tmp_path.glob("*.json"))
