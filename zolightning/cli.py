"""The command ``zolightning``: LightningCLI with this project's defaults."""

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from zolightning.callbacks import (
    BlockCoordinateDescent,
    KeepLedger,
    LearningRateProbe,
    LinearProbing,
    RunOverview,
    SaveLast,
    StepProgressBar,
    ZerothOrder,
)
from zolightning.callbacks.refusals import refuse_unsupported
from zolightning.checkpoints.other_checkpoints import refuse_two_last_steps
from zolightning.checkpoints.resume import callback_states, find_checkpoint, go_on_in_folder, is_ledger, take_name
from zolightning.checkpoints.run_logs import log_once
from zolightning.commands.arguments import command_line, prepared
from zolightning.commands.checks import (
    check_data,
    check_gradient_free,
    check_groups,
    check_monitors,
    check_seed,
    check_settings,
    check_training,
    choose_monitor,
)
from zolightning.commands.leave_as_found import LeaveAsFound
from zolightning.commands.loggers import name_run, put_tensorboard_first
from zolightning.commands.metrics_files import MetricsFiles
from zolightning.commands.next_commands import next_commands
from zolightning.commands.options import CLASS_DEFAULTS, SEED, TRAINER_DEFAULTS, add_options
from zolightning.commands.parser import OneLineParser
from zolightning.commands.seeds import run_seeds
from zolightning.commands.slots import slot_callbacks, trial
from zolightning.commands.trainer import Trainer
from zolightning.partners import callbacks_of
from zolightning.rank_zero import rank_zero_info
from zolightning.scopes.scope import Scope, refuse_two_scopes
from zolightning.strategies import ZerothOrderDDP
from zolightning.versions import installed_version

_SUBCOMMANDS = {
    **LightningCLI.subcommands(),
    "predict": LightningCLI.subcommands()["predict"] | {"return_predictions"},  # they go to a file, batch by batch
    **{name: {"model", "datamodule"} for name in ("doctor", "profile", "sweep-layers", "export", "replay")},
}
# Of Lightning's commands; those of this package have docstrings.
_DESCRIPTIONS = {
    "fit": "Trains a model, and validates it every so many steps.",
    "validate": "Evaluates a model on the validation data.",
    "test": "Evaluates a model on the test data.",
    "predict": "Writes what a model predicts for the test data, which need no labels, to a file.",
}
# The config.yaml of a run has these, whatever command reads it.
_NOT_READ: dict[str, Any] = {"ckpt_path": str | None, "weights_only": bool | None}
_NO_GPU = "`trainer.accelerator` is 'gpu', but torch finds none here: use 'cpu' or 'auto'."
_NO_SPAWN = (
    "`trainer.strategy` starts its processes by 'spawn', by which the objects of a command cannot be sent to them. Use "
    "'zo_ddp' or 'ddp', which start the command once for each process."
)
_PARSER_KWARGS: dict[str, Any] = {
    "prog": "zolightning",
    "usage": "zolightning COMMAND [--config FILE ...] [--OPTION VALUE ...]",
    "version": installed_version("zolightning") or "unknown: not installed",
    "description": "Fine-tunes language models with forward passes only. Two more commands have a `--help`: "
    "`configs` lists the config files of the package, `report` compares runs on a page.",
    # argparse would list a hundred options, here and before every error.
    **{
        name: {"usage": f"zolightning {name} --config FILE [--config FILE ...] [--OPTION VALUE ...]"}
        | ({"description": _DESCRIPTIONS[name]} if name in _DESCRIPTIONS else {})
        for name in _SUBCOMMANDS
    },
}


