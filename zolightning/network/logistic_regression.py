"""Multinomial logistic regression without intercept, with a penalty chosen by cross-validation, as in scikit-learn."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.checks import require_positive

CS = tuple(10 ** (-4 + 8 * i / 9) for i in range(10))
"""Ten values from 1e-4 to 1e4, evenly spaced by their logarithms: scikit-learn's."""

_FOLDS = 5
_MOST_ITERATIONS = 5000


class LinearProbe(NamedTuple):
    """A fitted linear probe: new values for some rows of a head."""

    rows: Tensor  # indices of these rows, (K,)
    weights: Tensor  # their values, (K, H), float64
    accuracy: float  # share of the fitted examples for which the right row has the largest score
    num_features: int  # fitted examples
    c: float  # weight of the data against the penalty

    def __str__(self) -> str:
        return (
            f"{self.num_features:,} feature vectors of length {self.weights.shape[1]:,}, {len(self.rows):,} classes, C "
            f"{self.c:.3g}; {100 * self.accuracy:.1f} % are classified correctly."
        )


def fit_probe(
    features: Tensor,
    rows: Tensor,
    cs: Sequence[float],
    tolerance: float,
    choose: Callable[..., tuple[float, "CrossValidation"]],
) -> LinearProbe:
    """Fits rows of a head to features, on the host in float64.

    That takes less time than the forward passes, and gives the same result for every device. Features are (N, H), the
    right row of the head for each (N,). `choose` (:func:`most_accurate` or :func:`strongest_penalty`) chooses one of
    the `cs`.
    """
    found, (classes, targets) = features.double().cpu(), rows.cpu().unique(return_inverse=True)
    c = cs[0] if len(cs) == 1 else choose(found, targets, len(classes), cs, tolerance)[0]
    weights = fit(found, targets, len(classes), c, tolerance)
    return LinearProbe(classes, weights, accuracy(found @ weights.T, targets).item(), len(found), c)


def joined_features(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins the inputs of the head, (N, H), and the right rows of the head, (N,), of several batches."""
    features, rows = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return features, rows


def check_probe(cs: Sequence[float], tolerance: float) -> None:
    """Raises a ValueError that names an argument which :func:`fit_probe` cannot use."""
    if not cs or not all(c > 0 for c in cs):
        raise ValueError(f"`cs` must be at least one number above 0, got {cs!r}.")
    require_positive("tolerance", tolerance)


def fit(features: Tensor, targets: Tensor, num_classes: int, c: float, tolerance: float) -> Tensor:
    """The weights (K, H) that minimise ``mean cross-entropy + |W|^2 / (2 c N)``, by L-BFGS.

    Args:
        features: (N, H).
        targets: (N,), from 0 to K - 1.
        num_classes: K.
        c: weight of the data against the penalty, scikit-learn's ``C``.
        tolerance: the largest entry of the gradient at which it ends.
    """
    weights = features.new_zeros(num_classes, features.shape[1]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=64 * torch.finfo(features.dtype).eps,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            penalty = weights.square().sum() / (2 * c * len(features))
            loss = F.cross_entropy(features @ weights.T, targets) + penalty
            loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def accuracy(scores: Tensor, targets: Tensor) -> Tensor:
    """The share of the N examples whose largest score, of (N, K), is that of their target, (N,)."""
    return (scores.argmax(dim=1) == targets).double().mean()


class CrossValidation(NamedTuple):
    """How fits to all folds but one do on the fold that was left out."""

    loss: float  # mean of the folds' cross-entropies
    error: float  # standard error of `loss`
    accuracy: float  # mean share of the examples whose target has the largest score


def most_accurate(
    features: Tensor, targets: Tensor, num_classes: int, cs: Sequence[float], tolerance: float
) -> tuple[float, CrossValidation]:
    """The ``c`` with the best mean accuracy on five folds left out in turn; of equal ones the first.

    Each fold has its share of each class, in the order of the rows, as scikit-learn's ``StratifiedKFold`` deals them.
    """
    tried = ((c, cross_validate(features, targets, num_classes, c, tolerance)) for c in cs)
    return max(tried, key=lambda one: one[1].accuracy)


def strongest_penalty(
    features: Tensor, targets: Tensor, num_classes: int, cs: Sequence[float], tolerance: float
) -> tuple[float, CrossValidation]:
    """The smallest ``c`` whose loss on the folds is within one standard error of the least.

    The rule of Breiman et al. (1984, *Classification and Regression Trees*, 3.4.3): of fits that classify unseen rows
    about equally well, the one that is least certain of the rows it was fitted to. Values are tried from the smallest
    on, until the loss is a standard error above the least.
    """
    tried: list[tuple[float, CrossValidation]] = []
    least = limit = math.inf
    for c in sorted(cs):
        found = cross_validate(features, targets, num_classes, c, tolerance)
        tried.append((c, found))
        if found.loss < least:
            least, limit = found.loss, found.loss + found.error
        elif found.loss > limit:
            break
    return next((c, found) for c, found in tried if found.loss <= limit)


def cross_validate(features: Tensor, targets: Tensor, num_classes: int, c: float, tolerance: float) -> CrossValidation:
    """Five-fold cross-validation of :func:`fit`; folds that are empty, or hold all examples, are left out."""
    # How many examples of the same class come before each one
    same = F.one_hot(targets, num_classes).cumsum(0).gather(1, targets[:, None])[:, 0] - 1
    losses, accuracies = [], []
    for is_out in (same % _FOLDS == fold for fold in range(_FOLDS)):
        if is_out.any() and not is_out.all():
            weights = fit(features[~is_out], targets[~is_out], num_classes, c, tolerance)
            scores = features[is_out] @ weights.T
            losses.append(F.cross_entropy(scores, targets[is_out]))
            accuracies.append(accuracy(scores, targets[is_out]))
    if not losses:
        return CrossValidation(0.0, 0.0, 0.0)
    by_fold, count = torch.stack(losses), len(losses)
    error = by_fold.std().item() / count**0.5 if count > 1 else 0.0
    return CrossValidation(by_fold.mean().item(), error, torch.stack(accuracies).mean().item())
