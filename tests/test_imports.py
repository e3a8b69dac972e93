"""What importing the package loads, and that the methods work without the packages of the command line."""

import subprocess
import sys

import pytest

import zolightning
from zolightning.models import CausalLM
from zolightning.step import zeroth_order_step

# Those of pyproject.toml that Lightning and PyTorch do without.
OPTIONAL = [
    *("accelerate", "datasets", "gguf", "huggingface_hub", "jsonargparse", "matplotlib", "peft", "rich"),
    *("safetensors", "tensorboard", "transformers"),
]
LIGHTNING = ["lightning", "lightning_utilities", "pytorch_lightning", "torchmetrics", "jinja2", "yaml"]


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WITHOUT = f"""
import importlib.metadata, sys
absent, asked_for = set({OPTIONAL!r}), []

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            asked_for.append(name)
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

from_name = importlib.metadata.Distribution.from_name
def only_present(name):
    if name.replace("-", "_") in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)

sys.meta_path.insert(0, Absent())
importlib.metadata.Distribution.from_name = only_present

def loaded_since(before):
    assert not asked_for, asked_for
    return {{name.partition(".")[0] for name in set(sys.modules) - before}}
"""


TRAIN = """
from functools import partial
import lightning as L, torch
from torch.utils.data import DataLoader
from zolightning.callbacks import DominantLayer, SubspaceResampling, ZerothOrder
from zolightning.optim import SubZero
from zolightning.scopes import MLP

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
    def forward(self, x):
        return x + self.down(self.up(x).relu())

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
    def training_step(self, batch, batch_idx):
        for layer in self.layers:
            batch = layer(batch)
        return batch.square().mean()
    def configure_optimizers(self):
        pass

net = Net()
before = [parameter.clone() for parameter in net.layers[1].up.parameters()]
callbacks = [DominantLayer(MLP(), layer=1), ZerothOrder(partial(SubZero, lr=0.1, rank=2)), SubspaceResampling()]
trainer = L.Trainer(accelerator="cpu", max_steps=2, callbacks=callbacks, logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(net, DataLoader(torch.randn(8, 4), batch_size=4))
assert trainer.global_step == 2
assert not any(map(torch.equal, before, net.layers[1].up.parameters()))
"""


def test_callbacks_load_nothing_beside_lightning_and_train_a_module() -> None:
    run(
        WITHOUT
        + """
import lightning.pytorch
before = set(sys.modules)
asked_for.clear()
import zolightning.step, zolightning.callbacks, zolightning.scopes
assert loaded_since(before) <= {"zolightning", "lightning"}, loaded_since(before)
"""
        + TRAIN
    )


@pytest.mark.slow
def test_callbacks_train_a_module_without_the_modules_that_windows_lacks_and_saving_says_so() -> None:
    run(
        "import sys\nimport lightning.pytorch\nsys.modules.update(fcntl=None, resource=None)\n"
        + TRAIN
        + """
from tempfile import TemporaryDirectory
from zolightning.callbacks import KeepLedger, SaveLast
from zolightning.optim import MeZO
import zolightning.__main__  # so that it can refuse

for saving in (SaveLast, KeepLedger):
    with TemporaryDirectory() as folder:
        callbacks = [ZerothOrder(partial(MeZO, lr=0.1)), saving(folder)]
        trainer = L.Trainer(accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False)
        try:
            trainer.fit(Net(), DataLoader(torch.randn(8, 4), batch_size=4))
        except OSError as error:
            assert "on Linux and macOS only" in str(error) and trainer.global_step == 0, error
        else:
            raise AssertionError(saving)
"""
    )


def test_methods_load_pytorch_only_and_train_in_a_plain_loop() -> None:
    run(
        WITHOUT.replace("set([", f"set([*{LIGHTNING!r}, ")
        + """
import torch
before = set(sys.modules)
asked_for.clear()
import zolightning.optim, zolightning.directions, zolightning.evaluation
assert "zolightning" in loaded_since(before)
from zolightning.optim import MeZO
net = torch.nn.Linear(4, 1)
first = net.weight.clone()
optimizer = MeZO(net.parameters(), lr=0.1)
inputs = torch.randn(8, 4)
for _ in range(3):
    optimizer.estimate(lambda: net(inputs).square().mean())
    optimizer.step()
assert not torch.equal(first, net.weight)
"""
    )


def test_the_package_names_two_things() -> None:
    assert zolightning.CausalLM is CausalLM
    assert zolightning.zeroth_order_step is zeroth_order_step
    assert not hasattr(zolightning, "nothing")
