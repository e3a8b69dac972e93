"""The arguments that a method was constructed with: saved with its state, and compared when a run is resumed."""

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zolightning.rank_zero import rank_zero_warn

# Values that a resumed run takes from its checkpoint, an argument that changes no bit, and what torch adds when it
# restores an optimizer.
_NOT_COMPARED = ("seed", "step", "forward_passes", "offload_low_words", "differentiable")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
PLAIN = (bool, int, float, str, tuple, type(None))  # types of values that are saved as they are


def constructor_arguments(made: type) -> set[str]:
    """The names of the arguments of a class's constructor and of those of its base classes."""
    return set().union(*(_arguments_of(vars(cls)["__init__"]) for cls in made.__mro__ if "__init__" in vars(cls)))


@cache
def _arguments_of(constructor: Any) -> frozenset[str]:
    arguments = inspect.signature(constructor).parameters.values()
    return frozenset(argument.name for argument in arguments if argument.kind in _NAMED)


def refuse_unknown(method: type[torch.optim.Optimizer], names: Iterable[str]) -> None:
    """Raises a TypeError that names the first of some arguments which the constructor of a method does not have."""
    accepted = sorted(constructor_arguments(method) - {"self", "params", "defaults"})
    for name in names:
        close = "".join(f" (did you mean `{other}`?)" for other in get_close_matches(name, accepted, 1))
        raise TypeError(f"{method.__name__} has no argument `{name}`{close}; accepted: {', '.join(accepted)}.")


def settings_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The class, the constructor's arguments and the parameters' dtypes, by name, as plain values."""
    arguments = constructor_arguments(type(optimizer))
    attributes = {name: value for name, value in vars(optimizer).items() if name in arguments - {"defaults"}}
    settings = {name: value for name, value in (optimizer.defaults | attributes).items() if name not in _NOT_COMPARED}
    if "vector_lr_ratio" in settings:  # kept as a ratio, so that schedulers scale it, and given as a rate
        settings["vector_lr"] = float(f"{settings.pop('vector_lr_ratio') * settings['lr']:.12g}")
    dtypes = {str(parameter.dtype) for group in optimizer.param_groups for parameter in group["params"]}
    return {
        "class": type(optimizer).__name__,
        **{name: _plain(value) for name, value in settings.items()},
        "dtype": ", ".join(sorted(dtypes)).replace("torch.", ""),
    }


def require_same_settings(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any] | None) -> None:
    """Compares a method with the settings saved by the run that it resumes.

    A different learning rate is not refused: as with any torch optimizer, the checkpoint's is used, with a warning.

    Raises:
        ValueError: if nothing was saved, or the class or an argument differs; with both values.
    """
    name = type(optimizer).__name__
    if saved is None:
        raise ValueError(
            f"The checkpoint's optimizer is none of this package's methods, so {name} cannot continue from its state. "
            "Resume with the optimizer that wrote it, or start a new run from its weights."
        )
    own = settings_of(optimizer)
    if saved["class"] != name:
        raise ValueError(
            f"The checkpoint was written by {saved['class']}, but this run trains with {name}. Resume with the same "
            "method, or start a new run."
        )
    different = {key: (saved[key], own[key]) for key in own if key in saved and saved[key] != own[key]}
    rates = {key: different.pop(key) for key in ("lr", "vector_lr") if key in different}
    if different:
        values = "; ".join(f"`{key}` is {now!r}, was {before!r}" for key, (before, now) in different.items())
        raise ValueError(
            f"The settings of {name} differ from those of the checkpoint's run: {values}. Resume with the same ones, "
            "or start a new run."
        )
    for key, (before, now) in rates.items():
        rank_zero_warn(
            f"`{key}` continues as in the checkpoint, whose run was given {before!r}; the {now!r} given now has no "
            "effect."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return value if isinstance(value, PLAIN) else type(value).__name__
