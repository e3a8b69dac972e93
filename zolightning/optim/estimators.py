"""Which losses a step evaluates, and the projected gradients that follow from them.

With directions z_1..z_N of unit variance and F the loss of one batch, an estimator turns losses into projected
gradients g_1..g_N such that ``mean_i(g_i z_i)`` estimates the gradient (with ``ZScores``, its direction). The last
column is the bias of g_i; H is the Hessian:

===================  ========  ===========================================================  ====================
estimator            forwards  g_i                                                          bias for a quadratic
===================  ========  ===========================================================  ====================
``TwoSided``         2 N       (F(W + eps z_i) - F(W - eps z_i)) / (2 eps)                  none
``OneSided``         N + 1     (F(W + eps z_i) - F(W)) / eps                                (eps / 2) z_i' H z_i
``ThreePoint``       2 N + 1   that of ``TwoSided``, and second differences                 none
``Population``       N (>= 2)  (F(W + eps z_i) - mean over j != i of F(W + eps z_j)) / eps  its mean cancels
``ZScores``          N (>= 2)  (F(W + eps z_i) - their mean) / their standard deviation     its mean cancels
``PerExample``       2         that of ``TwoSided`` for F_i, the examples of query i alone  none
``ForwardGradient``  3 N       the derivative of F along z_i, exact                         none, for any F
===================  ========  ===========================================================  ====================
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

from torch import Tensor

from zolightning.evaluation.examples import MicroBatches
from zolightning.evaluation.losses import LossFunction
from zolightning.optim.forward_gradient import evaluate_derivatives
from zolightning.optim.per_example import evaluate_examples
from zolightning.optim.probing import Probe as Probe  # a name that estimators elsewhere import from here
from zolightning.optim.probing import Probed, evaluate_probes
from zolightning.optim.share import Share

if TYPE_CHECKING:
    from zolightning.optim.base import ZerothOrderOptimizer


_TINY = 1e-8  # far above the rounding errors of equal losses, far below differences that matter
EACH = -1  # in place of a query's number: each example of the batch is evaluated along its own direction


class Estimator(ABC):
    """Abstract base of the estimators, which have no state.

    An estimator says which evaluations a step has (:meth:`probes`) and what follows from their losses
    (:meth:`projected_grads`). One that needs more than a loss for each evaluation makes them itself (:meth:`evaluate`).
    """

    min_queries: int = 1
    forwards: int = 1  # cost of an evaluation, in forward passes
    why_unbatched: str = ""  # why `evaluations_per_forward` must be 1; empty if it need not be
    reads_examples: bool = False  # whether it needs the loss of each example, and so `micro_batches`
    takes_shards: bool = True  # whether it works for parameters of which a rank has some rows (FSDP2)

    @abstractmethod
    def probes(self, num_queries: int) -> list[Probe]:
        """The evaluations of a step, in order."""

    @abstractmethod
    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        """The projected gradients (num_queries,) from the losses of :meth:`probes`, both float64.

        Computed on the device of the losses without synchronizing with it: no ``item()``, no ``if`` on a tensor.
        """

    def gram(self, directions: Tensor) -> Tensor:
        """The Gram matrix (q, q) of the vectors along which projected gradients are measured.

        Args:
            directions: the Gram matrix (q, q) of the directions.
        """
        return directions

    def evaluate(
        self,
        optimizer: "ZerothOrderOptimizer",
        loss_fn: LossFunction,
        share: Share,
        micro_batches: MicroBatches | None = None,
    ) -> Probed:
        """Evaluates the losses of a step, the same ones at each call, and makes projected gradients of them.

        Args:
            optimizer: the method, which defines the directions.
            loss_fn, share, micro_batches: see :meth:`~zolightning.optim.base.ZerothOrderOptimizer.estimate`.
        """
        return evaluate_probes(optimizer, self, self.probes(optimizer.num_queries), loss_fn, share)

    def check(self, optimizer: "ZerothOrderOptimizer") -> None:
        """Raises a ValueError that names a setting of a method with which this estimator does not work."""
        least, found = self.min_queries, optimizer.num_queries
        if not isinstance(found, Integral) or found < least:
            name = type(self).__name__
            raise ValueError(f"`num_queries` must be an integer, at least {least} with {name}, got {found!r}.")
        for probe in self.probes(least):  # a wrong number of queries may be large
            if probe.sign not in (-1, 0, 1):
                raise ValueError(
                    f"`probes` of {type(self).__name__} has {probe}, but a sign must be 1, -1 or 0 (the unperturbed "
                    "weights). Evaluate other points by `zolightning.optim.probing.losses_along`."
                )


class TwoSided(Estimator):
    """Central differences, one pair of forwards per query (SPSA; MeZO, arXiv 2305.17333, definition 1)."""

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(query, sign) for query in range(num_queries) for sign in (1, -1)]

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        plus, minus = losses.view(-1, 2).unbind(1)
        return (plus - minus) / (2 * eps)


class ThreePoint(TwoSided):
    """Central differences, and the unperturbed loss once for all queries: second differences show curvature (HiZOO)."""

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(0, 0), *super().probes(num_queries)]

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        return super().projected_grads(losses[1:], eps)

    def second_differences(self, losses: Sequence[float]) -> list[float]:
        """``F(W + eps z_i) + F(W - eps z_i) - 2 F(W)`` of each query: for a quadratic ``eps**2 z_i' H z_i``."""
        return [plus + minus - 2 * losses[0] for plus, minus in zip(losses[1::2], losses[2::2], strict=True)]


