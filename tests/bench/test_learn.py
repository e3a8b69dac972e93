"""The comparison of methods in miniature: limits, the grid, seeds, stopping, going on, tables and curves."""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn

from zolightning.bench import learn_run
from zolightning.bench.__main__ import main
from zolightning.bench.learn import PAPERS
from zolightning.bench.learn_entries import callbacks, described, learning_rate, read, with_learning_rate
from zolightning.bench.learn_results import Curve, Line
from zolightning.packaged import packaged

ROWS = {"train": 24, "validation": 8, "test": 8}
Command = Callable[..., dict[tuple[str, str, str], list[dict[str, str]]]]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning 2.6 with jsonargparse 4.49
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows with the fields of SST-2."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in ROWS.items():
        lines = (packaged("zolightning/data/sentiment") / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    return folder


@pytest.fixture
def command(rows: Path, tmp_path: Path, write_tiny_model: Callable[..., Path]) -> Command:
    """Runs the command and returns the lines of its file by entry, learning rate and seed."""
    model = write_tiny_model(tmp_path / "model")
    config = f"configs/tasks/sst2.yaml data.path={rows} model.model_name={model}"

    def run(*arguments: str, output: str = "curves.csv") -> dict[tuple[str, str, str], list[dict[str, str]]]:
        path = tmp_path / output
        places = ["--config", config, "--output", str(path), "--folder", str(path.with_suffix(".runs"))]
        main(["learn", "--device", "cpu", *places, *arguments])
        found = defaultdict(list)
        with path.open() as file:
            for line in csv.DictReader(file):
                found[line["entry"], line["lr"], line["seed"]].append(line)
        return dict(found)

    return run


MEZO = ("--entry", "MeZO: configs/methods/mezo.yaml method.lr=1e-3")
SCOPE = "scope=DominantLayer scope.layer=1"


def test_every_kind_of_entry_is_tuned_seeded_and_cut_at_its_limit(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("--entry", f"ZO-MOPI: configs/methods/zo_mopi.yaml {SCOPE} evaluation.evaluations_per_forward=8"),
        *("--entry", "AdamW: configs/methods/adamw.yaml data.batch_size=8"),
        *("--forwards", "24", "--validations", "2", "--grid", "1", "10", "--seeds", "0", "1"),
    ]
    found = command(*arguments)
    printed = capsys.readouterr().out
    forwards_a_step = {"ZO-MOPI": 8, "AdamW": 3}
    for name, count in forwards_a_step.items():
        runs = {key[1:]: lines for key, lines in found.items() if key[0] == name}
        for lines in runs.values():
            *validated, tested = lines
            assert [line["split"] for line in lines] == ["val"] * len(validated) + ["test"]
            at = [int(line["forwards"]) for line in validated]
            assert at == [0, 16 if name == "ZO-MOPI" else 12, 24]
            assert all(int(line["forwards"]) == count * int(line["step"]) for line in lines)
            assert validated[0]["loss"] != validated[-1]["loss"], "nothing was trained"
            best = min(validated, key=lambda line: float(line["loss"]))
            assert tested["step"] == best["step"]
        grid = {lr: min(float(line["loss"]) for line in runs[lr, "0"][:-1]) for lr, seed in runs if seed == "0"}
        assert len(grid) == 2
        assert [lr for lr, seed in runs if seed == "1"] == [min(grid, key=lambda lr: grid[lr])]
        assert f"{name}: lr" in printed, "the best of two is an end of the grid"
    assert len(found) == 3 * len(forwards_a_step)
    assert "after 24 forwards of training" in printed
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.runs/*")), "checkpoints of finished runs are gone"
    assert command(*arguments) == found, "finished runs are passed over"


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    falling = f"{MEZO[1]} lr_scheduler=WarmupDecay"
    arguments = ("--entry", falling, "--forwards", "12", "--validations", "2")
    (whole,) = command(*arguments, output="whole.csv").values()
    (begun,) = command(*arguments, "--time-limit", "0.01").values()
    assert [line["step"] for line in begun] == ["0"]
    assert "the same command continues" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists(), "there is no finished run to draw"
    (resumed,) = command(*arguments).values()
    assert (tmp_path / "curves.png").exists()
    figures = [[{**line, "seconds": None} for line in lines] for lines in (resumed, whole)]
    assert figures[0] == figures[1]
    assert [line["step"] for line in resumed[:-1]] == ["0", "3", "6"]


def test_a_run_that_was_killed_before_its_test_is_only_tested(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = (*MEZO, "--forwards", "4", "--validations", "1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learn_run.L.Trainer, "test", killed)
        command(*arguments)
    (lines,) = command(*arguments).values()
    assert [(line["split"], line["step"]) for line in lines[:-1]] == [("val", "0"), ("val", "2")]
    assert lines[-1]["split"] == "test"


def test_one_run_serves_both_limits(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    # a step takes a second, and so does what is before the first one
    monkeypatch.setitem(learn_run.CLOCKS, "wall", lambda: float(next(ticks)))
    by_time = ("--forwards", "4", "--seconds", "9", "--validations", "1")
    (lines,) = command(*MEZO, *by_time).values()
    # The run ends two steps before it might take too long, and then with room for the first limit.
    spent = [(line["split"], int(line["forwards"]), float(line["seconds"])) for line in lines]
    assert [entry for entry in spent if entry[0] == "val"] == [
        ("val", 0, 0),
        ("val", 4, 3),
        ("val", 8, 5),
        ("val", 12, 7),
    ]


@pytest.mark.parametrize("limit", [pytest.param(("--forwards", "60"), marks=pytest.mark.slow), ("--seconds", "33")])
def test_a_schedule_ends_where_the_run_does(
    command: Command, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, str]
) -> None:
    ticks, rates = iter(range(10**6)), []
    # a step takes a second, and so does what is before the first one
    monkeypatch.setitem(learn_run.CLOCKS, "wall", lambda: float(next(ticks)))
    watch = LambdaCallback(on_train_batch_end=lambda trainer, *_: rates.append(trainer.optimizers[0].record.lr[0]))
    monkeypatch.setattr(learn_run, "callbacks", lambda config: [*callbacks(config), watch])
    command("--entry", f"{MEZO[1]} lr_scheduler=WarmupDecay", *limit, "--validations", "1")
    length, taken = (30, 30) if limit[0] == "--forwards" else (32, 30)  # one that took longer must fit in
    # what is before the first step is told apart from it after the second one
    assert rates[3:] == pytest.approx([1e-3 * (1 - step / length) for step in range(3, taken)])


def test_a_rate_that_is_measured_has_no_grid_and_is_paid_for(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "lr_probe.num_steps=2 lr_probe.num_examples=8 lr_probe.noise=0.01 trainer.precision=32-true"
    probe = f"configs/learning_rates/probe.yaml {words}"
    found = command("--entry", f"{MEZO[1]} {probe}", "--forwards", "150", "--validations", "2", "--grid", "1", "10")
    assert list(found) == [("MeZO", "0.001", "0")]
    *_, last, tested = found["MeZO", "0.001", "0"]
    probed = int(last["forwards"]) - 2 * int(last["step"])
    assert 20 <= probed <= 100
    assert tested["split"] == "test"
    assert re.search(r"lr now (?!0\.001,)\d", capsys.readouterr().out)


def test_a_run_whose_loss_is_not_finite_is_tested_where_it_was_best(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        next(module.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(learn_run, "callbacks", lambda c: [LambdaCallback(on_train_batch_start=spoil), *callbacks(c)])
    (lines,) = command(*MEZO, "--forwards", "40").values()
    assert [line["split"] for line in lines][-2:] == ["diverged", "test"]
    assert lines[-1]["step"] == "0"


def test_a_run_that_fails_does_not_stop_those_after_it(command: Command) -> None:
    nothing = ("--entry", "no layer: configs/methods/mezo.yaml scope=DominantLayer scope.layer=99")
    with pytest.raises(SystemExit, match="no layer, lr 1e-05, seed 0"):
        command(*nothing, *MEZO, "--forwards", "2", "--validations", "1", "--seeds", "0", "1")
    found = command(*MEZO, "--forwards", "2", "--validations", "1")
    tested = [(entry, seed) for (entry, _, seed), lines in found.items() if lines[-1]["split"] == "test"]
    assert tested == [("MeZO", "0"), ("MeZO", "1")]


def test_what_a_run_repeats_after_a_kill_counts_once() -> None:
    curve = Curve()
    for step, seconds in ((0, 0.0), (2, 1.0), (4, 2.0), (3, 1.5), (5, 2.5)):
        curve.add(Line("val", step, 2 * step, seconds, 1 / (1 + step), 0.5))
    assert list(curve.validated) == [0, 2, 3, 5]
    assert curve.best("seconds", 2.0).step == 3
    assert curve.best("forwards", 9).step == 3


GIVEN = "configs/tasks/sentiment.yaml model.model_name=nowhere"


def test_files_and_settings_mean_what_they_mean_to_the_command_line() -> None:
    words = "configs/blocks/adalezo.yaml blocks.order.decay=0.5 method.lr=1e-3 lr_scheduler=LinearLR"
    adalezo = read(f"{GIVEN} configs/methods/lozo.yaml {words}")
    found: list[Any] = callbacks(adalezo)
    blocks, zeroth_order = found
    assert (blocks.order.decay, blocks.others) == (0.5, "never")
    assert zeroth_order.lr_scheduler is not None and learning_rate(adalezo) == 1e-3
    found += callbacks(with_learning_rate(adalezo, 0.5))
    rates = [one.method([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]["lr"] for one in found[1::2]]
    assert rates == [1e-3, 0.5]
    recommended = read(
        f"configs/recommended.yaml configs/learning_rates/probe.yaml {GIVEN} lr_control=LearningRateControl"
    )
    kinds = [type(callback).__name__ for callback in callbacks(recommended)]
    expected = "LinearProbing TrainParameters LearningRateProbe LearningRateControl SubspaceResampling ZerothOrder"
    assert sorted(kinds) == sorted(expected.split())
    adamw = read(f"{GIVEN} configs/methods/mezo.yaml configs/methods/adamw.yaml")
    assert callbacks(adamw) == [] and learning_rate(adamw) == 2e-5


def test_what_a_run_depends_on() -> None:
    """Rows of a file stay those of the same command when a field gets added, or a run is longer in a file."""
    same = (read(f"{GIVEN} configs/methods/mezo.yaml {other}") for other in ("trainer.max_steps=3", "method.clip=null"))
    assert len({described(config) for config in same}) == 1
    assert described(read(f"{GIVEN} configs/methods/mezo.yaml method.clip=2")) != described(
        read(f"{GIVEN} method=MeZO")
    )


@pytest.mark.parametrize("words", PAPERS.values(), ids=PAPERS)
def test_entries_of_the_papers_can_be_made(words: str) -> None:
    config = read(f"{GIVEN} {words}")
    assert bool(callbacks(config)) == (config.method is not None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--forwards", "2"], "nothing to compare"),
        ([*MEZO], "`--forwards` or `--seconds` must be given"),
        ([*MEZO, "--forwards", "0"], "`--forwards` must be positive, got 0"),
        (["--entry", "MeZO", "--forwards", "2"], "got 'MeZO'"),
        (
            ["--entry", "A: configs/nothing.yaml", "--forwards", "2"],
            "'A': .*configs/nothing.yaml', which is not a file",
        ),
        (["--entry", "A: data.task=sst2", "--forwards", "2"], "`model.model_name` must be given"),
        (
            ["--entry", f"A: {GIVEN} model=lightning.pytorch.demos.boring_classes.BoringModel", "--forwards", "2"],
            "`method.lr`, or",
        ),
        (["--entry", f"A: {GIVEN} metod.lr=1", "--forwards", "2"], "`--metod.lr` is not a setting"),
        (["--entry", f"A: {GIVEN} method=MeZO method.lrr=1", "--forwards", "2"], "'A': .*did you mean lr"),
        (["--entry", f"A: {GIVEN} method=MeZO resampling.interval=2", "--forwards", "2"], "`resampling` is given, but"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["learn", "--device", "cpu", *arguments])
