"""The command ``zolightning``: what a run leaves behind, going on from it, and what wrong input looks like."""

import io
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from zolightning.cli import main

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIGS = Path(__file__).parent.parent / "configs"
LR = "--trainer.callbacks.init_args.method.init_args.lr"
NAME = "sentiment-mezo-smollm2_135m"


@dataclass
class Runs:
    """Writes the runs of a folder, whose model is tiny, and reads them."""

    folder: Path

    def arguments(self, subcommand: str, *options: Any) -> list[str]:
        overrides = {
            "--model.init_args.model_name": self.folder / "model",
            "--data.init_args.num_train": 64,
            "--data.init_args.num_validation": 20,
            "--data.init_args.num_test": 10,
            "--data.init_args.batch_size": 8,
            LR: 0.1,
            "--trainer.max_steps": 6,
            "--trainer.val_check_interval": 3,
            "--trainer.log_every_n_steps": 1,
            "--trainer.accelerator": "cpu",
            "--trainer.enable_progress_bar": "false",
            "--trainer.logger.init_args.save_dir": self.folder / "logs",
            "--trainer.default_root_dir": self.folder / "logs",
        }
        files = ("tasks/sentiment", "methods/mezo", "models/smollm2_135m")
        return [
            subcommand,
            *(part for file in files for part in ("--config", str(CONFIGS / f"{file}.yaml"))),
            *(str(part) for option in overrides.items() for part in option),
            *(str(option) for option in options),
        ]

    def __call__(self, subcommand: str, *options: Any) -> str:
        """Runs a subcommand and returns what it printed."""
        return printed(self.arguments(subcommand, *options))

    def version(self, number: int) -> Path:
        return self.folder / "logs" / NAME / f"version_{number}"

    def scalars(self, version: int) -> dict[str, dict[int, float]]:
        """By tag and step."""
        values: dict[str, dict[int, float]] = {}
        for file in sorted(self.version(version).glob("events.*")):
            events = EventAccumulator(str(file)).Reload()
            for tag in events.Tags()["scalars"]:
                values.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
        return values

    def texts(self, version: int) -> dict[str, str]:
        texts = {}
        for file in self.version(version).glob("events.*"):
            events = EventAccumulator(str(file)).Reload()
            for tag in events.Tags()["tensors"]:
                texts[tag] = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        return texts


def printed(arguments: list[str]) -> str:
    with redirect_stdout(io.StringIO()) as output:
        main(arguments)
    return output.getvalue()


@pytest.fixture(scope="module", autouse=True)
def fresh_process() -> Iterator[None]:
    """``sys.argv`` without pytest's arguments, and the seed of ``seed_everything`` kept to this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["zolightning"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        yield


@pytest.fixture
def runs(tmp_path: Path, write_tiny_model: Callable[..., Path]) -> Runs:
    write_tiny_model(tmp_path / "model")
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, write_tiny_model: Callable[..., Path], fresh_process: None
) -> tuple[Runs, str]:
    """A run of six steps that nobody interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    write_tiny_model(folder / "model")
    runs = Runs(folder)
    return runs, runs("fit", "--test_last", "true")


