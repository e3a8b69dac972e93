"""The strategy ``zo_ddp``, whose ranks hold the same weights and exchange losses; importing this file registers it."""

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
from torch.distributed import ReduceOp

from zolightning.checks import require_integer
from zolightning.optim import ZerothOrderOptimizer
from zolightning.strategies.ranks import CHECK_INTERVAL, Layout, leave_at_exit, reduced


class ZerothOrderDDP(DDPStrategy):
    """Replicates the weights and exchanges losses instead of gradients: ``Trainer(strategy="zo_ddp")``.

    Each rank evaluates its share of a step, the ranks exchange one sum of a few numbers, and all of them make the same
    update. `perturbation_parallel_size` defines the shares. At 1, ranks split the batch (data parallelism). At the
    number of ranks, all of them read the same rows and split the evaluations: the queries and, if there are fewer
    queries than ranks, their two signs (the perturbation parallelism of DistZO2, arXiv 2507.03211). Losses and weights
    then have the bits of a single process, unless that process batches evaluations. In between, ranks form groups of
    that many neighbours; the batch is split among the groups and the evaluations within each group: 8 ranks with a size
    of 2 split the batch in 4 parts and the evaluations in 2. If evaluations cannot be split evenly, some ranks have one
    less. Validation splits its rows over all ranks.

    Devices, nodes, launchers, samplers and collectives are those of ``ddp``, on CPUs (gloo) and GPUs (NCCL). The module
    is not wrapped in DistributedDataParallel, which would allocate gradient buckets as large as the trainable weights
    and broadcast buffers before every step, and ``reduce`` does not wait at a barrier first. Rank 0 broadcasts
    parameters and buffers once, before the first step; buffers that the loss writes differ between ranks afterwards.

    Args:
        accelerator: set by the Trainer, as are the next four arguments if it has values for them.
        parallel_devices: the devices of this node, one for each process.
        cluster_environment: what started the processes (torchrun, SLURM, ...); detected if None.
        checkpoint_io: how checkpoints are written.
        precision_plugin: the plugin for the Trainer's `precision`.
        process_group_backend: gloo, nccl or another backend of ``torch.distributed``; if None, that of the devices.
        timeout: how long a rank waits for another one before it fails.
        start_method: how the processes of a node are started: popen, spawn, fork or forkserver; fork in a notebook.
        perturbation_parallel_size: how many ranks share the evaluations of a step on the same rows; divides the number
            of ranks.
        check_interval: number of steps between two comparisons of the ranks' weights, by checksums.

    Attributes:
        batch: the arguments of the training step that runs; None between steps.

    Raises:
        MisconfigurationException: if the ranks do not divide into groups; before the first step, if an optimizer reads
            gradients, or a step has fewer evaluations than a group has ranks.
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
        perturbation_parallel_size: int = 1,
        check_interval: int = CHECK_INTERVAL,
    ) -> None:
        require_integer("perturbation_parallel_size", perturbation_parallel_size)
        require_integer("check_interval", check_interval)
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
        self.perturbation_parallel_size = perturbation_parallel_size
        self.check_interval = check_interval
        self.batch: Any = None

    @property
    def layout(self) -> Layout:
        """How the ranks divide a step."""
        return Layout(self.num_nodes * self.num_processes, self.perturbation_parallel_size)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share the evaluations of a step read the same training rows; elsewhere each has its own."""
        module = self.lightning_module
        if module is not None and not module.trainer.training:
            return super().distributed_sampler_kwargs
        return {"num_replicas": self.layout.data_parallel_size, "rank": self.layout.data_rank(self.global_rank)}

    def set_world_ranks(self) -> None:
        ranks, size = self.layout.world_size, self.perturbation_parallel_size
        if ranks % size:
            raise MisconfigurationException(
                f"`perturbation_parallel_size` is {size}, which does not divide the number of ranks, {ranks} "
                "(`trainer.devices` times `trainer.num_nodes`)."
            )
        super().set_world_ranks()

    def setup_environment(self) -> None:
        super().setup_environment()
        leave_at_exit()

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        for optimizer in self.optimizers:
            if not isinstance(optimizer, ZerothOrderOptimizer):
                raise MisconfigurationException(
                    f"`trainer.strategy` is 'zo_ddp', under which no gradients are averaged, but the optimizer is "
                    f"{type(optimizer).__name__}. Use 'ddp', or a zeroth-order method (the ZerothOrder callback)."
                )
            self.check(optimizer)

    def check(self, optimizer: ZerothOrderOptimizer) -> None:
        """Refuses a method whose steps have fewer evaluations than ranks that share them.

        Raises:
            MisconfigurationException: naming both numbers.
        """
        evaluations = len(optimizer.estimator.probes(optimizer.num_queries))
        if evaluations < self.perturbation_parallel_size:
            raise MisconfigurationException(
                f"`perturbation_parallel_size` is {self.perturbation_parallel_size}, but a step of "
                f"{type(optimizer).__name__} has {evaluations} evaluations to share "
                f"({type(optimizer.estimator).__name__}, `num_queries` {optimizer.num_queries}). Use at most "
                f"{evaluations}, or more queries."
            )

    def configure_ddp(self) -> None:
        """Copies the parameters and buffers of rank 0 to all ranks, without wrapping the module."""
        assert self.model is not None
        _sync_module_states(self.model)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.batch = args
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.batch = None

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        return reduced(tensor, group, reduce_op)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register("zo_ddp", cls, description="ranks that exchange losses only")


ZerothOrderDDP.register_strategies(StrategyRegistry)
