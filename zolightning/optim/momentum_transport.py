"""Moves the momentum of a matrix from one basis to the next."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from zolightning.directions.basis import Basis
from zolightning.optim.bases import Matrix
from zolightning.optim.precision import State

Transport = Literal["project", "reset", "keep"]


def momentum_of(state: State) -> Tensor | None:
    """The first moment in the state of a matrix, flat; None if there is none."""
    return state.get("momentum_buffer", state.get("exp_avg"))


def transport_momentum(
    state: State, matrix: Matrix, old: Basis, drawn: Basis, group: Mapping[str, Any], unit: bool
) -> tuple[Basis, float, float]:
    """Expresses the momentum of a matrix in its next basis; see :class:`~zolightning.callbacks.MomentumTransport`.

    Args:
        state: the `matrix`'s entry in the optimizer's state, with a momentum, which "reset" removes.
        old, drawn: the basis in which the momentum was gathered, and the next one.
        group: the settings: ``transport``, and as ``anchor`` how many dominant directions of the momentum take the
            places of drawn ones; the factors of such a basis are put into the state.
        unit: whether columns of factors are orthonormal.

    Returns:
        The next basis, and the squared Frobenius norm of the momentum as a matrix (m, n), before and after.
    """
    momentum = momentum_of(state)
    assert momentum is not None
    core, new = momentum.view(old.core_shape(matrix.shape)), drawn
    if group["anchor"]:
        new = drawn.anchored(old, core, min(group["anchor"], *core.shape), unit)
        state.update(new.by_side)
    before = old.squared_norm(core)
    if group["transport"] == "reset" or new.core_shape(matrix.shape) != core.shape:
        for entry in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step"):
            state.pop(entry, None)
        return new, before, 0.0
    if group["transport"] == "project":
        core.copy_(old.transport(core.clone(), new))
        if (squares := state.get("exp_avg_sq")) is not None:
            # Of an element whose noise was 0 in all steps so far. It now has a share of others' means, and would move
            # by its ratio to Adam's epsilon.
            squares.masked_fill_(squares == 0, squares.mean())
    return new, before, new.squared_norm(core)
