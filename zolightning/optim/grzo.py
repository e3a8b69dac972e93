"""GRZO in cores: one random core a step, and for each example signs of its own on its rows and columns."""

import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.dense import arithmetic, directions
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.signed import Signed
from zolightning.kernels.noise import NoiseKind
from zolightning.optim.estimators import Estimator, PerExample
from zolightning.optim.normalization import normalized
from zolightning.optim.record import StepRecord
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.optim.subspace_bases import Matrix

_SPREAD_EPS = 1e-12  # for projected gradients that are all the same


class GRZO(SubspaceOptimizer):
    """LO-GRZO, the low-rank form of GRZO (arXiv 2606.02857), with its signs within the subspace.

    With V (n, r) Gaussian, drawn anew at each resampling, Z (m, r) Gaussian, new at each step and the same for all
    examples, and signs r_i (m,) and s_i (r,) of example i, its direction is ``D_i = (Z * r_i s_i') V' / sqrt(r)``; its
    entries have variance 1. All examples are evaluated along their directions in the same two forwards, and the weight
    moves by ``-lr * mean_i(a_i D_i)``, where a_i are projected gradients over their standard deviation in the batch.
    (LOZO with ``estimator=PerExample()`` has an independent core for each example instead.)

    State: V, (n, r) in the weight's dtype; while updates are pending the core, (m, r) in fp32; within a step Z in fp32,
    and of ``num_queries (m + r)`` signs.

    Differs from the authors' code (LiyanTan111/GRZO-public): there s_i are n signs, of the weight's columns, so that
    directions leave the span of V (unless "strict", where they are 1); signs of norms are here dense directions; and
    signs are random, where a low bit made a checkerboard. Their learning rate is ``2 eps`` times `lr`.

    Args:
        params: parameters or parameter groups.
        lr: step size; the RMS move of a weight in a step is about ``lr / sqrt(num_queries)``.
        eps: perturbation scale of a weight.
        rank: r.
        num_queries: how many different directions: as many as a batch has examples, over all ranks.
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
        **common: Any,
    ) -> None:
        if common.get("align_queries"):
            raise ValueError("`align_queries` is True, and GRZO's directions share a core: set it to False.")
        self._drawn: dict[tuple[str, int], Tensor] = {}  # in a step, by name and query
        self._drawn_in = (0, 0)  # seed and step
        super().__init__(
            params,
            {"lr": lr, "eps": eps},
            rank=rank,
            num_queries=num_queries,
            vector_lr=lr if vector_lr is None else vector_lr,
            estimator=PerExample() if estimator is None else estimator,
            **common,
        )
        if num_queries == 1:
            raise ValueError("`num_queries` must be at least 2 for GRZO, which divides by their spread, got 1.")

    def direction_scale(self, matrix: Matrix) -> float:
        return self.unit_rms_scale(matrix)

    def perturbations_of(self, queries: Iterable[int], sign: int) -> dict[int, dict[nn.Parameter, Perturbation]]:
        found = super().perturbations_of(queries, sign)
        for group in self.param_groups:
            run = group["seed"], group["step"]
            for name, (parameter, matrix) in self.split(group)[0].items():
                pending = self.state.get(parameter, {}).get("core")
                factor = sign * group["eps"] * self.direction_scale(matrix)
                for query, changes in found.items():
                    core, signs = self._parts(parameter, name, matrix, run, query)
                    changes[parameter] = Signed(self.basis(parameter), matrix[:2], pending, core, signs, factor)
        return found

    def update(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            matrices, vectors = self.split(group)
            projected_grads = normalized(group, record.projected_grads)
            spread = statistics.stdev(projected_grads) + _SPREAD_EPS
            coefficients = [g / spread / len(projected_grads) for g in projected_grads]
            if group["vector_lr_ratio"]:
                by_query = dict(enumerate(coefficients))
                self._update_vectors(group, vectors, record, by_query, lr * group["vector_lr_ratio"])
            for name, (parameter, matrix) in matrices.items():
                step = self._sum(parameter, name, matrix, record, coefficients)
                self.core(parameter, matrix).sub_(step, alpha=lr)
        self._drawn.clear()

    def core_gradient(self, parameter: nn.Parameter, record: StepRecord) -> Tensor:
        matrices = self.split(self._group_of(parameter), frozen=True)[0]
        name, matrix = next((name, matrix) for name, (own, matrix) in matrices.items() if own is parameter)
        coefficients = [g / len(record.projected_grads) for g in record.projected_grads]
        return self._sum(parameter, name, matrix, record, coefficients)

    def _sum(
        self, parameter: nn.Parameter, name: str, matrix: Matrix, record: StepRecord, coefficients: list[float]
    ) -> Tensor:
        """The sum of all queries' cores, each times a coefficient."""
        run = record.seed, record.step
        parts = [self._parts(parameter, name, matrix, run, query) for query in range(len(coefficients))]
        core = parts[0][0]
        rows, columns = torch.stack([signs for _, signs in parts]).to(core.dtype).split(list(core.shape), dim=1)
        weights = core.new_tensor(coefficients)[:, None]
        return core * (rows.T @ (weights * columns)) * self.direction_scale(matrix)

    def _parts(
        self, parameter: nn.Parameter, name: str, matrix: Matrix, run: tuple[int, int], query: int
    ) -> tuple[Tensor, Tensor]:
        """The core that all queries of a step share, and the signs of one of them: first those of rows."""
        if run != self._drawn_in:
            self._drawn.clear()
            self._drawn_in = run
        shape = self.basis(parameter).core_shape(matrix[:2])
        core = self._draw_once(parameter, f"{name}/shared", shape, run, 0, self.noise)
        return core, self._draw_once(parameter, f"{name}/signs", (sum(shape),), run, query, "rademacher")

    def _draw_once(
        self,
        parameter: nn.Parameter,
        name: str,
        shape: tuple[int, ...],
        run: tuple[int, int],
        query: int,
        kind: NoiseKind,
    ) -> Tensor:
        if (name, query) not in self._drawn:
            drawn = torch.zeros(shape, dtype=arithmetic(parameter.dtype), device=parameter.device)
            directions({name: parameter}, *run, {query: 1.0}, kind)[name].accumulate(drawn)
            self._drawn[name, query] = drawn
        return self._drawn[name, query]
