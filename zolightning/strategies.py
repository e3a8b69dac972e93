"""Strategies of Lightning for training without gradients; importing this file registers them by name."""

from datetime import timedelta
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import device

from zolightning.optim import ZerothOrderOptimizer


class ZerothOrderDDP(DDPStrategy):
    """Data-parallel ranks that exchange losses and never gradients: ``Trainer(strategy="zo_ddp")``.

    Each rank evaluates its share of a batch, one sum of a few losses is exchanged a step, and every rank then makes
    the same update. Devices, nodes, launchers, samplers and collectives are those of ``ddp``, on CPUs (gloo) and GPUs
    (NCCL). What ``ddp`` has beside is left out: its DistributedDataParallel allocates buckets for gradients, as large
    as the trainable weights, and broadcasts buffers before every step. Here rank 0 broadcasts parameters and buffers
    once, before the first step, and the module stays bare; a buffer that the loss writes is afterwards each rank's own.

    Args:
        accelerator: set by the Trainer, as are the next four where it has them.
        parallel_devices: of this node, one a process.
        cluster_environment: that which started the processes; found out if None (torchrun, SLURM, ...).
        checkpoint_io: how checkpoints are written.
        precision_plugin: of the Trainer's `precision`.
        process_group_backend: gloo, nccl or another of ``torch.distributed``; by the devices if None.
        timeout: after which a rank that waits for another fails.
        start_method: of the processes of a node: popen, spawn, fork or forkserver; fork in a notebook.

    Raises:
        MisconfigurationException: before the first step, if an optimizer reads gradients.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Any = "popen",
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        for optimizer in self.optimizers:
            if not isinstance(optimizer, ZerothOrderOptimizer):
                raise MisconfigurationException(
                    f"`trainer.strategy` is 'zo_ddp', under which no gradients are averaged, and the optimizer is "
                    f"{type(optimizer).__name__}. Use 'ddp', or a zeroth-order method (the ZerothOrder callback)."
                )

    def configure_ddp(self) -> None:
        """Leaves the module bare, with the states of rank 0."""
        assert self.model is not None
        _sync_module_states(self.model)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register("zo_ddp", cls, description="data-parallel ranks that exchange losses only")


ZerothOrderDDP.register_strategies(StrategyRegistry)
