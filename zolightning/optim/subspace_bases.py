"""Parameters that are searched in subspaces: which of them, seen as which matrices, in which bases."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zolightning.directions.autocast import without_autocast
from zolightning.directions.basis import Basis, Sides, gaussian, orthonormal
from zolightning.directions.dense import arithmetic
from zolightning.optim.base import ZerothOrderOptimizer

_GIVEN = {"left": "given_left", "right": "given_right"}  # where the state has them


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

    Bases are functions of (seed, refresh index, parameter name): a checkpoint holds none, unless `anchor` is used or
    factors are given to :meth:`~zolightning.optim.subspace_weights.SubspaceWeights.resample`; those are state, which a
    replay from records needs beside them. Bases have the dtype of the weight, so a bf16 run searches in a subspace that
    is rounded to bf16, which is not quite that of an fp32 run.
    """

    sides: ClassVar[Sides]  # which factors a basis has
    unit: ClassVar[bool] = True  # columns are orthonormal, or Gaussian of unit variance
    normalize_directions: bool  # an argument of SubspaceOptimizer

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

    def unit_rms_scale(self, matrix: Matrix) -> float:
        """What makes the elements of a lift of mean square 1, if those of its core are, in bases as they are drawn."""
        sides = ("left", "right") if self.sides == "both" else (self.sides,)
        return math.prod(self._mean_square(matrix, side) for side in sides) ** -0.5

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Their bases too, which are drawn again when they move again."""
        parameters = list(parameters)
        given = {parameter: self.given(parameter) for parameter in parameters}
        super().release(parameters)
        for parameter in parameters:
            self._bases.pop(parameter, None)
            if given[parameter]:
                self._give(parameter, Basis(**given[parameter]))

    def state_bytes(self) -> int:
        """Bytes of tensors in the optimizer's state now, with the bases."""
        in_state = {id(value) for state in self.state.values() for value in state.values()}
        factors = (factor for basis in self._bases.values() for factor in (basis.left, basis.right))
        drawn = (factor for factor in factors if factor is not None and id(factor) not in in_state)
        return super().state_bytes() + sum(factor.nbytes for factor in drawn)

    @property
    def has_given(self) -> bool:
        """Whether any matrix has factors that were given."""
        return any(self.given(parameter) for group in self.param_groups for parameter in group["params"])

    def given(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The factors of a matrix that were given to :meth:`resample`, by side, "left" or "right"."""
        state = self.state.get(parameter, {})
        return {side: state[key] for side, key in _GIVEN.items() if key in state}

    def _give(self, parameter: nn.Parameter, basis: Basis) -> None:
        factors = {"left": basis.left, "right": basis.right}
        self.state[parameter] |= {
            _GIVEN[side]: factor.to(parameter.device, parameter.dtype)
            for side, factor in factors.items()
            if factor is not None
        }

    def _mean_square(self, matrix: Matrix, side: str) -> float:
        """Squared length of a row of a drawn factor, on average."""
        return matrix.rank / (matrix.rows if side == "left" else matrix.columns) if self.unit else float(matrix.rank)

    def _as_long_as_drawn(self, parameter: nn.Parameter, basis: Basis) -> Basis:
        """A basis that is given, with factors of such a length that lifts are as large as in drawn ones."""
        matrix = self.matrix(parameter, self._group_of(parameter)["rank"])
        if matrix is None:
            return basis

        def rescaled(side: str, factor: Tensor | None) -> Tensor | None:
            if factor is None:
                return None
            own = side if self.sides == "both" else self.sides
            wide = factor.to(arithmetic(factor.dtype))
            length = self._mean_square(matrix, own) * len(factor)
            return wide * (length / wide.square().sum().clamp_min(torch.finfo(wide.dtype).tiny)).sqrt()

        return Basis(rescaled("left", basis.left), rescaled("right", basis.right))

    def _is_turned(self, parameter: nn.Parameter) -> bool:
        """Whether the factor of a matrix, of which the method has one, is on the other side than the method's own."""
        return self.sides != "both" and getattr(self.basis(parameter), self.sides) is None

    def _draw(self, parameter: nn.Parameter) -> Basis:
        group, name = self._group_of(parameter), self._names[parameter]
        matrix = self.matrix(parameter, group["rank"])
        if matrix is None:
            raise ValueError(f"`{name}` moves along dense directions and has no basis.")

        given = self.given(parameter)

        def factor(side: str, size: int) -> Tensor | None:
            if side in given:
                return given[side]
            if self.sides not in (side, "both") or (given and self.sides != "both"):
                return None
            drawn = gaussian(size, matrix.rank, group["seed"], group["refresh"], f"{name}/{side}", parameter.device)
            drawn = drawn.to(arithmetic(parameter.dtype))
            with without_autocast(parameter.device):
                return (orthonormal(drawn) if self.unit else drawn).to(parameter.dtype)

        return Basis(factor("left", matrix.rows), factor("right", matrix.columns))

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
