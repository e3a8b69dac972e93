"""Checks of what a method is given: hyperparameters and parameters."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

from torch import Tensor, nn

from zolightning.directions.shards import require_rows
from zolightning.kernels.noise import MAX_ELEMENTS
from zolightning.optim.estimators import Estimator


def require_positive(name: str, value: object) -> None:
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


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
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
            raise ValueError(f"`patterns` has '{pattern}', which is not a regular expression: {error}.") from None


def require_batching(evaluations_per_forward: int, estimator: Estimator) -> None:
    """Raises a ValueError if evaluations are to share a forward pass, and those of this estimator cannot."""
    if evaluations_per_forward > 1 and estimator.why_unbatched:
        raise ValueError(
            f"`evaluations_per_forward` is {evaluations_per_forward}, but with {type(estimator).__name__}() "
            f"{estimator.why_unbatched}. Leave it at 1."
        )


def require_prefix(keep_prefix_gib: float, cuda_graphs: bool) -> None:
    """Raises a ValueError if `keep_prefix_gib` is negative, or above 0 with CUDA graphs, which skip no layers."""
    if not keep_prefix_gib >= 0:
        raise ValueError(f"`keep_prefix_gib` must not be negative, got {keep_prefix_gib}.")
    if cuda_graphs and keep_prefix_gib:
        raise ValueError(
            "`cuda_graphs` is True, but a graph runs the whole network: leave `keep_prefix_gib` at 0, got "
            f"{keep_prefix_gib}."
        )


def refuse_with_shards(settings: Iterable[tuple[str, object, str]]) -> None:
    """Raises a ValueError that names the first of some settings which do not work with sharded parameters (FSDP2).

    Each has a name, a value, and one that works.
    """
    for name, value, accepted in settings:
        raise ValueError(
            f"`{name}` is {value}, which does not support parameters that are sharded over ranks. Use {accepted}, or a "
            "strategy under which every rank holds all of them ('zo_ddp')."
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
            raise ValueError(
                f"Parameter `{name}` has {parameter.numel()} elements, but at most {MAX_ELEMENTS} can train. Freeze it."
            )
        require_rows(name, parameter)
