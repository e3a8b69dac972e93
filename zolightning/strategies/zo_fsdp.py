"""The strategy ``zo_fsdp``, which shards weights over ranks (FSDP2); importing this file registers it."""

from contextlib import suppress
from datetime import timedelta
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from zolightning.directions.shards import gathered, is_sharded, own_part, whole
from zolightning.evaluation.stacked import networks_of
from zolightning.layers import find_layers
from zolightning.messages import some
from zolightning.optim import ZerothOrderOptimizer
from zolightning.strategies.ranks import leave_at_exit, reduced


class ZerothOrderFSDP(ModelParallelStrategy):
    """Shards the weights over ranks, which gather those of a layer when it runs: ``Trainer(strategy="zo_fsdp")``.

    Ranks split the batch and exchange losses as under ``zo_ddp``, with the same losses, records and weights, up to the
    order in which losses are summed. In addition each forward gathers the weights of one layer at a time
    (``torch.distributed.fsdp.fully_shard``), perturbs them on every rank, and frees them. Updates, and the state that a
    method keeps for each weight, are sharded as well; bases and cores of subspaces are whole on every rank.

    Each layer of the network is sharded by itself, and the rest of the network together, from the weights of rank 0. A
    module whose ``configure_model`` has applied ``fully_shard`` is left as it is; its ranks must start with equal
    weights.

    All ranks must run the same number of forwards: if ``training_step`` returns None on some ranks only, the others
    wait until `timeout`.

    Checkpoints are those of a single process, written by rank 0 from whole tensors. A run can be resumed from them on
    any number of ranks, under any strategy.

    With double precision (``precision="64-true"``) choose it by its name: Lightning refuses an object of this class.

    Args:
        process_group_backend: gloo, nccl or another backend of ``torch.distributed``; if None, that of the devices.
        timeout: how long a rank waits for another one before it fails.
        layers_name: where the layers are, see :func:`~zolightning.layers.find_layers`; found if None.

    Raises:
        ValueError: before the first step, if there are no layers, or the method or one of its arguments needs whole
            weights.
        MisconfigurationException: before the first step, if an optimizer reads gradients, or a tensor of the module is
            on the device ``meta``.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        layers_name: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.layers_name = layers_name

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        leave_at_exit()

    def setup(self, trainer: L.Trainer) -> None:
        module, accelerator = self.lightning_module, self.accelerator
        assert module is not None and accelerator is not None
        named = chain(module.named_parameters(), module.named_buffers())
        if empty := [name for name, tensor in named if tensor.is_meta]:
            raise MisconfigurationException(
                f"{some(empty)} are on the device 'meta', without numbers. Make them elsewhere, or fill them in "
                "`configure_model`, after `fully_shard`: `to_empty(device=...)`, then torch's `set_model_state_dict`."
            )
        accelerator.setup(trainer)
        loops = trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop
        for loop in loops:  # in inference mode gathered weights become tensors that no training can use later
            loop.inference_mode = False
        self.model = self.precision_plugin.convert_module(module)
        if not any(isinstance(submodule, FSDPModule) for submodule in module.modules()):
            self._shard(module)
        for submodule in module.modules():
            if isinstance(submodule, FSDPModule):  # otherwise the outermost ones wait for a backward pass
                submodule.set_reshard_after_forward(True, recurse=False)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        for optimizer in self.optimizers if trainer.state.fn == TrainerFn.FITTING else ():
            if not isinstance(optimizer, ZerothOrderOptimizer):
                raise MisconfigurationException(
                    f"`trainer.strategy` is 'zo_fsdp', but the optimizer is {type(optimizer).__name__}. Use "
                    "Lightning's ModelParallelStrategy, or a zeroth-order method (the ZerothOrder callback)."
                )

    def _shard(self, module: L.LightningModule) -> None:
        """Shards the layers one by one, and then the rest of the network."""
        layers = find_layers(module, self.layers_name).layers
        parts: list[nn.Module] = [*layers]
        with suppress(ValueError):  # if the module itself holds the layers, the rest of it is not sharded
            parts += networks_of(module, chain(*(layer.parameters() for layer in layers)))[:1]
        kept: set[nn.Parameter] = set()
        for part in (*parts, module):
            part.to(self.root_device)
            for tensor in chain(part.parameters(), part.buffers()):
                if not is_sharded(tensor):
                    torch.distributed.broadcast(tensor.detach(), src=0)
            if part is not module:
                own = {p for p in part.parameters() if p.is_floating_point() and not is_sharded(p)} - kept
                if len({p.dtype for p in own}) > 1:  # which FSDP does not shard together; few stay float32 in a network
                    kept |= {p for p in own if p.dtype == torch.float32}
                fully_shard(part, mesh=self.device_mesh["data_parallel"], ignored_params=kept)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        return reduced(tensor, group, reduce_op)

    # Checkpoints: those of Lightning's base class, with whole tensors

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        if any(map(is_sharded, module.parameters())):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # takes a second

            # What is not sharded is still where it was made, and torch fills tensors of one device only
            module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.root_device))
            options = StateDictOptions(full_state_dict=True, strict=strict)
            set_model_state_dict(module, checkpoint["state_dict"], options=options)
        else:
            module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of a method, with whole tensors; empty on ranks other than the first. Call it on all ranks."""
        own: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        saved, state = own.state_dict(), {}
        for index, parameter in own.numbered(saved):
            if index in saved["state"]:
                kept = {
                    name: _whole(value, parameter, own.is_by_element(parameter, name))
                    for name, value in saved["state"][index].items()
                }
                if self.is_global_zero:
                    state[index] = kept
        return saved | {"state": state} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        optimizers: list[Any] = self.optimizers
        for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"], strict=True):
            state = {
                index: {
                    name: _own(value, parameter, optimizer.is_by_element(parameter, name))
                    for name, value in saved["state"][index].items()
                }
                for index, parameter in optimizer.numbered(saved)
                if index in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register("zo_fsdp", cls, description="ranks that share weights and exchange losses")


def _whole(value: Any, parameter: nn.Parameter, is_by_element: bool) -> Any:
    """An entry of a parameter's state, gathered from all ranks."""
    if not isinstance(value, Tensor):
        return value
    if is_by_element and not is_sharded(value):  # stored weights, which some methods save, are
        value = gathered(value, parameter)
    return whole(value).cpu()


def _own(value: Any, parameter: nn.Parameter, is_by_element: bool) -> Any:
    """This rank's part of a gathered entry, flat if it is sharded."""
    if not (isinstance(value, Tensor) and is_by_element and is_sharded(parameter)):
        return value
    return own_part(value.flatten(), parameter)


ZerothOrderFSDP.register_strategies(StrategyRegistry)
