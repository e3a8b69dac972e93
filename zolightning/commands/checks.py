"""Finds mistakes before the first step, cheapest checks first: settings, folders, rows, metrics."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from zolightning.callbacks.refusals import refuse_precision, refuse_strategy
from zolightning.checkpoints.checkpoint_io import require_writable
from zolightning.checkpoints.resume import folder_settings
from zolightning.commands.configured_trainer import ConfiguredTrainer
from zolightning.commands.explanations import null_group
from zolightning.commands.quiet import quiet
from zolightning.models.pretrained_module import PretrainedModule
from zolightning.models.spread import refuse_misplaced, refuse_training_offloaded
from zolightning.optim import ZerothOrderOptimizer
from zolightning.optim.estimators import ForwardGradient
from zolightning.partners import callbacks_of
from zolightning.scopes.scope import scopes_of
from zolightning.strategies import ZerothOrderDDP, ZerothOrderFSDP

_MOST_QUERIES = 10_000
_SMALLEST_EPS, _LARGEST_EPS, _LARGEST_LR = 1e-12, 1e3, 1e6
_MODES = {"loss": "min"} | dict.fromkeys(("accuracy", "f1", "exact_match", "pearson", "spearman", "reward"), "max")
_NOT_OF_VALIDATION = ("train", "zo/", "run/", "lr-")  # names of metrics that a validation does not log


def check_seed(seed: int | bool) -> None:
    """Raises a ValueError for a seed that no generator takes."""
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise ValueError(f"`seed_everything` must be at least 0 and below 2**32, got {seed}.")


def check_groups(config: Namespace, names: Iterable[str]) -> None:
    """Raises a ValueError if a group of settings is null; groups have defaults and cannot be switched off."""
    for name in names:
        if name in config and config[name] is None:  # a class without arguments has no group
            raise ValueError(null_group(name))


def choose_monitor(config: Namespace, datamodule: Any) -> None:
    """Chooses the metric of the best checkpoint if ``checkpoint.monitor`` is null.

    It is the reward if the model has one, else the first metric that the data module names, or the loss if it names an
    empty list; accuracy for a data module without such a list.

    Raises:
        ValueError: ``checkpoint.mode`` would keep the worst one.
    """
    checkpoint = config.checkpoint
    if checkpoint.monitor is None:
        names = getattr(datamodule, "validation_metrics", ("accuracy",))
        has_reward = config.model.get("init_args", {}).get("reward") is not None
        name = "reward" if has_reward else next(iter(names), "loss")
        checkpoint.monitor, checkpoint.mode = f"val/{name}", _MODES[name]
    mode = _MODES.get(checkpoint.monitor.rpartition("/")[2], checkpoint.mode)
    if checkpoint.mode != mode:
        raise ValueError(
            f"`checkpoint.mode` is {checkpoint.mode!r}, and `checkpoint.monitor` {checkpoint.monitor!r}: the worst "
            f"weights would be kept. Set `checkpoint.mode` to {mode}."
        )


def check_settings(config: Namespace, subcommand: str) -> None:
    """Checks what needs no object at all.

    Raises:
        ValueError: naming the setting, its value and what is accepted.
    """
    trainer = config.trainer
    if subcommand == "fit":
        _check_fit(config)
    interval = trainer.val_check_interval
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(
            "`trainer.val_check_interval` must be above 0, a number of batches or a share of an epoch, got "
            f"{interval}. For a run without validations set `trainer.limit_val_batches: 0`."
        )
    if isinstance(interval, float) and trainer.check_val_every_n_epoch is None:
        raise ValueError(
            f"`trainer.val_check_interval` is {interval}, a share of an epoch, and `trainer.check_val_every_n_epoch` "
            "is null, so that it must be a whole number of batches. Set the latter to 1, or give such a number."
        )
    for path in _folders(config):
        require_writable(*path)
    if subcommand == "predict":
        predictions = Path(config.predictions.path)
        if predictions.is_dir():
            raise ValueError(f"`predictions.path` is {predictions}, which is a folder. Name a file.")
        require_writable("predictions.path", predictions.parent)


def _check_fit(config: Namespace) -> None:
    """What is wrong with the settings of a training alone: its length, what trains, and the folder of its ledger."""
    trainer, model = config.trainer, config.model.get("init_args", {})
    if not trainer.fast_dev_run:
        if trainer.max_steps == -1 and trainer.max_epochs in (None, -1) and trainer.max_time is None:
            raise ValueError(
                f"`trainer.max_steps` is -1 and `trainer.max_epochs` is {trainer.max_epochs}: the run would not end. "
                "Set one of them, or `trainer.max_time`."
            )
        for name in ("max_steps", "max_epochs", "limit_train_batches"):
            if trainer[name] == 0:
                raise ValueError(f"`trainer.{name}` is 0: nothing would be trained. Set it to 1 or more.")
    quantization, is_chosen = model.get("quantization"), config.scope is not None or model.get("adapter") is not None
    if quantization is not None and not is_chosen and not trainer.callbacks:
        raise ValueError(
            f"`model.quantization` is {quantization!r}, which freezes weights, but no `scope` says what else trains. "
            "Name one (TrainLayers, its `part` LoRA, or TrainParameters for their scales), or leave `quantization` out."
        )
    if config.keep_ledger and config.method is not None:
        _refuse_remote_ledger(config)


def check_gradient_free(config: Namespace) -> None:
    """Refuses a strategy or a precision that needs gradients, where a zeroth-order method trains.

    ZerothOrder refuses them too, but in its ``setup``. Before that come Lightning's errors about other things: a GPU
    that sharding needs, a package that is not installed; and on a CPU it silently takes bf16-mixed for 16-mixed.

    Raises:
        MisconfigurationException: naming the setting, its value and what is accepted.
    """
    callbacks = config.trainer.callbacks or []
    if config.method is None and not any("ZerothOrder" in str(callback.get("class_path")) for callback in callbacks):
        return
    if isinstance(config.trainer.strategy, str):
        refuse_strategy(config.trainer.strategy)
    if config.trainer.precision is not None:
        refuse_precision(config.trainer.precision)


def check_method(optimizer: ZerothOrderOptimizer) -> None:
    """Checks for numbers that a method accepts but that make no sense in a run.

    Raises:
        ValueError: naming the setting, its value and what is accepted.
    """
    group = optimizer.param_groups[0]
    if optimizer.num_queries > _MOST_QUERIES:
        raise ValueError(
            f"`method.num_queries` must be at most {_MOST_QUERIES:,}, got {optimizer.num_queries}: each is a forward "
            "pass or two of every step."
        )
    if not _SMALLEST_EPS <= group["eps"] <= _LARGEST_EPS:
        raise ValueError(
            f"`method.eps` must be between {_SMALLEST_EPS:g} and {_LARGEST_EPS:g}, got {group['eps']:g}: a smaller "
            "one is lost in rounding, a larger one drowns the weights in noise. 1e-3 is usual."
        )
    if group["lr"] > _LARGEST_LR:
        raise ValueError(f"`method.lr` must be at most {_LARGEST_LR:g}, got {group['lr']:g}.")


def check_data(config: Namespace, datamodule: Any, subcommand: str) -> None:
    """Checks settings of data and method against each other, and reads the rows that are needed only at the end.

    Raises:
        ValueError: naming the setting, or the file and line that are wrong.
    """
    fixed = getattr(datamodule, "fixed_batches", True)
    if subcommand == "fit" and config.evaluation.keep_prefix_gib and not fixed:
        raise ValueError(
            f"`evaluation.keep_prefix_gib` is {config.evaluation.keep_prefix_gib}, but `data.fixed_batches` is false: "
            "what is kept of a batch helps only if the same batch comes again. Set `data.fixed_batches` to true."
        )
    if subcommand == "fit" and hasattr(datamodule, "check_training"):
        datamodule.check_training()
    if subcommand == "fit" and config.test_last and hasattr(datamodule, "check_rows"):
        datamodule.check_rows("test")


def check_training(
    trainer: L.Trainer,
    model: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    methods: Collection[ZerothOrderOptimizer],
) -> None:
    """Checks, before anything is validated or written, that derivatives are not asked for where there are none.

    A reward has no gradient, and the package's strategies average no gradients. `methods` are those of the Trainer.

    Raises:
        MisconfigurationException: naming the strategy, the device map, the objective or the reward.
    """
    if isinstance(network := getattr(model, "model", None), nn.Module):
        if not scopes_of(trainer):
            refuse_training_offloaded(network)
        refuse_misplaced(network, trainer, "fit", getattr(model, "save_frozen", True))
    if isinstance(model, PretrainedModule):
        differentiates = any(isinstance(method.estimator, ForwardGradient) for method in methods)
        model.check_objective(datamodule, by_gradients=differentiates or not methods)
    ours = isinstance(trainer.strategy, ZerothOrderDDP | ZerothOrderFSDP)
    if ours and not methods and model.automatic_optimization:
        name = "zo_ddp" if isinstance(trainer.strategy, ZerothOrderDDP) else "zo_fsdp"
        raise MisconfigurationException(
            f"`trainer.strategy` is '{name}', under which no gradients are averaged, but `method` is not given. Use "
            "'ddp', or name a method."
        )


def check_monitors(
    trainer: ConfiguredTrainer, model: L.LightningModule, datamodule: L.LightningDataModule | None
) -> None:
    """Checks that the metrics which callbacks monitor exist.

    A module may name its metrics by a method ``validation_metrics(datamodule)``; otherwise one batch is validated,
    without traces.

    Raises:
        MisconfigurationException: naming a metric that nothing logs, its callback and the metrics that there are.
    """
    monitors = _monitors(callbacks_of(trainer))
    if not monitors or trainer.limit_val_batches == 0:
        return
    named = getattr(model, "validation_metrics", None)
    logged = _validated_once(trainer, model, datamodule) if named is None else named(datamodule)
    for owner, name in monitors:
        if name not in logged:
            raise MisconfigurationException(
                f"`{owner}` asks for the metric {name!r}, which the validation does not log. It logs "
                f"{', '.join(sorted(logged)) or 'none'}."
            )


def _validated_once(
    trainer: ConfiguredTrainer, model: L.LightningModule, datamodule: L.LightningDataModule | None
) -> set[str]:
    """Names of the metrics that one batch of validation logs."""
    with quiet(), isolate_rng():
        runner = trainer.without_traces(callbacks=[], limit_val_batches=1)
        return {name for metrics in runner.validate(model, datamodule, verbose=False) for name in metrics}


def _refuse_remote_ledger(config: Namespace) -> None:
    root = str(config.trainer.default_root_dir)
    folder = str((folder_settings(config.trainer.logger) or {}).get("save_dir") or root)
    if "://" in folder:
        name = "trainer.default_root_dir" if folder == root else "trainer.logger.save_dir"
        raise ValueError(
            f"`{name}` is {folder}, but a ledger is a file on this machine, to which each step is appended. Name a "
            "local folder, or set `keep_ledger` to false."
        )


def _folders(config: Namespace) -> Iterable[tuple[str, Path]]:
    settings = folder_settings(config.trainer.logger)
    candidates = {
        "trainer.default_root_dir": config.trainer.default_root_dir,
        "trainer.logger.save_dir": settings and settings.get("save_dir"),
        "checkpoint.dirpath": config.checkpoint.dirpath,
    }
    for name, folder in candidates.items():
        if folder is not None and "://" not in str(folder):
            yield name, Path(folder)


def _monitors(callbacks: Iterable[Callback]) -> list[tuple[str, str]]:
    """The metrics of a validation that callbacks monitor, each after the setting or callback that names it."""
    found = []
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        if isinstance(name, str) and not name.startswith(_NOT_OF_VALIDATION):
            owner = "checkpoint.monitor" if type(callback).__name__ == "ModelCheckpoint" else type(callback).__name__
            found.append((owner, name))
    return found
