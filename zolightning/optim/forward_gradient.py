"""Differentiates a step's loss along its directions by forward-mode automatic differentiation."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zolightning.directions.tangent import Tangent
from zolightning.evaluation.losses import LossFunction, require_terms
from zolightning.messages import counted, some
from zolightning.optim.probing import Probed, device_of, losses_at, of_whole_parameters, sums_of
from zolightning.optim.share import Share

if TYPE_CHECKING:
    from zolightning.optim.base import ZerothOrderOptimizer
    from zolightning.optim.estimators import ForwardGradient


def evaluate_derivatives(
    optimizer: "ZerothOrderOptimizer", estimator: "ForwardGradient", loss_fn: LossFunction, share: Share
) -> Probed:
    """Differentiates a loss along the direction of each query, at the stored weights.

    Attention runs as separate operations, because its fused kernels have no forward-mode derivative. The arguments are
    those of ``Estimator.evaluate``.

    Returns:
        The loss at the stored weights, once for each query, and its derivatives. Where a derivative is not finite, it
        stands in place of the loss.

    Raises:
        ValueError: if the loss cannot be differentiated: an operation has no forward derivative, a parameter is read
            where it cannot be exchanged, or the loss does not depend on the parameters through torch's operations.
    """
    if optimizer.evaluator.graphs is not None:
        raise ValueError(
            "`cuda_graphs` is True, but ForwardGradient() cannot use a recorded forward pass. Set it to False."
        )
    count, group = optimizer.num_queries, optimizer.param_groups[0]
    own = share.of(len(estimator.probes(count)))

    def tangents_at(queries: Iterable[int]) -> list[dict[nn.Parameter, Tangent]]:
        whole = [of_whole_parameters(optimizer, optimizer.unit_directions(query)) for query in queries]
        return [{parameter: Tangent(direction) for parameter, direction in found.items()} for found in whole]

    tangents = tangents_at(own)
    sums = torch.zeros(count, 3, dtype=torch.float64, device=device_of(optimizer))
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        with _named_operation():
            results = losses_at(optimizer, tangents, loss_fn, share, lambda: tangents_at([0])) if own else []
        for query, (dual, terms) in zip(own, results, strict=True):
            loss, derivative = forward_ad.unpack_dual(dual)
            hidden = [name for _, name, parameter in optimizer.trainable() if tangents[0][parameter].is_hidden]
            if (derivative is None or hidden) and terms > 0 and loss.isfinite():
                raise ValueError(f"`estimator` is ForwardGradient(), but {_why_not(hidden)}, or choose TwoSided().")
            sums[query] = sums_of(terms, loss, torch.zeros_like(loss) if derivative is None else derivative)
    sums = sums if share.sum is None else share.sum(sums)
    losses, derivatives, terms = (*(sums[:, :2] / sums[:, 2:]).unbind(1), sums[:, 2])
    losses = torch.where(derivatives.isfinite(), losses, derivatives)
    numbers = torch.cat([losses, terms, estimator.projected_grads(derivatives, group["eps"])]).tolist()
    require_terms(numbers[count : 2 * count])
    return Probed(numbers[:count], numbers[2 * count :], 0 in numbers[count : 2 * count], at_one_point=True)


@contextmanager
def _named_operation() -> Iterator[None]:
    """Turns torch's error about an operation without a forward-mode derivative into one line that names it."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        found = re.search(r"forward AD with (\S+)|(\w*jvp\w*)", str(error))
        if found is None:
            raise
        operation = found[1] or "a custom function"
        raise ValueError(
            f"`estimator` is ForwardGradient(), but the network uses {operation}, which has no forward-mode "
            "derivative. Replace it, or choose TwoSided()."
        ) from error


def _why_not(hidden: list[str]) -> str:
    if hidden:
        return (
            f"{counted(len(hidden), 'parameter is', 'parameters are')} unused, or read where torch's Python functions "
            f"do not see it (a compiled network): {some(hidden)}. Freeze them, or do not compile"
        )
    return (
        "the loss carries no derivative: it is detached, or computed by operations other than torch's (`item()`, a "
        "reward of generated texts). Use torch's operations"
    )
