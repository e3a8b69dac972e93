"""Which parameters form a block, and what cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from zolightning.blocks import Blocks, find_blocks

Names = dict[str, set[str]]


class Net(nn.Module):
    """Embeddings whose table is the head's too, three layers of which two share their weight, a final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.layers[2].weight = self.layers[1].weight
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.table.weight


def named(net: nn.Module, blocks: Blocks) -> Names:
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {block: {names[p] for p in parameters} for block, parameters in blocks.parameters.items()}


def test_by_structure() -> None:
    net = Net()
    layers = {f"layer_{i}": {f"layers.{i}.weight", f"layers.{i}.bias"} for i in range(3)}
    layers["layer_2"] -= {"layers.2.weight"}
    rest = {"embeddings": {"table.weight"}, "head": {"norm.weight", "norm.bias", "head.bias"}}
    assert named(net, find_blocks(net, net.parameters())) == layers | rest
    assert named(net, find_blocks(net, net.parameters(), others="always")) == layers
    never = find_blocks(net, net.parameters(), others="never")
    assert named(net, never) == layers and len(never.never) == 4
    some = [*net.layers[0].parameters(), net.layers[2].bias]
    assert named(net, find_blocks(net, some)) == {"layer_0": layers["layer_0"], "layer_2": {"layers.2.bias"}}


def test_by_patterns() -> None:
    net = Net()
    found = named(net, find_blocks(net, net.parameters(), ["bias$", r"layers\.\d"]))
    assert found["bias$"] == {f"{name}.bias" for name in ("layers.0", "layers.1", "layers.2", "norm", "head")}
    assert found[r"layers\.\d"] == {"layers.0.weight", "layers.1.weight"}
    assert found["others"] == {"table.weight", "norm.weight"}


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_of_a_language_model(write_tiny_model: Callable[..., Path], tmp_path: Path, architecture: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path, architecture))
    blocks = find_blocks(model, model.parameters())
    assert blocks.names == ("embeddings", "layer_0", "layer_1", "head")
    parameters = [parameter for block in blocks.parameters.values() for parameter in block]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))
    assert set(blocks.parameters["embeddings"]) >= {model.get_input_embeddings().weight}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patterns": ["layers", "attention"]}, "`patterns` has 'attention', which matches nothing that trains"),
        ({"patterns": ["layers", r"layers\.1"]}, r"`patterns` has 'layers\\\.1', which matches .* no earlier pattern"),
        ({"patterns": ["layers"], "others": "always"}, "Blocks take turns, .* divided into 1: layers "),
        ({"patterns": ["("]}, r"`patterns` has '\(', which is not a regular expression"),
        ({"patterns": []}, "`patterns` must be a list of at least one"),
        ({"others": "frozen"}, "`others` must be one of"),
        ({"layers_name": "blocks"}, "`layers_name` is 'blocks', which matches nothing"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        find_blocks(net, net.parameters(), **arguments)
    with pytest.raises(ValueError, match="divided into none"):
        find_blocks(net, [torch.zeros(1)], others="never")
