"""The memory that a run of a Trainer will take, and the refusal of a run that does not fit."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from zolightning.callbacks.block_coordinate_descent import BlockCoordinateDescent
from zolightning.callbacks.subspace_resampling import SubspaceResampling
from zolightning.callbacks.zeroth_order import ZerothOrder
from zolightning.memory import (
    BatchShape,
    MemoryPlan,
    Trained,
    kept_direction_bytes,
    plan,
    sketch_bytes,
    state_bytes,
    with_bases_of_inputs,
)
from zolightning.memory_alternatives import alternatives
from zolightning.messages import in_units
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.partners import find_callbacks
from zolightning.rank_zero import rank_zero_warn


def memory_plan(
    trainer: L.Trainer, module: L.LightningModule, optimizer: ZerothOrderOptimizer, trained: list[Trained]
) -> MemoryPlan:
    """The memory plan of a run, unless :func:`refuse_too_large` refuses it.

    Args:
        trainer: the Trainer, whose callbacks say how the method's state differs from that of the method alone.
        module: the module that trains.
        optimizer: its method.
        trained: the weights that train at some time.
    """
    (zeroth_order, *_) = find_callbacks(trainer, ZerothOrder)
    setting = zeroth_order.method, _largest_batch(trainer, zeroth_order), optimizer.evaluator.graphs is not None
    bases = next((found.bases for found in find_callbacks(trainer, SubspaceResampling)), None)
    trained = trained if bases is None else with_bases_of_inputs(module, trained)
    planned = plan(module, trained, *setting)
    for blocks in find_callbacks(trainer, BlockCoordinateDescent):
        if blocks.left_state == "reset":
            largest = blocks.largest(optimizer)
            moving = state_bytes([one for one in trained if one.weight in largest], zeroth_order.method)
            others = state_bytes([one for one in trained if one.weight not in largest], zeroth_order.method)
            planned = replace(planned, state=moving.device + others.at_rest, host=moving.host)
    if bases is not None:
        directions = bases.skip + max(group["rank"] for group in optimizer.param_groups)
        kept = kept_direction_bytes(trained, directions) if bases.decay else 0
        planned = replace(planned, state=planned.state + kept, sketches=sketch_bytes(trained, directions))
    if offloaded := [parameter.nbytes for parameter in module.parameters() if parameter.is_meta]:
        fetched, away = max(offloaded), sum(offloaded)
        at_rest = {"weights": planned.weights - away, "host": planned.host + away}
        planned = replace(planned, **at_rest, scratch=planned.scratch + fetched)
    if isinstance(wrapped := trainer.strategy.model, DistributedDataParallel):
        planned = replace(planned, ddp_buckets=sum(p.nbytes for p in wrapped.parameters() if p.requires_grad))
    device = trainer.strategy.root_device
    if device.type == "cuda":
        held = {parameter.device for parameter in module.parameters() if not parameter.is_meta}
        devices = held | {device}  # several by a device map
        refuse_too_large(planned, sum(map(_free_bytes, devices)), partial(_others, planned, module, trained, *setting))
    return planned


def refuse_too_large(planned: MemoryPlan, free: int, others: Callable[[], Mapping[str, MemoryPlan]]) -> None:
    """Warns of a run that will not fit into the free bytes if the estimate of its forward pass is right.

    Raises:
        MisconfigurationException: if it needs more even without a forward pass. The message gives the sizes of ways to
            train the same network that need less, by the settings that choose them.
    """
    if planned.peak <= free:
        return
    needed = in_units(planned.peak)
    sizes = {name: other.peak for name, other in others().items() if other.peak < planned.peak}
    width = max(map(len, sizes), default=0)
    lines = [
        f"The run needs {needed} of the device's memory, but only {in_units(free)} are free: {planned}.",
        f"Use a smaller batch{', or one of these:' if sizes else '.'}",
        *(f"  {name:{width}}  {in_units(peak)}{'' if peak <= free else ', too much'}" for name, peak in sizes.items()),
    ]
    if planned.certain > free:
        raise MisconfigurationException("\n".join(lines))
    rank_zero_warn("\n".join(lines))


def _others(planned: MemoryPlan, *setting: Any) -> dict[str, MemoryPlan]:
    """Plans of other ways to train the same network, without gradient buckets."""
    without_buckets = (
        {"trainer.strategy zo_ddp, as below": replace(planned, ddp_buckets=0)} if planned.ddp_buckets else {}
    )
    return without_buckets | alternatives(*setting)


def _largest_batch(trainer: L.Trainer, zeroth_order: ZerothOrder) -> BatchShape | None:
    """The largest input of a forward pass in a step; None if the datamodule does not tell."""
    largest = getattr(getattr(trainer, "datamodule", None), "largest_batch", None)
    if largest is None:
        return None
    rows, length, positions = largest(zeroth_order.micro_batch_size)
    return BatchShape(rows * zeroth_order.evaluations_per_forward, length, positions)


def _free_bytes(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process holds or can still allocate."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
