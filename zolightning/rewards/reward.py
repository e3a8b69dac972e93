"""The type of a reward, and how rewards are called and checked."""

import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any

Reward = Callable[[str, Sequence[str]], float]
"""A function of a text and the references of its row that returns a number.

An object with a method ``check(references)`` may raise a ValueError there for references that it cannot use; that is
called for every row before the first step. A method ``all_of(pairs)`` gets all texts of a batch with their references.
"""


def check_signature(reward: Reward) -> None:
    """Raises a ValueError for a function that cannot be called with a text and its references, in this order."""
    try:
        wanted = signature(reward)
    except ValueError:  # some functions in C have no signature
        return
    name = getattr(reward, "__name__", type(reward).__name__)
    advice = "Write a function of (text, references) that returns the number of one text."
    if "completions" in wanted.parameters:
        raise ValueError(f"`reward` is {name}{wanted}, which takes whole batches, like TRL's rewards. {advice}")
    try:
        wanted.bind("", ())
    except TypeError:
        raise ValueError(
            f"`reward` is {name}{wanted}, which does not take a text and its references. {advice}"
        ) from None


def check_references(reward: Reward, references: Sequence[str]) -> None:
    """Calls the method ``check`` of a reward, if it has one; that raises a ValueError for references it cannot use."""
    check = getattr(reward, "check", None)
    if check is not None:
        check(references)


def rewards_of(reward: Reward, texts: Iterable[str], references: Iterable[Sequence[str]]) -> list[float]:
    """The rewards of several texts, together if `reward` has a method `all_of`, as InProcesses has.

    Raises:
        ValueError: if one of them is no finite number, there are more or fewer than texts, or `reward` raised an error,
            which is the cause of this one.
    """
    pairs = list(zip(texts, references, strict=True))
    together = getattr(reward, "all_of", None)
    values = [_reward_of(reward, *pair) for pair in pairs] if together is None else list(together(pairs))
    if len(values) != len(pairs):
        raise ValueError(
            f"`all_of` of `model.reward` must return {len(pairs)} numbers for as many texts, got {len(values)}."
        )
    return [as_number(value, text) for value, (text, _) in zip(values, pairs, strict=True)]


def _reward_of(reward: Reward, text: str, references: Sequence[str]) -> Any:
    try:
        return reward(text, references)
    except Exception as error:  # whatever a user's function raises
        name = getattr(reward, "__name__", type(reward).__name__)
        frames = traceback.extract_tb(error.__traceback__)[1:2]  # the first one is this function
        where = "".join(f" ({frame.filename}, line {frame.lineno})" for frame in frames)
        raise ValueError(
            f"`model.reward` {name} raised {type(error).__name__}: {error}{where}, for the text {_start(text)!r} and "
            f"the references {list(references)!r}. Let it return a number for any text, or wrap it in InProcesses, "
            "which counts an error and makes the reward 0."
        ) from error


def as_number(value: Any, text: str) -> float:
    """The reward of a text as a float; a truth value is 1 or 0. Raises a ValueError if it is no finite number."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (OverflowError, TypeError, ValueError):  # 10**400, None, a list, a tensor of several elements
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`model.reward` must return a finite number, got {value!r} for the text {_start(text)!r}.")
    return number


def _start(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."
