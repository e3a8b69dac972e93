"""Random number generators that a module keeps as attributes: torch's, NumPy's and Python's, with one interface."""

import random
import sys
from typing import Any

import torch


def is_generator(value: Any) -> bool:
    """Whether a value is a generator whose state can be read: not ``random.SystemRandom``, for one, which has none."""
    if type(value) in (torch.Generator, random.Random):
        return True
    numpy = sys.modules.get("numpy")  # which need not be installed
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def state_of(generator: Any) -> Any:
    """The state of a generator, which does not change when it is drawn from."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state(legacy=False) if hasattr(generator, "get_state") else generator.bit_generator.state


def set_state(generator: Any, state: Any) -> None:
    """Sets a generator to a state that :func:`state_of` has returned."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def are_equal(one: Any, other: Any) -> bool:
    """Whether two states of one generator are the same."""
    if isinstance(one, dict):  # NumPy's, which may hold arrays
        return all(are_equal(value, other[name]) for name, value in one.items())
    return bool((one == other).all()) if hasattr(one, "all") else one == other