def test_fit_leaves_config_metrics_and_checkpoints(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    config = yaml.safe_load((runs.version(0) / "config.yaml").read_text())
    assert config["data"]["init_args"]["task"] == "sentiment"
    assert config["trainer"]["max_steps"] == 6

    scalars = runs.scalars(0)
    for tag in ("train/loss", "train/accuracy", "zo/projected_grad", "zo/lr", "zo/forward_passes"):
        assert sorted(scalars[tag]) == [0, 1, 2, 3, 4, 5], tag
    assert list(scalars["zo/forward_passes"].values()) == [2, 4, 6, 8, 10, 12]
    assert scalars["zo/lr"][5] == pytest.approx(0.1)
    assert all(value > 0 for tag in ("run/steps_per_second", "run/peak_memory_gib") for value in scalars[tag].values())
    assert len(scalars["run/steps_per_second"]) == 6
    assert {2, 5} <= set(scalars["val/accuracy"])  # counted from 0; 0 is the validation before training
    assert "test/accuracy" in scalars
    assert "It was" in runs.texts(0)["prompt/text_summary"]

    (best,) = (runs.version(0) / "checkpoints").glob("best-step=*.ckpt")
    last = load(runs.version(0) / "checkpoints/last.ckpt")
    assert last["global_step"] == 6
    best_accuracy = max(scalars["val/accuracy"][step] for step in (2, 5))
    assert scalars["val/accuracy"][load(best)["global_step"] - 1] == pytest.approx(best_accuracy)


def test_fit_says_accuracy_before_and_after(finished: tuple[Runs, str]) -> None:
    runs, output = finished
    before, best, tested = (line for line in output.splitlines() if line.startswith(("before", "best")))
    assert before.startswith("before training: val/accuracy 0.")
    assert float(before.split()[3].rstrip(",")) == pytest.approx(runs.scalars(0)["val/accuracy"][0], abs=1e-4)
    assert best.startswith("best checkpoint: val/accuracy 0.") and ".ckpt" in best
    assert tested.startswith("best checkpoint: test/accuracy 0.")
    assert "Tip" not in output and "litlogger" not in output


def test_validate_first_can_be_turned_off(runs: Runs) -> None:
    assert "before training" not in runs("fit", "--validate_first", "false", "--trainer.max_steps", 1)


def test_validate_reads_the_config_of_a_run(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    (best,) = (runs.version(0) / "checkpoints").glob("best-step=*.ckpt")
    printed(["validate", "--config", str(runs.version(0) / "config.yaml"), "--ckpt_path", str(best)])
    logged, again = runs.scalars(0), runs.scalars(latest(runs))
    step = load(best)["global_step"]
    for metric in ("val/accuracy", "val/loss"):
        assert list(again[metric].values()) == [logged[metric][step - 1]]


def test_test_reads_a_checkpoint(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    (best,) = (runs.version(0) / "checkpoints").glob("best-step=*.ckpt")
    assert "test/accuracy" in runs("test", "--ckpt_path", best)
    tested = {tag: list(values.values()) for tag, values in runs.scalars(latest(runs)).items() if "test/" in tag}
    at_the_end = {tag: list(values.values()) for tag, values in runs.scalars(0).items() if "test/" in tag}
    assert tested == at_the_end


def test_predict_writes_a_line_an_example(finished: tuple[Runs, str], tmp_path: Path) -> None:
    runs, _ = finished
    path = tmp_path / "made" / "predictions.jsonl"
    for _ in range(2):  # a second run replaces the file
        runs("predict", "--ckpt_path", runs.version(0) / "checkpoints/last.ckpt", "--predictions.path", path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 10
    for row in rows:
        assert row["prediction"] == row["scores"].index(max(row["scores"]))


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_resumed_run_equals_uninterrupted_run(finished: tuple[Runs, str], runs: Runs) -> None:
    whole, _ = finished
    runs("fit", "--trainer.max_steps", 3)
    output = runs("fit", "--ckpt_path", runs.version(0) / "checkpoints/last.ckpt")
    assert "before training" not in output
    expected = load(whole.version(0) / "checkpoints/last.ckpt")
    found = load(runs.version(1) / "checkpoints/last.ckpt")
    halfway = load(runs.version(0) / "checkpoints/last.ckpt")
    assert halfway["global_step"] == 3 and found["global_step"] == 6
    assert_same(found["state_dict"], expected["state_dict"])
    assert_same(found["optimizer_states"], expected["optimizer_states"])
    with pytest.raises(AssertionError):
        assert_same(halfway["state_dict"], expected["state_dict"])
    for tag in ("train/loss", "zo/projected_grad", "val/accuracy"):
        resumed = runs.scalars(1)[tag]
        assert resumed == {step: value for step, value in whole.scalars(0)[tag].items() if step >= 3}


def test_export_is_a_hugging_face_folder(finished: tuple[Runs, str], tmp_path: Path) -> None:
    runs, _ = finished
    checkpoint = runs.version(0) / "checkpoints/last.ckpt"
    config = runs.version(0) / "config.yaml"
    folder = tmp_path / "exported"
    printed(["export", "--config", str(config), "--ckpt_path", str(checkpoint), "--folder", str(folder)])

    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    trained = AutoModelForCausalLM.from_pretrained(runs.folder / "model", dtype=exported.dtype).eval()
    tokens = AutoTokenizer.from_pretrained(folder)("The boat is red. It was", return_tensors="pt")
    with torch.no_grad():
        before = trained(**tokens).logits
        weights = load(checkpoint)["state_dict"]
        trained.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
        assert torch.equal(exported(**tokens).logits, trained(**tokens).logits)
        assert not torch.equal(exported(**tokens).logits, before)

    message = refused(["export", "--config", str(config), "--folder", str(folder)])
    assert message.startswith("error: `folder` is ") and "not empty" in message


def test_manual_optimization_warning_is_off(runs: Runs) -> None:
    # A warning would be an error here.
    runs("fit", "--trainer.max_steps", 2, "--checkpoint.every_n_train_steps", 1, "--checkpoint.monitor", "null")


def test_two_ranks_end_with_the_same_weights(runs: Runs) -> None:
    (runs.folder / "fingerprint.py").write_text(
        "import hashlib, pathlib, torch\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Fingerprint(Callback):\n"
        "    def __init__(self, folder: str):\n"
        "        self.folder = folder\n"
        "    def on_train_end(self, trainer, pl_module):\n"
        "        weights = b''.join(p.detach().float().numpy().tobytes() for p in pl_module.parameters())\n"
        "        text = f'{trainer.world_size} {trainer.global_step} {hashlib.sha256(weights).hexdigest()}'\n"
        "        (pathlib.Path(self.folder) / f'rank_{trainer.global_rank}.txt').write_text(text)\n"
    )
    (runs.folder / "fingerprint.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: fingerprint.Fingerprint\n"
        f"      init_args:\n        folder: {runs.folder}\n"
    )
    arguments = runs.arguments(
        "fit", "--config", CONFIGS / "strategies/ddp_cpu.yaml", "--config", runs.folder / "fingerprint.yaml"
    )
    # The last callback of the list is another one now, so its learning rate stays out of the command.
    at = arguments.index(LR)
    del arguments[at : at + 2]
    method = runs.folder / "method.yaml"
    method.write_text((CONFIGS / "methods/mezo.yaml").read_text().replace("lr: 2.0e-6", "lr: 0.1"))
    arguments[arguments.index(str(CONFIGS / "methods/mezo.yaml"))] = str(method)

    command = Path(sysconfig.get_path("scripts")) / "zolightning"
    environment = dict(os.environ) | {"PYTHONPATH": str(runs.folder), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([command, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]

    first, second = ((runs.folder / f"rank_{rank}.txt").read_text() for rank in (0, 1))
    assert first.startswith("2 6 ")
    assert first == second
    assert result.stdout.count("before training") == 1
    for noise in ("litlogger", "LeafSpec", "many workers", "Traceback"):
        assert noise not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer.strategy", "fsdp"), "`trainer.strategy` is 'fsdp'"),
        (("--trainer.strategy", "deepspeed_stage_3"), "`trainer.strategy` is 'deepspeed_stage_3'"),
        (("--trainer.precision", "16-mixed"), "`trainer.precision` is '16-mixed'"),
        (("--trainer.accumulate_grad_batches", "2"), "`trainer.accumulate_grad_batches` is 2"),
        (("--trainer.gradient_clip_val", "1.0"), "`trainer.gradient_clip_val` is 1.0"),
        (("--data.init_args.task", "sst3"), "`data.task` must be one of agnews, "),
        (("--data.init_args.path", "no/such/folder"), "`data.path` must be a folder of JSON lines"),
        (("--data.init_args.batch_size", "0"), "`data.batch_size` must be at least 1, got 0"),
        (("--model.init_args.model_name", "./no-model"), "`model_name` './no-model' is a path, but nothing is there"),
        ((LR, "-1"), "`lr` must be a positive number, got -1.0"),
        (("--ckpt_path", "no.ckpt"), "`ckpt_path` is no.ckpt, which is not a file"),
    ],
)
def test_wrong_settings_take_one_line(runs: Runs, options: tuple[str, str], message: str) -> None:
    with redirect_stdout(io.StringIO()) as output:
        error = refused(runs.arguments("fit", *options))
    assert error.startswith("error: " + message)
    assert "\n" not in error
    assert "before training" not in output.getvalue()  # not after minutes of validation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "no-config.yaml"), "File does not exist"),
        (("--data.init_args.bogus", "1"), "Option 'bogus' is not accepted"),
        (("--trainer.max_steps", "many"), "trainer.max_steps"),
        (("--nothing", "1"), "nothing"),
    ],
)
def test_wrong_options_exit_with_the_parsers_message(
    runs: Runs, options: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(runs.arguments("fit", *options))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) < 15


def test_bugs_keep_their_traceback(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs.folder / "broken.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Broken(Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        raise ValueError('a bug of the user')\n"
    )
    (runs.folder / "broken.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: broken.Broken\n")
    monkeypatch.syspath_prepend(runs.folder)
    arguments = runs.arguments("fit", "--config", runs.folder / "broken.yaml", "--validate_first", "false")
    at = arguments.index(LR)
    del arguments[at : at + 2]
    with pytest.raises(ValueError, match="a bug of the user"):
        printed(arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["Fine-tunes language models by forward passes only.", "fit", "export"]),
        (["fit", "--help"], ["usage: zolightning fit --config", "--validate_first", "--test_last", "val/accuracy"]),
        (["fit", "--model.help", "CausalLM"], ["--model.model_name", "GGUF"]),
        (["fit", "--data.help", "PromptDataModule"], ["--data.task", "train.jsonl"]),
        (["export", "--help"], ["--folder", "--ckpt_path"]),
    ],
)
def test_help(arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for part in expected:
        assert part in text


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def latest(runs: Runs) -> int:
    return max(int(path.name.removeprefix("version_")) for path in runs.version(0).parent.iterdir())


def refused(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, str)  # printed to stderr, exit status 1
    return exit_.value.code


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
