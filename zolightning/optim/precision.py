"""Adds updates to half-precision weights without losing them to rounding.

A zeroth-order update is often far below the spacing of half-precision numbers: with rounding to nearest, a bf16 weight
realises 3 % of updates of RMS 1e-6. There are three ways to add an update to a weight:

* ``exact`` (the default): weights of every dtype take the same updates as fp32 weights, bit for bit. A bf16 number is
  the upper half of an fp32 number, and the optimizer's state keeps the lower half, its *low word*: 2 bytes per
  parameter instead of the 4 of an fp32 master copy. fp16 numbers have a different exponent, so fp16 weights have a
  master copy.
* ``low_byte``: the state keeps one byte per parameter, and the fp32 number is rounded to 24 bits (16 significant ones)
  after each update. That takes half the memory of ``exact`` and loses only the smallest updates. fp16 weights have a
  master copy here as well.
* ``native``: the weight is rounded to its dtype after each update. That takes no memory and loses most of a small
  update.

For fp32 and fp64 weights the three are the same. The table shows how far 500 random updates of RMS `s` move a bf16
weight of standard deviation 0.02, as a share of the intended distance (and the cosine between the two):

========  ============  ============  ============
s         1e-5          1e-6          1e-7
========  ============  ============  ============
exact     1.00 (1.00)   1.00 (1.00)   1.00 (1.00)
low_byte  1.00 (1.00)   0.99 (0.99)   0.62 (0.69)
native    0.23 (0.44)   0.04 (0.16)   0.00 (0.05)
========  ============  ============  ============

If other code writes to a weight between updates (clamping or averaging it), the next update starts from the written
value: in fp16 exactly, unless the value equals the rounded master; in bf16 plus the old low word or byte, which is at
most half a unit in the last place.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from zolightning import kernels
from zolightning.directions.dense import Direction
from zolightning.directions.shards import own_rows
from zolightning.directions.slices import Slice
from zolightning.messages import some
from zolightning.rank_zero import rank_zero_warn

UpdatePrecision = Literal["exact", "low_byte", "native"]
UPDATE_PRECISIONS: tuple[UpdatePrecision, ...] = get_args(UpdatePrecision)
State = MutableMapping[str, Any]
_HALF = (torch.bfloat16, torch.float16)
EXTRA_BITS = ("low_word", "low_byte", "master")  # keys in the optimizer's state of what is kept beside a weight


def state_bytes(dtype: torch.dtype, precision: UpdatePrecision) -> int:
    """Bytes of optimizer state for each element of a weight that is updated with `precision`."""
    if precision == "native":
        return 0
    return {torch.bfloat16: 2 if precision == "exact" else 1, torch.float16: 4}.get(dtype, 0)


def warn_of_native(names: Mapping[nn.Parameter, str]) -> None:
    """Warns that half-precision parameters among these, if there are any, lose updates under the precision "native"."""
    half = [name for parameter, name in names.items() if parameter.dtype in _HALF]
    if half:
        rank_zero_warn(
            f"`update_precision` is 'native', which loses most of a small update in {some(half)}. 'exact' loses "
            "nothing, for 2 bytes per bfloat16 weight, 4 per float16 one; 'low_byte' loses little, for 1 byte per "
            "bfloat16 one."
        )


@contextmanager
def as_contiguous(parameter: Tensor, part: Slice | None = None) -> Iterator[Tensor]:
    """A parameter's data, or a slice of it, as a contiguous tensor; what is written to it reaches the parameter.

    If the parameter is sharded (FSDP2), it is the rows of this rank.
    """
    data = own_rows(parameter)
    if part is not None:
        compact = part.take(data)
        yield compact
        part.put(data, compact)
        return
    weight = data.contiguous()
    yield weight
    if weight is not data:
        data.copy_(weight)


def add_direction(
    weight: Tensor, state: State, direction: Direction, precision: UpdatePrecision, decay: float = 1.0
) -> None:
    """``weight = decay * weight + direction``, in place, generating the direction as it is added.

    Args:
        weight: the parameter's data, any shape, contiguous.
        state: the parameter's entry in the optimizer's state; one of ``EXTRA_BITS`` is made there if needed.
        direction: what to add.
        precision: how the sum is rounded.
        decay: multiplies the weight first (decoupled weight decay is ``1 - lr * weight_decay``).
    """
    kernels.add(**stored(weight, state, precision), **direction.arguments(), decay=decay)


def add_tensor(
    weight: Tensor,
    state: State,
    delta: Tensor,
    precision: UpdatePrecision,
    decay: float = 1.0,
    start: int = 0,
    scale: float = 1.0,
) -> None:
    """``weight = decay * weight + scale * delta``, in place, for the elements from `start` on.

    Args:
        weight: the parameter's data, any shape, contiguous.
        state: the parameter's entry in the optimizer's state, as for :func:`add_direction`.
        delta: (k,), float32, or float64 for double-precision weights.
        precision: how the sum is rounded.
        decay: multiplies these elements first.
        start: index of the first of them.
        scale: multiplies `delta` first.
    """
    part = slice(start, start + delta.numel())
    kernels.add_delta(**stored(weight, state, precision, part), delta=delta, decay=decay, scale=scale)


def stored(weight: Tensor, state: State, precision: UpdatePrecision, part: slice | None = None) -> dict[str, Any]:
    """A weight as the loops of :mod:`zolightning.kernels` take it: the arguments ``weight`` and ``extra_bits``, (n,).

    Args:
        weight, state, precision: see :func:`add_direction`.
        part: the elements that are wanted; None for all.
    """
    flat = weight.view(-1)
    extra_bits = _extra_bits(flat, state, precision) if flat.dtype in _HALF and precision != "native" else None
    if part is not None:
        flat, extra_bits = flat[part], None if extra_bits is None else extra_bits[part]
    return {"weight": flat, "extra_bits": extra_bits}


def stored_each(
    weights: Sequence[Tensor], states: Sequence[State], precision: UpdatePrecision, decay: float
) -> list[dict[str, Any]]:
    """:func:`stored` of several weights, and the argument ``decay``, which is 1 for weights of less than two
    dimensions."""
    return [
        {**stored(weight, state, precision), "decay": decay if weight.ndim >= 2 else 1.0}
        for weight, state in zip(weights, states, strict=True)
    ]


def _extra_bits(flat: Tensor, state: State, precision: UpdatePrecision) -> Tensor:
    """The extra bits of a half-precision weight, (n,), made at its first update."""
    if flat.dtype == torch.float16:
        if "master" not in state:
            state["master"] = flat.float()
        return state["master"]
    name, dtype = ("low_word", torch.int16) if precision == "exact" else ("low_byte", torch.int8)
    if name not in state:
        state[name] = torch.zeros_like(flat, dtype=dtype)
    return state[name]
