"""``zolightning export`` of a run that trained adapters."""

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli_runs import Runs
from zolightning.network.adapters import merge_adapter

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


def test_export_writes_the_adapter_of_the_checkpoint(runs: Runs) -> None:
    scope = ("--scope", "TrainLayers", "--scope.layers", "[1]", "--scope.part", "LoRA", "--scope.part.rank", 2)
    runs("fit", *scope, "--validate_first", "false", "--trainer.max_steps", 2, "--trainer.val_check_interval", 2)
    (checkpoint,) = runs.folder.glob("logs/*/version_0/checkpoints/last.ckpt")

    folder = runs.folder / "exported"
    runs("export", "--ckpt_path", checkpoint, "--folder", folder)

    assert (folder / "adapter_config.json").is_file()
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    expected = {name.split("layers.1.")[1].replace(".default", ""): w for name, w in trained.items() if "lora" in name}
    written = {name.split("layers.1.")[1]: w for name, w in load_file(folder / "adapter_model.safetensors").items()}
    assert written.keys() == expected.keys() and len(expected) > 0
    for name, weight in expected.items():
        assert torch.equal(written[name], weight)

    merged = runs.folder / "merged"
    runs("export", "--ckpt_path", checkpoint, "--folder", merged, "--merge", "true")
    assert ModelCard.load(merged / "README.md").data.library_name == "transformers"
    whole, base = (load_file(path / "model.safetensors") for path in (merged, runs.folder / "model"))
    for exported in (folder, merged):  # others may read all that is in it, if they may read new files
        assert len({path.stat().st_mode for path in exported.iterdir()}) == 1
    name = "model.layers.1.self_attn.q_proj"
    first, second = (trained[f"model.{name}.lora_{letter}.default.weight"].float() for letter in "AB")
    scaled = 16 / 2 * second @ first
    assert scaled.any()
    found = {name: weight.float() for name, weight in whole.items()}
    before = {name: weight.to(whole[name].dtype).float() for name, weight in base.items()}
    torch.testing.assert_close(found[f"{name}.weight"], before[f"{name}.weight"] + scaled, atol=1e-3, rtol=8e-3)
    kept = {name for name, weight in before.items() if torch.equal(found[name], weight)}
    assert {name.split("layers.1.")[-1] for name in base.keys() - kept} == {
        f"{module.split('.lora')[0]}.weight" for module in expected
    }
    with pytest.raises(ValueError, match="`merge` is for LoRA adapters, but the model has none"):
        merge_adapter(AutoModelForCausalLM.from_pretrained(merged))
