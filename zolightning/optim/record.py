"""What a step leaves behind, and the error of one that could not be taken."""

from collections import deque
from dataclasses import dataclass, field

MAX_NONFINITE_IN_A_ROW = 20  # steps that may be skipped; a loss that is never finite trains nothing
FLAT_IN_A_ROW = 3  # steps with equal losses after which it is asked why; rounded ones are equal now and then


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; the weights are those of the last completed step."""


@dataclass(frozen=True)
class StepRecord:
    """All that a step depends on beside the weights: applying a run's records to its first weights replays it.

    Attributes:
        step: number of the step, from 0; with `seed` it names the directions.
        seed: the run's seed.
        lr: learning rate of each parameter group.
        projected_grads: one a query, aligned where the method aligns them; empty for a step that was skipped.
        losses: of the step's evaluations, in the order of the estimator's probes.
        forward_passes: evaluations of the loss.
        refresh: index of the subspace's basis, for methods that have one.
        folds: how often updates that such methods keep beside the weights were added to them before the step.
        blocks: indices of the blocks that moved; none where all parameters did.
        given: whether the bases of `refresh` were given to the method, which no record has.
        leaves_traces: whether the loss wrote to the module (a metric, a counter, an average of the weights), which no
            record has.
    """

    step: int
    seed: int
    lr: tuple[float, ...]
    projected_grads: tuple[float, ...]
    losses: tuple[float, ...]
    forward_passes: int
    refresh: int = 0
    folds: int = 0
    blocks: tuple[int, ...] = ()
    given: bool = False
    leaves_traces: bool = False

    @property
    def says_all(self) -> bool:
        """Whether applying it does all that the step did."""
        return bool(self.projected_grads) and not self.leaves_traces

    @property
    def loss(self) -> float:
        """Mean of the losses that were evaluated."""
        return sum(self.losses) / len(self.losses)


@dataclass
class Estimate:
    """The last estimate of an optimizer: one object, since wrappers copy an optimizer's attributes (Fabric does).

    Attributes:
        record: what it found; None before the first one.
        is_pending: whether it has yet to be applied.
        flat_in_a_row: how many estimates up to this one had equal losses.
        nonfinite_in_a_row: how many estimates up to this one had a loss that is not finite.
        measured: evaluations since then that no step has counted yet.
        known: the records of the steps that come next, where these were taken before.
        evaluates_known: whether their losses are evaluated nevertheless.
    """

    record: StepRecord | None = None
    is_pending: bool = False
    flat_in_a_row: int = 0
    nonfinite_in_a_row: int = 0
    measured: int = 0
    known: deque[StepRecord] = field(default_factory=deque)
    evaluates_known: bool = False
