"""Layers and their parts are found by structure."""

from collections.abc import Callable

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from zolightning.layers import check_index, find_layers, mlp_of

STACKS = {"opt": "network.model.decoder.layers", "gpt2": "network.transformer.h", "bert": "network.bert.encoder.layer"}
PLAIN = {"opt": ["fc1", "fc2"], "gpt2": ["mlp.c_fc", "mlp.c_proj"], "bert": ["intermediate.dense", "output.dense"]}
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def test_layers_of_every_architecture(architecture: str, make_module: Callable[..., nn.Module]) -> None:
    module = make_module(architecture)
    stack = find_layers(module)

    assert stack.name == STACKS.get(architecture, "network.model.layers")
    assert len(stack) == 6
    assert stack.layers == tuple(module.get_submodule(stack.name))
    names = {name for name, _ in module.named_parameters() if name.startswith(f"{stack.name}.4.")}
    assert set(stack.parameters(4)) == names
    assert all(module.get_parameter(name) is parameter for name, parameter in stack.parameters(4).items())


def test_mlp_of_every_architecture(architecture: str, make_module: Callable[..., nn.Module]) -> None:
    layer = find_layers(make_module(architecture)).layers[2]
    *up, down = (layer.get_submodule(name) for name in PLAIN.get(architecture, GATED))

    mlp = mlp_of(layer)

    assert mlp.up == tuple(up)
    assert mlp.down is down
    assert mlp.width == 48
    assert all(parameter.shape[dim] == 48 for parameter, dim in mlp.channel_dims().items())
    biases = 0 if len(up) == 2 else 1
    assert len(mlp.channel_dims()) == len(up) + biases + 1
    assert len(mlp.parameters()) == (3 if len(up) == 2 else 4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_mlp_as_wide_as_the_layer(architecture: str, make_module: Callable[..., nn.Module]) -> None:
    width = {"n_inner": 16} if architecture == "gpt2" else {"intermediate_size": 16}
    layer = find_layers(make_module(architecture, **width)).layers[0]
    *up, down = (layer.get_submodule(name) for name in PLAIN.get(architecture, GATED))
    assert mlp_of(layer) == (tuple(up), down)


def test_torch_encoder() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 24, batch_first=True), 3, enable_nested_tensor=False
    )
    stack = find_layers(encoder)
    assert (stack.name, len(stack)) == ("layers", 3)
    assert mlp_of(stack.layers[1]) == ((stack.layers[1].linear1,), stack.layers[1].linear2)


def test_the_largest_outermost_list_wins() -> None:
    module = nn.Module()
    module.heads = nn.ModuleList([nn.Linear(2, 2)])
    module.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)]), nn.ModuleList([nn.Linear(9, 9)])])
    module.empty = nn.ModuleList()
    stack = find_layers(module)
    assert stack.names == ("blocks.0", "blocks.1")
    assert set(stack.parameters(0)) == {"blocks.0.0.weight", "blocks.0.0.bias", "blocks.0.1.weight", "blocks.0.1.bias"}


def test_layers_by_name() -> None:
    module = nn.Sequential()
    module.block_0, module.block_1, module.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
    assert find_layers(module, r"block_\d").names == ("block_0", "block_1")

    outer = nn.Module()
    outer.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    assert find_layers(outer, "net").names == ("net.0", "net.1")
    assert find_layers(outer, r".*\bnet").layers == tuple(outer.net)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nothing", r"matches nothing in Sequential. Accepted are one list \(body\)"),
        ("head", "matches head in Sequential"),
        ("body.*", "`body.0` inside another match"),
        ("bo(dy", "not a regular expression"),
    ],
)
def test_names_that_find_no_layers(name: str, found: str) -> None:
    module = nn.Sequential()
    module.body, module.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"`layers_name` is .*{found}"):
        find_layers(module, name)


def test_no_recognisable_layers() -> None:
    module = nn.Sequential()
    module.body = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`layers_name` is not given.*it holds `body` \(Linear\).*Sequential"):
        find_layers(module)


@pytest.mark.parametrize("index", [-1, 6, 1.0, True, "1"])
def test_index_out_of_range(index: object, make_module: Callable[..., nn.Module]) -> None:
    stack = find_layers(make_module())
    check_index(stack, 5)
    with pytest.raises(ValueError, match=r"`extra_layers` is .*`network.model.layers` has 6 layers: 0 to 5"):
        check_index(stack, index, "extra_layers")


@pytest.mark.parametrize(("architecture", "there"), [("phi3", "gate_up_proj` 16 to 96"), ("mixtral", "mixture")])
def test_layers_without_a_plain_mlp(architecture: str, there: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 20, "pad_token_id": 1}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    with pytest.raises(ValueError, match=rf"`part` needs a layer with one MLP.*{there}"):
        mlp_of(find_layers(network).layers[0])
