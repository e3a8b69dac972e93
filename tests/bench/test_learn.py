"""The comparison of methods in miniature: limits, the grid, seeds, stopping, going on, tables and curves."""

import csv
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from torch import nn

from cli_runs import parsed, parser
from zolightning.bench import learn_run
from zolightning.bench.__main__ import main
from zolightning.bench.learn import PAPERS
from zolightning.bench.learn_entries import callbacks, learning_rate, model_arguments, read, with_learning_rate
from zolightning.bench.learn_results import Curve, Line
from zolightning.callbacks import ZerothOrder
from zolightning.commands.slots import SLOTS, slot_callbacks
from zolightning.optim import ZerothOrderOptimizer
from zolightning.packaged import packaged

ROWS = {"train": 24, "validation": 8, "test": 8}
Command = Callable[..., dict[tuple[str, str, str], list[dict[str, str]]]]

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


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


def test_every_kind_of_entry_is_tuned_seeded_and_cut_at_its_limit(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("--entry", "one layer: configs/methods/mezo.yaml scope=DominantLayer scope.layer=1 method.lr=1e-3"),
        *("--entry", "ZO-MOPI: configs/methods/zo_mopi.yaml evaluation.evaluations_per_forward=8"),
        *("--entry", "AdamW: configs/methods/adamw.yaml data.batch_size=8"),
        *("--forwards", "24", "--validations", "2", "--grid", "1", "10", "--seeds", "0", "1"),
    ]
    found = command(*arguments)
    printed = capsys.readouterr().out
    forwards_a_step = {"one layer": 2, "ZO-MOPI": 8, "AdamW": 3}
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
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (*MEZO, "--forwards", "12", "--validations", "2")
    (whole,) = command(*arguments, output="whole.csv").values()
    (begun,) = command(*arguments, "--time-limit", "0.01").values()
    assert [line["step"] for line in begun] == ["0"]
    assert "the same command goes on" in capsys.readouterr().out
    (resumed,) = command(*arguments).values()
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
    monkeypatch.setitem(learn_run.CLOCKS, "wall", lambda: float(next(ticks)))  # a step takes a second
    by_time = ("--forwards", "4", "--seconds", "7", "--validations", "1")
    (lines,) = command(*MEZO, *by_time).values()
    # The run ends two steps before it might take too long, and then with room for the first limit.
    spent = [(line["split"], int(line["forwards"]), float(line["seconds"])) for line in lines]
    assert [entry for entry in spent if entry[0] == "val"] == [
        ("val", 0, 0),
        ("val", 4, 2),
        ("val", 8, 4),
        ("val", 12, 6),
    ]


def test_a_run_whose_loss_is_not_finite_is_tested_where_it_was_best(command: Command) -> None:
    (lines,) = command("--entry", "MeZO: configs/methods/mezo.yaml method.lr=1e45", "--forwards", "40").values()
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


def by_command_line(*files: str) -> list[Callback]:
    """The callbacks that ``zolightning fit`` makes of files."""
    config = parsed(["fit", *(f"--config={path}" for path in (*files, *OTHERS))])["fit"]
    given = Namespace({slot: config[slot] for slot in SLOTS})
    given["trainer"] = Namespace(callbacks=None)
    return slot_callbacks(config, parser().instantiate_classes(Namespace(fit=given, subcommand="fit"))["fit"])


def described(value: Any) -> Any:
    """Classes and settings, all the way down."""
    if isinstance(value, list | tuple | deque):
        return [described(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, ZerothOrderOptimizer):
        return type(value), [{**group, "params": None} for group in value.param_groups], described(value.estimator)
    if isinstance(value, ZerothOrder):
        made = value.method([nn.Parameter(torch.zeros(2, 2))])
        return described(made), {**vars(value), "method": None}
    if type(value).__module__.startswith("zolightning"):
        return type(value), {name: described(item) for name, item in vars(value).items()}
    return value


OTHERS = ("configs/tasks/sentiment.yaml", "configs/models/smollm2_135m.yaml")
FILES = [
    "methods/mezo_adam",
    "methods/zo_mopi_one_sided",
    "methods/subzero methods/lozo_momentum scopes/dominant_layer_mlp_without_outlier_channels",
    "methods/mezo blocks/adalezo scopes/lora",
    "methods/mezo blocks/focus",
    "methods/aim_zo",
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 calls what jsonargparse 4.49 deprecates
@pytest.mark.parametrize("files", FILES)
def test_files_mean_what_they_mean_to_the_command_line(files: str) -> None:
    paths = [f"configs/{file}.yaml" for file in files.split()]
    ours = callbacks(read(" ".join(paths)))
    assert described(ours) == described(by_command_line(*paths))


def test_settings_reach_into_classes() -> None:
    words = "configs/blocks/adalezo.yaml blocks.order.decay=0.5 blocks.interval=7 method.lr=1e-3 lr_scheduler=LinearLR"
    config = read(words)
    blocks, zeroth_order = callbacks(config)
    assert (blocks.order.decay, blocks.interval, blocks.others) == (0.5, 7, "never")
    assert zeroth_order.lr_scheduler is not None
    assert learning_rate(config) == 1e-3
    (_, changed) = callbacks(with_learning_rate(config, 0.5))
    assert changed.method.keywords["lr"] == 0.5
    assert zeroth_order.method.keywords["lr"] == 1e-3
    adamw = read("configs/methods/mezo.yaml configs/methods/adamw.yaml")
    assert callbacks(adamw) == []
    assert model_arguments(adamw)["optimizer"].keywords == {"lr": 2e-5}


GIVEN = ("--config", "model.model_name=nowhere data.task=sst2")


@pytest.mark.parametrize("words", PAPERS.values(), ids=PAPERS)
def test_entries_of_the_papers_can_be_made(words: str) -> None:
    config = read(words)
    assert bool(callbacks(config)) == (config["method"] is not None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--forwards", "2"], "nothing to compare"),
        ([*MEZO], "`--forwards` or `--seconds` must be given"),
        ([*MEZO, "--forwards", "0"], "`--forwards` must be positive, got 0"),
        (["--entry", "MeZO", "--forwards", "2"], "got 'MeZO'"),
        (["--entry", "A: configs/nothing.yaml", "--forwards", "2"], "'configs/nothing.yaml' is neither a YAML file"),
        (["--entry", "A: configs/methods/mezo.yaml metod.lr=1", "--forwards", "2"], "`metod` is a field that no run"),
        (["--entry", "A: method=MeZO", "--forwards", "2"], "`method.lr`"),
        ([*GIVEN, "--entry", "A: configs/methods/mezo.yaml method.lrr=1", "--forwards", "2"], "'A': .*'lrr'"),
        (
            [*GIVEN, "--entry", "A: configs/methods/mezo.yaml scope=Layers", "--forwards", "2"],
            "'Layers' names no class",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["learn", "--device", "cpu", *arguments])
