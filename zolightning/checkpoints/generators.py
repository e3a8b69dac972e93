"""The states of the random generators in a checkpoint: loaders shuffle with them, and a data set may draw from them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor

from zolightning.evaluation.randomness import Generators, States
from zolightning.evaluation.replaced import replaced
from zolightning.strategies.ranks import of_all_ranks


def generators_of_all_ranks(trainer: L.Trainer) -> list[dict[str, Any]]:
    """The states of generators by rank, as plain values, on the first rank.

    They are the global ones of torch, NumPy and Python, and those that the training loaders were given; with them is
    what :func:`drawing_again` needs.
    """
    device = trainer.strategy.root_device
    states = Generators([device]).states()
    numpy = (
        None if states.numpy is None else [part.tolist() if part is states.numpy[1] else part for part in states.numpy]
    )
    loaders = [generator.get_state() for generator in _of_loaders(trainer)]
    orders = [_order(divided) for divided in _divided(trainer)]
    return of_all_ranks(
        trainer,
        {
            "device": device.type,
            "torch": states.torch,
            "numpy": numpy,
            "python": states.python,
            "loaders": loaders,
            "orders": orders,
        },
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


@contextmanager
def drawing_again(trainer: L.Trainer, saved: Sequence[dict[str, Any]]) -> Iterator[None]:
    """A context in which samplers that Lightning divides among ranks give the order of the epoch that was saved.

    It draws an epoch's order from such a sampler, that of torchdata's loaders for one, when its own sampler, which has
    no state, begins; and restoring a loader begins it twice.
    """
    with ExitStack() as stack:
        if len(saved) == trainer.world_size:
            for divided, order in zip(_divided(trainer), saved[trainer.global_rank].get("orders", ()), strict=False):
                if order.shape == (len(divided),):
                    stack.enter_context(replaced(divided, "_sampler", order.tolist()))
        yield


def _of_loaders(trainer: L.Trainer) -> list[torch.Generator]:
    owners = [owner for loader in _loaders(trainer) for owner in (loader, getattr(loader, "sampler", None))]
    owners += [divided._sampler for divided in _divided(trainer)]
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if generator is not None]


def _divided(trainer: L.Trainer) -> list[Any]:
    """What Lightning keeps of each sampler that it divides among ranks: the sampler, and the order of the epoch."""
    samplers = (getattr(getattr(loader, "batch_sampler", None), "sampler", None) for loader in _loaders(trainer))
    return [sampler.dataset for sampler in samplers if isinstance(sampler, DistributedSamplerWrapper)]


def _order(divided: Any) -> Tensor:
    """What the sampler gave for the epoch; empty if it has not been asked, or gives other things than numbers."""
    try:
        return torch.tensor(divided._sampler_list)
    except (RuntimeError, TypeError, ValueError):
        return torch.empty(0)


def _loaders(trainer: L.Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened
