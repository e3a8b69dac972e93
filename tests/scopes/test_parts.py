"""Parts of layers: how many numbers, which ones, and that they add up."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from zolightning.layers import find_layers
from zolightning.scopes.calibration import calibration_forward
from zolightning.scopes.parts import (
    MLP,
    ChosenParameters,
    OutlierChannels,
    Part,
    WholeLayer,
    WithoutOutlierChannels,
    outlier_channels,
)

GATED = ("llama", "qwen3", "gemma3_text", "mistral")
HIDDEN, WIDTH, KEY_VALUE = 16, 48, 8


def never() -> None:
    raise AssertionError("ran the network")


@pytest.fixture
def select(
    make_batches: Callable[..., Any],
) -> Callable[[L.LightningModule, Part, Sequence[int]], ChosenParameters]:
    def run(module: L.LightningModule, part: Part, indices: Sequence[int] = (1,)) -> ChosenParameters:
        def calibrate() -> None:
            for batch in make_batches():
                calibration_forward(module, batch)

        return part.select(module, find_layers(module), indices, calibrate)

    return run


def count(selected: ChosenParameters) -> int:
    return sum(p.numel() if part is None else part.take(p).numel() for p, part in selected.items())


def mask(module: nn.Module, selected: ChosenParameters) -> dict[str, torch.Tensor]:
    """True where a number of the module trains."""
    masks = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        if parameter in selected:
            part = selected[parameter]
            masks[name] |= (
                True
                if part is None
                else torch.zeros(parameter.shape[part.dim])
                .index_fill(0, part.index, 1)
                .bool()
                .reshape([-1 if dim == part.dim else 1 for dim in range(parameter.ndim)])
            )
    return masks


def layer_size(architecture: str) -> int:
    """Attention, MLP and norms."""
    if architecture in GATED:
        attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE
        norms = {"qwen3": 2 * HIDDEN + 2 * 8, "gemma3_text": 4 * HIDDEN + 2 * 8}.get(architecture, 2 * HIDDEN)
        return attention + 3 * HIDDEN * WIDTH + norms
    return 4 * HIDDEN * (HIDDEN + 1) + 2 * HIDDEN * WIDTH + WIDTH + HIDDEN + 4 * HIDDEN


def mlp_size(architecture: str) -> int:
    return 3 * HIDDEN * WIDTH if architecture in GATED else 2 * HIDDEN * WIDTH + WIDTH + HIDDEN


def channel_size(architecture: str) -> int:
    """A row of gate and up and a column of down, or a row of up, its bias, and a column of down."""
    return 3 * HIDDEN if architecture in GATED else 2 * HIDDEN + 1


def test_sizes_by_formula(
    architecture: str, make_module: Callable[..., Any], select: Callable[..., ChosenParameters]
) -> None:
    module = make_module(architecture)
    for layers in ([1], [0, 4, 5]):
        times, k = len(layers), math.ceil(0.1 * WIDTH)
        layer, mlp, channels = (times * f(architecture) for f in (layer_size, mlp_size, channel_size))
        expected = {
            WholeLayer(): layer,
            MLP(): mlp,
            OutlierChannels(0.1): k * channels,
            WithoutOutlierChannels(0.1): layer - k * channels,
            WithoutOutlierChannels(0.1, MLP()): mlp - k * channels,
        }
        assert {part: count(select(module, part, layers)) for part in expected} == expected


def test_channels_and_their_complement_divide_the_layer(
    architecture: str, make_module: Callable[..., Any], select: Callable[..., ChosenParameters]
) -> None:
    module = make_module(architecture)
    channels = mask(module, select(module, OutlierChannels(0.1)))
    for within in (WholeLayer(), MLP()):
        others = mask(module, select(module, WithoutOutlierChannels(0.1, within)))
        whole = mask(module, select(module, within))
        for name in whole:
            assert torch.equal(channels[name] ^ others[name], whole[name])
            assert not (channels[name] & others[name]).any()


def test_whole_parts_do_not_run_the_network(make_module: Callable[..., Any]) -> None:
    module = make_module()
    for part in (WholeLayer(), MLP()):
        part.select(module, find_layers(module), [1], never)


@pytest.mark.parametrize("channel", [0, 17, 47])
def test_the_channel_with_the_largest_value_is_selected(
    architecture: str, channel: int, make_module: Callable[..., Any], select: Callable[..., ChosenParameters]
) -> None:
    module = make_module(architecture)
    layer = find_layers(module).layers[3]
    name = {"opt": "fc1", "gpt2": "mlp.c_fc", "bert": "intermediate.dense"}.get(architecture, "mlp.up_proj")
    up = layer.get_submodule(name).weight
    with torch.no_grad():
        (up[:, channel] if architecture == "gpt2" else up[channel]).mul_(100)

    selected = select(module, OutlierChannels(1e-9), [3])

    assert selected
    assert all(part.index.tolist() == [channel] for part in selected.values())


def test_statistic_is_the_maximum_over_tokens_and_not_padding(
    make_module: Callable[..., Any], make_batches: Callable[..., Any]
) -> None:
    module = make_module("opt")  # its MLP reads tokens of all sequences in one list
    seen: list[torch.Tensor] = []
    stack = find_layers(module)
    with torch.no_grad():  # padding alone excites channel 5
        row = stack.layers[2].fc1.weight[5]
        module.network.model.decoder.embed_tokens.weight[1] = 1e4 * (row - row.mean())
    hook = stack.layers[2].fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, WIDTH)))
    for prompts in make_batches(size=1):
        calibration_forward(module, prompts)
    hook.remove()
    expected = torch.cat(seen).abs().amax(0).topk(5).indices.sort().values
    assert 5 not in expected

    for size, side in ((1, "left"), (3, "left"), (6, "right")):

        def calibrate(size: int = size, side: str = side) -> None:
            for batch in make_batches(size=size, side=side):
                calibration_forward(module, batch)

        channels = outlier_channels(module, stack, [2], 0.1, calibrate)
        assert torch.equal(channels[2], expected)


def test_number_of_channels_is_rounded_up(
    make_module: Callable[..., Any], select: Callable[..., ChosenParameters]
) -> None:
    module = make_module("llama", intermediate_size=100)
    for fraction, k in ((1e-12, 1), (0.01, 1), (0.011, 2), (0.07, 7), (0.5, 50), (1, 100)):
        assert count(select(module, OutlierChannels(fraction))) == 3 * HIDDEN * k


def test_all_channels_leave_attention_and_norms(
    make_module: Callable[..., Any], select: Callable[..., ChosenParameters]
) -> None:
    module = make_module()
    rest = select(module, WithoutOutlierChannels(1.0))
    assert count(rest) == layer_size("llama") - mlp_size("llama")
    assert not select(module, WithoutOutlierChannels(1.0, MLP()))


def test_choice_is_deterministic_also_among_equals(
    make_module: Callable[..., Any], select: Callable[..., ChosenParameters]
) -> None:
    module = make_module()
    first, second = (list(select(module, OutlierChannels(0.2)).values()) for _ in range(2))
    assert all(torch.equal(one.index, two.index) for one, two in zip(first, second, strict=True))
    with torch.no_grad():
        module.network.model.layers[1].mlp.up_proj.weight.zero_()
    (*_, part) = select(module, OutlierChannels(0.1)).values()
    assert part.index.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("make", [OutlierChannels, WithoutOutlierChannels])
@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), True, "1"])
def test_fractions_out_of_range(make: Callable[..., Part], fraction: object) -> None:
    with pytest.raises(ValueError, match=r"`fraction` must be above 0 and at most 1, got"):
        make(fraction)


def test_complement_within_something_else() -> None:
    with pytest.raises(
        ValueError, match=r"`within` must be WholeLayer\(\) or MLP\(\), got OutlierChannels\(fraction=0"
    ):
        WithoutOutlierChannels(0.1, OutlierChannels(0.1))


def test_channels_that_cannot_be_measured(make_module: Callable[..., Any], make_batches: Callable[..., Any]) -> None:
    module = make_module()
    with pytest.raises(ValueError, match=r"channels of the MLP of layer 1 of `network.model.layers` never ran"):
        outlier_channels(module, find_layers(module), [1], 0.1, lambda: None)
    with torch.no_grad():
        module.network.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"layer 1 .* are not finite"):
        outlier_channels(module, find_layers(module), [1], 0.1, lambda: calibration_forward(module, make_batches()[0]))
