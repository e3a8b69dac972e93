"""The options of ``zolightning fit``; the other subcommands have most of them too."""

from typing import Any

from jsonargparse import ActionConfigFile
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from zolightning.callbacks import PredictionWriter, RunMonitor, SaveLast
from zolightning.commands.help import HelpAll
from zolightning.commands.parser import OneLineParser
from zolightning.commands.slots import add_slots
from zolightning.commands.trainer import Trainer

SEED = 0
LOGS = "logs"
TENSORBOARD: dict[str, Any] = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"save_dir": LOGS},
}
TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": TENSORBOARD,
    "default_root_dir": LOGS,
    "log_every_n_steps": 10,
    # Validation is counted in batches across epochs, and Lightning's own two-batch check would only repeat
    # what `validate_first` does in full.
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # RunOverview says what matters of it here
}
CLASS_DEFAULTS = {
    "model": {"class_path": "zolightning.CausalLM"},
    "data": {"class_path": "zolightning.data.PromptDataModule"},
}


def add_options(parser: LightningArgumentParser) -> None:
    """Adds the options that LightningCLI does not have."""
    parser.add_argument("--help_all", action=HelpAll)
    parser.add_argument("--seeds", type=int, nargs="+", help="fit, validate, test: run once for each of these seeds")
    add_slots(parser)
    parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
    parser.set_defaults(
        {
            "checkpoint.monitor": None,  # `choose_monitor` chooses one
            "checkpoint.mode": "max",
            "checkpoint.filename": "best-{step}",
            "checkpoint.save_on_train_epoch_end": False,  # but after the validation: `last.ckpt` names the best one
            "checkpoint.enable_version_counter": False,  # a second file of a step only comes after a kill
        }
    )
    parser.add_lightning_class_args(SaveLast, "save_last")
    parser.set_defaults({"save_last.how_to_go_on": "zolightning fit --config {folder}/config.yaml --ckpt_path last"})
    parser.add_argument(
        "--keep_ledger",
        type=bool,
        default=True,
        help="fit: append each step to ledger.bin in the run's folder, from which `replay` rebuilds the model",
    )
    parser.add_lightning_class_args(RunMonitor, "monitor")
    parser.add_lightning_class_args(PredictionWriter, "predictions")
    parser.add_argument(
        "--validate_first",
        type=bool,
        default=True,
        help="fit: validate before the first step, unless resuming",
    )
    parser.add_argument(
        "--test_last", type=bool, default=False, help="fit: test the best checkpoint when training is over"
    )


def fit_parser() -> OneLineParser:
    """The parser of ``zolightning fit`` alone: LightningCLI also reads, makes and runs in its constructor.

    Its errors are raised.
    """
    parser = OneLineParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--seed_everything", type=bool | int, default=SEED)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()} | CLASS_DEFAULTS)
    add_options(parser)
    parser.add_method_arguments(Trainer, "fit", skip=LightningCLI.subcommands()["fit"])
    return parser
