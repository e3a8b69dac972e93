"""Sparse-MeZO: MeZO that trains the small weights only."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from zolightning import kernels
from zolightning.checks import require_choice
from zolightning.directions.dense import Direction
from zolightning.directions.masked import MagnitudeMasked, Masked, PackedMask, RandomMask, packed
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.shards import own_rows, whole
from zolightning.kernels.compiled import chunk_size, chunks
from zolightning.kernels.noise import key
from zolightning.optim.common import DenseSettings, Unpack
from zolightning.optim.dense import DenseOptimizer
from zolightning.optim.precision import add_tensor, as_contiguous, stored
from zolightning.optim.record import StepRecord
from zolightning.optim.samples import strided

MaskKind = Literal["dynamic", "fixed", "random"]


class SparseMeZO(DenseOptimizer):
    """Sparse-MeZO (Liu et al., "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning",
    arXiv 2402.15751, NeurIPS 2025): perturbs and moves the weights of small magnitude in each matrix, and no others.

    A weight is small if its absolute value is at most a threshold, which is set before the first step of the matrix so
    that a share `sparsity` of its weights is larger; the threshold then stays the same. The mask is computed anew in
    each step, from the stored weights and in the same pass as the noise, so only the threshold is stored. (The paper's
    pseudo-code compares signed weights; its text and figures use magnitudes, as we do.)

    Parameters that are not matrices (biases, norms) train densely. So do matrices whose threshold would be 0, such as
    the B of a new LoRA adapter, whose weights would stop as soon as they are no longer 0.

    Args:
        params: parameters or parameter groups.
        lr: step size, as in :class:`~zolightning.optim.MeZO`; the paper's is larger than MeZO's.
        eps: perturbation scale: standard deviation of the perturbation of each weight that moves.
        sparsity: share of the weights of a matrix that do not train, between 0 and 1.
        mask: "dynamic", as above; "fixed", the mask of the first step for all steps, at one bit per weight; or
            "random", drawn once per run and not stored, the paper's control (R-MeZO). The last two take several passes
            over memory where the first takes one.
        sparse_embeddings: whether weights of ``nn.Embedding`` modules (and output layers tied to them) are masked too.
        **common: num_queries, align_queries, estimator, noise, seed, update_precision: see
            :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
    """

    takes_shards = True
    kept_at_rest = ("threshold", "mask")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        sparsity: float = 0.75,
        mask: MaskKind = "dynamic",
        sparse_embeddings: bool = True,
        **common: Unpack[DenseSettings],
    ) -> None:
        require_choice("mask", mask, get_args(MaskKind))
        self.mask: MaskKind = mask
        self.sparse_embeddings = sparse_embeddings
        self._first: dict[nn.Parameter, dict[str, Any]] = {}  # masks of an estimate whose step has not stored them yet
        super().__init__(params, {"lr": lr, "eps": eps, "sparsity": sparsity}, **common)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if not 0 < group["sparsity"] < 1:
            raise ValueError(f"`sparsity` must lie between 0 and 1, got {group['sparsity']!r}.")

    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        found: dict[nn.Parameter, Perturbation] = {}
        for group in self.param_groups:
            directions = self.directions(group, group["seed"], group["step"], {query: sign * group["eps"]})
            for parameter, direction in directions.items():
                found[parameter] = self._masked(direction, self._mask_of(parameter, group), group)
        return found

    def update(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            coefficients = {q: -lr * g / self.num_queries for q, g in enumerate(record.projected_grads)}
            directions = self.directions(group, record.seed, record.step, coefficients)
            calls: list[dict[str, Any]] = []
            with self.to_move(directions, directions.values()) as own:
                for parameter, weight, state, direction in zip(directions, *own, strict=True):
                    kept = self._mask_of(parameter, group)
                    masked = self._masked(direction, kept, group)
                    state.update(kept)
                    self._first.pop(parameter, None)
                    if not isinstance(masked, Masked):
                        threshold = masked.threshold if isinstance(masked, MagnitudeMasked) else None
                        call = {**stored(weight, state, self.update_precision), **direction.arguments()}
                        calls.append({**call, "threshold": threshold})
                        continue
                    for part in chunks(weight.numel(), chunk_size(weight)):
                        noise = masked.of_elements(weight.view(-1)[part], direction.first + part.start)
                        add_tensor(weight, state, noise, self.update_precision, start=part.start)
                kernels.for_each(kernels.add, calls)

    def is_by_element(self, parameter: nn.Parameter, name: str) -> bool:
        return name not in self.kept_at_rest

    def measurements(self) -> dict[str, float]:
        """For a dynamic mask the share of masked weights that move, estimated from a sample of each parameter."""
        moving = total = 0.0
        for _, _, parameter in self.trainable():
            threshold = self.state.get(parameter, {}).get("threshold", math.inf)
            if threshold < math.inf:
                weight, part = own_rows(parameter), self.slices.get(parameter)
                moves = strided(weight if part is None else part.take(weight)).abs() <= threshold
                size = math.prod(self.trainable_shape(parameter))
                moving, total = moving + float(moves.double().mean()) * size, total + size
        return {"share_moving": moving / total} if total else {}

    def _mask_of(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        """The threshold or mask of a parameter, as it is or will be in the state; empty if all elements move."""
        if len(self.trainable_shape(parameter)) < 2:
            return {}
        state = self.state.get(parameter, {})
        if mask := {name: state[name] for name in self.kept_at_rest if name in state}:
            return mask
        if parameter not in self._first:  # an estimate creates no state
            self._first[parameter] = self._find_mask(parameter, group)
        return self._first[parameter]

    def _find_mask(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        if not self.sparse_embeddings and self._is_embedding(parameter):
            return {"threshold": math.inf}
        if self.mask == "random":
            words = key(group["seed"], -1, 0, self.names[parameter])  # -1: not a step
            return {"mask": torch.tensor(words, dtype=torch.int32, device=parameter.device)}
        with as_contiguous(whole(parameter), self.slices.get(parameter)) as weight:
            least = max(round((1 - group["sparsity"]) * weight.numel()), 1)
            threshold = kth_smallest_magnitude(weight, least) or math.inf
            if self.mask == "dynamic" or threshold == math.inf:
                return {"threshold": threshold}
            return {"mask": packed(weight.view(-1).abs() <= threshold)}

    def _is_embedding(self, parameter: nn.Parameter) -> bool:
        module = self.evaluator.module
        return module is not None and any(
            isinstance(submodule, nn.Embedding) and submodule.weight is parameter for submodule in module.modules()
        )

    def _masked(self, direction: Direction, mask: dict[str, Any], group: dict[str, Any]) -> Direction:
        if (kept := mask.get("mask")) is not None:
            is_random = self.mask == "random"
            return Masked(direction, RandomMask(kept, 1 - group["sparsity"]) if is_random else PackedMask(kept))
        threshold = mask.get("threshold", math.inf)
        return direction if threshold == math.inf else MagnitudeMasked(direction, threshold)


def kth_smallest_magnitude(weight: Tensor, k: int) -> float:
    """The k-th smallest absolute value of a contiguous floating-point tensor, k from 1 on; NaNs are the largest.

    An exact radix selection, two bytes at a time: sorting a large embedding would take as much memory again, and
    ``torch.quantile`` refuses more than 2**24 elements.
    """
    if weight.is_meta:  # only the size of the state is wanted: any number will do
        return torch.finfo(weight.dtype).max
    size = weight.element_size()
    bits = weight.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    prefix = 0
    for shift in range(8 * size - 16, -1, -16):
        counts = torch.zeros(2**16, dtype=torch.int64, device=bits.device)
        for part in chunks(bits.numel(), max(chunk_size(bits), 2**20)):
            magnitudes = bits[part] & torch.iinfo(bits.dtype).max  # without the sign, in the order of the numbers
            if shift < 8 * size - 16:
                magnitudes = magnitudes[magnitudes >> (shift + 16) == prefix]
            counts += torch.bincount((magnitudes >> shift) & 0xFFFF, minlength=2**16)
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, k))
        k -= int(upto[digit] - counts[digit])
        prefix = prefix << 16 | digit
    return float(torch.tensor(prefix, dtype=bits.dtype).view(weight.dtype))
