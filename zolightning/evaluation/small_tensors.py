"""Makes the small perturbed tensors of an evaluation together: on a GPU in a few launches instead of one for each.

A launch takes the host as long as the device needs for a matrix of millions of elements, and most parameters of a
language model are vectors. The cores of low-rank perturbations are almost as small.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from zolightning import kernels
from zolightning.directions.dense import Direction
from zolightning.directions.low_rank import LowRank
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.scaled import FullCurvature, ScaledDirection
from zolightning.evaluation.buffer import Buffer

_MOST = 2**17  # elements: larger tensors deserve a launch of their own, and use the shared scratch memory
_ALIGNMENT = 16  # bytes, which threads read and write at once


class SmallTensors(Buffer):
    """Memory for the small perturbed tensors of an evaluation, which the next evaluation reuses."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._layout: list[tuple[tuple[int, ...], torch.dtype, bool]] = []
        self._tensors: list[nn.Parameter] = []

    def make(self, perturbations: Iterable[tuple[nn.Parameter, Perturbation | None]]) -> dict[int, Tensor]:
        """Perturbed vectors, and perturbed cores of matrices in the matrices' dtype, by the id of their parameter."""
        found: list[tuple[nn.Parameter, Tensor | None, Direction]] = []
        layout = []
        for parameter, change in perturbations:
            source, direction, shape, requires_grad = _small(parameter, change)
            if direction is not None and math.prod(shape) <= _MOST and parameter.device == self.device:
                found.append((parameter, source, direction))
                layout.append((shape, parameter.dtype, requires_grad))
        if layout != self._layout:
            self._lay_out(layout)
        if found:
            _perturb(self._tensors, [source for _, source, _ in found], [direction for *_, direction in found])
        return {id(parameter): made for (parameter, _, _), made in zip(found, self._tensors, strict=True)}

    def spare(self, output: object) -> None:
        """If a function's output lies in this memory, the next evaluation uses other memory."""
        if self.holds(output):
            self._layout, self._tensors = [], []

    @torch.inference_mode(False)
    def _lay_out(self, layout: list[tuple[tuple[int, ...], torch.dtype, bool]]) -> None:
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype, _ in layout]
        places = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self._bytes = torch.empty(sum(places), dtype=torch.uint8, device=self.device)
        self._layout, self._tensors = layout, []
        for part, size, (shape, dtype, requires_grad) in zip(self._bytes.split(places), sizes, layout, strict=True):
            self._tensors.append(nn.Parameter(part[:size].view(dtype).view(shape), requires_grad))


def cores_of_groups(changes: Mapping[nn.Parameter, Sequence[Perturbation | None]]) -> dict[int, Tensor]:
    """Makes the small cores of the low-rank perturbations that each group of rows has, together.

    Args:
        changes: for each parameter, the perturbation of each group.

    Returns:
        By the id of each parameter the cores, (groups, *core shape), in its dtype. Parameters with another kind of
        perturbation in some group are left out.
    """
    found: dict[int, Tensor] = {}
    outs: list[Tensor] = []
    sources: list[Tensor | None] = []
    directions: list[Direction] = []
    for parameter, each in changes.items():
        plain = [(c, c.direction) for c in each if type(c) is LowRank and type(c.direction) is Direction]
        if not plain or len(plain) < len(each):
            continue
        shape = plain[0][0].basis.core_shape(plain[0][0].shape)
        if len(each) * math.prod(shape) <= _MOST:
            cores = torch.empty(len(each), *shape, dtype=parameter.dtype, device=parameter.device)
            found[id(parameter)] = cores
            outs += cores.unbind()
            sources += [change.pending for change, _ in plain]
            directions += [direction for _, direction in plain]
    if directions:
        _perturb(outs, sources, directions)
    return found


def _perturb(outs: Sequence[Tensor], sources: Sequence[Tensor | None], directions: Sequence[Direction]) -> None:
    each = zip(outs, sources, directions, strict=True)
    kernels.for_each(kernels.perturb, [d.arguments() | {"out": out, "weight": source} for out, source, d in each])


def _small(
    parameter: nn.Parameter, change: Perturbation | None
) -> tuple[Tensor | None, Direction | None, tuple[int, ...], bool]:
    """A small tensor to be made: what the direction is added to (None for zeros), the direction (None if there is
    nothing to make), the tensor's shape, and whether it requires gradients."""
    is_freed = not parameter.untyped_storage().nbytes()  # one that FSDP gathers when its layer runs
    if isinstance(change, Direction) and parameter.ndim < 2 and parameter.is_contiguous() and not is_freed:
        is_scaled = isinstance(change, ScaledDirection) and isinstance(change.curvature, FullCurvature)
        if is_scaled or type(change) is Direction:
            return parameter, change, tuple(parameter.shape), parameter.requires_grad
    if type(change) is LowRank and type(change.direction) is Direction:
        return change.pending, change.direction, change.basis.core_shape(change.shape), False
    return None, None, (), False
