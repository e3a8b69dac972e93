"""Which losses a step asks for, and the projected gradients they give.

With directions z_1..z_N of unit variance and F the loss of one batch, every estimator turns losses into numbers
g_1..g_N such that ``mean_i(g_i z_i)`` estimates the gradient (with ``ZScores`` its direction). The bias is that of g_i;
H is the Hessian:

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
from typing import NamedTuple

from torch import Tensor


class Probe(NamedTuple):
    """One evaluation of the loss, at ``W + sign * eps * z_query``."""

    query: int
    sign: int  # +1, -1, or 0 for the unperturbed weights


_TINY = 1e-8  # far above the rounding of equal losses, far below differences that say something
EACH = -1  # in the place of a query: each example of the batch is evaluated along its own


class Estimator(ABC):
    """What is asked of a loss, and how projected gradients follow. Stateless."""

    min_queries: int = 1
    forwards: int = 1  # that an evaluation costs

    @abstractmethod
    def probes(self, num_queries: int) -> list[Probe]:
        """The evaluations a step needs, in order."""

    @abstractmethod
    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        """The projected gradients (num_queries,) from the losses of :meth:`probes`, both float64.

        On the device of the losses, which must not be waited for: no ``item()``, no ``if`` on a tensor.
        """

    def gram(self, directions: Tensor) -> Tensor:
        """Inner products of what projected gradients are measured along, given those of the directions, both (q, q)."""
        return directions


class TwoSided(Estimator):
    """Central differences, one pair of forwards a query (SPSA; MeZO, arXiv 2305.17333, definition 1)."""

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(query, sign) for query in range(num_queries) for sign in (1, -1)]

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        plus, minus = losses.view(-1, 2).unbind(1)
        return (plus - minus) / (2 * eps)


class ThreePoint(TwoSided):
    """Central differences and the loss between them, the same for all queries: what curvature shows in (HiZOO)."""

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(0, 0), *super().probes(num_queries)]

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        return super().projected_grads(losses[1:], eps)

    def second_differences(self, losses: Sequence[float]) -> list[float]:
        """``F(W + eps z_i) + F(W - eps z_i) - 2 F(W)`` of each query: for a quadratic ``eps**2 z_i' H z_i``."""
        return [plus + minus - 2 * losses[0] for plus, minus in zip(losses[1::2], losses[2::2], strict=True)]


class PerExample(TwoSided):
    """Central differences of each example's own loss along its own direction, all in two forwards (arXiv 2606.02857).

    Example number e of a step's batch, counted over all ranks, takes part in query ``e mod num_queries`` alone; so let
    there be as many queries as examples. With F_i the mean loss of the examples of query i, and w_i their share of the
    batch's terms (1 / N each, mostly)::

        g_i = N w_i (F_i(W + eps z_i) - F_i(W - eps z_i)) / (2 eps)

    and ``mean_i(g_i z_i)`` estimates the gradient of the batch's loss. With G_i the gradient of F_i, its variance is
    that of one direction for all examples times ``mean_i(|G_i|^2) / (N |mean_i(G_i)|^2)``: N times less where examples
    agree, and no less where they have nothing in common.
    """

    min_queries = 2

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(EACH, 1), Probe(EACH, -1)]


class OneSided(Estimator):
    """Forward differences with one shared baseline, the loss at the unperturbed weights."""

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(0, 0), *(Probe(query, 1) for query in range(num_queries))]

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        return (losses[1:] - losses[0]) / eps


class Population(Estimator):
    """Each query against the mean of the others: no baseline forward, and curvature common to all cancels.

    The leave-one-out form of population methods (AIM-ZO, FZOO), with the division by `eps` that some released
    codes leave out: there `lr` silently means ``lr * eps``.
    """

    min_queries = 2

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(query, 1) for query in range(num_queries)]

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        others = (losses.sum() - losses) / (len(losses) - 1)
        return (losses - others) / eps

    def gram(self, directions: Tensor) -> Tensor:
        """Of the directions less their mean."""
        rows = directions - directions.mean(0)
        return rows - rows.mean(1, keepdim=True)


class ZScores(Population):
    """Each query by its standard score among all: without units, so for rewards of any scale (arXiv 2509.24372).

    A query's loss is its mean over the examples of the batch, and these means are standardised over the queries, as
    "Evolution Strategies at Scale" and its code do it: with the population's standard deviation (of N, not N - 1), and
    without a division by `eps`, so that `lr` is their alpha: about ``lr / sqrt(N)`` is the RMS move of a weight a step.
    To subtract each example's own mean over the queries first, as others do, changes nothing after the mean over
    examples. Where all losses are equal, nothing moves.
    """

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        centered = losses - losses[0]  # exactly 0 for equal losses, whose mean may be rounded
        centered = centered - centered.mean()
        return centered / (centered.square().mean().sqrt() + _TINY)


class ForwardGradient(Estimator):
    """No difference but a derivative: ``grad F' z_i``, exact, by forward-mode automatic differentiation.

    The forward gradient of Baydin et al., "Gradients without Backpropagation" (arXiv 2202.08587): what the other
    estimators come to where `eps`, which it does not use, goes to zero and no loss is rounded. An upper bound for them,
    at the weights themselves, and a first-order method that keeps no activations. It is refused where one of the
    network's operations has no derivative in forward mode. For methods with dense directions: MeZO and MeZOAdam.
    """

    forwards = 3  # beside ``W x`` the products ``W dx`` and ``dW x``

    def probes(self, num_queries: int) -> list[Probe]:
        return [Probe(query, 0) for query in range(num_queries)]

    def projected_grads(self, losses: Tensor, eps: float) -> Tensor:
        """Of the derivatives, which are the projected gradients already."""
        return losses
