"""``zolightning replay``: from base model and ledger to a Hugging Face folder."""

import time
from collections.abc import Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks import ZerothOrder
from zolightning.checkpoints.replay import replay


def replay_to_folder(
    model: L.LightningModule, callbacks: Iterable[Callback], ledger: str, output: str, step: int | None
) -> None:
    """Replays a run by the method of its ZerothOrder callback, and exports what comes of it.

    Raises:
        ValueError: naming `output` if it is not empty, or what of the ledger does not fit.
        MisconfigurationException: if the run's weights are others, which something else than the method changed.
    """
    folder = Path(output)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`output` is {output}, which is not empty. Name a new folder.")
    methods = [callback.method for callback in callbacks if isinstance(callback, ZerothOrder)]
    if not methods:
        raise MisconfigurationException(
            "`method` is null, and a ledger is replayed by the method that the run was trained by: name the run's "
            "config.yaml as --config."
        )
    export = getattr(model, "export", None)
    if not callable(export):
        raise ValueError(
            f"{type(model).__name__} has no `export` method; in Python zolightning.checkpoints has replay."
        )
    start = time.perf_counter()
    done = replay(ledger, model, methods[0], step)
    seconds = time.perf_counter() - start
    if done.sealed is False:
        raise MisconfigurationException(
            f"After {done.steps} steps the weights are not those that the run of {ledger} ended with: something else "
            "than the method changed them in the run (a hook that averages or clamps them), or bases were drawn on "
            "another device. Nothing was written; a checkpoint of the run can be exported."
        )
    export(folder)
    equal = ", equal to the last bit to the weights the run ended with" if done.sealed else ""
    print(f"replayed {done.steps} steps in {seconds:.1f} s{equal}: {folder}", flush=True)
