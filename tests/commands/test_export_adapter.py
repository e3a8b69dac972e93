"""``zolightning export`` of a run that trained adapters."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_export_writes_the_adapter_of_the_checkpoint(command_line: Any) -> None:
    scope = command_line.folder / "scope.yaml"
    scope.write_text(
        "trainer:\n  callbacks+:\n    - class_path: zolightning.callbacks.TrainLayers\n      init_args:\n"
        "        layers: [1]\n        part:\n          class_path: zolightning.scopes.LoRA\n"
        "          init_args:\n            rank: 2\n"
    )
    options = {"--trainer.max_steps": 2, "--trainer.val_check_interval": 2, "--trainer.log_every_n_steps": 1}
    flat = [part for option in options.items() for part in option]
    command_line("fit", "--config", scope, "--validate_first", "false", *flat)
    (checkpoint,) = command_line.folder.glob("logs/*/version_0/checkpoints/last.ckpt")

    folder = command_line.folder / "exported"
    command_line("export", "--ckpt_path", checkpoint, "--folder", folder)

    assert (folder / "adapter_config.json").is_file()
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    expected = {name.split("layers.1.")[1].replace(".default", ""): w for name, w in trained.items() if "lora" in name}
    written = {name.split("layers.1.")[1]: w for name, w in load_file(folder / "adapter_model.safetensors").items()}
    assert written.keys() == expected.keys() and len(expected) > 0
    for name, weight in expected.items():
        assert torch.equal(written[name], weight)
