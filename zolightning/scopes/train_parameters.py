"""Trains parameters by their names."""

import re
from collections.abc import Sequence
from itertools import islice

import lightning as L

from zolightning.optim.checks import require_patterns
from zolightning.scopes.scope import Scope, Selection


class TrainParameters(Scope):
    """Trains only the parameters whose names match.

    Args:
        patterns: regular expressions; a parameter trains if one of them matches somewhere in its dotted name.

    Example::

        callbacks = [TrainParameters([r"attn", r"norm\\.weight$"]), ZerothOrder(partial(MeZO, lr=1e-6))]
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        super().__init__()
        require_patterns(patterns)
        self.patterns = tuple(patterns)

    def select(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Selection:
        names = [name for name, _ in pl_module.named_parameters()]
        for pattern in self.patterns:
            if not any(re.search(pattern, name) for name in names):
                some = ", ".join(islice(names, 0, None, max(1, len(names) // 8)))
                raise ValueError(f"`patterns` has {pattern!r}, which matches no parameter. Some of them are {some}.")
        chosen = [name for name in names if any(re.search(pattern, name) for pattern in self.patterns)]
        return Selection(dict.fromkeys(chosen), f"parameters that match {' or '.join(map(repr, self.patterns))}")
