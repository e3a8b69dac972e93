"""``zolightning replay`` makes the model of a run again from its base model and its ledger."""

import re
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from cli_runs import Runs, printed, refused
from zolightning.callbacks import ZerothOrder
from zolightning.checkpoints.ledger import Ledger
from zolightning.commands.trainer import Trainer
from zolightning.optim import MeZO

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


def test_a_run_is_replayed_from_its_folder(runs: Runs) -> None:
    """One that trained an adapter, in subspaces and half precision; by its config.yaml and its ledger."""
    options = {
        **{"--scope": "TrainLayers", "--scope.layers": "[1]", "--scope.part": "LoRA", "--scope.part.rank": 4},
        **{"--method": "SubZero", "--method.lr": 0.1, "--method.rank": 2, "--resampling.interval": 2},
        **{"--trainer.max_steps": 4, "--validate_first": "false", "--trainer.precision": "bf16-true"},
    }
    output = runs("fit", *(word for option in options.items() for word in option))
    config, ledger = runs.version(0) / "config.yaml", runs.version(0) / "ledger.bin"
    assert f"replay:       zolightning replay --config {config} --ledger {ledger} --output NEW_FOLDER\n" in output
    assert len(Ledger(ledger)) == 4 and Ledger(ledger).entry_size == 53

    words = ["replay", "--config", str(config), "--ledger", str(ledger), "--output"]
    said = printed([*words, str(runs.folder / "replayed")])
    assert re.match(r"replayed 4 steps in .* s, equal to the last bit to the weights the run ended with: ", said)
    trained = torch.load(runs.version(0) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    expected = {name.split("layers.1.")[1].replace(".default", ""): w for name, w in trained.items() if "lora" in name}
    replayed = load_file(runs.folder / "replayed/adapter_model.safetensors")
    assert len(replayed) == len(expected) > 0
    for name, weight in replayed.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name.split("layers.1.")[1]]), name

    seen = printed([*words[:-1], "--follow"]).splitlines()
    assert re.match(r"step 4: val/accuracy \d\.\d+, .*val/loss \d\.\d+$", seen[0]) and len(seen) == 2
    assert seen[1] == "the run ended after 4 steps" and not runs.version(1).exists()

    message = refused([*words, str(runs.folder / "new"), "--seed_everything", "1"])  # of the adapter's first values
    assert message.startswith(f"error: The ledger {ledger} begins with different weights: use the base model and ")
    assert not (runs.folder / "new").exists()


def test_a_run_along_the_massive_direction_is_replayed(runs: Runs) -> None:
    """Its direction was found on calibration prompts, and is in the ledger."""
    options = {
        **{"--scope": "DominantLayer", "--scope.layer": 1, "--scope.part": "MassiveDirection", "--method": "MeZO"},
        **{
            "--method.lr": 0.1,
            "--trainer.max_steps": 2,
            "--validate_first": "false",
            "--trainer.precision": "bf16-true",
        },
    }
    runs("fit", *(word for option in options.items() for word in option))
    config, ledger = runs.version(0) / "config.yaml", runs.version(0) / "ledger.bin"
    said = printed(["replay", "--config", str(config), "--ledger", str(ledger), "--output", str(runs.folder / "new")])
    assert re.match(r"replayed 2 steps in .* s, equal to the last bit to the weights the run ended with: ", said)
    trained = torch.load(runs.version(0) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    expected = {side: weight for name, weight in trained.items() for side in ("lora_A", "lora_B") if side in name}
    replayed = load_file(runs.folder / "new/adapter_model.safetensors")
    assert len(replayed) == len(expected) == 2
    assert all(torch.equal(weight, expected[re.search("lora_.", name)[0]]) for name, weight in replayed.items())


def replay_to(output: str, callbacks: Sequence[Callback] = (ZerothOrder(MeZO),)) -> None:
    Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks)).replay(
        L.LightningModule(), "ledger.bin", output
    )


class TestRefused:
    """Before the ledger is read."""

    def test_a_folder_with_something_in_it(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"`output` is .*, which is not empty"):
            replay_to(str(tmp_path))

    @pytest.mark.parametrize("folder", ["/proc/x", __file__])
    def test_a_folder_that_cannot_be(self, folder: str) -> None:
        with pytest.raises(ValueError, match=r"`output` is .*, (where no file can be written|which is not empty)"):
            replay_to(folder)

    def test_no_method(self, tmp_path: Path) -> None:
        with pytest.raises(MisconfigurationException, match="`method` is null"):
            replay_to(str(tmp_path), [])

    def test_a_module_that_cannot_be_exported(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="LightningModule has no `export` method"):
            replay_to(str(tmp_path))