class ZerothOrderCLI(LightningCLI):
    """Adds checkpoints (best, last), a run monitor, a validation before training and a test after it."""

    trainer: Trainer

    def __init__(self, args: ArgsType = None) -> None:
        self._ledger: Path | None = None  # of a run that goes on without a checkpoint
        self._begins_anew = False  # in the folder of a run that was killed before its first step
        self._leave_as_found = LeaveAsFound()
        words = sys.argv[1:] if args is None else args
        self._only = words[0] if isinstance(words, list) and words and words[0] in _SUBCOMMANDS else None
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=SEED,
            save_config_kwargs={"overwrite": True},
            parser_kwargs=_PARSER_KWARGS,
            parser_class=OneLineParser,
            args=args,
        )

    def setup_parser(self, *args: Any, **settings: Any) -> None:
        super().setup_parser(*args, **settings)
        for listed in getattr(self.parser._subcommands_action, "_choices_actions", ()):
            listed.help = _DESCRIPTIONS.get(listed.dest, listed.help)  # Lightning lists the first lines of docstrings

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults(CLASS_DEFAULTS)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_options(parser)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return _SUBCOMMANDS

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Leaves out the arguments of subcommands that nobody has asked for: to add all takes half a second."""
        if self._only not in (None, subcommand):
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for name, kind in _NOT_READ.items():
            if name not in self._subcommand_method_arguments[subcommand]:
                parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if args is None or isinstance(args, list):
            self.config = parser.parse_args(prepared(sys.argv[1:] if args is None else args))
        else:
            self.config = parser.parse_object(args)
        check_seed(self.config[self.config.subcommand].seed_everything)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would read a whole checkpoint here for hyperparameters, which the config has."""

    def _dump_config(self) -> None:
        """Makes what ``save_hyperparameters`` of a module saves."""
        if not hasattr(self, "config_dump"):
            self.config_dump = self._plain_config()

    def _plain_config(self) -> dict[str, Any]:
        """The config of the command as plain values, which were checked when it was parsed: that takes 0.1 s."""
        options = {"format": "json", "skip_none": False, "skip_link_targets": False, "skip_check": True}
        plain: dict[str, Any] = json.loads(self.parser.dump(self.config, **options))[str(self.subcommand)]
        return plain

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_groups(config, ("trainer", "model", "data", "evaluation", *self._parser(self.subcommand).callback_keys))
        put_tensorboard_first(config)
        if self.subcommand == "fit":
            take_name(config)
        else:  # true, and of no interest where nothing is saved
            warnings.filterwarnings("ignore", "The dirpath has changed.*")
        name_run(config)
        self.datamodule = self._made("data")
        choose_monitor(config, self.datamodule)
        if config.seeds:
            parser = self._parser(self.subcommand)
            run_seeds(str(self.subcommand), config, parser.dump(config, skip_none=False))
            sys.exit()
        find_checkpoint(config, of_ledgers=self.subcommand == "fit" and config.keep_ledger)
        check_settings(config, str(self.subcommand))
        check_gradient_free(config)

    def instantiate_classes(self) -> None:
        """Makes the model last: errors elsewhere are reported before it is loaded."""
        name, config = str(self.subcommand), self.config.clone()
        if name == "fit":
            self.config[name].ckpt_path = None  # it belongs to this command, not to the run's config.yaml
            if go_on_in_folder(config[name]):
                warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            if is_ledger(config[name].ckpt_path):
                ledger, config[name].ckpt_path = Path(config[name].ckpt_path), None
                self._ledger = ledger if ledger.is_file() else None
                self._begins_anew = self._ledger is None
                if self._begins_anew:
                    rank_zero_info(f"{ledger.parent} has no step yet: the run begins anew.")
        for field in ("model", "data"):
            config[name].pop(field)
        self.config_init = self.parser.instantiate_classes(config)
        self.config_init[name].data = self.datamodule
        check_data(config[name], self.datamodule, name)
        self.trainer = self.instantiate_trainer()
        blocks, path = (self.config_init[name].get(field) for field in ("blocks", "ckpt_path"))
        if name == "fit" and blocks is not None and path is not None:
            blocks.check_resume(callback_states(path))
        self.model = self._made("model")

    def _made(self, field: str) -> Any:
        """The object that a field of the config names, made by itself."""
        name = str(self.subcommand)
        only = Namespace({name: Namespace({field: self.config[name][field]}), "subcommand": name})
        return self.parser.instantiate_classes(only)[name][field]

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        made = self.config_init[self.subcommand]
        made.trainer.callbacks = [*slot_callbacks(self.config[self.subcommand], made), *(made.trainer.callbacks or [])]
        if made.trainer.enable_checkpointing is False:
            parser = self._parser(self.subcommand)
            parser.callback_keys = [key for key in parser.callback_keys if not isinstance(made[key], Checkpoint)]
        if not any(isinstance(callback, ProgressBar) for callback in made.trainer.callbacks):
            made.trainer.callbacks += [StepProgressBar()] if made.trainer.enable_progress_bar is not False else []
        is_zeroth_order = any(isinstance(callback, ZerothOrder) for callback in made.trainer.callbacks)
        if self.subcommand == "fit" and made.keep_ledger and is_zeroth_order:
            made.trainer.callbacks.append(KeepLedger(go_on=self._ledger))
        command = command_line(["zolightning", *sys.argv[1:]])
        made.trainer.callbacks += [RunOverview(command), self._leave_as_found]
        if self.subcommand in ("fit", "validate", "test"):
            made.trainer.callbacks.append(MetricsFiles(self.subcommand, command, made.ckpt_path))
        try:
            trainer: Any = super().instantiate_trainer(**kwargs)
        except (ImportError, TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
            # Lightning's, about an unknown strategy, accelerator or devices, the package that one of them needs, or a
            # callback that is given twice
            is_no_gpu = "No supported gpu backend" in str(error)
            raise MisconfigurationException(_NO_GPU if is_no_gpu else str(error)) from error
        # The checkpoints of the field come first: `trainer.checkpoint_callback`, beside which the last step is saved
        trainer.callbacks.sort(key=lambda each: isinstance(each, Checkpoint) and each is not made.checkpoint)
        trainer.run_config = self._plain_config()
        refuse_two_scopes(trainer)
        if getattr(trainer.strategy, "_start_method", None) in ("spawn", "forkserver"):
            raise MisconfigurationException(_NO_SPAWN)
        if self.subcommand == "fit" and is_zeroth_order:
            refuse_unsupported(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        with self._leave_as_found.watch(self.trainer):
            super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return arguments | ({"return_predictions": False} if subcommand == "predict" else {})

    def before_fit(self) -> None:
        config = self.config[self.subcommand]
        is_new = self.config_init[self.subcommand].ckpt_path is None and self._ledger is None
        callbacks = callbacks_of(self.trainer)
        methods = [trial(callback.method) for callback in callbacks if isinstance(callback, ZerothOrder)]
        for callback in callbacks:
            if isinstance(callback, ZerothOrder | BlockCoordinateDescent | LinearProbing):
                callback.check(self.trainer, self.model)
            if isinstance(callback, LearningRateProbe) and is_new:
                callback.check(self.trainer, self.model)
            if isinstance(callback, Scope) and not is_overridden("configure_model", self.model):
                callback.check(self.trainer, self.model)
            if isinstance(callback, SaveLast):
                refuse_two_last_steps(self.trainer, callback)
        if isinstance(strategy := self.trainer.strategy, ZerothOrderDDP):
            for method in methods:
                strategy.check(method)
        check_training(self.trainer, self.model, self.datamodule, methods)
        check_monitors(self.trainer, self.model, self.datamodule)
        # Now, not only with a validation: a fit must be the same with and without one, as a resumed run has none. An
        # average of the weights has the dtype that they have now.
        self.trainer.precision_plugin.convert_module(self.model)
        if config.validate_first and is_new and not config.trainer.fast_dev_run:
            if self._begins_anew:
                log_once(self.trainer, begins_with_fit=False)
            with isolate_rng():
                found = self.trainer.validate(self.model, self.datamodule, verbose=False)
            self._say("before training", found)
        if self._begins_anew:
            log_once(self.trainer)  # again: a fit writes to another file than a validation before it

    def after_fit(self) -> None:
        config = self.config[self.subcommand]
        best: Any = self.trainer.checkpoint_callback
        if best is not None and best.best_model_score is not None:
            self._say("best checkpoint", [{best.monitor: float(best.best_model_score)}], best.best_model_path)
        if config.test_last and not config.trainer.fast_dev_run:
            path = best.best_model_path if best is not None else None
            results = self.trainer.test(self.model, self.datamodule, ckpt_path=path or None, verbose=False)
            self._say("best checkpoint" if path else "last step", results)
        commands = next_commands(self.trainer, self.model)  # on every rank, as it asks for the folder
        if self.trainer.is_global_zero:
            for what, words in commands.items():
                print(f"{f'{what}:':13} {words}", flush=True)

    def _say(self, when: str, of_loaders: Sequence[Mapping[str, float]], where: str = "") -> None:
        metrics = {name: value for metrics in of_loaders for name, value in metrics.items()}
        if self.trainer.is_global_zero and metrics:
            values = ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
            print(f"{when}: {values}{f' ({where})' if where else ''}", flush=True)
