"""A pytest plugin: an emulated CUDA device, on which the tests with the marker `gpu` run where there is none.

It is for the CPU build of PyTorch, whose dispatcher has CUDA's keys and nothing behind them. ``device.cpp`` makes a
device whose memory is the host's, ``operations.cpp`` has the CPU's kernels in CUDA's place, ``torch_cuda.py`` what
Python asks of ``torch.cuda``, ``collectives.cpp`` and ``distributed.py`` put gloo in NCCL's, and ``loops.py`` this
project's loops in C in that of those in Triton.

As a real device does, it refuses operations on tensors of two devices, returns fresh memory that is not zero, raises
where the host waits for it if the debug mode of ``torch.cuda`` says so, records graphs and replays them in the same
memory, and counts what is allocated. The CPU computes everything, so that results have the bits of a run without it.
It knows nothing of speed, races, cuBLAS's rounding and Triton's compiler: those take a card.
"""

import os
from pathlib import Path

import torch
from torch.utils import cpp_extension

if torch.version.cuda is not None:
    raise RuntimeError(f"the emulated device needs a CPU build of PyTorch, found {torch.__version__}")

FOLDER = Path(__file__).parent
BUILD = FOLDER / "build"
BUILD.mkdir(exist_ok=True)
DEVICES = int(os.environ.get("EMULATED_DEVICES", "1"))

device = cpp_extension.load(
    "emulated_cuda_device",
    [str(FOLDER / name) for name in ("device.cpp", "operations.cpp", "collectives.cpp")],
    extra_cflags=["-O1", "-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO"],
    build_directory=str(BUILD),
)
device.set_device_count(DEVICES)

from emulated_cuda import distributed, loops, torch_cuda  # noqa: E402

torch_cuda.install(device, DEVICES)
distributed.install(device)
loops.install(device)
