"""Computes the memory that a run needs on a device from shapes, before the run.

The bytes of weights and of a method's state are exact: the method takes steps on parameters of the same shapes on
torch's ``meta`` device, which holds no data, or on the CPU if it reads numbers. Scratch memory is that of dense
perturbations. For a forward pass, the largest buffers that exist at once are estimated, for causal language models with
one MLP per layer: those of an MLP, and the logits at the positions where answers are read. CUDA graphs of a run share a
pool of their own, which is estimated as the forward's memory and its scratch once more, and a copy of the factors of
low-rank perturbations. Attention implementations that store a matrix of scores are not accounted for. GB are 1e9 bytes.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zolightning.directions.basis import Basis
from zolightning.directions.low_rank import LowRank
from zolightning.directions.second_moment import moment_bytes
from zolightning.evaluation.scratch import scratch_bytes
from zolightning.layers import FeedForward, find_layers, is_conv1d, mlp_of
from zolightning.messages import in_units
from zolightning.network.quantization import quantized_linears
from zolightning.optim.base import Method, ZerothOrderOptimizer
from zolightning.optim.record import StepRecord
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.scopes.input_moments import INPUT_DIM, Side


class Trained(NamedTuple):
    """A weight that trains, on any device."""

    weight: Tensor  # the whole weight
    shape: tuple[int, ...]  # the shape of the weight, or of the slice of it that trains
    beside: bool = False  # whether it is in no block while other weights are in blocks; some methods keep less for it
    # where a matrix has its inputs, "left" or "right", if a factor comes from these and is not drawn
    side: Side | None = None


class BatchShape(NamedTuple):
    """The shape of the input of one forward pass."""

    rows: int  # number of sequences
    length: int  # tokens of a sequence, with padding
    # at how many positions of a sequence logits are computed: 1 if answers are single tokens, otherwise one more than
    # the tokens of an answer
    positions: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on a device, by purpose."""

    weights: int  # parameters and buffers
    state: int = 0  # the method's state at its largest
    scratch: int = 0  # perturbed or dequantised weights of the layer that runs
    # an estimate for one forward pass; None for other networks, or if the batch is unknown
    activations: int | None = None
    logits: int | None = None  # an estimate, likewise
    graphs: int | None = 0  # an estimate for the pool of CUDA graphs; None if that of the forward pass is None
    sketches: int = 0  # an upper bound for the second moments of inputs, while bases are computed from activations
    ddp_buckets: int = 0  # for gradients, which DistributedDataParallel allocates and nothing here uses
    host: int = 0  # state in host memory, which is not counted

    @property
    def certain(self) -> int:
        """The bytes that are needed for a batch of any size."""
        return self.weights + self.state + self.scratch + self.ddp_buckets

    @property
    def peak(self) -> int:
        """The certain bytes and the estimates for the forward pass.

        Temporary memory of updates is not counted, because the forward pass has freed its memory by then.
        """
        return self.certain + (self.activations or 0) + (self.logits or 0) + (self.graphs or 0) + self.sketches

    def __str__(self) -> str:
        parts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "host"}
        said = [
            f"{name.replace('_', ' ')} {'not estimated' if value is None else in_units(value)}"
            for name, value in parts.items()
            if value != 0 or name not in ("graphs", "sketches", "ddp_buckets")
        ]
        return ", ".join([*said, f"in host memory {in_units(self.host)}"] if self.host else said)


def plan(
    module: nn.Module,
    trained: Iterable[Trained],
    method: Method,
    batch: BatchShape | None = None,
    cuda_graphs: bool = False,
    **changes: Any,
) -> MemoryPlan:
    """The memory that training takes.

    Args:
        module: the network, on any device, ``meta`` included; frozen weights count too.
        trained: the weights of it that train.
        method: makes an optimizer from parameters.
        batch: the input of one forward pass, with stacked evaluations; None if it is not known.
        cuda_graphs: whether the network's forward is replayed from CUDA graphs.
        **changes: attributes of the optimizer, such as ``update_precision="native"``.
    """
    trained = list(trained)
    state = state_bytes(trained, method, **changes)
    scratch = max(scratch_bytes(one.weight for one in trained), unpacked_bytes(module))
    activations, logits = _forward_bytes(module, batch)
    graphs: int | None = 0
    if cuda_graphs:
        graphs = None if activations is None or logits is None else scratch + activations + logits + state.factors
    return MemoryPlan(weight_bytes(module), state.device, scratch, activations, logits, graphs, host=state.host)


def trained_whole(weights: Iterable[Tensor], beside: bool = False) -> list[Trained]:
    """Describes weights that train as a whole."""
    return [Trained(weight, tuple(weight.shape), beside) for weight in weights]


def trained_by(optimizer: ZerothOrderOptimizer) -> list[Trained]:
    """Describes the parameters that an optimizer moves now, and those at rest if they keep their state."""
    parameters = [parameter for _, _, parameter in optimizer.trainable()]
    if optimizer.param_groups[0].get("left_state") == "keep":
        parameters += [parameter for _, parameter in optimizer.at_rest()]
    return [Trained(p, optimizer.trainable_shape(p), optimizer.blocks.is_beside(p)) for p in parameters]


