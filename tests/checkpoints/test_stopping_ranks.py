"""Two ranks stop after the same step, whichever of them is told to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zolightning

SCRIPT = """
import os, signal, sys
from functools import partial

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from zolightning.callbacks import SaveLast, ZerothOrder
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.optim import MeZO

folder = sys.argv[1]
torch.set_num_threads(1)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if self.global_step == 3 and self.trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


trainer = L.Trainer(
    max_steps=50, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[ZerothOrder(partial(MeZO, lr=1e-2)), SaveLast(folder)],
    plugins=[AtomicCheckpointIO()],
)
try:
    trainer.fit(Module(), DataLoader(TensorDataset(torch.ones(80, 4)), batch_size=4))
finally:
    with open(f"{folder}/rank_{trainer.global_rank}", "w") as file:
        file.write(str(trainer.global_step))
"""


@pytest.mark.slow
def test_two_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    started_by_lightning = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"}
    environment = {name: value for name, value in os.environ.items() if name not in started_by_lightning}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(zolightning.__file__).parents[1])}
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 143, result.stderr
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    assert result.stderr.count("Stopped by SIGTERM") == 1
