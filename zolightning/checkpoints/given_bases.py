"""Files next to a ledger with bases that were given to the method, which records do not hold."""

from pathlib import Path

import torch

from zolightning.checkpoints.checkpoint_io import replacing, require_whole
from zolightning.checkpoints.ledger import Ledger
from zolightning.directions.basis import Basis
from zolightning.optim.subspace_weights import SubspaceWeights


def save_bases(ledger: Ledger, refresh: int, optimizer: SubspaceWeights) -> None:
    """Writes the factors that a method was given at a refresh to ``ledger-bases-REFRESH.pt``."""
    # Also those of blocks that are at rest now and move later
    factors = {optimizer.names[p]: optimizer.given(p) for group in optimizer.param_groups for p in group["params"]}
    with replacing(_path(ledger, refresh)) as file:
        torch.save({"ledger": ledger.stored_checksum(0), "bases": factors}, file)


def load_bases(ledger: Ledger, refresh: int) -> dict[str, Basis]:
    """Reads what :func:`save_bases` wrote, by name of the parameter.

    Raises:
        FileNotFoundError, DamagedCheckpointError: if there is no such file, or it differs from what was written.
        ValueError: if it belongs to another run.
    """
    path = _path(ledger, refresh)
    require_whole(path)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["ledger"] != ledger.stored_checksum(0):
        raise ValueError(f"The bases {path} belong to a different run from {ledger.path}.")
    return {name: Basis(**factors) for name, factors in saved["bases"].items() if factors}


def _path(ledger: Ledger, refresh: int) -> Path:
    return ledger.path.with_name(f"{ledger.path.stem}-bases-{refresh}.pt")
