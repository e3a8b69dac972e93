"""``zolightning replay``: makes a Hugging Face folder from base model and ledger, or validates a running run."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks import ZerothOrder
from zolightning.checkpoints.follow import follow as follow_ledger
from zolightning.checkpoints.replay import replay
from zolightning.commands.configured_trainer import SILENT, ConfiguredTrainer
from zolightning.commands.output_folder import require_new_folder
from zolightning.commands.quiet import quiet
from zolightning.messages import counted
from zolightning.partners import find_callbacks


def replay_run(
    trainer: ConfiguredTrainer,
    model: L.LightningModule,
    ledger: str,
    output: str | None = None,
    datamodule: L.LightningDataModule | None = None,
    step: int | None = None,
    follow: bool = False,
) -> None:
    """Rebuilds a fine-tuned model from its base model and the run's ledger, and writes it as a folder.

    Neither data nor forward passes are needed. If the run has ended, the result is checked to equal its weights to the
    last bit. With `follow`, a run that trains in another process is validated at its newest step, again and again.

    Args:
        trainer: the Trainer, with the run's ZerothOrder among its callbacks.
        model: the model as it was before the run's first step, with an ``export`` method, such as CausalLM.
        ledger: the ``ledger.bin`` of the run.
        output: folder in which to write config, weights and tokenizer; must not exist, or be empty. Needed unless
            `follow` is given.
        datamodule: the data whose validation part `follow` reads.
        step: after which step of the run to stop; all of them if not given.
        follow: validate the newest step while the run goes on, print the metrics, and end when it ends.

    Raises:
        ValueError: if `ledger`, `output` or `step` is invalid, or the ledger does not fit the model or the method.
        MisconfigurationException: if there is no method, or the result differs from the run's weights, because
            something else changed them.
    """
    if follow and step is not None:
        raise ValueError(f"`step` is {step}, but `follow` is given, which continues to the last step. Leave one out.")
    if output is None and not follow:
        raise ValueError("`output` is not given. Name the folder to write the model to, or give `follow` to validate.")
    methods = [callback.method for callback in find_callbacks(trainer, ZerothOrder)]
    if not methods:
        raise MisconfigurationException(
            "`method` is null, but a ledger is replayed with the method that trained the run: name the run's "
            "config.yaml as --config."
        )
    export = None if output is None else _export_to(model, Path(output))
    model.to(trainer.strategy.root_device)
    start = time.perf_counter()
    if follow:
        done = follow_ledger(ledger, model, methods[0], _validation(trainer, model, datamodule))
        what = f"the run ended after {counted(done.steps, 'step')}"
    else:
        done = replay(ledger, model, methods[0], step)
        what = f"replayed {counted(done.steps, 'step')} in {time.perf_counter() - start:.1f} s"
    if export is None:
        print(what if done.sealed is not None else f"{what}, before its end: it was stopped or killed", flush=True)
        return
    if done.sealed is False:
        raise MisconfigurationException(
            f"After {counted(done.steps, 'step')} the weights are not those that the run of {ledger} ended with: "
            "something other than the method changed them in the run (a hook that averages or clamps them), or bases "
            "were drawn on another device. Nothing was written; a checkpoint of the run can be exported."
        )
    export()
    equal = ", equal to the last bit to the weights the run ended with" if done.sealed else ""
    print(f"{what}{equal}: {output}", flush=True)


def _export_to(model: L.LightningModule, folder: Path) -> Callable[[], None]:
    require_new_folder("output", folder)
    export = getattr(model, "export", None)
    if not callable(export):
        raise ValueError(
            f"{type(model).__name__} has no `export` method. In Python, call zolightning.checkpoints.replay."
        )
    return partial(export, folder)


def _validation(
    trainer: ConfiguredTrainer, model: L.LightningModule, datamodule: L.LightningDataModule | None
) -> Callable[[int], None]:
    """A function that validates the model and prints the metrics of a step."""
    validator = trainer.with_settings(callbacks=[], **SILENT)

    def validate(step: int) -> None:
        with quiet():
            found = validator.validate(model, datamodule, verbose=False)
        model.to(trainer.strategy.root_device)  # Lightning leaves it on the host
        values = [f"{name} {value:.4f}" for metrics in found for name, value in sorted(metrics.items())]
        print(f"step {step}: {', '.join(values)}", flush=True)

    return validate
