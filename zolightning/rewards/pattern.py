"""Whether a text matches a regular expression."""

import re
from collections.abc import Sequence


class Pattern:
    """1 for a text in which the pattern is found, else 0.

    Args:
        pattern: a regular expression of Python's. ``{reference}`` in it stands for each reference in turn, taken
            literally; one that is found is enough.

    Example:
        >>> reward = Pattern(r"[Tt]he answer is {reference}\\b")
        >>> reward("I think the answer is 42.", ["42", "43"])
        1.0

    Raises:
        ValueError: if it is not a regular expression.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        try:
            re.compile(self._with("x"))
        except re.error as error:
            raise ValueError(f"`pattern` is not a regular expression: {error}, in '{pattern}'.") from None

    def __call__(self, text: str, references: Sequence[str]) -> float:
        found = (re.search(self._with(re.escape(reference)), text) for reference in references or [""])
        return float(any(found))

    def check(self, references: Sequence[str]) -> None:
        """Raises a ValueError if the pattern has a place for a reference, and there is none."""
        if "{reference}" in self.pattern and not references:
            raise ValueError(f"the pattern '{self.pattern}' needs a reference, but the row has none")

    def _with(self, reference: str) -> str:
        return self.pattern.replace("{reference}", reference)
