"""Finds the ledger that leads to a checkpoint, or that of a run to be resumed without one."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.checkpoints.ledger import LEDGER, DamagedLedgerError, Ledger
from zolightning.checkpoints.ledger_header import Header, as_json_values
from zolightning.messages import counted, some
from zolightning.optim.record import StepRecord
from zolightning.rank_zero import rank_zero_warn


class NoLedgerError(RuntimeError):
    """No ledger leads to a checkpoint; the message is the reason, as a clause."""


def ledger_to(saved: Mapping[str, Any], step: int, folder: Path, checkpoint: Path | None) -> tuple[Ledger, int]:
    """The ledger that leads to a checkpoint, and the number of its steps up to there.

    The last of these steps may be missing from the file, if the checkpoint was saved before it was written.

    Args:
        saved: the checkpoint's entry about the ledger: its ``path`` and ``checksum``, and ``pending``, the record of a
            step that was not written yet, or None. Empty if the run had no ledger.
        step: number of the checkpoint's step, as the method counts.
        folder: the folder to look in first; then the old one and those around the checkpoint, which may have moved.
        checkpoint: path of the checkpoint, if it is a file.

    Raises:
        NoLedgerError: if there is none.
    """
    if not saved:
        raise NoLedgerError("the checkpoint is from a run without one")
    was, near = Path(saved["path"]), [] if checkpoint is None else checkpoint.absolute().parents[:2]
    reason = f"there is no {was}"
    for path in dict.fromkeys([folder / was.name, was, *(place / was.name for place in reversed(near))]):
        if path.is_file():
            try:
                ledger = Ledger(path)
                steps = step - ledger.header.first_step
                written = steps - (saved["pending"] is not None)
                if not 0 <= written <= len(ledger):
                    reason = f"{path} has {counted(len(ledger), 'step')}, and the checkpoint is of step {step}"
                elif ledger.checksum_after(written) != saved["checksum"]:
                    reason = f"{path} belongs to a different run from the checkpoint"
                else:
                    return ledger, steps
            except (DamagedLedgerError, ValueError) as error:
                reason = str(error).rstrip(".")
    raise NoLedgerError(reason)


def ledger_of(path: Path, header: Header) -> Ledger:
    """Opens the ledger of a run that begins as `header` describes.

    Raises:
        DamagedLedgerError, ValueError: if the file is not a ledger, or damaged.
        MisconfigurationException: if it belongs to a run with a different model or settings; naming them.
    """
    ledger = Ledger(path)
    own, found = as_json_values(asdict(header)), asdict(ledger.header)
    other = [f"`{name}`" for name in own if own[name] != found[name] and name != "zolightning"]
    if other:
        raise MisconfigurationException(
            f"The ledger {path} belongs to a run with different {some(other)}. Resume with the model and the "
            "settings of that run, or start a new one."
        )
    return ledger


def whole_records(ledger: Ledger) -> list[StepRecord]:
    """The records before the first damaged one; a warning names that one."""
    records: list[StepRecord] = []
    try:
        for record in ledger.records():
            records.append(record)
    except DamagedLedgerError as error:
        rank_zero_warn(f"{error} The run continues after these.")
    return records


def free_path(folder: Path) -> Path:
    """A path for a new ledger in a folder, at which there is no file yet."""
    path, version = folder / LEDGER, 0
    while path.exists():
        version += 1
        path = path.with_name(f"ledger-v{version}.bin")
    return path
