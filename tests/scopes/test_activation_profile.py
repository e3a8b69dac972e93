"""What is measured: the right numbers of the right tokens, whatever the batches, and nothing is left behind."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from zolightning.layers import LayerStack, find_layers
from zolightning.models.attention_masks import causal_mask
from zolightning.scopes.activation_profile import ActivationProfile, Fingerprint, profile_activations
from zolightning.scopes.calibration import calibration_forward
from zolightning.scopes.rules import select
from zolightning.scopes.token_mask import TokenMask


def profile_of(module: L.LightningModule, batches: list[Any]) -> ActivationProfile:
    return profile_activations(module, batches, find_layers(module))


def assert_same(one: ActivationProfile, other: ActivationProfile) -> None:
    """The same but for the last bits, which depend on the shapes of the batches."""
    for a, b in zip(one.layers, other.layers, strict=True):
        for name in ("max", "mean", "median", "peak"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-3)
        assert a.tokens == b.tokens
        assert a.channels[0] == b.channels[0]


@pytest.mark.parametrize("outlier", [0, 1, 3, 5])
def test_the_planted_layer_is_selected(
    architecture: str, outlier: int, make_module: Callable[..., Any], make_batches: Callable[..., Any]
) -> None:
    profile = profile_of(make_module(architecture, outlier), make_batches())
    assert select(profile)[0] == outlier
    assert profile.num_prompts == 6


def test_without_an_outlier_no_layer_is_selected(
    architecture: str, make_module: Callable[..., Any], make_batches: Callable[..., Any]
) -> None:
    profile = profile_of(make_module(architecture), make_batches())
    with pytest.raises(ValueError, match=r"No layer stands out by `rules` Both.*Jump(.|\n)*max/median") as error:
        select(profile)
    assert len(str(error.value).splitlines()) == 8


def test_batches_do_not_matter(
    architecture: str, make_module: Callable[..., Any], make_batches: Callable[..., Any]
) -> None:
    module = make_module(architecture, outlier=2)
    profile = profile_of(module, make_batches())

    assert profile_of(module, make_batches()) == profile
    for order in list(permutations(range(6)))[100::200]:
        assert_same(profile_of(module, make_batches(order=order)), profile)
    for size in (1, 2, 6):
        assert_same(profile_of(module, make_batches(size=size)), profile)
    for size in (2, 6):
        assert_same(profile_of(module, make_batches(size=size, side="right")), profile)


class Constant(L.LightningModule):
    """Layers that put out what they are told to."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.net = Masked(factors)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(*batch)


class Masked(nn.Module):
    def __init__(self, factors: tuple[float, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scale(factor) for factor in factors)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            (hidden,) = layer(hidden)
        return hidden.sum()


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (hidden * self.factor,)


HIDDEN = torch.tensor(
    [
        [[-9.0, 0.0, 1.0], [2.0, 3.0, -4.0], [70.0, 70.0, 70.0]],
        [[5.0, 5.0, 5.0], [1.0, 1.0, 1.0], [1.0, -1.0, 6.0]],
    ]
)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_statistics_by_hand() -> None:
    profile = profile_of(Constant(1.0, -2.0), [(HIDDEN, MASK)])
    first, second = profile.layers
    assert (first.max, first.peak, first.median) == ((9.0 + 6.0) / 2, 9.0, (2.0 + 1.0) / 2)
    assert first.mean == pytest.approx((19 / 6 + 26 / 9) / 2)
    assert first.channels == (0, 2, 1)
    assert first.tokens == (0, 2)
    assert (second.max, second.peak, second.median) == (15.0, 18.0, 3.0)


def test_mask_without_which_every_position_counts() -> None:
    assert profile_of(Constant(1.0), [(HIDDEN,)]).layers[0].peak == 70.0


def test_mask_holds_for_its_own_call_only() -> None:
    profile = profile_of(Constant(1.0), [(HIDDEN, MASK), (HIDDEN / 70 * 2,)])
    assert profile.layers[0].peak == 9.0
    assert profile.num_prompts == 4
    assert profile_of(Constant(1.0), [(HIDDEN, MASK), (HIDDEN,)]).layers[0].peak == 70.0


@pytest.mark.parametrize("mask", [MASK, MASK.flip(1)], ids=["padding on the right", "on the left"])
def test_mask_of_queries_and_keys(mask: Tensor) -> None:
    profile = profile_of(Constant(1.0), [(HIDDEN, causal_mask(mask))])
    assert profile == profile_of(Constant(1.0), [(HIDDEN, mask)])


def test_mask_that_begins_with_what_is_cached() -> None:
    with_cache = torch.cat([torch.ones(2, 4, dtype=torch.long), MASK], dim=1)
    assert profile_of(Constant(1.0), [(HIDDEN, with_cache)]) == profile_of(Constant(1.0), [(HIDDEN, MASK)])


@pytest.mark.parametrize("mask", [MASK[:, :2], MASK[:1].expand(4, 3)])
def test_mask_that_does_not_fit(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"mask of shape .* does not fit activations of shape \(2, 3, 3\)"):
        profile_of(Constant(1.0), [(HIDDEN, mask)])


def test_vectors_are_sequences_of_one_token() -> None:
    profile = profile_of(Constant(1.0), [(HIDDEN[0],)])
    assert profile.num_prompts == 3
    assert profile.layers[0].tokens == (0,)
    with pytest.raises(ValueError, match=r"Layer 0 returns a tensor of shape \(1, 2, 3, 3\)"):
        profile_of(Constant(1.0), [(HIDDEN[None],)])


def test_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match=r"Layer 0 of `net.layers` did not run on any token"):
        profile_of(Constant(1.0), [(HIDDEN, MASK * 0)])


