"""The record of a step, and the error of a step that cannot be taken."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_NONFINITE_IN_A_ROW = 20  # steps that may be skipped in a row before training stops
FLAT_IN_A_ROW = 3  # steps with equal losses before the cause is looked for; rounding alone makes some equal


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; the weights are those of the last completed step."""


@dataclass(frozen=True)
class StepRecord:
    """Everything that determines a step besides the weights. Applying a run's records to its initial weights
    replays it.

    Attributes:
        step: number of the step, from 0; together with `seed` it determines the directions.
        seed: the run's seed.
        lr: the learning rate of each parameter group.
        projected_grads: one for each query, after `align_queries`; empty if the step was skipped.
        losses: one for each evaluation of the step, in the order of the estimator's probes.
        forward_passes: number of forward passes that the step took.
        refresh: index of the basis, for subspace methods.
        folds: how many times a subspace method had added its pending updates to the weights before the step.
        blocks: indices of the blocks that moved; empty if all parameters did.
        given: whether the bases of `refresh` were given to the method. Records do not hold them.
        leaves_traces: whether the loss changed the module (a metric, a counter), or logged a value to the mean of an
            epoch. Records do not hold the change.
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
        """Whether applying the record does everything that the step did."""
        return bool(self.projected_grads) and not self.leaves_traces

    @property
    def loss(self) -> float:
        """Mean of the losses that were evaluated."""
        return sum(self.losses) / len(self.losses)


@dataclass
class Estimate:
    """An optimizer's last estimate. It is one object because wrappers copy an optimizer's attributes (Fabric does).

    Attributes:
        record: the result; None before the first estimate.
        is_unapplied: whether it has yet to be applied.
        flat_in_a_row: number of estimates up to this one with equal losses.
        nonfinite_in_a_row: number of estimates up to this one with a loss that is not finite.
        known: records to be returned by the next estimates, see ``ZerothOrderOptimizer.expect``.
        evaluates_known: whether the losses of these steps are evaluated nevertheless.
    """

    record: StepRecord | None = None
    is_unapplied: bool = False
    flat_in_a_row: int = 0
    nonfinite_in_a_row: int = 0
    known: deque[StepRecord] = field(default_factory=deque)
    evaluates_known: bool = False

    @property
    def is_replaying(self) -> bool:
        """Whether the next estimate returns a known record and evaluates no loss."""
        return bool(self.known) and self.known[0].says_all and not self.evaluates_known

    def expect(self, records: Iterable[StepRecord], step: int, evaluate: bool) -> None:
        """Makes the next estimates return these records instead of new ones, to repeat steps of an interrupted run.

        The loss is not evaluated, except in steps in which it changed the module, which a record does not hold.

        Args:
            records: the records of the next steps, in order.
            step: number of the next step.
            evaluate: whether to evaluate the loss in all of these steps, for what it logs.

        Raises:
            ValueError: if they are not the records of the steps that come next.
        """
        known = list(records)
        if [record.step for record in known] != list(range(step, step + len(known))):
            raise ValueError(
                f"The records must continue with step {step}, but begin with step {known[0].step} or have gaps."
            )
        self.known.clear()
        self.known.extend(known)
        self.evaluates_known = evaluate
