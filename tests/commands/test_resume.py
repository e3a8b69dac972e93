"""``--ckpt_path last`` and ``best`` mean this run's, which goes on in its own folder."""

import shlex
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli_runs import NAME, Runs, printed
from zolightning.checkpoints.keep_ledger import KeepLedger
from zolightning.commands.event_log import event_files
from zolightning.commands.parser import OneLineParser

pytestmark = [
    pytest.mark.usefixtures("fresh_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning 2.6 with jsonargparse 4.49
]


def test_a_config_file_is_as_it_was_until_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser, path = OneLineParser(), tmp_path / "config.yaml"
    parser.add_argument("--steps", type=int)

    def save(steps: int) -> None:
        parser.save(parser.parse_args(["--steps", str(steps)]), path, skip_none=False, overwrite=True, multifile=False)

    save(3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parser, "dump", Mock(side_effect=KeyboardInterrupt))
        save(4)
    assert path.read_text() == "steps: 3\n" and list(tmp_path.iterdir()) == [path]
    save(4)
    assert path.read_text() == "steps: 4\n"


def last_of(runs: Runs, version: int = 0) -> dict[str, Any]:
    return torch.load(runs.version(version) / "checkpoints/last.ckpt", weights_only=True)


def test_a_resumed_run_goes_on_in_its_folder(resumed: tuple[Runs, str]) -> None:
    runs, output = resumed
    assert "before training" not in output
    assert not runs.version(1).exists()
    scalars = runs.scalars(0)
    assert sorted(scalars["train/loss"]) == [0, 1, 2, 3, 4, 5]
    assert sorted(scalars["best/val/accuracy"]) == [3, 6]  # at each end
    assert sorted(scalars["by_forward_passes/val/accuracy"]) == [0, 2, 4, 6, 8, 10, 12]
    assert last_of(runs)["global_step"] == 6


def test_the_files_of_metrics_have_each_step_once(resumed: tuple[Runs, str]) -> None:
    runs, _ = resumed
    logged, curves, metrics = runs.scalars(0), runs.curves(0), runs.metrics(0)
    for name in ("train/loss", "zo/projected_grad", "run/steps_per_second"):
        assert list(curves[name]) == [1, 2, 3, 4, 5, 6]
        assert list(curves[name].values()) == pytest.approx(list(logged[name].values()), rel=1e-6)
    assert list(curves["val/accuracy"]) == [0, 1, 2, 3, 4, 5, 6]
    assert (metrics["state"], metrics["step"], metrics["forward_passes"]) == ("finished", 6, 12)
    assert metrics["best"]["val/accuracy"] == max(value for step, value in curves["val/accuracy"].items() if step)
    assert metrics["test"] == {tag: pytest.approx(*of.values()) for tag, of in logged.items() if "test/" in tag}
    assert {"zolightning", "torch", "lightning", "transformers"} <= metrics["versions"].keys()


def test_the_best_is_that_of_the_whole_run(resumed: tuple[Runs, str]) -> None:
    runs, output = resumed
    accuracies = {step: value for step, value in runs.scalars(0)["val/accuracy"].items()}
    (state,) = (state for key, state in last_of(runs)["callbacks"].items() if key.startswith("ModelCheckpoint"))
    best = Path(state["best_model_path"])
    assert float(state["best_model_score"]) == pytest.approx(max(accuracies.values()))
    assert [path.name for path in best.parent.glob("best*")] == [best.name]
    assert f"({best})" in output

    tested = runs.scalars(0)["test/accuracy"]
    runs("test", "--ckpt_path", "best")
    assert list(runs.scalars(1)["test/accuracy"].values()) == list(tested.values())


def test_the_config_of_a_resumed_run_starts_a_new_one(resumed: tuple[Runs, str]) -> None:
    config = yaml.safe_load((resumed[0].version(0) / "config.yaml").read_text())
    assert config["ckpt_path"] is None and config["trainer"]["logger"]["init_args"]["version"] is None


def test_other_blocks_are_refused_before_a_model_is_loaded(resumed: tuple[Runs, str]) -> None:
    blocks = ("--blocks", "BlockCoordinateDescent", "--model.init_args.model_name", "./no-model")
    assert "a run without BlockCoordinateDescent" in resumed[0].refused("fit", "--ckpt_path", "last", *blocks)


def test_a_new_run_of_the_same_name_and_then_last(runs: Runs) -> None:
    """The newest version with a checkpoint, and numbers are not sorted as words."""
    for steps, version in ((1, 2), (2, 10)):
        runs("fit", "--trainer.max_steps", steps, "--trainer.logger.init_args.version", version)
    runs("validate", "--ckpt_path", "last")
    assert (runs.version(11)).exists()
    runs("fit", "--trainer.max_steps", 3, "--ckpt_path", "last")
    assert last_of(runs, 10)["global_step"] == 3 and last_of(runs, 2)["global_step"] == 1
    assert not runs.version(12).exists()


def test_by_its_path_and_with_another_config_file_a_run_goes_on_in_its_folder(runs: Runs) -> None:
    runs("fit", "--trainer.max_steps", 1)
    (runs.folder / "longer.yaml").write_text("trainer:\n  max_steps: 2\n")
    options = ["--config", runs.folder / "longer.yaml", "--ckpt_path", runs.version(0) / "checkpoints/last.ckpt"]
    runs("fit", "--trainer.max_steps", 2, *options)
    assert last_of(runs)["global_step"] == 2
    assert [path.name for path in runs.version(0).parent.parent.iterdir()] == [runs.version(0).parent.name]


def test_from_another_working_directory_a_run_goes_on_in_its_folder(
    runs: Runs, resumed: tuple[Runs, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of which was relative to the first one; and its best checkpoint is known."""
    monkeypatch.chdir(runs.folder)
    options = ["--trainer.max_steps", 3, "--trainer.val_check_interval", 1, "--trainer.default_root_dir", "logs"]
    runs("fit", *options, "--trainer.logger.init_args.save_dir", "logs")
    (runs.folder / "elsewhere").mkdir()
    monkeypatch.chdir(runs.folder / "elsewhere")
    config = f"../logs/{NAME}/version_0/config.yaml"
    printed(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "6"])
    assert not list(Path.cwd().iterdir()) and not runs.version(1).exists()
    states = [
        {
            name: Path(value).name if "path" in name else value
            for key, state in last_of(of)["callbacks"].items()
            if key.startswith("ModelCheckpoint")
            for name, value in state.items()
            if name in ("best_model_path", "best_model_score", "kth_value")
        }
        for of in (runs, resumed[0])
    ]
    assert states[0] == states[1] and len(states[0]) == 3
    assert sorted(runs.scalars(0)["train/loss"]) == [0, 1, 2, 3, 4, 5]


def test_from_the_best_a_run_goes_on_in_a_new_folder(runs: Runs) -> None:
    """What it had learned after it stays."""
    runs("fit", "--trainer.max_steps", 6)
    (best,) = (runs.version(0) / "checkpoints").glob("best*")
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        runs("fit", "--trainer.max_steps", 8, "--ckpt_path", best)
    assert last_of(runs, 0)["global_step"] == 6 and last_of(runs, 1)["global_step"] == 8


def test_a_run_that_was_stopped_goes_on_by_the_command_it_names(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs.folder = runs.folder.rename(runs.folder.with_name("my runs"))  # a shell would take it for two words
    (runs.folder / "stops.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Stop(Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    monkeypatch.syspath_prepend(runs.folder)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as exit_:
        runs("fit", "--trainer.callbacks+", "stops.Stop")
    assert exit_.value.code == 143
    assert last_of(runs)["global_step"] == 2
    (line,) = (record.getMessage() for record in caplog.records if "To resume: " in record.getMessage())
    command = shlex.split(line.partition("To resume: ")[2])
    assert command[:2] == ["zolightning", "fit"]
    with caplog.at_level("INFO"):
        output = printed(command[1:])
    first_words = next(message for message in caplog.messages if message.startswith("method"))
    for line in (first_words + output).splitlines():
        if line.startswith(("resume", "export:", "replay:", "train longer:")):
            words = shlex.split(line)
            assert Path(words[words.index("--config") + 1]) == runs.version(0) / "config.yaml"
    assert "train longer:" in output and "\nresume" in first_words
    assert last_of(runs)["global_step"] == 6 and not runs.version(1).exists()


@pytest.mark.parametrize(
    ("step", "hook"),
    [
        pytest.param(0, "train_batch_start", marks=pytest.mark.slow),
        pytest.param(1, "validation_start", marks=pytest.mark.slow),
        (1, "validation_end"),
        (2, "train_batch_start"),
    ],
)
def test_a_run_that_was_killed_before_its_first_checkpoint(
    runs: Runs,
    resumed: tuple[Runs, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: int,
    hook: str,
) -> None:
    (runs.folder / "kills.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Kill(Callback):\n"
        f"    def on_{hook}(self, trainer, *_):\n"
        f"        if trainer.global_step == {step} and trainer.state.fn == 'fit': raise GeneratorExit\n"
    )
    monkeypatch.syspath_prepend(runs.folder)
    monkeypatch.delitem(sys.modules, "kills", raising=False)
    every_step = ["--trainer.val_check_interval", 1]
    with pytest.raises(GeneratorExit):
        runs("fit", "--trainer.callbacks+", "kills.Kill", *every_step[:-1], 100 if step == 2 else 1)
    assert not (runs.version(0) / "checkpoints/last.ckpt").exists()
    with caplog.at_level("INFO"):
        output = runs("fit", "--ckpt_path", "last", *every_step)
    assert ("2 steps are restored from the ledger" in caplog.text) == (step == 2)
    assert "before training" not in output and not runs.version(1).exists()
    ends = [last_of(of)["state_dict"] for of in (runs, resumed[0])]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    events = [EventAccumulator(str(file)).Reload() for file in event_files(runs.version(0))]
    for tag in ("train/loss", "zo/lr", "val/loss"):
        steps = [event.step for file in events if tag in file.Tags()["scalars"] for event in file.Scalars(tag)]
        # Validations: before training, and after each step, but for one that the killed run had not made
        assert steps == [0] * (tag == "val/loss" and step < 2) + [0, 1, 2, 3, 4, 5], tag


def test_a_run_that_was_killed_before_its_ledger_begins_anew_in_its_folder(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the validation before training is logged once."""
    with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
        patch.setattr(KeepLedger, "on_train_start", Mock(side_effect=GeneratorExit))
        runs("fit", "--trainer.max_steps", 2, "--trainer.val_check_interval", 1)
    output = printed(["fit", "--config", str(runs.version(0) / "config.yaml"), "--ckpt_path", "last"])
    assert "before training" in output and not runs.version(1).exists()
    events = [EventAccumulator(str(file)).Reload() for file in event_files(runs.version(0))]
    for tag, expected in (("val/loss", [0, 0, 1]), ("train/loss", [0, 1])):  # a validation after step 2 is at 1
        steps = [event.step for file in events if tag in file.Tags()["scalars"] for event in file.Scalars(tag)]
        assert steps == expected, tag


def test_a_validation_before_training_changes_nothing_of_it(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed before its first checkpoint goes on without it: random numbers and averages are as ever."""
    (runs.folder / "draws.py").write_text(
        "import torch\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Draw(Callback):\n"
        "    def on_validation_batch_end(self, *_): torch.rand(())\n"  # as loaders and data sets may
        "    def on_train_batch_end(self, trainer, module, *_): module.log('train/drawn', torch.rand(()))\n"
    )
    monkeypatch.syspath_prepend(runs.folder)
    for validate_first in ("true", "false"):
        averaged = ("--trainer.callbacks+", "EMAWeightAveraging", "--trainer.precision", "bf16-true")
        own = ("--trainer.callbacks+", "draws.Draw", "--trainer.max_steps", 2, "--validate_first", validate_first)
        runs("fit", *averaged, *own)
    assert runs.scalars(0)["train/drawn"] == runs.scalars(1)["train/drawn"]
    ends = [last_of(runs, version)["state_dict"] for version in (0, 1)]
    assert all(
        torch.equal(ends[0][name], weight) and weight.dtype == ends[0][name].dtype for name, weight in ends[1].items()
    )


def test_a_run_without_a_validation_ends_with_its_last_step(runs: Runs) -> None:
    output = runs("fit", "--trainer.max_steps", 2, "--trainer.val_check_interval", 100, "--test_last", "true")
    assert last_of(runs)["global_step"] == 2
    assert "last step: test/accuracy" in output and "best checkpoint" not in output
    assert "names no best one" in runs.refused("test", "--ckpt_path", "best")


def test_the_best_of_a_run_that_validates_at_the_ends_of_epochs(runs: Runs) -> None:
    """Which the last checkpoint names: Lightning would save the best one later than that."""
    every_epoch = ["--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", 1]
    runs("fit", *every_epoch, "--trainer.max_steps", -1, "--trainer.max_epochs", 1)
    (best,) = (runs.version(0) / "checkpoints").glob("best*")
    runs("validate", "--ckpt_path", "best")
    trained, validated = runs.metrics(0), runs.metrics(1)
    assert trained["state"] == "ended"  # there was no number of steps to take
    assert (validated["state"], validated["checkpoint"]) == ("validated", str(best))
    assert validated["validation"]["val/accuracy"] == pytest.approx(trained["best"]["val/accuracy"])


def test_checkpoints_can_be_turned_off(runs: Runs) -> None:
    output = runs("fit", "--trainer.enable_checkpointing", "false", "--test_last", "true")
    assert not (runs.version(0) / "checkpoints").exists()
    assert "last step: test/accuracy" in output
