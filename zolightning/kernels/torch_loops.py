"""The loops in PyTorch, for every device and dtype: see :mod:`zolightning.kernels`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.kernels import bfloat16
from zolightning.kernels.adam import AdamStep
from zolightning.kernels.compiled import Kernel, chunk_size, chunks, kernel
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import Noise, codes, counter, start_of


def perturb(
    out: Tensor,
    weight: Tensor,
    noise: Noise,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    out, weight, curvature = out.view(-1), weight.view(-1), _flat(curvature)
    run, size = _loop(_perturb, weight, curvature)
    for part in chunks(weight.numel(), size):
        first = start_of(start + part.start, weight.device)
        own = None if curvature is None else curvature[part]
        run(out[part], weight[part], noise, first, own, threshold)


def perturb_both(
    plus: Tensor,
    minus: Tensor,
    weight: Tensor,
    noise: Noise,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    plus, minus, weight, curvature = plus.view(-1), minus.view(-1), weight.view(-1), _flat(curvature)
    run, size = _loop(_perturb_both, weight, curvature)
    for part in chunks(weight.numel(), size):
        first = start_of(start + part.start, weight.device)
        own = None if curvature is None else curvature[part]
        run(plus[part], minus[part], weight[part], noise, first, own, threshold)


def perturb_rows(
    out: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Noise,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    run, size = _loop(_perturb_rows, out, curvature)
    for part in chunks(rows.numel(), max(1, size // table.shape[1])):
        own = None if curvature is None else curvature[part]
        run(out[part], table, rows[part], noise, own, threshold)


def add(
    weight: Tensor,
    noise: Noise,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
    threshold: float | None = None,
) -> None:
    dtype = torch.promote_types(weight.dtype, noise.coefficients.dtype)
    factor = torch.full((), decay, dtype=dtype, device=weight.device)
    run, size = kernel(_add if extra_bits is None else _add_split, weight)
    for part in chunks(weight.numel(), size):
        weights = (weight[part],) if extra_bits is None else (weight[part], extra_bits[part])
        run(*weights, noise, start_of(start + part.start, weight.device), factor, threshold)


def add_curved(
    weight: Tensor,
    curvature: Tensor,
    noise: Noise,
    change: Change,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
) -> None:
    curve(curvature, noise, change, start)
    for part in chunks(weight.numel(), chunk_size(weight)):
        index = counter(weight[part], start_of(start + part.start, weight.device))
        delta = noise.at(index) / _root(curvature[part])
        add_delta(weight[part], delta, decay, None if extra_bits is None else extra_bits[part])


def curve(curvature: Tensor, noise: Noise, change: Change, start: int = 0) -> None:
    for part in chunks(curvature.numel(), chunk_size(curvature)):
        index = counter(curvature[part], start_of(start + part.start, curvature.device))
        moved = torch.full_like(curvature[part], change.shift)
        for query in range(noise.keys.shape[0]):
            moved += change.squares[query] * codes(index, noise.keys[query], noise.kind).square().to(curvature.dtype)
        moved *= curvature[part]
        torch.clamp(moved.add_(curvature[part]), change.floor, change.ceiling, out=curvature[part])


def add_adam(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    noise: Noise,
    step: AdamStep,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
) -> None:
    # Tensors, because to divide by a plain number a device multiplies by its reciprocal.
    numbers = step.mean_correction, step.square_correction
    corrections = [torch.full((), number, dtype=mean.dtype, device=mean.device) for number in numbers]
    for part in chunks(weight.numel(), chunk_size(weight)):
        index = counter(weight[part], start_of(start + part.start, weight.device))
        gradient = noise.at(index)
        mean[part].mul_(step.keep_mean).add_(step.take_mean * gradient)
        square[part].mul_(step.keep_square).add_((step.take_square * gradient) * gradient)
        root = _root(square[part] / corrections[1])
        delta = (mean[part] / corrections[0]) / (root + step.eps)
        add_delta(weight[part], delta, decay, None if extra_bits is None else extra_bits[part], step.scale)


def add_delta(
    weight: Tensor, delta: Tensor, decay: float = 1.0, extra_bits: Tensor | None = None, scale: float = 1.0
) -> None:
    if extra_bits is not None and extra_bits.dtype == torch.float32:
        take_over(weight, extra_bits)
    for part in chunks(weight.numel(), chunk_size(weight)):
        change = delta[part] if scale == 1.0 else scale * delta[part]
        if extra_bits is None and decay == 1.0 and weight.dtype == delta.dtype:
            weight[part].add_(change)
        elif extra_bits is None:
            weight[part].copy_(decay * weight[part].to(delta.dtype) + change)
        elif extra_bits.dtype == torch.float32:
            extra_bits[part].mul_(decay).add_(change)
            weight[part].copy_(extra_bits[part])
        else:
            bfloat16.write_split(
                weight[part], extra_bits[part], decay * bfloat16.read_split(weight[part], extra_bits[part]) + change
            )


def take_over(weight: Tensor, master: Tensor) -> None:
    """Brings an fp32 master, (n,), up to date with what others have written to its fp16 weight, (n,)."""
    for part in chunks(weight.numel(), chunk_size(weight)):
        is_written = weight[part] != master[part].half()
        master[part] = torch.where(is_written, weight[part].float(), master[part])


def add_to_master(master: Tensor, weight: Tensor, noise: Noise, decay: float, start: int, threshold: float) -> None:
    """:func:`add` to the fp32 master, (n,), of an fp16 weight, (n,), to whose values the threshold applies."""
    for part in chunks(weight.numel(), chunk_size(weight)):
        index = counter(weight[part], start_of(start + part.start, weight.device))
        master[part].mul_(decay).add_(_shaped(noise.at(index), weight[part], None, threshold))


def _flat(curvature: Tensor | None) -> Tensor | None:
    return None if curvature is None else curvature.view(-1)


def _loop(function: Kernel, like: Tensor, curvature: Tensor | None) -> tuple[Kernel, int]:
    """As ``compiled.kernel``; with a curvature never compiled: on GPUs, compilers approximate quotients and roots."""
    return kernel(function, like) if curvature is None else (function, chunk_size(like))


def _shaped(values: Tensor, weight: Tensor, curvature: Tensor | None, threshold: float | None) -> Tensor:
    """The noise that is added to a stored weight: over the root of a curvature, or only where the weight is small."""
    if curvature is not None:
        return values / _root(curvature)
    if threshold is not None:
        return torch.where(weight.to(values.dtype).abs() <= threshold, values, -0.0)  # adding -0.0 changes no number
    return values


def _root(values: Tensor) -> Tensor:
    """Correctly rounded roots: MKL's, which torch uses on CPUs, are not, unless made in float64 and rounded."""
    return values.double().sqrt().to(values.dtype) if values.device.type == "cpu" else values.sqrt()


