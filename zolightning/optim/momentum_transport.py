"""What becomes of the momentum of a matrix when its basis changes."""

from typing import Literal

from torch import Tensor

from zolightning.directions.basis import Basis
from zolightning.optim.precision import State

Transport = Literal["project", "reset", "keep"]
TRANSPORTS: tuple[str, ...] = ("project", "reset", "keep")


def momentum_of(state: State) -> Tensor | None:
    """The mean of core gradients in the state of a matrix, flat, if there is one."""
    return state.get("momentum_buffer", state.get("exp_avg"))


def transport_momentum(state: State, old: Basis, core: Tensor, new: Basis, how: Transport) -> tuple[float, float]:
    """Takes the momentum along; :class:`~zolightning.callbacks.MomentumTransport` says in which ways.

    Args:
        state: of the matrix; "reset" takes the momentum out.
        old: the basis that it was gathered in.
        core: the momentum, a view of what is in the state, of the bases' core shape; changed in place.
        new: the basis that it is wanted in.
        how: one of the three.

    Returns:
        The squared norm of the momentum as a matrix, before and after.
    """
    before = old.squared_norm(core)
    if how == "reset":
        for entry in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step"):
            state.pop(entry, None)
        return before, 0.0
    if how == "project":
        core.copy_(old.transport(core.clone(), new))
    return before, new.squared_norm(core)
