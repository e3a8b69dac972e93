"""Follows a run in another process by its ledger."""

import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from torch import nn

from zolightning.checkpoints.ledger import DamagedLedgerError
from zolightning.checkpoints.replay import Replay, Replayed
from zolightning.optim.base import Method, ZerothOrderOptimizer
from zolightning.optim.subspace_weights import SubspaceWeights


def follow(
    path: str | Path, module: nn.Module, method: Method, evaluate: Callable[[int], None], seconds: float = 1.0
) -> Replayed:
    """Keeps a module at the newest weights of a run that trains in another process, until the run ends.

    `evaluate` is called with the number of a step while the module has the weights after that step; then again for the
    newest step at that time. It may move the module to another device but must move it back. A ledger with nothing new
    is checked again after `seconds`, until no process writes to it any more.

    Raises:
        DamagedLedgerError: if steps that were followed are no longer in the ledger, for example because the run was
            resumed from an earlier step.
    """
    with Replay(path, module, method) as replaying:
        ledger, checksum = replaying.ledger, replaying.ledger.stored_checksum(0)
        while True:
            is_written = ledger.is_written()  # before `steps` is read: once no process writes, no step is added
            steps = len(ledger)
            if steps < replaying.steps or ledger.stored_checksum(replaying.steps) != checksum:
                raise DamagedLedgerError(
                    f"The ledger {path} no longer has the {replaying.steps} steps that were followed: its run was "
                    "resumed from an earlier step. Follow it from the beginning."
                )
            if steps > replaying.steps:
                replaying.apply(steps)
                checksum = ledger.stored_checksum(steps)
                _evaluate(replaying.optimizer, lambda: evaluate(ledger.header.first_step + replaying.steps))
            elif not is_written:
                break
            else:
                time.sleep(seconds)
    return Replayed(replaying.steps, replaying.is_sealed())


def _evaluate(optimizer: ZerothOrderOptimizer, evaluate: Callable[[], None]) -> None:
    """Evaluates with all pending updates added to the weights, and then takes them out again."""
    if not isinstance(optimizer, SubspaceWeights) or not optimizer.offsets():
        evaluate()
        return
    before = deepcopy(optimizer.state_dict())
    optimizer.fold()
    evaluate()
    optimizer.fold_every_step = False
    optimizer.load_state_dict(before)
