"""``zolightning replay``: makes a Hugging Face folder from base model and ledger, or validates a running run."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks import ZerothOrder
from zolightning.callbacks.zeroth_order import Method
from zolightning.checkpoints.follow import follow
from zolightning.checkpoints.replay import Replayed, replay
from zolightning.commands.output import require_new_folder
from zolightning.messages import counted

Validate = Callable[[], Iterable[dict[str, float]]]


def replay_to_folder(
    model: L.LightningModule, callbacks: Iterable[Callback], ledger: str, output: str | None, step: int | None
) -> None:
    """Replays a run by the method of its ZerothOrder callback, and exports the resulting model.

    Raises:
        ValueError: if `output` is missing or not empty, or the ledger does not fit the model or the method.
        MisconfigurationException: if the result differs from the run's weights, because something else changed them.
    """
    if output is None:
        raise ValueError(
            "`output` is not given: the folder in which to write the model. Or give `follow`, to validate."
        )
    method, export = _method(callbacks), _export_to(model, output)
    start = time.perf_counter()
    done = replay(ledger, model, method, step)
    what = f"replayed {counted(done.steps, 'step')} in {time.perf_counter() - start:.1f} s"
    _export(export, done, ledger, output, what)


def follow_run(
    model: L.LightningModule, callbacks: Iterable[Callback], ledger: str, output: str | None, validate: Validate
) -> None:
    """Validates the newest step of a run, again and again until the run ends, and exports the model it ended with.

    Args:
        model: the base model of the run.
        callbacks: the callbacks of the run, with ZerothOrder, which has the method.
        ledger: path of the run's ledger.
        output: folder to export to; None for no export.
        validate: validates the model, and returns the metrics of each validation loader.

    Raises:
        ValueError, MisconfigurationException: see :func:`replay_to_folder`.
    """
    method, export = _method(callbacks), None if output is None else _export_to(model, output)

    def evaluate(step: int) -> None:
        values = [f"{name} {value:.4f}" for metrics in validate() for name, value in sorted(metrics.items())]
        print(f"step {step}: {', '.join(values)}", flush=True)

    done = follow(ledger, model, method, evaluate)
    what = f"the run ended after {counted(done.steps, 'step')}"
    if export is None:
        print(what if done.sealed is not None else f"{what}, before its end: it was stopped or killed", flush=True)
    else:
        _export(export, done, ledger, str(output), what)


def _method(callbacks: Iterable[Callback]) -> Method:
    for callback in callbacks:
        if isinstance(callback, ZerothOrder):
            return callback.method
    raise MisconfigurationException(
        "`method` is null, and a ledger is replayed by the method that the run was trained by: name the run's "
        "config.yaml as --config."
    )


def _export_to(model: L.LightningModule, output: str) -> Callable[[Path], None]:
    require_new_folder("output", Path(output))
    export: Callable[[Path], None] | None = getattr(model, "export", None)
    if not callable(export):
        raise ValueError(
            f"{type(model).__name__} has no `export` method; in Python zolightning.checkpoints has replay."
        )
    return export


def _export(export: Callable[[Path], None], done: Replayed, ledger: str, output: str, what: str) -> None:
    if done.sealed is False:
        raise MisconfigurationException(
            f"After {counted(done.steps, 'step')} the weights are not those that the run of {ledger} ended with: "
            "something else than the method changed them in the run (a hook that averages or clamps them), or bases "
            "were drawn on another device. Nothing was written; a checkpoint of the run can be exported."
        )
    export(Path(output))
    equal = ", equal to the last bit to the weights the run ended with" if done.sealed else ""
    print(f"{what}{equal}: {output}", flush=True)
