"""EGGROLL: each query has a low-rank direction of its own, so that a population is cheap in one forward."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.checks import require_choice, require_integer
from zolightning.directions.basis import Basis
from zolightning.directions.dense import Direction, compute_dtype, directions
from zolightning.directions.low_rank import LowRank
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.shards import first_element
from zolightning.kernels.noise import NOISE_KINDS, NoiseKind
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.bases import BasisKind, Matrix
from zolightning.optim.common import Basic, Unpack
from zolightning.optim.cores import lift_in_pieces
from zolightning.optim.drawn import drawn
from zolightning.optim.estimators import Estimator, ZScores
from zolightning.optim.moments import descend
from zolightning.optim.normalization import RUNNING_MEAN, normalized, require_normalization
from zolightning.optim.precision import add_tensor, as_contiguous
from zolightning.optim.record import StepRecord

_KIND = BasisKind("both", unit=False)


class EGGROLL(ZerothOrderOptimizer):
    """EGGROLL, evolution strategies with low-rank directions (arXiv 2511.16652, section 4).

    Query i moves a matrix along ``E_i = A_i B_i' / sqrt(r)``, with A_i (m, r) and B_i (n, r) Gaussian, drawn anew for
    each query and step; entries of E_i have variance 1. An evaluation adds ``x B_i A_i'`` to a layer's output, and
    evaluations in one forward share the product with the weight. The weight moves by ``-lr * mean_i(g_i E_i)``, of rank
    ``num_queries * r`` at most. Vectors, and matrices of one row or column, have dense directions. (LOZO keeps B for
    several steps and shares it among all queries.)

    Memory beyond inference: the factors of the queries that are evaluated at once; for exact updates of half-precision
    weights 2 bytes per bf16 parameter or 4 per fp16 one.

    Differs from the authors' code (ESHyperscale/HyperscaleES): a member is one query, not half of an antithetic pair
    (``estimator=TwoSided()`` has pairs).

    Args:
        params: parameters or parameter groups.
        lr: step size; with z-scores the RMS move of a weight in a step is about ``lr / sqrt(num_queries)``.
        eps: perturbation scale of a weight, the paper's sigma.
        rank: r, at most the smaller side of a matrix.
        num_queries: size of the population.
        weight_decay: decoupled: ``W -= lr * weight_decay * W`` for parameters of two dimensions or more.
        normalize: divide projected gradients by their running RMS (arXiv 2605.03869); that of z-scores is already 1.
        clip: bound projected gradients at this multiple of their running RMS over earlier steps; above 1.
        rms_decay: decay of the running mean of squared projected gradients, for `normalize` and `clip`.
        noise: distribution of the factors and of dense directions, "gaussian" or "rademacher".
        estimator: ``ZScores()`` if None.
        **common: seed, update_precision: see :class:`~zolightning.optim.base.ZerothOrderOptimizer`.

    Raises:
        ValueError: also if `align_queries` is set.
    """

    takes_shards = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-4,
        eps: float = 1e-3,
        rank: int = 1,
        num_queries: int = 30,
        weight_decay: float = 0.0,
        normalize: bool = False,
        clip: float | None = None,
        rms_decay: float = 0.99,
        noise: NoiseKind = "gaussian",
        estimator: Estimator | None = None,
        **common: Unpack[Basic],
    ) -> None:
        require_choice("noise", noise, NOISE_KINDS)
        if common.get("align_queries"):
            raise ValueError("`align_queries` is True, but EGGROLL's queries have no basis in common: set it to False.")
        self.noise: NoiseKind = noise
        descent = {"lr": lr, "eps": eps, "rank": rank, "weight_decay": weight_decay}
        normalization = {"normalize": normalize, "clip": clip, "rms_decay": rms_decay}
        super().__init__(
            params,
            descent | normalization | RUNNING_MEAN,
            num_queries=num_queries,
            estimator=ZScores() if estimator is None else estimator,
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        require_integer("rank", group["rank"])
        require_normalization(group)

    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        return self.perturbations_of([query], sign)[query]

    def perturbations_of(self, queries: Iterable[int], sign: int) -> dict[int, dict[nn.Parameter, Perturbation]]:
        found: dict[int, dict[nn.Parameter, Perturbation]] = {query: {} for query in queries}
        for group in self.param_groups:
            matrices, vectors = self._split(group)
            run, eps = (group["seed"], group["step"]), sign * group["eps"]
            rights = self._factors("right", matrices, run, found)
            for query, changes in found.items():
                changes |= self._along(vectors, "", run, {query: eps})
                for parameter, left in self._along(matrices, "/left", run, {query: eps}).items():
                    matrix = matrices[parameter]
                    basis = Basis(right=rights[parameter, query])
                    changes[parameter] = LowRank(basis, matrix.shape, None, left.times(matrix.rank**-0.5))
        return found

    def update(self, record: StepRecord) -> None:
        run = record.seed, record.step
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            matrices, vectors = self._split(group)
            projected_grads = normalized(group, record.projected_grads)
            coefficients = {query: -lr * g / len(projected_grads) for query, g in enumerate(projected_grads)}
            moves = self._along(vectors, "", run, coefficients)
            with self.to_move(moves.keys(), moves.values()) as (weights, states, directions_):
                descend(weights, states, directions_, group, lr, self.update_precision)
            for parameter, matrix in matrices.items():
                self._move(parameter, matrix, run, coefficients, decay=1 - lr * group["weight_decay"])

    def _move(
        self,
        parameter: nn.Parameter,
        matrix: Matrix,
        run: tuple[int, int],
        coefficients: Mapping[int, float],
        decay: float,
    ) -> None:
        """Adds the sum over queries of coefficient times direction to a matrix, as one product of wide factors.

        One matrix at a time, because the factors of a large population take memory.
        """
        lefts, rights = (self._factors(side, {parameter: matrix}, run, coefficients) for side in ("left", "right"))
        scale = matrix.rank**-0.5
        left = torch.cat([lefts[parameter, q] * (c * scale) for q, c in coefficients.items()], dim=1)
        basis = Basis(right=torch.cat([rights[parameter, q] for q in coefficients], dim=1))
        with as_contiguous(parameter, self.slices.get(parameter)) as weight:
            for start, delta in lift_in_pieces(basis, left, weight, first_element(parameter)):
                add_tensor(weight, self.state[parameter], delta, self.update_precision, decay, start)

    def _split(self, group: dict[str, Any]) -> tuple[dict[nn.Parameter, Matrix], list[nn.Parameter]]:
        """The trainable parameters of a group: those with low-rank directions, and those with dense ones."""
        found = {p: _KIND.matrix(self.trainable_shape(p), group["rank"]) for p in self.named(group)}
        matrices = {parameter: matrix for parameter, matrix in found.items() if matrix is not None}
        return matrices, [parameter for parameter in found if parameter not in matrices]

    def _along(
        self, parameters: Iterable[nn.Parameter], side: str, run: tuple[int, int], coefficients: Mapping[int, float]
    ) -> dict[nn.Parameter, Direction]:
        """The sum over queries of coefficient times noise, for each of some parameters; `side` chooses the noise."""
        named = {f"{self.names[parameter]}{side}": parameter for parameter in parameters}
        found = directions(named, *run, coefficients, self.noise)
        return dict(zip(named.values(), found.values(), strict=True))

    def _factors(
        self, side: str, matrices: Mapping[nn.Parameter, Matrix], run: tuple[int, int], queries: Collection[int]
    ) -> dict[tuple[nn.Parameter, int], Tensor]:
        """The factors of some queries on one side, by parameter and query.

        Args:
            side: "left", for factors (m, r) in float32 or wider, or "right", for (n, r) in the weight's dtype.
            matrices, run, queries: which factors are drawn; `run` is the seed and the step.
        """
        is_left, named = side == "left", {self.names[parameter]: parameter for parameter in matrices}
        rows = {p: m.rows if is_left else m.columns for p, m in matrices.items()}
        sizes = {(name, query): rows[p] * matrices[p].rank for name, p in named.items() for query in queries}
        dtypes = {name: compute_dtype(p.dtype) if is_left else p.dtype for name, p in named.items()}
        found = drawn(sizes, side, named, run, self.noise, dtypes)
        return {(p := named[name], query): noise.view(rows[p], -1) for (name, query), noise in found.items()}
