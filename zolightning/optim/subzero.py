"""SubZero: directions in a subspace of both rows and columns."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import nn

from zolightning.checks import require_choice
from zolightning.optim.bases import Matrix
from zolightning.optim.common import SubspaceSettings, Unpack
from zolightning.optim.subspace import SubspaceOptimizer

Scaling = Literal["code", "paper"]


class SubZero(SubspaceOptimizer):
    """SubZero (arXiv 2410.08989); with `betas` and many one-sided queries, SubZero+.

    Directions are ``s U Z V'`` with U (m, r) and V (n, r) Haar-orthonormal, drawn anew at each resampling, and Z (r, r)
    drawn at each step. The weight moves by ``-lr * g`` times the direction. With ``scaling="code"``, s is
    ``sqrt(m n) / r``: directions have the norm of MeZO's, and published learning rates apply. With "paper", s is 1. The
    two are not equivalent at any `lr`: s scales the perturbation, and its square the step.

    A matrix with a side below `rank`, such as a LoRA factor, is reshaped to be as nearly square as possible. One with
    a single row or column is searched along dense directions.

    State: U, (m, r), and V, (n, r), in the weight's dtype; the core, (r, r) in fp32, while it holds updates; each
    moment, the same again.

    Differs from the released code: the signs of the bases' columns make them Haar-distributed, and a resumed run has
    the same bases.

    Args:
        params: parameters or parameter groups.
        lr: step size; the weight moves by ``lr * projected_grad`` along a direction.
        eps: perturbation scale, which multiplies the direction.
        rank: r.
        scaling: "code" or "paper"; with `normalize_directions` always "code".
        momentum: decay of the mean of core gradients; 0 keeps none.
        betas: Adam's decays, instead of `momentum`; SubZero+ uses (0.9, 0.95). Biases and norms get Adam's steps too.
        vector_lr: learning rate of biases and norms; None takes `lr`.
        **common: num_queries, align_queries, estimator, noise, normalize, normalize_directions, clip, rms_decay,
            seed, update_precision, offload_low_words: see
            :class:`~zolightning.optim.subspace.SubspaceOptimizer`.
    """

    sides = "both"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        rank: int = 16,
        scaling: Scaling = "code",
        momentum: float = 0.0,
        betas: tuple[float, float] | None = None,
        vector_lr: float | None = None,
        **common: Unpack[SubspaceSettings],
    ) -> None:
        require_choice("scaling", scaling, get_args(Scaling))
        self.scaling = scaling
        defaults = {"lr": lr, "eps": eps, "momentum": momentum, "betas": betas}
        super().__init__(params, defaults, rank=rank, vector_lr=vector_lr, **common)

    def direction_scale(self, matrix: Matrix) -> float:
        is_long = self.scaling == "code" or self.normalize_directions
        return math.sqrt(matrix.rows * matrix.columns) / matrix.rank if is_long else 1.0

    def matrix(self, parameter: nn.Parameter, rank: int) -> Matrix | None:
        found = super().matrix(parameter, rank)
        if found is None or found.rank == rank:
            return found
        size = found.rows * found.columns
        rows = next(divisor for divisor in range(math.isqrt(size), 0, -1) if size % divisor == 0)
        return Matrix(rows, size // rows, min(rank, rows)) if rows > 1 else None
