"""Countdown: an equation of given numbers that reaches a target."""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

_LONGEST = 200  # characters of an expression; nobody needs more, and deeply nested ones exhaust the parser
_CHARACTERS = re.compile(r"[0-9+\-*/() ]+")


class Countdown:
    """The reward of an expression such as ``3 * (7 - 5)``: 1 if it is right, `format_reward` if it is an expression.

    It is right if it has the value of the reference and uses each of its numbers as often as it does. A text is read
    up to the first ``=``. Values are exact fractions, and nothing is executed.

    Args:
        format_reward: the reward of a wrong expression, made of whole numbers, ``+ - * /`` and parentheses. Any other
            text gets 0.
        numbers_reward: added for a wrong expression, times the share of its numbers that are right: twice the count of
            numbers it has in common with the reference, divided by the sum of the counts of both.

    Example:
        >>> reward = Countdown()
        >>> [reward(text, ["3 * (7 - 5)"]) for text in ("7*3 - 5*3", "3 * (7 - 5) = 6", "7 - 3 + 5", "six")]
        [0.1, 1.0, 0.1, 0.0]
        >>> Countdown(numbers_reward=0.4)("7 - 3 + 5", ["3 * (7 - 5)"])
        0.5

    Raises:
        ValueError: if a reward is below 0, or both together are above 1.
    """

    def __init__(self, format_reward: float = 0.1, numbers_reward: float = 0.0) -> None:
        if not 0 <= format_reward <= 1:
            raise ValueError(f"`format_reward` must be from 0 to 1, got {format_reward}.")
        if not 0 <= numbers_reward <= 1 - format_reward:
            raise ValueError(
                f"`numbers_reward` must be from 0 to {1 - format_reward:g}, 1 without `format_reward`, got "
                f"{numbers_reward}."
            )
        self.format_reward = format_reward
        self.numbers_reward = numbers_reward

    def __call__(self, text: str, references: Sequence[str]) -> float:
        self.check(references)
        tree = _expression(text.split("=")[0])
        if tree is None:
            return 0.0
        rights = _rights(references)
        # numbers first: the values of other expressions may have a million digits
        is_right = any(_numbers(tree) == _numbers(right) and _value(tree) == _value(right) for right in rights)
        share = max(_share(_numbers(tree), _numbers(right)) for right in rights)
        return 1.0 if is_right else self.format_reward + self.numbers_reward * share

    def check(self, references: Sequence[str]) -> None:
        """Raises a ValueError if none of the references is an expression with a value."""
        if not _rights(references):
            raise ValueError(f"a reference of Countdown must be an expression with a value, got {list(references)!r}")


def _rights(references: Sequence[str]) -> list[ast.expr]:
    found = filter(None, map(_expression, references))
    return [tree for tree in found if _value(tree) is not None]


def _expression(text: str) -> ast.expr | None:
    """A text as an expression; None if it is not one."""
    text = text.strip()
    if len(text) > _LONGEST or not _CHARACTERS.fullmatch(text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        return None
    is_arithmetic = all(
        isinstance(node, ast.BinOp | ast.Constant | ast.Add | ast.Sub | ast.Mult | ast.Div) for node in ast.walk(tree)
    )
    return tree if is_arithmetic else None


def _numbers(tree: ast.expr) -> Counter[object]:
    return Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))


def _share(found: Counter[object], wanted: Counter[object]) -> float:
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def _value(tree: ast.expr) -> Fraction | None:
    """The value of an expression; None if it divides by 0."""
    if isinstance(tree, ast.Constant):
        return Fraction(str(tree.value))
    assert isinstance(tree, ast.BinOp)
    left, right = _value(tree.left), _value(tree.right)
    if left is None or right is None:
        return None
    match tree.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case _:
            return left / right if right else None
