"""A step needs the memory of inference: one layer of scratch beside the weights, and the stated state."""

import os
import subprocess
import sys

import pytest

from zolightning.bench.measure import reset_peak

# In a process of its own: the peak of this one is that of all tests before. 24 layers of 4 MiB, so that a copy of
# the weights (96 MiB), or of a tenth of them, could not hide in 2 % of the whole.
SCRIPT = """
import torch
from torch import nn
from zolightning.bench.measure import peak_bytes, reset_peak
from zolightning.optim import MeZO

torch.set_num_threads(1)
net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))
inputs = torch.randn(16, 1024)
loss = lambda: net(inputs).square().mean()
optimizer = MeZO(net.parameters(), lr=1e-6)
with torch.no_grad():
    loss()
reset_peak()
with torch.no_grad():
    loss()
forward = peak_bytes()
optimizer.estimate(loss)
optimizer.step()
reset_peak()
for _ in range(3):
    optimizer.estimate(loss)
    optimizer.step()
print(peak_bytes() / forward, optimizer.state_bytes())
"""


def test_peak_memory_of_a_step_is_that_of_inference() -> None:
    if not reset_peak():
        pytest.skip("this system cannot reset a process's peak memory")
    # Freed memory goes back to the system at once; by default glibc keeps some of it, a different amount each time.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env).stdout
    ratio, state = output.split()[-2:]
    assert state == "0"
    assert float(ratio) <= 1.02
