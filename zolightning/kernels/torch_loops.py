"""The loops in PyTorch, for every device and dtype: see :mod:`zolightning.kernels`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.kernels import bfloat16
from zolightning.kernels.compiled import chunk_size, chunks, kernel
from zolightning.kernels.noise import NoiseKind, counter, noise_sum, start_of


def perturb(out: Tensor, weight: Tensor, keys: Tensor, coefficients: Tensor, kind: NoiseKind, start: int = 0) -> None:
    out, weight = out.view(-1), weight.view(-1)
    run, size = kernel(_perturb, weight)
    for part in chunks(weight.numel(), size):
        run(out[part], weight[part], keys, coefficients, start_of(start + part.start, weight.device), kind)


def perturb_both(
    plus: Tensor,
    minus: Tensor,
    weight: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    kind: NoiseKind,
    start: int = 0,
) -> None:
    plus, minus, weight = plus.view(-1), minus.view(-1), weight.view(-1)
    run, size = kernel(_perturb_both, weight)
    for part in chunks(weight.numel(), size):
        first = start_of(start + part.start, weight.device)
        run(plus[part], minus[part], weight[part], keys, coefficients, first, kind)


def perturb_rows(out: Tensor, table: Tensor, rows: Tensor, keys: Tensor, coefficients: Tensor, kind: NoiseKind) -> None:
    run, size = kernel(_perturb_rows, out)
    for part in chunks(rows.numel(), max(1, size // table.shape[1])):
        run(out[part], table, rows[part], keys, coefficients, kind)


def add(
    weight: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    kind: NoiseKind,
    decay: float = 1.0,
    rest: Tensor | None = None,
    start: int = 0,
) -> None:
    dtype = torch.promote_types(weight.dtype, coefficients.dtype)
    factor = torch.full((), decay, dtype=dtype, device=weight.device)
    run, size = kernel(_add if rest is None else _add_split, weight)
    for part in chunks(weight.numel(), size):
        weights = (weight[part],) if rest is None else (weight[part], rest[part])
        run(*weights, keys, coefficients, start_of(start + part.start, weight.device), factor, kind)


def add_delta(
    weight: Tensor, delta: Tensor, decay: float = 1.0, rest: Tensor | None = None, scale: float = 1.0
) -> None:
    if rest is not None and rest.dtype == torch.float32:
        take_over(weight, rest)
    for part in chunks(weight.numel(), chunk_size(weight)):
        change = delta[part] if scale == 1.0 else scale * delta[part]
        if rest is None and decay == 1.0 and weight.dtype == delta.dtype:
            weight[part].add_(change)
        elif rest is None:
            weight[part].copy_(decay * weight[part].to(delta.dtype) + change)
        elif rest.dtype == torch.float32:
            rest[part].mul_(decay).add_(change)
            weight[part].copy_(rest[part])
        else:
            bfloat16.write_split(
                weight[part], rest[part], decay * bfloat16.read_split(weight[part], rest[part]) + change
            )


def take_over(weight: Tensor, master: Tensor) -> None:
    """Brings an fp32 master, (n,), up to date with what others have written to its fp16 weight, (n,)."""
    for part in chunks(weight.numel(), chunk_size(weight)):
        is_written = weight[part] != master[part].half()
        master[part] = torch.where(is_written, weight[part].float(), master[part])


def _perturb(out: Tensor, weight: Tensor, keys: Tensor, coefficients: Tensor, start: Tensor, kind: NoiseKind) -> None:
    noise = noise_sum(counter(weight, start), keys, coefficients, kind)
    out.copy_((weight.to(noise.dtype) + noise).to(out.dtype))


def _perturb_both(
    plus: Tensor,
    minus: Tensor,
    weight: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    start: Tensor,
    kind: NoiseKind,
) -> None:
    index = counter(weight, start)
    noise = noise_sum(index, keys, coefficients, kind)
    # A sum that cancels is +0 with negated terms, too: not the negated sum, which shows where the weight is -0.
    negated = -noise if keys.shape[0] == 1 else noise_sum(index, keys, -coefficients, kind)
    wide = weight.to(noise.dtype)
    plus.copy_((wide + noise).to(plus.dtype))
    minus.copy_((wide + negated).to(minus.dtype))


def _perturb_rows(
    out: Tensor, table: Tensor, rows: Tensor, keys: Tensor, coefficients: Tensor, kind: NoiseKind
) -> None:
    columns = table.shape[1]
    index = rows.to(torch.int32)[:, None] * columns + torch.arange(columns, dtype=torch.int32, device=rows.device)
    noise = noise_sum(index, keys, coefficients, kind)
    out.copy_((F.embedding(rows, table).to(noise.dtype) + noise).to(out.dtype))


def _add(weight: Tensor, keys: Tensor, coefficients: Tensor, start: Tensor, decay: Tensor, kind: NoiseKind) -> None:
    noise = noise_sum(counter(weight, start), keys, coefficients, kind)
    weight.copy_((decay * weight.to(decay.dtype) + noise).to(weight.dtype))


def _add_split(
    weight: Tensor, low: Tensor, keys: Tensor, coefficients: Tensor, start: Tensor, decay: Tensor, kind: NoiseKind
) -> None:
    noise = noise_sum(counter(weight, start), keys, coefficients, kind)
    bfloat16.write_split(weight, low, decay * bfloat16.read_split(weight, low) + noise)
