"""Two ranks choose the same, and train it to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zolightning

# Run as a program by both ranks, and by one. The ranks see different batches; they calibrate on the same prompts.
SCRIPT = """
import sys
from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from zolightning.callbacks import DominantLayer, ZerothOrder
from zolightning.optim import MeZO
from zolightning.scopes.parts import LoRA, OutlierChannels

folder, ranks = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.3, pad_token_id=1,
)
prompts = torch.randint(2, 50, (24, 6), generator=torch.Generator().manual_seed(1))


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.net = LlamaForCausalLM(config)
        with torch.no_grad():
            self.net.model.layers[1].mlp.down_proj.weight[0].mul_(1e4)

    def training_step(self, batch, batch_idx):
        return self.net(batch, labels=batch).loss

    def configure_optimizers(self):
        return None  # of its own: all parameters train


for name, part in (("channels", OutlierChannels(0.1)), ("lora", LoRA(4))):
    module = Module()
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        callbacks=[DominantLayer(part, num_prompts=5), ZerothOrder(partial(MeZO, lr=1e-3))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(prompts, batch_size=4 // ranks, shuffle=False))
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    left = {"weights": module.state_dict(), "scope": checkpoint["scope"]}
    torch.save(left, f"{folder}/{name}-{trainer.global_rank}-of-{ranks}.pt")
"""


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    started_by_lightning = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"}
    environment = {name: value for name, value in os.environ.items() if name not in started_by_lightning}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(zolightning.__file__).parents[1])}
    for ranks in (2, 1):
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(ranks)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]

    for name in ("channels", "lora"):
        first, second, alone = (
            torch.load(tmp_path / f"{name}-{which}.pt", weights_only=True) for which in ("0-of-2", "1-of-2", "0-of-1")
        )
        assert first["scope"]["layers"] == [1]
        assert repr(first["scope"]) == repr(second["scope"]) == repr(alone["scope"])
        for parameter, weight in first["weights"].items():
            assert torch.equal(weight, second["weights"][parameter]), parameter
            torch.testing.assert_close(weight, alone["weights"][parameter], rtol=1e-3, atol=1e-3)
