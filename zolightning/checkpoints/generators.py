"""The states of the random generators in a checkpoint: loaders shuffle with them, and a data set may draw from them."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from zolightning.evaluation.randomness import Generators, States
from zolightning.strategies.ranks import of_all_ranks


def generators_of_all_ranks(trainer: L.Trainer) -> list[dict[str, Any]]:
    """The states of generators by rank, as plain values, on the first rank.

    They are the global ones of torch, NumPy and Python, and those that the training loaders were given.
    """
    device = trainer.strategy.root_device
    states = Generators([device]).states()
    numpy = (
        None if states.numpy is None else [part.tolist() if part is states.numpy[1] else part for part in states.numpy]
    )
    loaders = [generator.get_state() for generator in _of_loaders(trainer)]
    return of_all_ranks(
        trainer,
        {"device": device.type, "torch": states.torch, "numpy": numpy, "python": states.python, "loaders": loaders},
    )


def restore_generators(trainer: L.Trainer, saved: Sequence[dict[str, Any]]) -> None:
    """Restores what :func:`generators_of_all_ranks` found, if the number of ranks and the kind of device are equal."""
    device = trainer.strategy.root_device
    if len(saved) != trainer.world_size or saved[trainer.global_rank]["device"] != device.type:
        return
    own = saved[trainer.global_rank]
    numpy = None if own["numpy"] is None else tuple(own["numpy"])
    Generators([device]).set(States(own["torch"], numpy, own["python"]))
    for generator, state in zip(_of_loaders(trainer), own.get("loaders", ()), strict=False):
        generator.set_state(state)


def _of_loaders(trainer: L.Trainer) -> list[torch.Generator]:
    combined = trainer.fit_loop._combined_loader
    loaders = [] if combined is None else combined.flattened
    found = (getattr(of, "generator", None) for loader in loaders for of in (loader, getattr(loader, "sampler", None)))
    return [generator for generator in found if generator is not None]
