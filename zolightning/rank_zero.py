"""Warnings and messages of the first rank only, without importing Lightning, which takes seconds."""

import logging
import os
import warnings

import torch.distributed as dist

# Lightning's: it shows what is at least INFO, and without Lightning Python's logging decides.
_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # variables of launchers, as Lightning reads them


def rank_zero_warn(message: str) -> None:
    """Warns, on the first rank only."""
    if _is_first_rank():
        warnings.warn(message, stacklevel=3)


def rank_zero_info(message: str) -> None:
    """Logs, on the first rank only."""
    if _is_first_rank():
        _log.info(message)


def _is_first_rank() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), 0)) == 0
