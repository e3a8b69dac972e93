"""Trains parameters by their names."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

import lightning as L

from zolightning.checks import require_patterns
from zolightning.partners import callbacks_of
from zolightning.scopes.scope import Scope, Selection

_MOST_NAMES = 12


class TrainParameters(Scope):
    """Trains only the parameters whose names match.

    Args:
        patterns: regular expressions; a parameter trains if one of them matches somewhere in its dotted name. In a
            quantised model ``weight_scale$`` matches the scales; codes stay as they are (QZO, arXiv 2505.13430).

    Example::

        callbacks = [TrainParameters([r"attn", r"norm\\.weight$"]), ZerothOrder(partial(MeZO, lr=1e-6))]
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        super().__init__()
        require_patterns(patterns)
        self.patterns = tuple(patterns)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_untied = any(getattr(callback, "unties_head", False) for callback in callbacks_of(trainer))  # LinearProbing
        self._refuse_without_match([name for name, _ in pl_module.named_parameters(remove_duplicate=not is_untied)])

    def select(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Selection:
        names = [name for name, _ in pl_module.named_parameters()]
        self._refuse_without_match(names)
        chosen = [name for name in names if any(re.search(pattern, name) for pattern in self.patterns)]
        patterns = " or ".join(f"'{pattern}'" for pattern in self.patterns)
        return Selection(dict.fromkeys(chosen), f"parameters that match {patterns}")

    def _refuse_without_match(self, names: Sequence[str]) -> None:
        for pattern in self.patterns:
            if not any(re.search(pattern, name) for name in names):
                there = ", ".join(_like(pattern, names))
                raise ValueError(f"`patterns` has '{pattern}', which matches no parameter. There are {there}.")


def _like(pattern: str, names: Iterable[str]) -> list[str]:
    """The kinds of names there are, numbers of layers left out, those that are most like a pattern first."""
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)

    def in_common(name: str) -> int:
        return sum(block.size for block in SequenceMatcher(None, pattern, name, False).get_matching_blocks())

    return sorted(kinds, key=in_common, reverse=True)[:_MOST_NAMES]
