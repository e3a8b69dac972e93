"""A checkpoint in the middle of a subspace's interval takes no second copy of the weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zolightning.bench.measure import reset_peak

# 96 MiB of weights. Lightning's own way of writing holds them folded, and the file twice: 390 MiB more.
SCRIPT = """
import sys
from functools import partial

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from zolightning.bench.measure import peak_bytes, reset_peak
from zolightning.callbacks import SaveLast, SubspaceResampling, ZerothOrder
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.optim import LOZO

torch.set_num_threads(1)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


save = SaveLast._save


def measured(self, trainer, *args):  # no callback: with one of others updates would be folded at every step
    reset_peak()
    before = peak_bytes()
    save(self, trainer, *args)
    print((peak_bytes() - before) / 2**20, flush=True)


SaveLast._save = measured
trainer = L.Trainer(
    max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[ZerothOrder(partial(LOZO, lr=1e-3)), SubspaceResampling(interval=100), SaveLast(sys.argv[1])],
    plugins=[AtomicCheckpointIO()],
)
trainer.fit(Module(), DataLoader(TensorDataset(torch.ones(64, 1024)), batch_size=16))
"""


@pytest.mark.slow
def test_peak_memory_of_a_checkpoint_in_mid_interval(tmp_path: Path) -> None:
    if not reset_peak():
        pytest.skip("this system cannot reset a process's peak memory")
    # Larger tensors in pages of their own: glibc would leave holes of those that were freed, in one run of two.
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True, mmap=True)
    state = checkpoint["optimizer_states"][0]["state"]
    assert all("core" in entries for entries in state.values()), "updates were not pending"
    assert not torch.equal(state[0]["base"], checkpoint["state_dict"]["net.0.weight"])
    assert float(result.stdout.split()[-1]) < 48, "half of the weights"
