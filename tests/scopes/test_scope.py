"""Scopes under a real Trainer: what trains, what is said and saved, what comes back, and what is refused."""

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
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from zolightning.activation_profile import profile_activations
from zolightning.callbacks import DominantLayer, RandomLayer, TrainLayers, TrainParameters, ZerothOrder
from zolightning.callbacks.layer_scope import LayerScope
from zolightning.callbacks.scope import Scope
from zolightning.layers import find_layers
from zolightning.optim import MeZO, MeZOAdam
from zolightning.scopes import MLP, OutlierChannels, WithoutOutlierChannels
from zolightning.selection_rules import Absolute, Jump

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13

HIDDEN, WIDTH, CHANNELS = 16, 48, 5  # of 48 channels, 5 are the tenth
TENTH = 0.1


def zeroth_order(method: Callable[..., Any] | None = None) -> ZerothOrder:
    return ZerothOrder(method or partial(MeZO, lr=1e-2))


def weights(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(before: dict[str, Tensor], module: L.LightningModule) -> dict[str, int]:
    """How many numbers of each parameter are other ones than before; parameters without any are left out."""
    counts = {name: int((p != before[name]).sum()) for name, p in module.named_parameters()}
    return {name: count for name, count in counts.items() if count}


@pytest.fixture
def fit(make_trainer: Callable[..., L.Trainer], make_loader: Callable[..., DataLoader]) -> Callable[..., L.Trainer]:
    def run(module: L.LightningModule, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> L.Trainer:
        trainer = make_trainer(**{"max_steps": 3, "callbacks": list(callbacks)} | options)
        trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
        return trainer

    return run


def sizes(module: L.LightningModule, prefix: str) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in module.named_parameters() if name.startswith(prefix)}


def channels(prefix: str, count: int) -> dict[str, int]:
    return {f"{prefix}.mlp.{name}_proj.weight": count * HIDDEN for name in ("gate", "up", "down")}


LAYER = "network.model.layers.{}"

SCOPES: dict[str, tuple[Callable[[], Scope], Callable[[L.LightningModule], dict[str, int]]]] = {
    "dominant": (DominantLayer, lambda m: sizes(m, LAYER.format(2))),
    "dominant and others": (
        lambda: DominantLayer(extra_layers=[4, 2]),
        lambda m: sizes(m, LAYER.format(2)) | sizes(m, LAYER.format(4)),
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
    assert trainer.optimizers[0].num_trainable() == sum(wanted.values())


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


@pytest.mark.parametrize("outlier", [0, 1, 3, 5])
def test_dominant_layer_of_every_architecture(
    architecture: str, outlier: int, make_module: Callable[..., Any], fit: Callable[..., L.Trainer]
) -> None:
    module = make_module(architecture, outlier)
    stack = find_layers(module)
    before = weights(module)
    fit(module, DominantLayer(), zeroth_order(), max_steps=1)
    assert moved(before, module).keys() == stack.parameters(outlier).keys()


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


class Save(L.Callback):
    """Writes a checkpoint after the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("make", "make_later"),
    [
        (DominantLayer, DominantLayer),
        (partial(DominantLayer, OutlierChannels(TENTH)), partial(DominantLayer, OutlierChannels(TENTH))),
        (partial(DominantLayer, WithoutOutlierChannels(TENTH)), partial(TrainLayers, [4], OutlierChannels(0.5))),
        (DominantLayer, partial(TrainLayers, "all")),
        (partial(RandomLayer, seed=1), partial(RandomLayer, seed=2)),
        (partial(TrainParameters, ["q_proj"]), partial(TrainParameters, ["v_proj"])),
    ],
)
@pytest.mark.parametrize("method", [partial(MeZO, lr=1e-2, momentum=0.9), partial(MeZOAdam, lr=1e-2)])
def test_resuming_goes_on_with_what_was_chosen(
    make: Any, make_later: Any, method: Any, make_module: Any, make_trainer: Any, make_loader: Any, tmp_path: Path
) -> None:
    def run(scope: Scope, ckpt_path: Path | None = None) -> tuple[dict[str, Tensor], L.Trainer]:
        plain = make_loader()
        loader = StatefulDataLoader(plain.dataset, batch_size=3, collate_fn=plain.collate_fn)
        module = make_module("llama", outlier=2)
        trainer = make_trainer(max_steps=4, callbacks=[scope, zeroth_order(method), Save(tmp_path / "two.ckpt")])
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return weights(module), trainer

    whole, trainer = run(make())
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    chosen = torch.load(tmp_path / "two.ckpt", weights_only=True)["scope"]
    resumed, trainer = run(make_later(), tmp_path / "two.ckpt")
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")

    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for path in ("four.ckpt", "resumed.ckpt"):
        assert repr(torch.load(tmp_path / path, weights_only=True)["scope"]) == repr(chosen)


def test_a_checkpoint_without_a_scope(
    make_module: Callable[..., Any], fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit(make_module(), zeroth_order(), max_steps=2).save_checkpoint(tmp_path / "whole.ckpt")
    with pytest.raises(
        MisconfigurationException, match="`ckpt_path` is a checkpoint of a run without a scope, and Train"
    ):
        fit(make_module(), TrainLayers([1]), zeroth_order(), ckpt_path=tmp_path / "whole.ckpt")


def test_what_is_said(
    make_module: Callable[..., Any],
    fit: Callable[..., L.Trainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = make_module("llama", outlier=2)
    with caplog.at_level("INFO"):
        logger = TensorBoardLogger(tmp_path, "run")
        fit(module, DominantLayer(OutlierChannels(TENTH)), zeroth_order(), logger=logger, log_every_n_steps=1)
    (said,) = [record.getMessage() for record in caplog.records if "DominantLayer" in record.getMessage()]
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


def test_profile_from_a_file(
    make_module: Callable[..., Any], make_batches: Callable[..., Any], fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    module = make_module("llama", outlier=3)
    profile_activations(module, make_batches(), find_layers(module)).save(tmp_path / "profile.json")
    other = make_module("llama")  # of the same shapes, without any outlier
    before = weights(other)
    fit(other, DominantLayer(profile=str(tmp_path / "profile.json")), zeroth_order())
    assert moved(before, other).keys() == sizes(other, LAYER.format(3)).keys()

    with pytest.raises(
        ValueError, match=r"`profile` is .*of another model: 6 layers of class Llama.*has 6 layers of class M"
    ):
        fit(make_module("mistral"), DominantLayer(profile=str(tmp_path / "profile.json")), zeroth_order())
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`profile` is .*broken.json', which is not an activation profile"):
        fit(make_module(), DominantLayer(profile=str(tmp_path / "broken.json")), zeroth_order())
    with pytest.raises(ValueError, match=r"`profile` is 'none.json', which is no file"):
        fit(make_module(), DominantLayer(profile="none.json"), zeroth_order())


def test_layer_as_given_and_rules_as_given(make_module: Callable[..., Any], fit: Callable[..., L.Trainer]) -> None:
    for scope, layer in (
        (DominantLayer(layer=4), 4),
        (DominantLayer(rules=[Absolute(1e9), Jump(first_half_only=False)]), 2),
        (DominantLayer(rules=[Absolute(1e-3)]), 0),
        (DominantLayer(layer=1, layers_name="network.model.layers"), 1),
    ):
        module = make_module("llama", outlier=2)
        before = weights(module)
        fit(module, scope, zeroth_order())
        assert moved(before, module).keys() == sizes(module, LAYER.format(layer)).keys()


def test_random_layers(make_module: Callable[..., Any], fit: Callable[..., L.Trainer]) -> None:
    drawn = {}
    for seed in range(6):
        module = make_module()
        before = weights(module)
        fit(module, RandomLayer(seed=seed), zeroth_order(), max_steps=1)
        (drawn[seed],) = {int(name.split(".")[3]) for name in moved(before, module)}
    assert drawn == {0: 4, 1: 1, 2: 0, 3: 3, 4: 4, 5: 5}


def test_random_layers_are_all_drawn_equally_often(make_module: Callable[..., Any]) -> None:
    stack = find_layers(make_module())
    counts, generator = [0] * 6, torch.get_rng_state()
    for seed in range(600):
        (index,) = RandomLayer(seed=seed).choose(None, None, stack, list).layers
        counts[index] += 1
    assert all(70 < count < 130 for count in counts)
    assert torch.equal(torch.get_rng_state(), generator)


def test_two_scopes(make_module: Callable[..., Any], fit: Callable[..., L.Trainer]) -> None:
    with pytest.raises(MisconfigurationException, match=r"`trainer.callbacks` has 2 scopes, TrainLayers, RandomLayer"):
        fit(make_module(), TrainLayers([1]), zeroth_order(), RandomLayer())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DominantLayer(layer=6), r"`layer` is 6, but `network.model.layers` has 6 layers: 0 to 5"),
        (lambda: DominantLayer(extra_layers=[-1]), r"`extra_layers` is -1, but .* 0 to 5"),
        (lambda: TrainLayers([0, 6]), r"`layers` is 6, but .* 0 to 5"),
        (lambda: TrainLayers([]), r"`layers` must be a list of at least one index, or 'all', got \[\]"),
        (lambda: TrainLayers("some"), r"`layers` must be a list of at least one index, or 'all', got 'some'"),
        (lambda: TrainLayers([1], layers_name="no"), r"`layers_name` is 'no', which matches nothing"),
        (lambda: DominantLayer(layer=1, profile="x"), r"`layer` is 1 and `profile` is 'x': give one"),
        (lambda: DominantLayer(num_prompts=0), r"`num_prompts` must be an integer, at least 1, got 0"),
        (lambda: RandomLayer(seed=2**63), r"`seed` must be an integer of at most 64 bits"),
        (lambda: TrainParameters([]), r"`patterns` must be a list of at least one regular expression, got \[\]"),
        (lambda: TrainParameters("attn"), r"`patterns` must be a list .* got 'attn'"),
        (lambda: TrainParameters(["q_proj", "(("]), r"`patterns` has '\(\(', which is no regular expression"),
        (
            lambda: TrainParameters(["q_proj", "query"]),
            r"`patterns` has 'query', which matches no parameter. Some of them are network.model.embed_tokens.weight",
        ),
        (DominantLayer, "No layer stands out by `rules`"),
    ],
)
def test_what_is_refused_before_training(
    make: Callable[[], Scope], message: str, make_module: Callable[..., Any], fit: Callable[..., L.Trainer]
) -> None:
    module = make_module()
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        fit(module, make(), zeroth_order())
    assert not moved(before, module)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_no_recognisable_layers_and_no_calibration_set(
    make_module: Callable[..., Any],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
    make_trainer: Callable[..., L.Trainer],
) -> None:
    with pytest.raises(ValueError, match=r"`layers_name` is not given.*`net` \(Sequential\)"):
        make_trainer(max_steps=1, callbacks=[TrainLayers([0]), zeroth_order()]).fit(
            make_regression(), regression_data()
        )
    with pytest.raises(ValueError, match="`num_prompts` is 32, but the training data"):
        make_trainer(max_steps=1, callbacks=[DominantLayer(), zeroth_order()]).fit(make_module(), DataLoader([]))


def test_layers_of_a_module_of_ones_own(
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
    make_trainer: Callable[..., L.Trainer],
) -> None:
    module = make_regression()
    before = weights(module)
    callbacks = [TrainLayers([0], layers_name="net"), zeroth_order()]
    make_trainer(max_steps=2, callbacks=callbacks).fit(module, regression_data())
    assert moved(before, module).keys() == {"net.0.weight", "net.0.bias"}


def test_every_layer_scope_takes_a_part() -> None:
    for make in (DominantLayer, partial(TrainLayers, [1]), RandomLayer):
        scope = make(part=MLP())
        assert isinstance(scope, LayerScope) and isinstance(scope.part, MLP)
