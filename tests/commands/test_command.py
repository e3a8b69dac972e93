"""The command ``zolightning``: its help, its parsers, what it chooses, and how it ends early."""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from jsonargparse import Namespace
from lightning.fabric.accelerators import MPSAccelerator as FabricMPSAccelerator
from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cli_runs import Runs
from zolightning.__main__ import console, main
from zolightning.cli import _SUBCOMMANDS, ZerothOrderCLI
from zolightning.commands.checks import choose_monitor
from zolightning.commands.configured_trainer import ConfiguredTrainer
from zolightning.data import PromptDataModule

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["Fine-tunes language models with forward passes only.", "fit", "export"]),
        (["--help"], ["Evaluates a model on the test data.\n", "Evaluates a model on the validation data.\n"]),
        (["test", "--help"], ["Evaluates a model on the test data.\n"]),
        (["fit", "--help"], ["usage: zolightning fit --config", "--validate_first", "--test_last", "or val/loss"]),
        (["fit", "--help"], ["--method.help MeZO", "--trainer.precision", "--ckpt_path", "--help_all"]),
        (["fit", "--help_all"], ["--trainer.overfit_batches", "--evaluation.skip_nonfinite"]),
        (["fit", "--method.help", "MeZO"], ["--method.lr", "--method.num_queries", "--method.estimator"]),
        (["fit", "--scope.help", "DominantLayer"], ["--scope.part", "--scope.profile"]),
        (["sweep-layers", "--help"], ["--first_order", "--method"]),
        (["fit", "--model.help", "CausalLM"], ["--model.model_name", "GGUF"]),
        (["fit", "--data.help", "PromptDataModule"], ["--data.task", ".parquet"]),
        (["export", "--help"], ["--folder", "--ckpt_path"]),
        (["predict", "--help"], ["--predictions.path", "(default: predictions.jsonl)"]),
    ],
)
def test_help(arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for part in expected:
        assert part in text
    # What the Trainer gives or would keep in memory, and noise
    assert not any(part in text for part in ("--method.params", "--return_predictions", "usage: __main__"))


@pytest.mark.parametrize(
    ("words", "parsers"), [(["fit", "--no", "1"], ["fit"]), (["--config", "no.yaml", "fit"], list(_SUBCOMMANDS))]
)
def test_a_command_makes_its_own_parser_only(
    words: list[str], parsers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a file that comes first may say which command it is."""
    made, own = [], LightningCLI._prepare_subcommand_parser

    def prepare(self: Any, klass: type, subcommand: str, **kwargs: Any) -> Any:
        made.append(subcommand)
        return own(self, klass, subcommand, **kwargs)

    monkeypatch.setattr(LightningCLI, "_prepare_subcommand_parser", prepare)
    with pytest.raises(SystemExit):
        main(words)
    assert made == parsers


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ([], "no command is given"),
        (["fitt"], "'fitt' is not a command (did you mean fit?)"),
        (["reprot", "logs"], "'reprot' is not a command (did you mean report?)"),
    ],
)
def test_a_wrong_command_is_told_all_there_are(
    words: list[str], wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["zolightning", *words])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == f"error: {wrong}; accepted: {', '.join([*_SUBCOMMANDS, 'configs', 'report'])}.\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"zolightning {version('zolightning')}\n"


def test_help_has_no_markup_and_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["fit", "--method.help", "MeZO"], ["profile", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
    printed = capsys.readouterr().out
    assert "see `zolightning.kernels.noise`" in " ".join(printed.split())
    assert ":mod:" not in printed and "``" not in printed
    assert "after every so many layers (default: 0)" in " ".join(printed.split())


def test_help_fits_two_screens(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 120


def test_classes_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_scopes.py").write_text("from zolightning.scopes import TrainHead\nclass Own(TrainHead): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["zolightning", "fit", "--scope.help", "own_scopes.Own"])
    with pytest.raises(SystemExit):
        console()
    assert "--scope.untie" in capsys.readouterr().out


def test_a_module_saves_the_arguments_it_was_given(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs.folder / "saving.py").write_text(
        "from zolightning import CausalLM\n"
        "class Saving(CausalLM):\n"
        "    def __init__(self, model_name: str, margin: float = 1.0):\n"
        "        super().__init__(model_name)\n"
        "        self.save_hyperparameters()\n"
    )
    monkeypatch.syspath_prepend(runs.folder)
    monkeypatch.setattr(ZerothOrderCLI, "_run_subcommand", Mock())
    model = ("--model", "saving.Saving", "--model.model_name", runs.folder / "model", "--model.margin", 2e-7)
    cli = ZerothOrderCLI(runs.arguments("validate", *model))
    assert cli.model.hparams["model_name"] == str(runs.folder / "model") and cli.model.hparams["margin"] == 2e-7
    assert cli.model.hparams["_class_path"] == "saving.Saving"


@pytest.mark.parametrize(
    ("task", "reward", "expected"),
    [
        ({"answers": ["a", "b"], "labels": [0, 1], "prompt": "{{ x }}"}, None, ("val/accuracy", "max")),
        ({"references": "x", "prompt": "{{ x }}"}, None, ("val/f1", "max")),
        ({"references": "x", "prompt": "{{ x }}"}, "a.reward", ("val/reward", "max")),
        ({"target": "x", "prompt": "{{ x }}"}, None, ("val/pearson", "max")),
        ({"text": "{{ x }}"}, None, ("val/loss", "min")),
        (None, None, ("val/accuracy", "max")),
    ],
)
def test_by_which_metric_a_checkpoint_is_the_best_unless_told(
    tmp_path: Path, task: dict[str, Any] | None, reward: str | None, expected: tuple[str, str]
) -> None:
    data = None if task is None else PromptDataModule({"name": "own", **task}, str(tmp_path))
    model = Namespace(init_args=Namespace(reward=reward))
    config = Namespace(model=model, checkpoint=Namespace(monitor=None, mode="max"))
    choose_monitor(config, data)
    assert (config.checkpoint.monitor, config.checkpoint.mode) == expected


@pytest.mark.parametrize("where", ["zolightning.cli.check_seed", "zolightning.models.CausalLM.validation_step"])
def test_ctrl_c_before_training(runs: Runs, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    with pytest.raises(SystemExit) as exit_:
        runs("fit")
    assert exit_.value.code == 130  # as after the first step


def test_a_rank_of_a_run_of_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train without logs and results: torchrun without `trainer.devices`, or variables of another run."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # of RANK, when Lightning is imported
    with pytest.raises(MisconfigurationException, match=r"make one process, but RANK.* rank 1 of several"):
        ConfiguredTrainer(accelerator="cpu", devices=1, logger=False)


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_a_mac_runs_on_its_cpu_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for accelerator in (MPSAccelerator, FabricMPSAccelerator):
        monkeypatch.setattr(accelerator, "is_available", lambda: True)
    for name, chosen in (("auto", CPUAccelerator), ("mps", MPSAccelerator)):
        assert type(ConfiguredTrainer(accelerator=name, logger=False).accelerator) is chosen


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit, match="need Linux or macOS"):
        console()


def test_a_reader_that_has_read_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """``zolightning configs | head`` ends without a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["zolightning", "configs"])
    with open(writing, "w") as closed, pytest.raises(SystemExit) as exit_:
        monkeypatch.setattr(sys, "stdout", closed)
        console()
    assert exit_.value.code == 1
