"""Checks of what a method is given: hyperparameters, parameters, losses."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from zolightning.directions.shards import require_rows
from zolightning.kernels.noise import MAX_ELEMENTS
from zolightning.optim.estimators import Estimator, ForwardGradient, PerExample

Loss = Tensor | tuple[Any, Any] | Mapping[str, Any]  # see `loss_and_terms`


def require_positive(name: str, value: float) -> None:
    """Raises a ValueError that names the argument unless `value` is a finite number above zero."""
    if not (isinstance(value, int | float | Tensor) and math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive number, got {value!r}.")


def require_fraction(name: str, value: float) -> None:
    """Raises a ValueError that names the argument unless `value` lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be at least 0 and below 1, got {value!r}.")


def require_integer(name: str, value: int, least: int = 1) -> None:
    """Raises a ValueError that names the argument unless `value` is an integer, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer, at least {least}, got {value!r}.")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises a ValueError that names the argument unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def require_patterns(patterns: Sequence[str]) -> None:
    """Raises a ValueError unless these are regular expressions, one at least."""
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"`patterns` must be a list of at least one regular expression, got {patterns!r}.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`patterns` has {pattern!r}, which is no regular expression: {error}.") from None


def require_estimator(estimator: Estimator, num_queries: int, align_queries: bool, of_units: bool, method: str) -> None:
    """Checks an estimator, and that it works with other arguments of a method.

    Args:
        estimator: the estimator.
        num_queries: directions in a step.
        align_queries: whether they are combined by least squares.
        of_units: whether the method has ``unit_directions``.
        method: the method's name.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    if not isinstance(estimator, Estimator):
        raise ValueError(f"`estimator` must be an Estimator, TwoSided() for example, got {estimator!r}.")
    if not isinstance(num_queries, Integral) or num_queries < estimator.min_queries:
        name, least = type(estimator).__name__, estimator.min_queries
        raise ValueError(f"`num_queries` must be an integer, at least {least} with {name}, got {num_queries!r}.")
    if align_queries and isinstance(estimator, PerExample):
        raise ValueError(
            "`align_queries` is True, and under PerExample() each query is of another loss: set it to False."
        )
    if isinstance(estimator, ForwardGradient) and not of_units:
        raise ValueError(
            f"`estimator` is ForwardGradient(), and {method} searches a subspace, or along directions that depend on "
            "the weights: use MeZO or MeZOAdam."
        )


def require_batching(evaluations_per_forward: int, estimator: Estimator) -> None:
    """Raises a ValueError if the evaluations of this estimator cannot share a forward pass, and are to."""
    if evaluations_per_forward > 1 and estimator.why_unbatched:
        raise ValueError(
            f"`evaluations_per_forward` is {evaluations_per_forward}, and under {type(estimator).__name__}() "
            f"{estimator.why_unbatched}. Leave it at 1."
        )


def refuse_with_shards(settings: Iterable[tuple[str, object, str]]) -> None:
    """Raises a ValueError that names the first of some settings which do not work with sharded parameters (FSDP2).

    Args:
        settings: the name of each, its value, and one that works.
    """
    for name, value, accepted in settings:
        raise ValueError(
            f"`{name}` is {value}, which has not been made for parameters that are sharded over ranks. Use "
            f"{accepted}, or a strategy under which every rank holds all of them ('zo_ddp')."
        )


def require_seed(seed: int) -> None:
    """Raises a ValueError unless `seed` is an integer of at most 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"`seed` must be an integer of at most 64 bits, got {seed!r}.")


def require_trainable(names: Mapping[nn.Parameter, str]) -> None:
    """Raises a ValueError unless there are parameters, and forward passes can train all of them."""
    if not names:
        raise ValueError("No parameter is trainable: all of the optimizer's have `requires_grad=False`.")
    for parameter, name in names.items():
        if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
            raise ValueError(
                f"Parameter `{name}` has dtype {parameter.dtype}; trainable are float64, float32, bfloat16 and "
                "float16. Freeze it (`requires_grad=False`)."
            )
        if parameter.numel() > MAX_ELEMENTS:
            raise ValueError(f"Parameter `{name}` has {parameter.numel()} elements, at most {MAX_ELEMENTS} can train.")
        require_rows(name, parameter)


def require_terms(terms: Sequence[float]) -> None:
    """Raises a ValueError if a loss is said to average a negative number of terms."""
    if min(terms) < 0:
        raise ValueError(f"`num_terms`, by which a loss is averaged, must not be negative, got {min(terms):g}.")


def loss_and_terms(output: Loss) -> tuple[Tensor, Tensor]:
    """A loss and the number of terms it averages, both as wide scalars, from what was returned for it.

    The loss keeps its derivative in forward mode, if it has one.

    Losses of micro-batches and of ranks are averaged by their numbers of terms, which is the loss of the whole batch
    where each is a mean over its own terms. A user's dictionary may hold whatever else it likes, ``"weight"`` included.

    Args:
        output: a tensor with one element, a pair of it and the number, or a mapping with it as ``"loss"`` and the
            number as ``"num_terms"``. The number is at least 0, and 1 where it is left out.

    Raises:
        TypeError: if the loss is no such tensor.
        ValueError: if the number of terms is not a single number.
    """
    loss: Any = output
    terms: Any = 1.0
    if isinstance(output, tuple):
        loss, terms = output
    elif isinstance(output, Mapping):
        loss, terms = output.get("loss"), output.get("num_terms", 1.0)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        plain = loss if loss is None or isinstance(loss, int | float) else f"a {type(loss).__name__}"
        raise TypeError(f"The loss must be a tensor with one element, got {getattr(loss, 'shape', plain)}.")
    if not (isinstance(terms, int | float) or (isinstance(terms, Tensor) and terms.numel() == 1)):
        raise ValueError(
            "`num_terms`, by which a loss is averaged, must be a number or a tensor with one element, got "
            f"{getattr(terms, 'shape', repr(terms))}. Return the dictionary's own entry under another name."
        )
    wide = torch.float32 if loss.device.type == "mps" else torch.float64
    loss, derivative = forward_ad.unpack_dual(loss)
    loss = loss.detach().view(()).to(wide)
    if derivative is not None:
        loss = forward_ad.make_dual(loss, derivative.detach().view(()).to(wide))
    if isinstance(terms, Tensor):
        return loss, terms.detach().view(()).to(loss.device, loss.dtype, non_blocking=True)
    return loss, torch.full_like(loss, terms)  # a kernel's argument: a copy from the host would wait for the device
