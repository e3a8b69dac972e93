"""Steps with the network's forward replayed: a stand-in for CUDA graphs, and what they are tried on."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.optim import MeZO, StepRecord, ZerothOrderOptimizer

_SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select")
_ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "set_")


class Recording(TorchDispatchMode):
    """The operations that a callable runs, with the very tensors that they read and write: a graph has no more."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _ALLOCATING:
            self.calls.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():  # a replay calls no functions
            for func, args, kwargs, output in self.calls:
                for tensor, again in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(tensor, Tensor) and tensor.data_ptr() != again.data_ptr():
                        tensor.copy_(again)


class NoSynchronization(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ in _SYNCHRONIZING:
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


class CPUCapture:
    """Stands in for :class:`CudaCapture`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.recorded = self.replayed = 0

    def warm_up(self, run: Callable[[], Any]) -> Any:
        try:
            with NoSynchronization():
                return run()
        except RuntimeError as error:  # as CUDA's, which have no frame of their own
            frame = error.__traceback__
            while frame.tb_next.tb_next is not None:
                frame = frame.tb_next
            frame.tb_next = None
            raise

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        with Recording() as recording:
            output = run()

        def replay() -> None:
            self.replayed += 1
            recording.replay()

        return output, replay


class Module(nn.Module):
    """Holds a network, counts its forwards, and has the loss of some inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, *inputs: Any, **options: Any) -> Tensor:
        output = self.net(*inputs, **options)
        return (output if isinstance(output, Tensor) else output.logits).square().mean()


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, device: str = "cpu") -> Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Module(make().to(device, dtype)).eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def llama() -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = AutoConfig.for_model("llama", vocab_size=13, num_key_value_heads=1, head_dim=4, use_cache=False, **sizes)
    return AutoModelForCausalLM.from_config(config)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def language(length: int, seed: int) -> tuple[Tensor, ...]:
    """Tokens, a mask of four dimensions and positions: of others transformers asks the device whether they pad."""
    ids = torch.randint(13, (2, length), generator=torch.Generator().manual_seed(seed))
    return ids, torch.ones(2, 1, length, length, dtype=torch.bool).tril(), torch.arange(length)[None].expand(2, -1)


def train(
    module: Module,
    method: Callable[..., ZerothOrderOptimizer],
    batches: list[tuple[Tensor, ...]],
    capture: Any = None,
    evaluations_per_forward: int = 1,
) -> list[StepRecord]:
    optimizer = method(module.parameters(), seed=5)
    optimizer.attach(module, evaluations_per_forward)
    if capture is not None:
        optimizer.evaluator.graphs = GraphedNetwork(module.net, capture)
    records = []
    for step, batch in enumerate(batches):
        if step == 3 and hasattr(optimizer, "resample"):
            optimizer.resample()
        records.append(optimizer.estimate(partial(module.loss, *batch)))
        optimizer.step()
    optimizer.detach()
    return records


def steps_of(module: Module, capture: Any, limit: int = 16) -> tuple[Callable[..., StepRecord], MeZO]:
    """A function that takes a step on some inputs."""
    optimizer = MeZO(module.parameters(), lr=1e-2, seed=5)
    optimizer.attach(module)
    optimizer.evaluator.graphs = GraphedNetwork(module.net, capture, limit)

    def step(*inputs: Any, **options: Any) -> StepRecord:
        record = optimizer.estimate(lambda: module.loss(*inputs, **options))
        optimizer.step()
        return record

    return step, optimizer


def equal(one: list[StepRecord], other: list[StepRecord]) -> bool:
    return [vars(record) for record in one] == [vars(record) for record in other]
