"""When a subspace method adds its pending updates to the weights ("folds" them) under a Trainer."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.rank_zero import rank_zero_info, rank_zero_warn

# Hooks that run between the first step and the end of the fit, when stored weights may lack pending updates.
_HOOKS = (
    *("on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step", "on_save_checkpoint"),
)
# In these ZerothOrder folds, but other callbacks may run before it.
_CALLBACK_HOOKS = (*_HOOKS, "on_validation_start", "on_fit_end", "on_exception", "state_dict")
_MODULE_HOOKS = (
    *_HOOKS,
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
    *("on_validation_model_zero_grad", "on_validation_model_eval"),
)
# Classes of Lightning whose hooks do not access weights. Others, also of later versions, are assumed to.
_HARMLESS = frozenset(
    {"Callback", "LightningModule", "ModelHooks", "DataHooks", "CheckpointHooks"}
    | {"ModelCheckpoint", "OnExceptionCheckpoint", "EarlyStopping", "Timer", "ModelSummary", "RichModelSummary"}
    | {"ProgressBar", "TQDMProgressBar", "RichProgressBar"}
    | {"LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor"}
)


def hook_between_steps(callbacks: Sequence[Callback], module: L.LightningModule) -> str | None:
    """The first hook found that may access weights between steps, such as ``MyCallback.on_train_batch_end``.

    None if all hooks that run between steps are this package's or known not to access weights. A module's hooks in and
    around validation do not count, because updates are folded before.
    """
    hooks: list[tuple[Any, str]] = [(owner, name) for owner in callbacks for name in _CALLBACK_HOOKS]
    hooks += [(module, name) for name in _MODULE_HOOKS]
    for owner, name in hooks:
        if not _is_harmless(getattr(owner, name, None)):
            return f"{type(owner).__name__}.{name}"
    return None


def choose_folding(optimizer: SubspaceOptimizer, callbacks: Sequence[Callback], module: L.LightningModule) -> None:
    """Lets a method fold at every step if a hook may access weights between steps, with a message that names the hook.

    Otherwise updates are folded before a resampling, a validation and the end of the fit.
    """
    hook = hook_between_steps(callbacks, module)
    optimizer.fold_every_step = hook is not None
    if hook is not None:
        rank_zero_info(
            f"{type(optimizer).__name__} adds its updates to the weights at every step, because {hook} may read or "
            "write weights between steps. Without it they wait in the subspace, which saves a pass over the weights "
            "a step."
        )
        if optimizer.offload_low_words:
            rank_zero_warn(
                "`offload_low_words` is True, but low words go to the device and back whenever updates are added to "
                f"the weights: here at every step, because of {hook}."
            )


def _is_harmless(hook: Any) -> bool:
    if hook is None:
        return True
    package = getattr(hook, "__module__", "").partition(".")[0]
    owner = getattr(hook, "__qualname__", "").partition(".")[0]
    return package == "zolightning" or (package in ("lightning", "pytorch_lightning") and owner in _HARMLESS)
