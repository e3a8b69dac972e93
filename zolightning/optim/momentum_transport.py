"""Moves the momentum of a matrix from one basis to the next."""

from typing import Literal

from torch import Tensor

from zolightning.directions.basis import Basis
from zolightning.optim.precision import State

Transport = Literal["project", "reset", "keep"]
TRANSPORTS: tuple[str, ...] = ("project", "reset", "keep")


def momentum_of(state: State) -> Tensor | None:
    """The first moment in the state of a matrix, flat; None if there is none."""
    return state.get("momentum_buffer", state.get("exp_avg"))


def transport_momentum(state: State, old: Basis, core: Tensor, new: Basis, how: Transport) -> tuple[float, float]:
    """Expresses the momentum of a matrix in a new basis; see :class:`~zolightning.callbacks.MomentumTransport`.

    Args:
        state: the matrix's entry in the optimizer's state, from which "reset" removes the momentum.
        old: the basis in which the momentum was gathered.
        core: the momentum in the shape of a core: a view of the tensor in the state, which is changed in place.
        new: the basis to express it in.
        how: "project", "reset" or "keep".

    Returns:
        The squared Frobenius norm of the momentum as a matrix (m, n), before and after.
    """
    before = old.squared_norm(core)
    if how == "reset":
        for entry in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step"):
            state.pop(entry, None)
        return before, 0.0
    if how == "project":
        core.copy_(old.transport(core.clone(), new))
    return before, new.squared_norm(core)
