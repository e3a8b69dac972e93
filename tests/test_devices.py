"""What a run owes to its device: nothing but rounding. Each test runs on CPUs too, which shows that it can."""

import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from conftest import METHODS, Regression
from optimizer_steps import DTYPES, attached
from stacked_runs import DEVICES
from zolightning.callbacks import ZerothOrder
from zolightning.optim import HiZOO, MeZO, StepRecord, SubspaceOptimizer, ZerothOrderOptimizer
from zolightning.strategies import ZerothOrderDDP, ZerothOrderFSDP

# Noise, sums and quotients that are rounded alike everywhere
EXACT = ("mezo-all", "mezo-low-byte", "mezo-adam-weight-decay", "hizoo-centered", "sparse-mezo", "sparse-mezo-fixed")
CLOSE = ("hizoo-l", "lozo-momentum", "grzo")  # products or means of the device's libraries


def on_gpu(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.gpu)


def small_net(device: str, dtype: torch.dtype) -> nn.Module:
    """Weights of which some are updated in one launch, of multiples of 16 elements, and some are not."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(33, 16), nn.Tanh(), nn.Linear(16, 5)).to(device, dtype)


def values_of(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().cpu().clone().view(torch.int16) for parameter in net.parameters()]


def made(name: str, net: nn.Module) -> ZerothOrderOptimizer:
    return attached(METHODS[name], net, lr=1e-3, seed=3)


def test_other_tests_do_not_see_the_gpu_of_this_machine() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
@pytest.mark.parametrize(
    ("source", "target"), [("cpu", "cpu"), on_gpu("cuda", "cuda"), on_gpu("cuda", "cpu"), on_gpu("cpu", "cuda")]
)
def test_a_record_replays_to_the_same_weights(source: str, target: str, name: str, dtype: torch.dtype) -> None:
    trained, replayed = small_net(source, dtype), small_net(target, dtype)
    optimizer, fresh = made(name, trained), made(name, replayed)
    inputs = torch.randn(8, 33).to(source, dtype)
    for step in range(5):
        if step == 3 and isinstance(optimizer, SubspaceOptimizer):
            optimizer.resample()
        record: StepRecord = optimizer.estimate(lambda: trained(inputs).float().square().mean())
        optimizer.step()
        fresh.apply(record)
    optimizer.fold(), fresh.fold()
    for one, other, before in zip(
        trained.parameters(), replayed.parameters(), small_net("cpu", dtype).parameters(), strict=True
    ):
        one, other = one.detach().cpu(), other.detach().cpu()
        assert not torch.equal(one, before)
        if source == target or name in EXACT:
            assert torch.equal(one, other)
        else:
            moved = (one.float() - before.float()).abs().max()
            # Another last bit of the weight itself, or of a sum of what has moved it
            error = (one.float() - other.float()).abs() - torch.finfo(dtype).eps * before.float().abs()
            assert error.max() <= 1e-3 * moved


@DEVICES
@pytest.mark.parametrize("name", ["mezo", "mezo-low-byte", "hizoo", "lozo"])
def test_a_rate_of_0_moves_no_bit(device: str, name: str) -> None:
    """However often weights are perturbed, updated and folded."""
    net, inputs = small_net(device, torch.bfloat16), torch.randn(8, 33).to(device, torch.bfloat16)
    before, optimizer = values_of(net), made(name, net)
    for group in optimizer.param_groups:
        group["lr_scale"] = 0.0  # as at the end of a schedule
    for _ in range(1000 if device == "cuda" else 50):
        optimizer.estimate(lambda: net(inputs).float().square().mean())
        optimizer.step()
        optimizer.fold()
    assert all(torch.equal(one, other) for one, other in zip(before, values_of(net), strict=True))


class Watching(L.Callback):
    """Keeps records, and what was allocated on a GPU when training began."""

    def __init__(self) -> None:
        self.records: list[StepRecord | None] = []
        self.allocated = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            self.allocated = torch.cuda.memory_allocated(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, ZerothOrderOptimizer)
        self.records.append(optimizer.record)


@DEVICES
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("method", [partial(MeZO, lr=1e-6, num_queries=2), partial(HiZOO, lr=1e-6)])
def test_one_rank_of_zo_ddp_does_what_a_process_without_a_strategy_does(
    device: str,
    method: Callable[..., ZerothOrderOptimizer],
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
) -> None:
    """On a GPU by NCCL, whose group of one does what groups of many do; and without buckets for gradients."""
    found = []
    for strategy in ("auto", ZerothOrderDDP(check_interval=3)):
        module, watching = make_regression(width=2**14), Watching()
        trainer = make_trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            strategy=strategy,
            use_distributed_sampler=False,  # which shuffles
            max_steps=7,
            callbacks=[ZerothOrder(partial(method, seed=2)), watching],
        )
        gc.collect()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        trainer.fit(module, regression_data())
        assert trainer.strategy.model is module  # bare
        weights = {name: weight.detach().cpu() for name, weight in module.state_dict().items()}
        found.append((watching.records, weights, watching.allocated - before))
        module.cpu()
        del trainer
    (records, weights, allocated), (ranked, rank_weights, rank_allocated) = found
    assert torch.distributed.is_initialized()
    assert torch.distributed.get_backend() == ("nccl" if device == "cuda" else "gloo")
    assert len(records) == 7 and ranked == records
    assert all(torch.equal(rank_weights[name], weight) for name, weight in weights.items())
    weight_bytes = sum(weight.nbytes for weight in weights.values())
    assert rank_allocated - allocated < weight_bytes / 4  # DistributedDataParallel would hold as much again


class Sharded(Regression):
    """Shards one of its two layers, and is validated before it is trained."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ZerothOrderFSDP) and not isinstance(self.net[3], FSDPModule):
            fully_shard(self.net[3], mesh=self.trainer.strategy.device_mesh["data_parallel"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), sync_dist=True)


@DEVICES
@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_one_rank_of_zo_fsdp_goes_on_as_a_process_without_a_strategy_does(
    device: str,
    make_trainer: Callable[..., L.Trainer],
    regression_data: Callable[..., DataLoader],
    tmp_path: Path,
) -> None:
    """One layer is sharded, and is on the GPU before the others are; its vector is not there while they run."""
    found = []
    for strategy in ("auto", "zo_fsdp"):
        records, path = [], None
        for max_epochs in (1, 2):
            watching = Watching()
            trainer = make_trainer(
                accelerator="gpu" if device == "cuda" else "cpu",
                strategy=strategy,
                use_distributed_sampler=False,
                max_epochs=max_epochs,
                callbacks=[ZerothOrder(partial(MeZO, lr=1e-2)), watching],
            )
            trainer.validate(module := Sharded(), regression_data(), verbose=False)
            trainer.fit(module, regression_data(), regression_data(), ckpt_path=path)
            trainer.save_checkpoint(path := tmp_path / f"{strategy}-{max_epochs}.ckpt")
            records += watching.records
        found.append((records, torch.load(path, map_location="cpu", weights_only=False)["state_dict"]))
    (records, weights), (ranked, rank_weights) = found
    assert len(records) == 14 and ranked == records
    assert all(torch.equal(rank_weights[name], weight) for name, weight in weights.items())
