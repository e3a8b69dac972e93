"""Tensors in nested containers are replaced in copies of the containers, which stay as they are."""

from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

from zolightning.evaluation.nested import map_tensors, tensors_in


class Named(NamedTuple):
    x: Tensor
    name: str


@dataclass
class Mutable:
    x: Tensor
    made: Any = field(init=False)


@dataclass(frozen=True)
class Frozen:
    x: list[Tensor]


def mutable(x: Tensor, made: Tensor) -> Mutable:
    result = Mutable(x)
    result.made = made
    return result


MAKE = {
    "a tensor": lambda a, b: a,
    "a list": lambda a, b: [a, None, [b]],
    "a tuple": lambda a, b: (a, "text", b),
    "a named tuple": lambda a, b: (Named(a, "n"), b),
    "a mapping": lambda a, b: OrderedDict(x=a, y={"z": b}),
    "a deque": lambda a, b: deque([a, b]),
    "a default": lambda a, b: defaultdict(list, x=[a, b]),
    "a batch of a tokenizer": lambda a, b: BatchEncoding({"input_ids": a, "labels": b}),
    "a dataclass": mutable,
    "a frozen dataclass": lambda a, b: Frozen([a, b]),
    "an output of transformers": lambda a, b: CausalLMOutput(loss=a, logits=b),
    "a dataclass that lacks a field": lambda a, b: [Mutable(a), b],
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_every_container_is_copied_with_other_tensors(make: Any) -> None:
    a, b = torch.ones(2), torch.arange(3.0)
    data, expected = make(a, b), make(a + 1, b + 1)
    before = tensors_in(data)
    found = map_tensors(lambda tensor: tensor + 1, data)
    assert type(found) is type(expected) and (found is not data)
    for values, wanted in zip(tensors_in(found), tensors_in(expected), strict=True):
        assert torch.equal(values, wanted)
    assert all(map(torch.equal, tensors_in(data), before)) and torch.equal(a, torch.ones(2))
    if isinstance(found, CausalLMOutput):
        assert torch.equal(found["loss"], found.loss)
    if isinstance(found, defaultdict):
        assert found["new"] == []
    if isinstance(found, Mutable):
        assert torch.equal(found.made, b + 1)


def test_other_objects_are_handed_on() -> None:
    thing, text = object(), "a text"
    assert map_tensors(Tensor.clone, {"a": thing, "b": text, "c": Mutable})["a"] is thing
    assert tensors_in((thing, text, 1, None, Mutable)) == []