def with_bases_of_inputs(module: nn.Module, trained: Iterable[Trained]) -> list[Trained]:
    """The same weights, of which matrices other than embeddings have their factors from inputs (ActivationBases)."""
    embedded = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    across = {id(child.weight) for child in module.modules() if is_conv1d(child)}
    found = []
    for one in trained:
        is_read = len(one.shape) == 2 and min(one.shape) > 1 and id(one.weight) not in embedded
        side: Side = "left" if id(one.weight) in across else "right"
        found.append(one._replace(side=side) if is_read else one)
    return found


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; shared ones count once."""
    return sum(tensor.nbytes for tensors in (module.parameters(), module.buffers()) for tensor in tensors)


def sketch_bytes(trained: Iterable[Trained], directions: int) -> int:
    """Bytes of the second moments of the matrices' inputs, from which that many `directions` of each are taken."""
    return sum(moment_bytes(size, directions) for size in _input_sizes(trained))


def kept_direction_bytes(trained: Iterable[Trained], directions: int) -> int:
    """Bytes of the directions themselves and of their eigenvalues, where they are kept for the next refresh."""
    return sum(4 * ((size + 1) * min(directions, size) + 1) for size in _input_sizes(trained))


def _input_sizes(trained: Iterable[Trained]) -> list[int]:
    return [one.shape[INPUT_DIM[one.side]] for one in trained if one.side is not None]


class StateBytes(NamedTuple):
    """Bytes of a method's state."""

    device: int  # those on the device
    host: int  # those on the host
    factors: int  # of those on the device, the factors of low-rank perturbations
    at_rest: int  # of those on the device, what is kept of a block that does not move, where its state is reset


def state_bytes(trained: Iterable[Trained], method: Method, **changes: Any) -> StateBytes:
    """The state when it is largest: for each shape by two steps of the method on it, with a :meth:`fold` in between."""
    counted: dict[Hashable, StateBytes] = {}
    found = []
    for weight, shape, beside, side in trained:
        key = (shape, weight.dtype, beside, side)
        if key not in counted:
            on = partial(torch.zeros, *shape, dtype=weight.dtype)
            try:
                counted[key] = _state_of(nn.Parameter(on(device="meta")), method, beside, side, changes)
            except RuntimeError:  # a method of the user's may read numbers (`item()`, `if`), which need data
                counted[key] = _state_of(nn.Parameter(on(device="cpu")), method, beside, side, changes)
        found.append(counted[key])
    return StateBytes(*(sum(each) for each in zip(*found, strict=True))) if found else StateBytes(0, 0, 0, 0)


def _state_of(
    stand_in: nn.Parameter, method: Method, beside: bool, side: Side | None, changes: dict[str, Any]
) -> StateBytes:
    optimizer = method([stand_in])
    if beside:
        optimizer.blocks.parameters.append(frozenset())
    for name, value in changes.items():
        setattr(optimizer, name, value)
    if side is not None and isinstance(optimizer, SubspaceOptimizer) and (matrix := optimizer.matrix_of(stand_in)):
        size = matrix.shape[INPUT_DIM[side]]
        factor = torch.zeros(size, min(matrix.rank, size), device=stand_in.device)
        optimizer.resample({stand_in: Basis(**{side: factor})})
    # Losses that differ: a method may divide by their spread.
    losses = tuple(map(float, range(len(optimizer.estimator.probes(optimizer.num_queries)))))
    record = StepRecord(
        0, optimizer.param_groups[0]["seed"], (1e-9,), (1.0,) * optimizer.num_queries, losses, len(losses)
    )
    optimizer.apply(record)
    optimizer.fold()
    optimizer.apply(replace(record, step=1, folds=optimizer.param_groups[0].get("folds", 0)))
    changed = [change for change in optimizer.offsets().values() if isinstance(change, LowRank)]
    factors = [factor for change in changed for factor in (change.basis.left, change.basis.right, change.pending)]
    kept = optimizer.state.get(stand_in, {})
    return StateBytes(
        optimizer.state_bytes(),
        optimizer.host_bytes(),
        sum(factor.nbytes for factor in factors if factor is not None),
        sum(getattr(value, "nbytes", 0) for name, value in kept.items() if name in optimizer.kept_at_rest),
    )


def unpacked_bytes(module: nn.Module) -> int:
    """Bytes of the largest quantised linear map's weight, dequantised while it runs."""
    maps = (linear for _, linear in quantized_linears(module))
    return max((m.in_features * m.out_features * m.weight_scale.element_size() for m in maps), default=0)


def _forward_bytes(module: nn.Module, batch: BatchShape | None) -> tuple[int | None, int | None]:
    """Estimates the bytes of activations and of logits in one forward pass.

    Activations are the channels of an MLP, four states as wide as the model, and the attention mask. The four states
    are the inputs of the first layer and of the present one, the residual, and the input of the MLP.
    """
    mlp, head = first_mlp(module), next(filter(None, map(_output_layer, module.modules())), None)
    if batch is None or mlp is None or head is None:
        return None, None
    bytes_each = head.weight.element_size()
    channels = (len(mlp.up) + 1) * mlp.width  # those of the maps up, and one more after the nonlinearity
    states = batch.rows * batch.length * (channels + 4 * head.weight.shape[1]) * bytes_each
    mask = batch.rows * batch.length**2 * (1 + bytes_each)  # of booleans, and as attention adds it to its scores
    # As the head writes them, those of answers among them, and their log-probabilities in float32.
    logits = batch.rows * batch.positions * head.weight.shape[0] * (2 * bytes_each + 4)
    return states + mask, logits


def first_mlp(module: nn.Module) -> FeedForward | None:
    """The MLP of the first layer; None if there are no layers, or it is a mixture of experts."""
    try:
        return mlp_of(find_layers(module).layers[0])
    except ValueError:
        return None


def _output_layer(module: nn.Module) -> Any:
    """The output layer of a model of transformers; None of any other module."""
    getter: Any = getattr(module, "get_output_embeddings", None)
    return None if getter is None else getter()
