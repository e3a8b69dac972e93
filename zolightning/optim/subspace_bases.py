"""Which parameters are searched in subspaces, as which matrices, and in which bases."""

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
    """The shape (rows, columns) in which a parameter is searched, and the number of columns of its factors.

    The dimensions after the first are flattened into columns, unless a method says otherwise. Of a parameter that
    trains in part (:class:`~zolightning.directions.slices.Slice`), it is the shape of that part.
    """

    rows: int
    columns: int
    rank: int


class SubspaceBases(ZerothOrderOptimizer):
    """Abstract: each matrix among the parameters has a basis, drawn when it is first asked for.

    A basis is a function of (seed, refresh index, parameter name), so checkpoints hold none. Exceptions are bases that
    keep dominant directions (`anchor`) and factors given to
    :meth:`~zolightning.optim.subspace_weights.SubspaceWeights.resample`: they are part of the state, and a replay from
    records needs the latter beside the records.

    Factors have the dtype of the weight. A bf16 run therefore searches in a slightly different subspace than an fp32
    run, and with orthonormal factors ends 0.2 to 1.5 % of the distance moved beside it, even with the same losses.
    """

    kept_at_rest = tuple(_GIVEN.values())
    sides: ClassVar[Sides]  # the sides on which a basis has a factor
    unit: ClassVar[bool] = True  # whether columns are orthonormal; if not, entries are Gaussian of unit variance
    normalize_directions: bool  # an argument of SubspaceOptimizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bases: dict[nn.Parameter, Basis] = {}
        super().__init__(*args, **kwargs)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if group.get("weight_decay"):
            raise ValueError(f"`weight_decay` is {group['weight_decay']!r}, and {type(self).__name__} has none: use 0.")

    def matrix(self, parameter: nn.Parameter, rank: int) -> Matrix | None:
        """The matrix that a parameter is searched as; None where it is searched along dense directions."""
        shape = self.trainable_shape(parameter)
        if len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        longest = {"left": rows, "right": columns, "both": min(rows, columns)}[self.sides]
        return Matrix(rows, columns, min(rank, longest)) if min(rows, columns) > 1 else None

    def split(
        self, group: dict[str, Any], frozen: bool = False
    ) -> tuple[dict[str, tuple[nn.Parameter, Matrix]], dict[str, nn.Parameter]]:
        """Divides the trainable parameters of a group, or with `frozen` all of them, by how they are searched.

        Returns:
            Two mappings from names: to parameters that are searched in a subspace, each with its matrix; and to the
            others, which are searched along dense directions.
        """
        matrices: dict[str, tuple[nn.Parameter, Matrix]] = {}
        vectors: dict[str, nn.Parameter] = {}
        for parameter in group["params"]:
            if frozen or self.moves(parameter):
                name, matrix = self.names[parameter], self.matrix(parameter, group["rank"])
                if matrix is None:
                    vectors[name] = parameter
                else:
                    matrices[name] = parameter, matrix
        return matrices, vectors

    def basis(self, parameter: nn.Parameter) -> Basis:
        """The present basis of a matrix: factors (rows, rank) and (columns, rank), in the dtype of its weight.

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
        """The factor that gives ``left @ core @ right.T`` entries of mean square 1, for drawn bases and unit cores."""
        sides = ("left", "right") if self.sides == "both" else (self.sides,)
        return math.prod(self._mean_square(matrix, side) for side in sides) ** -0.5

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Frees their bases as well, which are drawn again when the parameters move again."""
        parameters = list(parameters)
        super().release(parameters)
        for parameter in parameters:
            self._bases.pop(parameter, None)

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
        """Mean squared norm of a row of a drawn factor."""
        return matrix.rank / (matrix.rows if side == "left" else matrix.columns) if self.unit else float(matrix.rank)

    def _as_long_as_drawn(self, parameter: nn.Parameter, basis: Basis) -> Basis:
        """A given basis, its factors scaled to the Frobenius norm that drawn ones have on average."""
        matrix = self._matrix_now(parameter)
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
        """Whether the one factor of a matrix was given on the other side than the method's own."""
        return self.sides != "both" and getattr(self.basis(parameter), self.sides) is None

    def _draw(self, parameter: nn.Parameter) -> Basis:
        group, name, matrix = self.group_of(parameter), self.names[parameter], self._matrix_now(parameter)
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

    def _matrix_now(self, parameter: nn.Parameter) -> Matrix | None:
        return self.matrix(parameter, self.group_of(parameter)["rank"])
