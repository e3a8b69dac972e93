"""The state of a ModelCheckpoint whose folder has been moved, or is named from another working directory."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from zolightning.partners import find_callbacks

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


def find_files_again(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Changes the paths in a checkpoint to those of the same files beside it, from where the run goes on.

    Lightning compares the folder's name of then and of now, and forgets the best checkpoint if they differ.

    Args:
        trainer: the Trainer of the resumed run.
        checkpoint: what was loaded, before callbacks are.
    """
    here = Path(str(trainer.ckpt_path)).resolve().parent
    for callback in find_callbacks(trainer, ModelCheckpoint):
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if state and callback.dirpath and Path(callback.dirpath).resolve() == here:
            checkpoint["callbacks"][callback.state_key] = _in_folder(state, Path(callback.dirpath))


def _in_folder(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    def there(path: str) -> str:
        return path and str(folder / Path(path).name)

    paths = {name: there(state[name]) for name in _PATHS if name in state}
    best = {there(path): score for path, score in state.get("best_k_models", {}).items()}
    return state | paths | {"best_k_models": best, "dirpath": str(folder)}
