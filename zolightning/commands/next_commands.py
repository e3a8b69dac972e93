"""The commands that go on from a run that has ended."""

from pathlib import Path
from shlex import quote
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging

from zolightning.checkpoints.keep_ledger import KeepLedger
from zolightning.partners import find_callbacks


def next_commands(trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
    """By what they do: those that export, replay or lengthen the run that a Trainer has ended, if it has a folder."""
    folder, best = trainer.log_dir, getattr(trainer.checkpoint_callback, "best_model_path", "")
    if folder is None or not trainer.loggers:
        return {}
    found, config = {}, f"--config {quote(str(Path(folder) / 'config.yaml'))}"
    structure: dict[str, Any] = getattr(module, "structure_dict", dict)()
    # An adapter's folder cannot record an early exit
    is_exported = hasattr(module, "export") and not (structure.get("adapter") and structure.get("num_layers"))
    if best and is_exported:
        found["export"] = f"zolightning export {config} --ckpt_path {quote(best)} --folder NEW_FOLDER"
    ledgers = [callback.path for callback in find_callbacks(trainer, KeepLedger)]
    averages = find_callbacks(trainer, WeightAveraging)  # the run ends at an average, of which no ledger knows
    if ledgers and ledgers[0] is not None and is_exported and not averages:
        found["replay"] = f"zolightning replay {config} --ledger {quote(str(ledgers[0]))} --output NEW_FOLDER"
    if Path(folder, "checkpoints/last.ckpt").is_file() and not trainer.should_stop:  # a callback would stop it again
        limit = "max_steps" if trainer.global_step == trainer.max_steps else "max_epochs"
        found["train longer"] = f"zolightning fit {config} --ckpt_path last --trainer.{limit} MORE"
    return found
