"""What the benchmarks compare: the rows of their tables, each a way to make a training step."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.bench.published import PublishedMeZO
from zolightning.blocks import Bandit, Blocks, BlockSchedule, Cyclic, Order
from zolightning.evaluation.graph_capture import CudaCapture
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.losses import LossAndTerms
from zolightning.evaluation.perturbed import Perturbed
from zolightning.layers import find_layers
from zolightning.optim import EGGROLL, LOZO, ZOMOPI, HiZOO, MeZO, SparseMeZO, SubZero, ZOMuon
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.estimators import ZScores
from zolightning.optim.subspace_weights import SubspaceWeights

Evaluate = Callable[[], Tensor]
Step = Callable[[Evaluate], object]

# Small, so that hundreds of steps on random tokens leave the losses finite.
LR, EPS = 1e-7, 1e-3
RANK, POWER_RANK = 64, 16


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str  # name in the table
    # takes a model and returns its training step: a function that takes the loss of a batch
    make: Callable[[nn.Module], Step]
    forwards: int = 2  # how often a step evaluates the loss
    steps: int = 1  # steps made by one call, more than one where they differ in cost; their mean is reported
    # environment variables that the row needs from the start of its process
    environment: tuple[tuple[str, str], ...] = ()


class OptimizerStep:
    """A step of one of our methods, without Lightning around it.

    Args:
        method: makes the optimizer from parameters, such as ``partial(MeZO, lr=1e-6)``.
        model: the model that is trained.
        parameters: those of its parameters that move; all if not given.
        evaluations_per_forward: how many evaluations share a forward of the model.
        cuda_graphs: whether the model's forward is replayed from CUDA graphs.
    """

    def __init__(
        self,
        method: Callable[..., ZerothOrderOptimizer],
        model: nn.Module,
        parameters: Iterable[nn.Parameter] | None = None,
        evaluations_per_forward: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        self.evaluations_per_forward = evaluations_per_forward
        self.optimizer = method(model.parameters() if parameters is None else parameters)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`update_precision` is 'native'")  # the row says so by its name
            self.optimizer.attach(nn.ModuleDict({"model": model}), evaluations_per_forward, cuda_graphs=cuda_graphs)
        if isinstance(self.optimizer, SubspaceWeights):
            self.optimizer.fold_every_step = False  # as under a Trainer without callbacks of others

    def __call__(self, evaluate: Evaluate) -> None:
        self.optimizer.estimate(evaluate)
        self.optimizer.step()


class BlockSteps(OptimizerStep):
    """Six steps in blocks: two in each of three layers that are evenly spread over the depth.

    So their mean is the mean over all depths. A block is left after two steps, which is more often than in training:
    the cost of changing blocks counts for more here. If `beside`, parameters outside of the layers move in every
    step too; otherwise they are frozen.
    """

    blocks, interval = 3, 2

    def __init__(
        self, method: Callable[..., ZerothOrderOptimizer], order: Callable[[], Order], beside: bool, model: nn.Module
    ) -> None:
        super().__init__(method, model)
        stack = find_layers(model)
        layers = [[*stack.parameters(index).values()] for index in range(len(stack))]
        count = min(self.blocks, len(stack))
        chosen = [(2 * number + 1) * len(stack) // (2 * count) for number in range(count)]
        moving = {parameter for index in chosen for parameter in layers[index]}
        in_layers = {parameter for layer in layers for parameter in layer}
        never = (in_layers if beside else set(model.parameters())) - moving
        blocks = Blocks({f"layer_{index}": layers[index] for index in chosen}, tuple(never))
        BlockSchedule(blocks, order(), self.interval).attach(self.optimizer)

    def __call__(self, evaluate: Evaluate) -> None:
        for _ in range(self.blocks * self.interval):
            super().__call__(evaluate)


class ResamplingStep(OptimizerStep):
    """A step of a subspace method with a resampling: it folds its core into the weights and draws new subspaces."""

    optimizer: SubspaceWeights

    def __call__(self, evaluate: Evaluate) -> None:
        super().__call__(evaluate)
        self.optimizer.resample()


def state_bytes(step: Step) -> int:
    """Bytes that a step keeps besides the weights."""
    return step.optimizer.state_bytes() if isinstance(step, OptimizerStep) else 0


@torch.no_grad()
def _forward(evaluate: Evaluate) -> Tensor:
    return evaluate()


class _GraphedForward:
    """A forward replayed from a CUDA graph, as in steps with graphs."""

    def __init__(self, model: nn.Module) -> None:
        self.graphs = GraphedNetwork(model, CudaCapture(next(model.parameters()).device))

    @torch.no_grad()
    def __call__(self, evaluate: Evaluate) -> None:
        self.graphs.begin_step()
        self.graphs.evaluate(lambda: LossAndTerms(evaluate(), torch.ones(())), [Perturbed({})])


def _ours(name: str, method: Callable[..., ZerothOrderOptimizer], forwards: int = 2, **options: Any) -> Row:
    return Row(name, partial(OptimizerStep, method, **options), forwards)


def _blocks(
    name: str,
    method: Callable[..., ZerothOrderOptimizer],
    order: Callable[[], Order],
    forwards: int,
    beside: bool = False,
) -> Row:
    return Row(name, partial(BlockSteps, method, order, beside), forwards, BlockSteps.blocks * BlockSteps.interval)


def _one_layer(shared: bool, model: nn.Module) -> OptimizerStep:
    """A step of the layer at a third of the depth; if `shared`, the layers below it are computed once a step."""
    stack = find_layers(model)
    parameters = stack.parameters(len(stack) // 3).values()
    step = OptimizerStep(_MEZO, model, parameters)
    if not shared:
        step.optimizer.evaluator.prefix.layers = ()
    return step


_MOPI = partial(ZOMOPI, lr=LR, eps=EPS, rank=RANK, power_rank=POWER_RANK, seed=0)
FORWARD = Row("forward", lambda model: _forward, forwards=1)
PUBLISHED = Row("published", lambda model: PublishedMeZO(model.parameters(), LR, EPS).step)
# What is left of its cost where only the logits are made that are read, in batches of ours
PUBLISHED_ANSWERS = Row("published, answer logits", PUBLISHED.make)
_MEZO = partial(MeZO, lr=LR, eps=EPS, seed=0)
_HIZOO = partial(HiZOO, lr=LR, eps=EPS, seed=0)
_FOCUS = partial(_HIZOO, smoothing=1e-5)
_LOZO = partial(LOZO, lr=LR, eps=EPS, rank=4, seed=0)
DENSE = [
    _ours("MeZO", _MEZO),
    _ours("MeZO native", partial(_MEZO, update_precision="native")),
    _ours("MeZO low byte", partial(_MEZO, update_precision="low_byte")),
    _ours("MeZO rademacher", partial(_MEZO, noise="rademacher")),
    _ours("MeZO, both signs in one forward", _MEZO, evaluations_per_forward=2),
    _ours("HiZOO", _HIZOO, 3),
    _ours("HiZOO-L", partial(_HIZOO, curvature="row_column"), 3),
    _ours("Sparse-MeZO", partial(SparseMeZO, lr=LR, eps=EPS, seed=0)),
    Row("MeZO, layer L/3", partial(_one_layer, False)),
    Row("MeZO, layer L/3, prefix shared", partial(_one_layer, True)),
    _blocks("MeZO-BCD, layers", _MEZO, Cyclic, 2),
    _blocks("FOCUS, cyclic", _FOCUS, Cyclic, 3),
    _blocks("FOCUS, bandit", _FOCUS, Bandit, 3),
    _blocks("FOCUS, embeddings and head beside", _FOCUS, Cyclic, 3, beside=True),
]
SUBSPACE = [
    _ours("LOZO rank 4", _LOZO),
    _ours("SubZero rank 64", partial(SubZero, lr=LR, eps=EPS, rank=RANK, seed=0)),
    _ours("ZO-Muon rank 64", partial(ZOMuon, lr=LR, eps=EPS, rank=RANK, num_queries=1, seed=0)),
    _ours("ZO-MOPI rank 64, power rank 16", partial(_MOPI, num_queries=1)),
    Row("the same, resampling at every step", partial(ResamplingStep, partial(_MOPI, num_queries=1))),
    _ours("the same, 4 queries", partial(_MOPI, num_queries=4), 8),
    *(
        _ours(f"the same, {k} evaluations a forward", partial(_MOPI, num_queries=4), 8, evaluations_per_forward=k)
        for k in (2, 4, 8)
    ),
]
POPULATIONS = [
    _ours(
        f"{name}, 8 members in one forward",
        partial(method, lr=LR, eps=EPS, num_queries=8, estimator=ZScores(), seed=0),
        8,
        evaluations_per_forward=8,
    )
    for name, method in (("ES", MeZO), ("EGGROLL", EGGROLL))
]
ROWS = [FORWARD, PUBLISHED, *DENSE, *SUBSPACE, *POPULATIONS]
GRAPHED = [
    Row("forward, CUDA graphs", _GraphedForward, forwards=1),
    _ours("MeZO, CUDA graphs", _MEZO, cuda_graphs=True),
    _ours("MeZO, both signs in one forward, CUDA graphs", _MEZO, evaluations_per_forward=2, cuda_graphs=True),
    _ours("LOZO rank 4, CUDA graphs", _LOZO, cuda_graphs=True),
]
# What the loops in Triton are for
_NO_TRITON = ("ZOLIGHTNING_TRITON", "0")
PARITY = [
    Row("MeZO, loops by torch.compile", DENSE[0].make, environment=(_NO_TRITON,)),
    Row("MeZO, eager loops", DENSE[0].make, environment=(_NO_TRITON, ("ZOLIGHTNING_COMPILE", "0"))),
]
BY_NAME = {row.name: row for row in [*ROWS, PUBLISHED_ANSWERS, *GRAPHED, *PARITY]}
