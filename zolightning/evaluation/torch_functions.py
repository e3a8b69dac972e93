"""Torch's functions of a weight: those that only describe it, and products, also of large perturbed matrices.

A large matrix, such as an output layer, is perturbed and multiplied piece by piece, so that only a piece is in memory
at a time. A piece is some of its rows, which become columns of the output. Kernels for fewer columns may add in a
different order, so the bits of the product may differ from those with the whole matrix. They are the same for equal
weights, and both signs of a direction are cut into the same pieces.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn import functional as F

from zolightning.directions.dense import Direction
from zolightning.directions.low_rank import LowRank
from zolightning.directions.trials import FlippedBit, Unchanged
from zolightning.evaluation.buffer import Buffer
from zolightning.evaluation.scratch import PIECE_BYTES, pieces

# Getters that return a tensor that holds the parameter's values; all others (shape, dtype, ...) only describe it.
_VALUE_GETTERS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_DESCRIPTIONS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "__len__"}
    | {"is_floating_point", "is_complex", "__hash__", "get_device", "storage_offset"}
)
# Functions that multiply by a weight, and which of their arguments are the weight, the input and the bias
PRODUCTS = {F.linear: (1, 0, 2), torch.addmm: (2, 1, 0)}
HOST = "cpu"  # the device on which a launch costs nothing
ByRows = Direction | LowRank | FlippedBit | Unchanged  # changes that can be written to some rows of a matrix


def describes(func: Callable[..., Any]) -> bool:
    """Whether a function that is handed a tensor only describes it: its shape, its dtype, where it is stored."""
    name = func.__name__
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", None) not in _VALUE_GETTERS
    return name in _DESCRIPTIONS


def factors_of(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Weight, input and bias of one of :data:`PRODUCTS`, None where they are not given by position."""
    count = len(args)
    weight, inputs, bias = [args[place] if place < count else None for place in PRODUCTS[func]]
    return weight, inputs, bias


def table_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Row numbers and table of a call of ``F.embedding``; None if it does more, such as renormalising (`max_norm`)."""
    max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
    return None if len(args) < 2 or max_norm is not None else (args[0], args[1])


def is_transformed() -> bool:
    """Whether a transform of torch.func runs: ``grad``, ``jvp``, ``vmap``."""
    return peek_interpreter_stack() is not None


def is_cut(weight: Tensor) -> bool:
    """Whether a weight is read in pieces: not while autograd records, which keeps its inputs."""
    is_large_matrix = weight.nbytes > PIECE_BYTES and weight.ndim == 2
    return is_large_matrix and weight.is_contiguous() and not torch.is_grad_enabled()


def linear_in_pieces(
    inputs: Tensor, weight: nn.Parameter, bias: Tensor | None, change: ByRows, buffer: Buffer
) -> Tensor:
    """``F.linear(inputs, weight + change, bias)``.

    Args:
        inputs: (..., n).
        weight: (m, n), for which :func:`is_cut` is True.
        bias: (m,), perturbed already, or None.
        change: the perturbation of the weight.
        buffer: memory for the pieces, one after the other.
    """
    device, output = inputs.device.type, None
    if device != HOST and inputs.dtype == weight.dtype and not torch.is_autocast_enabled(device):
        rows = inputs.reshape(-1, inputs.shape[-1])
        output = rows.new_empty(len(rows), len(weight))
        for part, piece in changed_pieces(weight, change, buffer, PIECE_BYTES):
            multiply(rows, piece.T, None if bias is None else bias[part], output[:, part])
        return output.view(*inputs.shape[:-1], len(weight))
    for part, piece in changed_pieces(weight, change, buffer, PIECE_BYTES):
        columns = F.linear(inputs, piece, None if bias is None else bias[part])
        if output is None:  # whose dtype autocast chooses
            output = columns.new_empty(*inputs.shape[:-1], len(weight))
        output[..., part] = columns
    assert output is not None
    return output


def changed_pieces(weight: nn.Parameter, change: ByRows, buffer: Buffer, limit: int) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of a perturbed matrix, of at most `limit` bytes, and their rows; the next one takes the same memory."""
    for part in pieces(weight, limit):
        rows = weight[part]
        piece = buffer.tensor(rows.shape, rows.dtype, weight.requires_grad)
        change.add_to(rows, piece, start=part.start * weight.shape[1])
        yield part, piece


def multiply(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = rows @ matrix + bias``; `out` may be some columns of a matrix."""
    if bias is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(bias, rows, matrix, out=out)