class PerExample(TwoSided):
    """Central differences of each example's own loss along its own direction, all in two forwards (arXiv 2606.02857).

    Example number e of a step's batch, counted over all ranks, belongs to query ``e mod num_queries``; use as many
    queries as a batch has examples. With F_i the mean loss of the examples of query i, and w_i their share of the terms
    of the batch (usually 1 / N)::

        g_i = N w_i (F_i(W + eps z_i) - F_i(W - eps z_i)) / (2 eps)

    and ``mean_i(g_i z_i)`` estimates the gradient of the batch's loss. With G_i the gradient of F_i, its variance is
    ``mean_i(|G_i|^2) / (N |mean_i(G_i)|^2)`` times that of one direction for all examples: N times less if all
    gradients are equal, and the same if they are orthogonal.
    """

    min_queries = 2
    why_unbatched = "the examples of an evaluation already share a forward pass"
    reads_examples = True
    takes_shards = False

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(EACH, 1), Probe(EACH, -1)]

    def evaluate(
        self,
        optimizer: "ZerothOrderOptimizer",
        loss_fn: LossFunction,
        share: Share,
        micro_batches: MicroBatches | None = None,
    ) -> Probed:
        return evaluate_examples(optimizer, self, loss_fn, share, micro_batches)

    def check(self, optimizer: "ZerothOrderOptimizer") -> None:
        super().check(optimizer)
        if optimizer.align_queries:
            raise ValueError(
                "`align_queries` is True, but with PerExample() each query has a different loss: set it to False."
            )


class OneSided(Estimator):
    """Forward differences with one shared baseline, the loss at the unperturbed weights."""

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(0, 0), *(Probe(query, 1) for query in range(num_queries))]

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        return (losses[1:] - losses[0]) / eps


class Population(Estimator):
    """Each query's loss minus the mean of the others': no baseline forward, and the curvature common to all cancels.

    The leave-one-out form of population methods (AIM-ZO, FZOO). Unlike in some released code, it is divided by `eps`;
    multiply a learning rate from such code by `eps` to get `lr` here.
    """

    min_queries = 2

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(query, 1) for query in range(num_queries)]

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        others = (losses.sum() - losses) / (len(losses) - 1)
        return (losses - others) / eps

    def gram(self, directions: Tensor) -> Tensor:
        """The Gram matrix of the directions minus their mean."""
        rows = directions - directions.mean(0)
        return rows - rows.mean(1, keepdim=True)


class ZScores(Population):
    """The z-score of each query's loss among all queries, which suits rewards of any scale (arXiv 2509.24372).

    A query's loss is the mean over the examples of the batch. These means are standardised over the queries as in
    "Evolution Strategies at Scale": by the standard deviation over N (not N - 1), and without a division by `eps`.
    `lr` is that paper's alpha, and the RMS move of a weight in a step is about ``lr / sqrt(N)``. First subtracting each
    example's mean over the queries, as others do, gives the same result. If all losses are equal, nothing moves.
    """

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        centered = losses - losses[0]  # exactly 0 for equal losses, whose mean may be rounded
        centered = centered - centered.mean()
        return centered / (centered.square().mean().sqrt() + _TINY)


class ForwardGradient(Estimator):
    """The exact directional derivative ``grad F' z_i``, by forward-mode automatic differentiation.

    The forward gradient of Baydin et al., "Gradients without Backpropagation" (arXiv 2202.08587): the limit of the
    other estimators as `eps` goes to zero without rounding errors, and so an upper bound for them. It does not use
    `eps` and keeps no activations. Networks with an operation that has no forward-mode derivative are refused. For
    methods with dense directions: MeZO, MeZOAdam, ZOAdaMM, ConMeZO and BSZO.
    """

    forwards = 3  # besides ``W x`` the products ``W dx`` and ``dW x``
    why_unbatched = "each evaluation is differentiated separately"
    takes_shards = False

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(query, 0) for query in range(num_queries)]

    def evaluate(
        self,
        optimizer: "ZerothOrderOptimizer",
        loss_fn: LossFunction,
        share: Share,
        micro_batches: MicroBatches | None = None,
    ) -> Probed:
        return evaluate_derivatives(optimizer, self, loss_fn, share)

    def check(self, optimizer: "ZerothOrderOptimizer") -> None:
        super().check(optimizer)
        if not optimizer.has_unit_directions:
            raise ValueError(
                f"`estimator` is ForwardGradient(), but {type(optimizer).__name__} searches a subspace, or along "
                "directions that depend on the weights: use MeZO, MeZOAdam, ZOAdaMM, ConMeZO or BSZO."
            )

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        """The derivatives themselves, which are given in place of losses."""
        return losses
