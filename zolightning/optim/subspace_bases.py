"""Parameters that are searched in subspaces: which of them, seen as which matrices, in which bases."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from zolightning.directions.basis import Basis, Sides, gaussian, orthonormal
from zolightning.directions.dense import arithmetic
from zolightning.optim.base import ZerothOrderOptimizer


class Matrix(NamedTuple):
    """How a parameter is searched: viewed as a (rows, columns) matrix, by factors of `rank` columns.

    All dimensions after the first are columns, unless a method says otherwise; of a parameter that trains in part
    (:class:`~zolightning.directions.slices.Slice`) only that part counts.
    """

    rows: int
    columns: int
    rank: int


class SubspaceBases(ZerothOrderOptimizer):
    """Abstract: each matrix among the parameters has a basis, drawn when it is first asked for.

    Bases are functions of (seed, refresh index, parameter name): a checkpoint holds none, unless `anchor` is used.
    They have the dtype of the weight, so a bf16 run searches in a subspace that is rounded to bf16, which is not quite
    that of an fp32 run.
    """

    sides: ClassVar[Sides]  # which factors a basis has
    unit: ClassVar[bool] = True  # columns are orthonormal, or Gaussian of unit variance

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bases: dict[nn.Parameter, Basis] = {}
        super().__init__(*args, **kwargs)

    def matrix(self, parameter: nn.Parameter, rank: int) -> Matrix | None:
        """How a parameter is searched; None for dense directions."""
        shape = self.trainable_shape(parameter)
        if len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        longest = {"left": rows, "right": columns, "both": min(rows, columns)}[self.sides]
        return Matrix(rows, columns, min(rank, longest)) if min(rows, columns) > 1 else None

    def split(
        self, group: dict[str, Any], frozen: bool = False
    ) -> tuple[dict[str, tuple[nn.Parameter, Matrix]], dict[str, nn.Parameter]]:
        """Sorts the trainable parameters of a group, or with `frozen` all of them.

        Returns:
            By name: parameters that are searched in a subspace, each with the matrix that it is seen as; and the
            others, of any shape, which move along dense directions.
        """
        matrices: dict[str, tuple[nn.Parameter, Matrix]] = {}
        vectors: dict[str, nn.Parameter] = {}
        for parameter in group["params"]:
            if frozen or self.moves(parameter):
                name, matrix = self._names[parameter], self.matrix(parameter, group["rank"])
                if matrix is None:
                    vectors[name] = parameter
                else:
                    matrices[name] = parameter, matrix
        return matrices, vectors

    def basis(self, parameter: nn.Parameter) -> Basis:
        """The basis of a matrix now: factors (rows, rank) and (columns, rank) in the dtype of its weight.

        Raises:
            ValueError: if the parameter is not searched in a subspace.
        """
        if parameter not in self._bases:
            state = self.state.get(parameter, {})
            is_anchored = "left" in state or "right" in state
            self._bases[parameter] = (
                Basis(state.get("left"), state.get("right")) if is_anchored else self._draw(parameter)
            )
        return self._bases[parameter]

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Their bases too, which are drawn again when they move again."""
        parameters = list(parameters)
        super().release(parameters)
        for parameter in parameters:
            self._bases.pop(parameter, None)

    def state_bytes(self) -> int:
        """Bytes of tensors in the optimizer's state now, with the bases."""
        drawn = (basis for p, basis in self._bases.items() if not self.state.get(p, {}).keys() & {"left", "right"})
        factors = (factor for basis in drawn for factor in (basis.left, basis.right) if factor is not None)
        return super().state_bytes() + sum(factor.nbytes for factor in factors)

    def _draw(self, parameter: nn.Parameter) -> Basis:
        group, name = self._group_of(parameter), self._names[parameter]
        matrix = self.matrix(parameter, group["rank"])
        if matrix is None:
            raise ValueError(f"`{name}` moves along dense directions and has no basis.")

        def factor(side: str, size: int) -> Tensor:
            drawn = gaussian(size, matrix.rank, group["seed"], group["refresh"], f"{name}/{side}", parameter.device)
            drawn = drawn.to(arithmetic(parameter.dtype))
            return (orthonormal(drawn) if self.unit else drawn).to(parameter.dtype)

        left = None if self.sides == "right" else factor("left", matrix.rows)
        right = None if self.sides == "left" else factor("right", matrix.columns)
        return Basis(left, right)

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
