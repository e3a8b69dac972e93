"""The states of the random generators in a checkpoint: a loader shuffles by them, and a data set may draw from them."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from zolightning.checkpoints.running_metrics import of_all_ranks
from zolightning.evaluation.randomness import Generators, States


def generators_of_all_ranks(trainer: L.Trainer) -> list[dict[str, Any]]:
    """The states of torch's, NumPy's and Python's global generators by rank, as plain values, on the first rank."""
    device = trainer.strategy.root_device
    states = Generators([device]).states()
    numpy = (
        None if states.numpy is None else [part.tolist() if part is states.numpy[1] else part for part in states.numpy]
    )
    return of_all_ranks(
        trainer, {"device": device.type, "torch": states.torch, "numpy": numpy, "python": states.python}
    )


def restore_generators(trainer: L.Trainer, saved: Sequence[dict[str, Any]]) -> None:
    """Puts back what :func:`generators_of_all_ranks` found, on as many ranks and the same kind of device."""
    device = trainer.strategy.root_device
    if len(saved) != trainer.world_size or saved[trainer.global_rank]["device"] != device.type:
        return
    own = saved[trainer.global_rank]
    numpy = None if own["numpy"] is None else tuple(own["numpy"])
    Generators([device]).set(States(own["torch"], numpy, own["python"]))
