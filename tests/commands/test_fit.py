"""What ``zolightning fit`` leaves behind and says, and what other commands make of it."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli_runs import CONFIGS, NAME, Runs, parsed, printed, refused
from zolightning.commands.trainer import Trainer

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, write_tiny_model: Callable[..., Path], fresh_process: None
) -> tuple[Runs, str]:
    """A run of six steps that nobody interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    write_tiny_model(folder / "model")
    runs = Runs(folder)
    return runs, runs("fit", "--test_last", "true")


@pytest.mark.parametrize("subcommand", ["doctor", "profile", "sweep-layers"])
def test_other_commands_take_the_config_of_a_run(finished: tuple[Runs, str], subcommand: str) -> None:
    arguments = [subcommand, "--config", str(finished[0].version(0) / "config.yaml")]
    assert parsed(arguments)[subcommand].trainer.max_steps == 6


def test_fit_leaves_config_metrics_and_checkpoints(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    config = yaml.safe_load((runs.version(0) / "config.yaml").read_text())
    assert config["data"]["init_args"]["task"]["name"] == "sentiment"
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
    overview = runs.texts(0)["run/text_summary"]
    assert "activations " in overview and " MB at the peak" in overview and "not estimated" not in overview

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


def test_default_root_dir_moves_the_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = runs.arguments("fit", "--trainer.max_steps", 1, "--trainer.val_check_interval", 1)
    at = arguments.index("--trainer.logger.init_args.save_dir")
    del arguments[at : at + 2]
    monkeypatch.setenv("HOME", str(runs.folder))
    printed([*arguments, "--trainer.default_root_dir", "~/elsewhere"])
    (checkpoint,) = runs.folder.glob("elsewhere/*/version_0/checkpoints/last.ckpt")
    assert list(checkpoint.parent.parent.glob("events.*")) and not (runs.folder / "logs").exists()


def test_other_checkpoints_leave_the_last_and_the_best_where_they_are(runs: Runs) -> None:
    other = f"[{{class_path: ModelCheckpoint, init_args: {{dirpath: {runs.folder}/other, save_top_k: 0}}}}]"
    options = {"trainer.callbacks": other, "trainer.max_steps": 1, "trainer.val_check_interval": 1}
    output = runs("fit", "--validate_first=false", *(f"--{name}={value}" for name, value in options.items()))
    assert f"(logs/{NAME}/version_0/checkpoints/best-step=1.ckpt)" in output.replace(f"{runs.folder}/", "")
    assert (runs.version(0) / "checkpoints/last.ckpt").is_file() and not (runs.folder / "other").exists()


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
    of_file = runs.metrics(latest(runs))
    assert of_file["state"] == "tested" and of_file["checkpoint"] == str(best)
    assert of_file["test"] == {tag: pytest.approx(value) for tag, (value,) in tested.items()}


def test_predict_writes_a_line_an_example(
    finished: tuple[Runs, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, _ = finished
    predict = Mock(wraps=Trainer.predict)
    monkeypatch.setattr(Trainer, "predict", lambda *args, **options: predict(*args, **options))
    path = tmp_path / "made" / "predictions.jsonl"
    for _ in range(2):  # a second run replaces the file
        runs("predict", "--ckpt_path", runs.version(0) / "checkpoints/last.ckpt", "--predictions.path", path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 10
    for row in rows:
        assert row["prediction"] == row["scores"].index(max(row["scores"]))
    assert predict.call_args.kwargs["return_predictions"] is False, "nobody reads what a Trainer would keep of them"


def test_resumed_run_equals_uninterrupted_run(finished: tuple[Runs, str], runs: Runs) -> None:
    whole, _ = finished
    runs("fit", "--trainer.max_steps", 3)
    halfway = load(runs.version(0) / "checkpoints/last.ckpt")
    output = runs("fit", "--ckpt_path", runs.version(0) / "checkpoints/last.ckpt")
    assert "before training" not in output
    expected = load(whole.version(0) / "checkpoints/last.ckpt")
    found = load(runs.version(0) / "checkpoints/last.ckpt")
    assert halfway["global_step"] == 3 and found["global_step"] == 6
    assert_same(found["state_dict"], expected["state_dict"])
    (one,), (other,) = found["optimizer_states"], expected["optimizer_states"]
    assert one.pop("method") == other.pop("method")
    assert_same(one, other)
    with pytest.raises(AssertionError):
        assert_same(halfway["state_dict"], expected["state_dict"])
    for tag in ("train/loss", "zo/projected_grad", "val/accuracy"):
        assert runs.scalars(0)[tag] == whole.scalars(0)[tag]
    assert not runs.version(1).exists()


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
    message = refused(["export", "--config", str(config), "--folder", "/proc/x"])
    assert message.startswith("error: `folder` is /proc/x, where no file can be written: ")

    other = load(checkpoint)
    del other["state_dict"]["model.lm_head.weight"]
    torch.save(other, tmp_path / "other.ckpt")
    words = ["--config", str(config), "--ckpt_path", str(tmp_path / "other.ckpt"), "--folder", str(tmp_path / "new")]
    message = refused(["export", *words])
    assert message.startswith("error: `ckpt_path` is of another model: 1 weights") and "lm_head" in message
    assert not (tmp_path / "new").exists()


def test_manual_optimization_warning_is_off(runs: Runs) -> None:
    # A warning would be an error here.
    runs("fit", "--trainer.max_steps", 2, "--checkpoint.every_n_train_steps", 1, "--checkpoint.monitor", "null")


@pytest.mark.slow
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
    command = Path(sysconfig.get_path("scripts")) / "zolightning"
    path = os.pathsep.join([str(runs.folder), os.environ.get("PYTHONPATH", "")])
    environment = dict(os.environ) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([command, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]

    first, second = ((runs.folder / f"rank_{rank}.txt").read_text() for rank in (0, 1))
    assert first.startswith("2 6 ")
    assert first == second
    assert result.stdout.count("before training") == 1
    for noise in ("litlogger", "LeafSpec", "many workers", "Traceback"):
        assert noise not in result.stdout + result.stderr


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def latest(runs: Runs) -> int:
    return max(int(path.name.removeprefix("version_")) for path in runs.version(0).parent.iterdir())


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
