"""``zolightning profile``: what it prints and leaves behind, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli_runs import NAME, Runs
from zolightning.commands.event_log import event_files
from zolightning.commands.trainer import Trainer
from zolightning.scopes.activation_profile import ActivationProfile

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


@pytest.fixture
def planted(runs: Runs) -> Runs:
    """A model whose layer 1 has one weight that makes its outputs explode."""
    file = runs.folder / "model/model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e7
    save_file(weights, file, metadata={"format": "pt"})
    return runs


def images(folder: Path) -> set[str]:
    tags: set[str] = set()
    for file in event_files(folder):
        tags |= set(EventAccumulator(str(file)).Reload().Tags()["images"])
    return tags


def assert_plot(path: Path) -> None:
    with Image.open(path) as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 20  # not blank


def test_profile_finds_the_planted_layer_and_a_callback_reads_it(planted: Runs) -> None:
    output = planted("profile", "--num_prompts", 6, "--data.batch_size", 4)
    folder = planted.folder / "logs" / NAME / "profile"
    assert "DominantLayer selects layer 1" in output
    assert "Both(" in output and "): layer 1" in output
    assert str(folder) in output
    assert "2 forwards of" in output  # batches of 4

    profile = ActivationProfile.load(folder / "profile.json")
    assert profile.num_prompts == 12 and len(profile.layers) == 2  # two candidates a prompt, of several bytes
    assert profile.layers[1].channels[0] == 3
    assert profile.table() in output
    assert_plot(folder / "profile.png")
    assert images(folder) == {"profile"}
    assert not list((planted.folder / "logs" / NAME).glob("version_*"))

    scope = ("--scope", "DominantLayer", "--scope.profile", folder / "profile.json")
    planted("fit", *scope, "--trainer.max_steps", 1, "--trainer.val_check_interval", 1, "--validate_first", "false")
    (last,) = (planted.folder / "logs" / NAME).glob("version_0/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["scope"]["layers"] == [1]


def test_no_layer_stands_out(runs: Runs) -> None:
    output = runs("profile", "--num_prompts", 3)
    assert output.count("no layer") == 2
    assert "No layer stands out" in output


def test_sensitivity_and_step_times(runs: Runs) -> None:
    folder = runs.folder / "mine"
    options = ("--sensitivity_queries", 2, "--time_model", "true", "--output", folder, "--trainer.precision", "32-true")
    output = runs("profile", "--num_prompts", 4, *options)

    sensitivity = json.loads((folder / "sensitivity.json").read_text())
    assert (sensitivity["num_queries"], sensitivity["eps"], sensitivity["relative_error"]) == (2, 1e-3, 0.5)
    assert len(sensitivity["layers"]) == 2 and all(layer["rms"] > 0 for layer in sensitivity["layers"])
    assert "standard error of 50%" in output and "rounding" not in output

    times = json.loads((folder / "step_time.json").read_text())
    assert [step["scope"] for step in times["steps"]] == ["MLP of layer 0", "layer 0", "all layers", "whole model"]
    assert times["forward"] > 0 and times["model"]["forward"] > 0
    assert "gamma" in output and "R²" in output and "predicted_seconds" in output

    for name in ("profile", "sensitivity", "step_time"):
        assert_plot(folder / f"{name}.png")
    assert images(folder) == {"profile", "sensitivity", "step_time"}

    again = runs("profile", "--num_prompts", 4, *options[:2], *options[4:])
    assert json.loads((folder / "sensitivity.json").read_text()) == sensitivity
    assert "written to" in again

    half = runs("profile", *options[:2], "--trainer.precision", "bf16-true")
    assert "The layers are in bfloat16, where rounding" in half


def test_probes_of_layers(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the first layer is what a network of one layer gives."""
    monkeypatch.setattr("zolightning.commands.profile.CS", (0.001, 0.01))  # all would take seconds
    output = runs("profile", "--num_prompts", 4, "--probe_every", 1, "--output", tmp_path)
    probes = json.loads((tmp_path / "probes.json").read_text())["probes"]
    assert [probe["num_layers"] for probe in probes] == [1, 2]
    runs("profile", "--probe_every", 2, "--model.num_layers", 1, "--output", tmp_path / "alone")
    assert json.loads((tmp_path / "alone/probes.json").read_text())["probes"] == probes[:1]
    assert probes[0]["loss"] != probes[1]["loss"] and all(
        0 < probe["standard_error"] < probe["loss"] for probe in probes
    )
    best = min(probes, key=lambda probe: probe["loss"])["num_layers"]
    assert f"--model.num_layers {best} --linear_probing LinearProbing" in output
    assert_plot(tmp_path / "probes.png")


def test_profile_leaves_the_module_as_it_was(make_regression: Any, make_trainer: Any, tmp_path: Path) -> None:
    """A module that is no language model, frozen in part, in a Trainer without a logger."""
    from torch.utils.data import DataLoader, TensorDataset

    module: LightningModule = make_regression()
    module.net[0].weight.requires_grad_(False)
    module.train_dataloader = lambda: DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), batch_size=4)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="`layers_name` is 'nowhere'"):
        trainer.profile(module, layers_name="nowhere")
    assert not (tmp_path / "profile").exists()
    trainer.profile(module, layers_name=r"net\.\d", num_prompts=8)
    assert ActivationProfile.load(tmp_path / "profile/profile.json").num_prompts == 8
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
    assert module.training and not module._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_prompts", 0), "`num_prompts` must be an integer, at least 1, got 0"),
        (("--sensitivity_queries", -1), "`sensitivity_queries` must be an integer, at least 0, got -1"),
        (("--probe_every", -1), "`probe_every` must be an integer, at least 0, got -1"),
        (("--layers_name", "no.such.layers"), "`layers_name` is 'no.such.layers', which matches nothing"),
        (("--output", "{folder}/model/config.json/x"), "`output` is {folder}/model/config.json/x, where no file can"),
        (("--data.init_args.path", "{folder}"), "{folder}/train.jsonl, .csv or .parquet does not exist"),
    ],
)
def test_wrong_input_takes_one_line(runs: Runs, options: tuple[str, Any], message: str) -> None:
    folder = str(runs.folder)
    error = runs.refused("profile", *(str(option).format(folder=folder) for option in options))
    assert error.startswith("error: " + message.format(folder=folder))