def _perturb(
    out: Tensor, weight: Tensor, noise: Noise, start: Tensor, curvature: Tensor | None, threshold: float | None
) -> None:
    values = noise.at(counter(weight, start))
    out.copy_((weight.to(values.dtype) + _shaped(values, weight, curvature, threshold)).to(out.dtype))


def _perturb_both(
    plus: Tensor,
    minus: Tensor,
    weight: Tensor,
    noise: Noise,
    start: Tensor,
    curvature: Tensor | None,
    threshold: float | None,
) -> None:
    values = noise.at(counter(weight, start))
    wide = weight.to(values.dtype)
    plus.copy_((wide + _shaped(values, weight, curvature, threshold)).to(plus.dtype))
    minus.copy_((wide + _shaped(-values, weight, curvature, threshold)).to(minus.dtype))


def _perturb_rows(
    out: Tensor, table: Tensor, rows: Tensor, noise: Noise, curvature: Tensor | None, threshold: float | None
) -> None:
    columns = table.shape[1]
    index = rows.to(torch.int32)[:, None] * columns + torch.arange(columns, dtype=torch.int32, device=rows.device)
    values = noise.at(index)
    weight = F.embedding(rows, table)
    out.copy_((weight.to(values.dtype) + _shaped(values, weight, curvature, threshold)).to(out.dtype))


def _add(weight: Tensor, noise: Noise, start: Tensor, decay: Tensor, threshold: float | None) -> None:
    values = _shaped(noise.at(counter(weight, start)), weight, None, threshold)
    weight.copy_((decay * weight.to(decay.dtype) + values).to(weight.dtype))


def _add_split(
    weight: Tensor, low: Tensor, noise: Noise, start: Tensor, decay: Tensor, threshold: float | None
) -> None:
    values = _shaped(noise.at(counter(weight, start)), weight, None, threshold)
    bfloat16.write_split(weight, low, decay * bfloat16.read_split(weight, low) + values)
