"""The same random numbers for all evaluations of a step.

A loss may draw random numbers: input noise, a VAE's latents, masks, ``F.dropout``. If two losses drew different ones,
their difference would say nothing about the direction, so all evaluations of a step draw the same numbers. These are a
function of (run seed, step, stream): they change at every step, and are the same after a resume. Outside the
evaluations all generators are in the state that they would have without them.
"""

import hashlib
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class States(NamedTuple):
    """The states of the generators."""

    torch: list[Tensor]  # of the CPU, then of each device
    numpy: Any
    python: Any

    def equal(self, other: "States") -> bool:
        """Whether nothing has been drawn between two looks at the generators."""
        if self.python != other.python or not all(map(torch.equal, self.torch, other.torch)):
            return False
        # NumPy's is a tuple of a name, an array of words and three numbers
        pairs = zip(self.numpy or (), other.numpy or (), strict=True)
        return all(bool((one == two).all()) if hasattr(one, "all") else one == two for one, two in pairs)


class Generators:
    """The global generators that a loss may draw from: torch's, and NumPy's and Python's.

    Generators that a module keeps as its own attributes (:mod:`zolightning.evaluation.own_generators`) are handled by
    :mod:`zolightning.evaluation.traces`.

    Args:
        devices: of the parameters; torch has one generator for the CPU and one for each other device.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._devices = sorted({device for device in devices if device.type not in ("cpu", "meta")}, key=str)

    def states(self) -> States:
        """The current states of all generators."""
        numpy = _numpy()
        on_devices = [torch.get_device_module(d).get_rng_state(*_place(d)) for d in self._devices]
        return States(
            [torch.get_rng_state(), *on_devices],
            None if numpy is None else numpy.random.get_state(),
            random.getstate(),
        )

    def set(self, states: States) -> None:
        """Sets all generators to these states."""
        torch.set_rng_state(states.torch[0])
        for device, state in zip(self._devices, states.torch[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, *_place(device))
        if states.numpy is not None and (numpy := _numpy()) is not None:
            numpy.random.set_state(states.numpy)
        random.setstate(states.python)

    def seeded(self, *numbers: int) -> States:
        """The states of generators seeded with some 64-bit integers."""
        message = b"randomness" + struct.pack(f"<{len(numbers)}q", *numbers)
        seed = int.from_bytes(hashlib.blake2b(message, digest_size=7).digest(), "little")
        numpy = _numpy()
        return States(
            [torch.Generator(device).manual_seed(seed).get_state() for device in (torch.device("cpu"), *self._devices)],
            None if numpy is None else numpy.random.RandomState(seed % 2**32).get_state(),
            random.Random(seed).getstate(),
        )

    @contextmanager
    def rewound(self, *numbers: int) -> Iterator[Callable[[], None]]:
        """A context that restores the generators at its end; it yields a function that seeds them with the integers."""
        before, start = self.states(), self.seeded(*numbers)
        try:
            yield lambda: self.set(start)
        finally:
            self.set(before)


def _numpy() -> ModuleType | None:
    """NumPy if it has been imported; otherwise nobody draws from it."""
    return sys.modules.get("numpy")


def _place(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # of which there is only one