def test_overflow_is_named(make_module: Callable[..., Any], make_batches: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"output of layer 1 is not finite in torch.float16.*bfloat16"):
        profile_of(Constant(1.0, 1e5).half(), [(HIDDEN.half(), MASK)])


def test_module_is_as_before(make_module: Callable[..., Any], make_batches: Callable[..., Any]) -> None:
    module = make_module("llama", outlier=1)
    module.network.model.layers[2].eval()
    generator = torch.get_rng_state()

    def state() -> list[Any]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
        return [hooks, [m.training for m in module.modules()], sorted(vars(module))]

    before = state()
    profile_of(module, make_batches())
    assert state() == before
    with pytest.raises(IndexError):
        profile_of(module, [{"input_ids": torch.tensor([[99]]), "attention_mask": torch.tensor([[1]])}])
    assert state() == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_forward_is_the_modules_own_step_in_evaluation_mode(
    make_module: Callable[..., Any], make_batches: Callable[..., Any]
) -> None:
    module = make_module("opt", dropout=0.9)
    (batch,) = make_batches(size=6)
    module.training_step = None  # as under a callback that stands in for it
    losses = {calibration_forward(module, batch).item() for _ in range(3)}
    module.network.eval()
    del module.training_step
    module.log = lambda *_: None
    assert losses == {module.training_step(batch, 0).item()}


def test_a_step_that_trains_is_not_run() -> None:
    module = Constant(1.0)
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"Constant has `automatic_optimization=False`.*`layer`"):
        calibration_forward(module, (HIDDEN,))


def test_profile_as_a_file(make_module: Callable[..., Any], make_batches: Callable[..., Any], tmp_path: Path) -> None:
    profile = profile_of(make_module("llama", outlier=1), make_batches())
    profile.save(tmp_path / "profile.json")
    assert ActivationProfile.load(tmp_path / "profile.json") == profile
    for text in ("", "[]", "{}", (tmp_path / "profile.json").read_text().replace('"peak"', '"top"')):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="not an activation profile"):
            ActivationProfile.load(tmp_path / "other.json")


def test_the_first_token_of_a_network_without_masks() -> None:
    with TokenMask(nn.Linear(4, 4), LayerStack("", (), ())) as tokens:
        assert tokens.of(torch.ones(2, 3, 4)).tolist() == [[True] * 3] * 2
        assert tokens.of(torch.ones(2, 3, 4), with_first=False).tolist() == [[False, True, True]] * 2


def test_fingerprints_tell_shapes_apart(make_module: Callable[..., Any]) -> None:
    fingerprints = [
        Fingerprint.of(find_layers(make_module(name, **config)))
        for name, config in [
            ("llama", {}),
            ("llama", {"intermediate_size": 40}),
            ("llama", {"num_hidden_layers": 5}),
            ("mistral", {}),
        ]
    ]
    assert len(set(fingerprints)) == 4
    module = make_module("llama", outlier=2)
    assert Fingerprint.of(find_layers(module)) == Fingerprint.of(find_layers(module.network)) == fingerprints[0]
