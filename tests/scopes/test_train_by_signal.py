"""What blocks promise, measured by forwards, against autograd; and the scope that goes by it."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from training import Save, moved, num_trained, zeroth_order
from zolightning.directions.slices import Slice
from zolightning.scopes import TrainBySignal, train_by_signal
from zolightning.scopes.parts import OutlierChannels
from zolightning.scopes.signal import BlockSignal, measure_signal

SLOPES, CURVATURES = (3.0, 1.0, 0.0), (10.0, 0.5, 2.0)  # ratios of 0.9, 2 and 0


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))


class Layers(L.LightningModule):
    """A quadratic in the weights of three layers; a batch adds its mean to every gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in SLOPES])

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for layer, slope, curvature in zip(self.layers, SLOPES, CURVATURES, strict=True):
            loss = loss + ((slope + batch.mean(0)) * layer.weight).sum() + curvature * layer.weight.square().sum() / 2
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def examples() -> DataLoader:
    """Batches whose gradients differ by three times the slope of the second layer, and are right on average."""
    return DataLoader(3 * torch.randn(8, 50, dtype=torch.float64), batch_size=1)


def test_estimates_agree_with_autograd(examples: DataLoader) -> None:
    module, batches = Layers(), list(examples)[:3]
    blocks = {f"layer {index}": {layer.weight: None} for index, layer in enumerate(module.layers)}
    blocks["layer 1"][module.layers[1].weight] = Slice(0, torch.arange(7, 40))
    module.layers[0].weight.requires_grad_(False)
    losses = [partial(module.training_step, batch) for batch in batches]
    found = measure_signal(module, blocks, losses, num_queries=100, eps=1e-2, seed=1)

    assert [layer.weight.requires_grad for layer in module.layers] == [False, True, True]
    module.layers[0].weight.requires_grad_(True)
    for index, (signal, layer) in enumerate(zip(found, module.layers, strict=True)):
        part = range(7, 40) if index == 1 else range(50)
        grads = torch.stack([torch.autograd.grad(loss(), layer.weight)[0][part] for loss in losses])
        pairs = [one @ other for i, one in enumerate(grads) for j, other in enumerate(grads) if i != j]
        assert abs(signal.squared_grad - sum(pairs).item() / len(pairs)) < 5 * signal.squared_grad_error
        (gradient,) = torch.autograd.grad(losses[0](), layer.weight, create_graph=True)
        trace = sum(torch.autograd.grad(gradient[i], layer.weight, retain_graph=True)[0][i] for i in part)
        assert abs(signal.curvature - trace.item()) < 5 * signal.curvature_error
        assert signal.size == len(part) and not layer.weight.any()
        assert signal.least_curvature == 2 * sorted(signal.curvature_error for signal in found)[1]
    # Squares would count the batches' noise, which is as large in the layer without a slope.
    assert abs(found[2].squared_grad) < 200 < grads.square().sum().item() / len(grads)


def test_a_curvature_that_noise_makes_small_is_no_flatness() -> None:
    flat = BlockSignal("flat", 1, 1.0, 0.1, -30.0, 1.0, least_curvature=20.0)
    steep = BlockSignal("steep", 1, 4.0, 0.1, 40.0, 1.0, least_curvature=20.0)
    linear = BlockSignal("linear", 1, 4.0, 0.1, 0.0, 0.0, least_curvature=0.0)
    assert (flat.ratio, steep.ratio, linear.ratio) == (0.05, 0.1, 0.0)


@pytest.mark.parametrize(
    "settings", [{}, {"patterns": ["layers.2", "layers.1", "layers.0"]}], ids=["layers", "patterns"]
)
def test_the_block_of_the_largest_ratio_trains(settings: Any, make_trainer: Any, examples: DataLoader) -> None:
    examples.dataset.div_(3)
    module = Layers()
    scope = TrainBySignal(num_queries=16, num_prompts=8, **settings)
    trainer = make_trainer(max_steps=2, callbacks=[scope, zeroth_order()], precision="64-true")
    trainer.fit(module, examples)
    looks = 3 * 8 * (2 * 16 + 1)  # of three blocks, on eight batches of one example
    assert trainer.optimizers[0].param_groups[0]["forward_passes"] == looks + 2 * 2
    assert [bool(layer.weight.any()) for layer in module.layers] == [False, True, False]
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_channels_of_a_layer(make_module: Any, make_loader: Any, make_trainer: Any) -> None:
    module = make_module("llama")
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    scope = TrainBySignal(2, OutlierChannels(0.1), num_queries=2, num_prompts=6)
    trainer = make_trainer(max_steps=2, callbacks=[scope, zeroth_order()])
    trainer.fit(module, make_loader())
    counts = moved(before, module)
    assert num_trained(trainer) == 2 * 3 * 5 * 16  # five of 48 channels in three maps of two layers
    assert all(0 < count <= 5 * 16 for count in counts.values()) and len(counts) == 6
    assert len({name.split(".mlp")[0] for name in counts}) == 2
    assert all(isinstance(part, Slice) for part in trainer.optimizers[0].slices.values())


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
def test_a_resumed_run_does_not_look_again(
    make_trainer: Any, examples: DataLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(ckpt_path: Path | None = None) -> tuple[L.LightningModule, int]:
        module = Layers()
        callbacks = [TrainBySignal(num_queries=16, num_prompts=2), zeroth_order(), Save(4, tmp_path / "four.ckpt")]
        trainer = make_trainer(max_steps=8, callbacks=callbacks, precision="64-true")
        trainer.fit(module, StatefulDataLoader(examples.dataset, batch_size=1), ckpt_path=ckpt_path)
        return module, trainer.optimizers[0].param_groups[0]["forward_passes"]

    whole, forwards = fit()

    def look(*_: Any, **__: Any) -> None:
        raise AssertionError("looked again")

    monkeypatch.setattr(train_by_signal, "measure_signal", look)
    resumed, of_both = fit(tmp_path / "four.ckpt")
    assert of_both == forwards
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_refusals(make_trainer: Any, examples: DataLoader) -> None:
    def fit(scope: TrainBySignal) -> None:
        make_trainer(max_steps=1, callbacks=[scope, zeroth_order()], precision="64-true").fit(Layers(), examples)

    with pytest.raises(ValueError, match="`num_prompts` is 1, which is one batch"):
        fit(TrainBySignal(num_prompts=1))
    with pytest.raises(ValueError, match="`num_blocks` must be at most 3, the number of blocks, got 4"):
        fit(TrainBySignal(num_blocks=4))
    with pytest.raises(ValueError, match="give one of them"):
        TrainBySignal(part=OutlierChannels(), patterns=["mlp"])
    with pytest.raises(ValueError, match="`num_queries` must be an integer, at least 2, got 1"):
        TrainBySignal(num_queries=1)
