"""What scopes choose under a real Trainer, and what they refuse before training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from training import moved, sizes, weights, zeroth_order
from zolightning.callbacks import DominantLayer, LinearProbing, RandomLayer, TrainLayers, TrainParameters
from zolightning.layers import find_layers
from zolightning.scopes.activation_profile import ActivationProfile, profile_activations
from zolightning.scopes.layer_scope import LayerScope
from zolightning.scopes.parts import MLP, LoRA
from zolightning.scopes.rules import Absolute, Jump
from zolightning.scopes.scope import Scope
from zolightning.scopes.train_by_signal import TrainBySignal


@pytest.mark.parametrize("outlier", [0, 1, 3, 5])
def test_dominant_layer_of_every_architecture(
    architecture: str, outlier: int, make_module: Callable[..., Any], fit: Callable[..., L.Trainer]
) -> None:
    module = make_module(architecture, outlier)
    stack = find_layers(module)
    before = weights(module)
    trainer = fit(module, DominantLayer(num_prompts=6), zeroth_order(), max_steps=1)
    assert moved(before, module).keys() == stack.parameters(outlier).keys()
    assert trainer.optimizers[0].param_groups[0]["forward_passes"] == 2 + 2  # batches of three prompts


def test_profile_from_a_file(
    make_module: Callable[..., Any], make_batches: Callable[..., Any], fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    module = make_module("llama", outlier=3)
    profile_activations(module, make_batches(), find_layers(module)).save(tmp_path / "profile.json")
    other = make_module("llama")  # of the same shapes, without any outlier
    before = weights(other)
    fit(other, DominantLayer(profile=str(tmp_path / "profile.json")), zeroth_order())
    assert moved(before, other).keys() == sizes(other, "network.model.layers.3").keys()

    with pytest.raises(
        ValueError, match=r"`profile` is .*of another model: 6 layers of class Llama.*has 6 layers of class M"
    ):
        fit(make_module("mistral"), DominantLayer(profile=str(tmp_path / "profile.json")), zeroth_order())
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`profile` is .*broken.json', which is not an activation profile"):
        fit(make_module(), DominantLayer(profile=str(tmp_path / "broken.json")), zeroth_order())
    with pytest.raises(ValueError, match=r"`profile` is 'none.json', which is not a file"):
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
        assert moved(before, module).keys() == sizes(module, f"network.model.layers.{layer}").keys()


def test_random_layers(make_module: Callable[..., Any], fit: Callable[..., L.Trainer]) -> None:
    drawn = {}
    for seed in range(6):
        module = make_module()
        before = weights(module)
        fit(module, RandomLayer(seed=seed), zeroth_order(), max_steps=1)
        (drawn[seed],) = {int(name.split(".")[3]) for name in moved(before, module)}
    assert drawn == {0: 4, 1: 1, 2: 0, 3: 3, 4: 4, 5: 5}


def test_random_layers_are_all_drawn_equally_often(make_module: Callable[..., Any]) -> None:
    def profile() -> ActivationProfile:
        raise AssertionError("a draw looks at nothing")

    stack = find_layers(make_module())
    counts, generator = [0] * 6, torch.get_rng_state()
    for seed in range(600):
        (index,) = RandomLayer(seed=seed).choose(stack, profile).layers
        counts[index] += 1
    assert all(70 < count < 130 for count in counts)
    assert torch.equal(torch.get_rng_state(), generator)


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


def test_what_dominant_layer_took_fourth_is_not_taken_for_a_profile() -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        DominantLayer(None, (), None, 64)  # type: ignore[misc]  # was `num_prompts`


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
        (lambda: TrainParameters(["q_proj", "(("]), r"`patterns` has '\(\(', which is not a regular expression"),
        (
            lambda: TrainParameters(["q_proj", "query"]),
            r"`patterns` has 'query', which matches no parameter. There are network.model.",
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


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (
            TrainParameters([r"layers\.\d+\..*q_prj"]),
            r"has 'layers\\\.\\d\+\\\.\.\*q_prj', .* There are network.model.layers.\*.self_attn.q_proj.weight, ",
        ),
        (TrainLayers([6]), "`layers` is 6"),
        (DominantLayer(extra_layers=[9]), "`extra_layers` is 9"),
        (DominantLayer(profile="none.json"), "`profile` is 'none.json', which is not a file"),
        (
            DominantLayer(LoRA(target_modules=["q_proj", "query"])),
            "`target_modules` matches nothing for query in layer 0",
        ),
        (TrainBySignal(patterns=["query"]), "`patterns` has 'query', which matches nothing that trains"),
    ],
)
def test_what_is_known_without_running_the_network(
    scope: Scope, message: str, make_module: Callable[..., Any], make_trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(ValueError, match=message):
        scope.check(make_trainer(), make_module())


def test_a_tied_head_has_a_name_of_its_own_where_something_unties_it(
    make_module: Callable[..., Any], make_trainer: Callable[..., L.Trainer]
) -> None:
    scope, tied = TrainParameters([r"lm_head\.weight$"]), make_module(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"`patterns` has 'lm_head\\.weight\$', which matches no parameter"):
        scope.check(make_trainer(), tied)
    scope.check(make_trainer(callbacks=[LinearProbing()]), tied)


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
