"""The command ``zolightning``: LightningCLI with this project's defaults."""

from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from zolightning.callbacks import RunMonitor
from zolightning.trainer import Trainer

_TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "logs"}},
    "default_root_dir": "logs",
    "log_every_n_steps": 10,
    # Validation is counted in batches across epochs, and Lightning's own two-batch check would only repeat
    # what `validate_first` does in full.
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
}


class ZerothOrderCLI(LightningCLI):
    """Adds a checkpoint of the best validation, a run monitor, and validation before and tests after training."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best-{step}",
                "checkpoint.save_last": True,
            }
        )
        parser.add_lightning_class_args(RunMonitor, "monitor")
        parser.add_argument(
            "--validate_first",
            type=bool,
            default=True,
            help="fit: validate before the first step (unless resuming), so that the gain can be seen",
        )
        parser.add_argument(
            "--test_last", type=bool, default=False, help="fit: test the best checkpoint when training is over"
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        _name_run(config)
        _refuse_scaled_gradients(config)

    def before_fit(self) -> None:
        config = self.config[self.subcommand]
        self._before: dict[str, float] = {}
        if config.validate_first and config.ckpt_path is None and not config.trainer.fast_dev_run:
            (self._before,) = self.trainer.validate(self.model, self.datamodule, verbose=False)
            self._say("before training", self._before)

    def after_fit(self) -> None:
        config = self.config[self.subcommand]
        best = self.trainer.checkpoint_callback
        if best is not None and best.best_model_score is not None:
            self._say("best checkpoint", {best.monitor: float(best.best_model_score)}, best.best_model_path)
        if config.test_last and not config.trainer.fast_dev_run:
            (results,) = self.trainer.test(self.model, self.datamodule, ckpt_path="best", verbose=False)
            self._say("best checkpoint", results)

    def _say(self, when: str, metrics: dict[str, float], where: str = "") -> None:
        if self.trainer.is_global_zero:
            values = ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
            print(f"{when}: {values}{f' ({where})' if where else ''}", flush=True)


def _name_run(config: Any) -> None:
    """Calls a run after its config files, unless it has a name: ``logs/sst2-mezo/version_0``."""
    logger = config.trainer.logger
    init_args = getattr(logger, "init_args", None)
    if init_args is not None and init_args.get("name") in (None, "lightning_logs"):
        stems = [Path(str(path)).stem for path in config.get("config") or []]
        init_args["name"] = "-".join(stems) or "run"


def _refuse_scaled_gradients(config: Any) -> None:
    """Refuses 16-mixed by name: on a CPU Lightning would quietly train in bf16-mixed instead."""
    callbacks = config.trainer.callbacks or []
    zeroth_order = any("ZerothOrder" in str(callback.get("class_path")) for callback in callbacks)
    if zeroth_order and str(config.trainer.precision) in ("16", "16-mixed"):
        raise SystemExit(
            "error: `trainer.precision` is '16-mixed', which scales gradients, and zeroth-order training has none. "
            "Use 'bf16-mixed', 'bf16-true', '16-true' or '32-true'."
        )


def main(args: ArgsType = None) -> None:
    """Runs the command line; `args` stands in for ``sys.argv[1:]``."""
    ZerothOrderCLI(
        LightningModule,
        LightningDataModule,
        trainer_class=Trainer,
        trainer_defaults=_TRAINER_DEFAULTS,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=args,
    )
