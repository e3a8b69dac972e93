"""LO-GRZO: one random core per step, whose rows and columns get random signs of their own for each example."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.dense import coefficient_tensor, compute_dtype
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.signed import Signed
from zolightning.optim.bases import Matrix
from zolightning.optim.common import SubspaceCommon, Unpack
from zolightning.optim.drawn import Pair, drawn
from zolightning.optim.estimators import Estimator, PerExample
from zolightning.optim.normalization import normalized
from zolightning.optim.record import StepRecord
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.optim.subspace_weights import Matrices

_LEAST_SPREAD = 1e-6  # of projected gradients, as a share of the largest: below it they differ only by rounding


class GRZO(SubspaceOptimizer):
    """LO-GRZO, the low-rank form of GRZO (arXiv 2606.02857), with the signs applied within the subspace.

    With V (n, r) Gaussian, drawn anew at each resampling, Z (m, r) Gaussian, new at each step and the same for all
    examples, and signs r_i (m,) and s_i (r,) of example i, its direction is ``D_i = (Z * r_i s_i') V' / sqrt(r)``; its
    entries have variance 1. All examples are evaluated along their directions in the same two forwards, and the weight
    moves by ``-lr * mean_i(a_i D_i)``, where a_i are the projected gradients divided by their standard deviation
    in the batch (with N - 1); if all are equal, nothing moves. (LOZO with ``estimator=PerExample()`` has an
    independent core for each example instead.)

    State: V, (n, r) in the weight's dtype; the core, (m, r) in fp32, while updates are pending; within a step also Z in
    fp32 and ``num_queries (m + r)`` signs.

    Differs from the authors' code (LiyanTan111/GRZO-public): there s_i has n signs, one for each column of the weight,
    so that directions leave the span of V (in its "strict" variant they are all 1); norms get signs there, and dense
    directions here; and its signs, the low bit of a hash, form a checkerboard. Their learning rate is ``2 eps`` times
    `lr`.

    Args:
        params: parameters or parameter groups.
        lr: step size; the RMS move of a weight in a step is about ``lr / sqrt(num_queries)``.
        eps: perturbation scale of a weight.
        rank: r.
        num_queries: number of different directions: as many as a batch has examples, over all ranks.
        vector_lr: learning rate of biases and norms; None takes `lr`.
        estimator: ``PerExample()`` if None; others evaluate the whole batch along each direction.
        **common: noise, normalize, normalize_directions, clip, rms_decay, seed, update_precision, offload_low_words:
            see :class:`~zolightning.optim.subspace.SubspaceOptimizer`.

    Raises:
        ValueError: also if `num_queries` is 1, or `align_queries` is set.
    """

    sides = "right"
    unit = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-5,
        eps: float = 1e-3,
        rank: int = 8,
        num_queries: int = 16,
        vector_lr: float | None = None,
        estimator: Estimator | None = None,
        **common: Unpack[SubspaceCommon],
    ) -> None:
        if common.get("align_queries"):
            raise ValueError("`align_queries` is True, but GRZO's directions share a core: set it to False.")
        self._cores: dict[str, Tensor] = {}  # drawn in a step, by name
        self._signs: dict[Pair, Tensor] = {}  # first those of rows
        self._drawn_in = (0, 0)  # seed and step
        super().__init__(
            params,
            {"lr": lr, "eps": eps},
            rank=rank,
            num_queries=num_queries,
            vector_lr=vector_lr,
            estimator=PerExample() if estimator is None else estimator,
            **common,
        )
        if num_queries == 1:
            raise ValueError(
                "`num_queries` must be at least 2 for GRZO, which divides by the spread over the queries, got 1."
            )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        for name in ("momentum", "betas"):
            if group.get(name):
                raise ValueError(f"`{name}` is {group[name]!r}, but GRZO keeps none: leave it out.")

    def direction_scale(self, matrix: Matrix) -> float:
        return self.basis_kind.unit_rms_scale(matrix)

    def perturbations_of_matrices(
        self, group: dict[str, Any], matrices: Matrices, queries: Sequence[int], sign: int
    ) -> dict[int, dict[nn.Parameter, Perturbation]]:
        found: dict[int, dict[nn.Parameter, Perturbation]] = {query: {} for query in queries}
        self._draw_cores(matrices, (group["seed"], group["step"]), queries)
        for name, (parameter, matrix) in matrices.items():
            pending, basis = self.state.get(parameter, {}).get("core"), self.basis(parameter)
            factor, core = sign * group["eps"] * self.direction_scale(matrix), self._cores[name]
            for query, changes in found.items():
                signs = self._signs[name, query]
                changes[parameter] = Signed(basis, matrix.shape, pending, core, signs, factor)
        return found

    def update(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            matrices, vectors = self.split(group)
            projected_grads = normalized(group, record.projected_grads)
            spread = statistics.stdev(projected_grads)
            if spread <= _LEAST_SPREAD * max(map(abs, projected_grads)):
                spread = math.inf  # all equal, which says nothing about the size of a step
            coefficients = [g / spread / len(projected_grads) for g in projected_grads]
            self.update_vectors(group, vectors, record, dict(enumerate(coefficients)), lr)
            batches: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
            for name, (parameter, matrix) in matrices.items():
                core = self.core(parameter, matrix)
                batches[self.direction_scale(matrix), core.shape, core.dtype, core.device].append(name)
            for names in batches.values():
                own = {name: matrices[name] for name in names}
                steps = self._sums(own, record, coefficients)
                torch._foreach_sub_([self.core(*pair) for pair in own.values()], steps.unbind(), alpha=lr)
        self._forget()

    def core_gradient(self, parameter: nn.Parameter, record: StepRecord) -> Tensor:
        matrices = self.split(self.group_of(parameter), frozen=True)[0]
        own = {name: pair for name, pair in matrices.items() if pair[0] is parameter}
        return self._sums(own, record, [g / len(record.projected_grads) for g in record.projected_grads])[0]

    def _sums(self, matrices: Matrices, record: StepRecord, coefficients: list[float]) -> Tensor:
        """The sum over queries of coefficient times core, (matrices, *core shape); all cores have one shape."""
        queries = range(len(coefficients))
        self._draw_cores(matrices, (record.seed, record.step), queries)
        cores = torch.stack([self._cores[name] for name in matrices])
        signs = torch.stack([self._signs[name, query] for name in matrices for query in queries])
        rows, columns = signs.view(len(cores), len(queries), -1).split(list(cores.shape[1:]), dim=2)
        weights = coefficient_tensor(tuple(coefficients), cores.dtype, cores.device)[:, None]
        _, matrix = next(iter(matrices.values()))
        return cores * (rows.mT @ (weights * columns)) * self.direction_scale(matrix)

    def _draw_cores(self, matrices: Matrices, run: tuple[int, int], queries: Sequence[int]) -> None:
        """Draws the cores, which all queries share, and the signs that this step has not drawn yet.

        It takes one launch on a GPU for cores and one for signs.
        """
        if run != self._drawn_in:
            self._forget()
            self._drawn_in = run
        shapes = {name: self.basis(weight).core_shape(matrix.shape) for name, (weight, matrix) in matrices.items()}
        parameters = {name: parameter for name, (parameter, _) in matrices.items()}
        dtypes = {name: compute_dtype(parameter.dtype) for name, parameter in parameters.items()}
        cores = {(name, 0): math.prod(shape) for name, shape in shapes.items() if name not in self._cores}
        for (name, _), core in drawn(cores, "shared", parameters, run, self.noise, dtypes).items():
            self._cores[name] = core.view(shapes[name])
        pairs = ((name, query) for name in matrices for query in queries)
        signs = {pair: sum(shapes[pair[0]]) for pair in pairs if pair not in self._signs}
        self._signs |= drawn(signs, "signs", parameters, run, "rademacher", dtypes)

    def _forget(self) -> None:
        self._cores.clear()
        self._signs.clear()
