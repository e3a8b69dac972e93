"""Scopes under a real Trainer: what trains and nothing else, what is said, and what is as before afterwards."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from training import moved, num_trained, sizes, weights, zeroth_order
from zolightning.callbacks import DominantLayer, TrainLayers, TrainParameters
from zolightning.optim import MeZO, MeZOAdam
from zolightning.scopes.parts import MLP, OutlierChannels, WithoutOutlierChannels
from zolightning.scopes.scope import Scope

HIDDEN, WIDTH, CHANNELS = 16, 48, 5  # of 48 channels, 5 are the tenth
TENTH = 0.1


def channels(prefix: str, count: int) -> dict[str, int]:
    return {f"{prefix}.mlp.{name}_proj.weight": count * HIDDEN for name in ("gate", "up", "down")}


LAYER = "network.model.layers.{}"

SCOPES: dict[str, tuple[Callable[[], Scope], Callable[[L.LightningModule], dict[str, int]]]] = {
    "dominant": (DominantLayer, lambda m: sizes(m, LAYER.format(2))),
    "dominant and others": (
        lambda: DominantLayer(extra_layers=[4, 2]),
        lambda m: sizes(m, LAYER.format(2)) | sizes(m, LAYER.format(4)),
    ),
    "given layers": (
        lambda: DominantLayer(layer=0, extra_layers=[4]),
        lambda m: sizes(m, LAYER.format(0)) | sizes(m, LAYER.format(4)),
    ),
    "dominant MLP": (lambda: DominantLayer(MLP()), lambda m: sizes(m, LAYER.format("2.mlp"))),
    "dominant channels": (
        lambda: DominantLayer(OutlierChannels(TENTH)),
        lambda m: channels(LAYER.format(2), CHANNELS),
    ),
    "dominant without channels": (
        lambda: DominantLayer(WithoutOutlierChannels(TENTH)),
        lambda m: sizes(m, LAYER.format(2)) | channels(LAYER.format(2), WIDTH - CHANNELS),
    ),
    "dominant MLP without channels": (
        lambda: DominantLayer(WithoutOutlierChannels(TENTH, MLP())),
        lambda m: channels(LAYER.format(2), WIDTH - CHANNELS),
    ),
    "layers": (lambda: TrainLayers([5, 0]), lambda m: sizes(m, LAYER.format(0)) | sizes(m, LAYER.format(5))),
    "all layers": (lambda: TrainLayers("all"), lambda m: sizes(m, "network.model.layers")),
    "parameters": (
        lambda: TrainParameters([r"layers\.[13]\..*q_proj", "embed"]),
        lambda m: (
            sizes(m, LAYER.format("1.self_attn.q_proj"))
            | sizes(m, LAYER.format("3.self_attn.q_proj"))
            | sizes(m, "network.model.embed_tokens")
        ),
    ),
}
SLICED = {name for name in SCOPES if "channels" in name}


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("method", [partial(MeZO, lr=1e-2), partial(MeZOAdam, lr=1e-2)], ids=["mezo", "adam"])
def test_zeroth_order_moves_what_is_in_scope_and_nothing_else(
    name: str, method: Any, make_module: Callable[..., Any], fit: Callable[..., L.Trainer]
) -> None:
    make, expected = SCOPES[name]
    module = make_module("llama", outlier=2)
    before = weights(module)
    trainer = fit(module, make(), zeroth_order(method))
    counts, wanted = moved(before, module), expected(module)
    assert counts.keys() == wanted.keys()
    for parameter, count in wanted.items():
        # an update may be too small for the largest numbers, the planted one among them
        assert 0.9 * count <= counts[parameter] <= count
    assert num_trained(trainer) == sum(wanted.values())


@pytest.mark.parametrize("name", sorted(SCOPES.keys() - SLICED))
def test_backpropagation_respects_whole_parameters(
    name: str, make_module: Callable[..., Any], fit: Callable[..., L.Trainer]
) -> None:
    make, expected = SCOPES[name]
    module = make_module("llama", outlier=2)
    before = weights(module)
    fit(module, make())
    assert moved(before, module).keys() == expected(module).keys()


@pytest.mark.parametrize("name", sorted(SLICED))
def test_backpropagation_cannot_train_slices(
    name: str, make_module: Callable[..., Any], fit: Callable[..., L.Trainer]
) -> None:
    module = make_module("llama", outlier=2)
    with pytest.raises(
        MisconfigurationException, match=r"DominantLayer chose slices.*OutlierChannels.*SGD trains whole"
    ):
        fit(module, SCOPES[name][0]())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_same_channels_train_as_are_measured(
    make_module: Callable[..., Any], fit: Callable[..., L.Trainer]
) -> None:
    module, twin = make_module("llama", outlier=2), make_module("llama", outlier=2)
    before = weights(module)
    fit(module, DominantLayer(OutlierChannels(TENTH)), zeroth_order())
    fit(twin, DominantLayer(WithoutOutlierChannels(TENTH)), zeroth_order())
    for (name, one), two in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert not ((one != before[name]) & (two != before[name])).any()


def test_a_run_repeats_itself(make_module: Callable[..., Any], fit: Callable[..., L.Trainer]) -> None:
    """Also with the callbacks in the other order."""
    runs = []
    for order in (1, 1, -1):
        module = make_module("llama", outlier=2)
        fit(module, *[DominantLayer(OutlierChannels(TENTH)), zeroth_order()][::order])
        runs.append(weights(module))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in other)


def test_flags_come_back_and_frozen_stays_frozen(
    make_module: Callable[..., Any], fit: Callable[..., L.Trainer]
) -> None:
    module = make_module("llama", outlier=2)
    frozen = LAYER.format("2.mlp.up_proj.weight")
    module.get_parameter(frozen).requires_grad_(False)
    before, flags = weights(module), [parameter.requires_grad for parameter in module.parameters()]

    fit(module, DominantLayer(), zeroth_order())
    assert moved(before, module).keys() == sizes(module, LAYER.format(2)).keys() - {frozen}
    assert [parameter.requires_grad for parameter in module.parameters()] == flags

    class Stop(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(module, DominantLayer(), zeroth_order(), Stop())
    assert [parameter.requires_grad for parameter in module.parameters()] == flags

    for parameter in module.network.model.layers[2].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(
        MisconfigurationException, match=r"DominantLayer chose .*layer 2 of 6.* all parameters are frozen"
    ):
        fit(module, DominantLayer(), zeroth_order())


def test_one_scope_after_the_other(make_module: Callable[..., Any], fit: Callable[..., L.Trainer]) -> None:
    module = make_module()
    for index in (1, 4):
        before = weights(module)
        fit(module, TrainLayers([index]), zeroth_order())
        assert moved(before, module).keys() == sizes(module, LAYER.format(index)).keys()


def test_validation_chooses_nothing(
    make_module: Callable[..., Any], make_trainer: Callable[..., L.Trainer], make_loader: Callable[..., DataLoader]
) -> None:
    module = make_module()
    module.validation_step = lambda batch, batch_idx: None
    make_trainer(callbacks=[TrainLayers([99])]).validate(module, make_loader(), verbose=False)


def test_what_is_said(
    make_module: Callable[..., Any],
    fit: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[str] = []
    monkeypatch.setattr("zolightning.scopes.scope.rank_zero_info", messages.append)
    module = make_module("llama", outlier=2)
    logger = TensorBoardLogger(tmp_path, "run")
    fit(module, DominantLayer(OutlierChannels(TENTH)), zeroth_order(), logger=logger, log_every_n_steps=1)
    (said,) = messages
    total = sum(parameter.numel() for parameter in module.parameters())
    assert said == (
        "DominantLayer: OutlierChannels(fraction=0.1) of layer 2 of 6 (`network.model.layers`), layer 2 chosen by "
        "Both(one=Absolute(threshold=100.0), other=RatioToMedian(ratio=1000.0)); "
        f"{3 * HIDDEN * CHANNELS} of {total:,} parameters train ({100 * 240 / total:.3g} %)."
    )
    events = EventAccumulator(str(tmp_path / "run/version_0")).Reload()
    (event,) = events.Tensors("scope/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert said in text and "max/median" in text
    assert f"{LAYER.format(2)}.mlp.down_proj.weight, 5 entries along dimension 1" in text
