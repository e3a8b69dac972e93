"""Slots: the fields of the command line's config that become callbacks.

``method``, ``lr_scheduler`` and ``evaluation`` become the ZerothOrder callback; ``linear_probing``, ``scope``,
``blocks``, ``lr_probe``, ``lr_control``, ``resampling`` and ``transport`` are callbacks themselves. A slot holds one
object, so a later file or flag replaces it, where a list of callbacks would grow.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LRSchedulerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks import (
    BlockCoordinateDescent,
    LearningRateControl,
    LearningRateProbe,
    LinearProbing,
    MomentumTransport,
    SubspaceResampling,
    ZerothOrder,
)
from zolightning.callbacks.refusals import made_scheduler
from zolightning.commands.checks import check_method
from zolightning.optim import SubspaceOptimizer, ZerothOrderOptimizer
from zolightning.optim.base import Method
from zolightning.optim.moments import keeps_moments
from zolightning.scopes import Scope

OF_A_METHOD = ("lr_scheduler", "resampling", "transport")  # dropped when another method replaces it
_OF_ANY_METHOD = ("blocks", "lr_probe", "lr_control")
_NEED_A_METHOD = (*_OF_ANY_METHOD, *OF_A_METHOD)
CLASSES = ("method", "scope", "linear_probing", *_NEED_A_METHOD)
SLOTS = (*CLASSES, "evaluation")
_EVALUATION = {name: parameter.default for name, parameter in inspect.signature(ZerothOrder).parameters.items()}
_OPTIONS: dict[str, tuple[Any, str]] = {
    "method": (
        Method,
        "zeroth-order method: MeZO, LOZO, SubZero, ...; without one `model.optimizer` trains by backpropagation",
    ),
    "lr_scheduler": (LRSchedulerCallable, "scheduler of the method, stepped after every step"),
    "scope": (Scope, "which parameters train: DominantLayer, TrainLayers, ...; all of them if none"),
    "linear_probing": (LinearProbing, "fit the head by logistic regression before the first step"),
    "blocks": (BlockCoordinateDescent, "which parameters move when: block coordinate descent"),
    "resampling": (SubspaceResampling, "when a subspace method draws new subspaces"),
    "transport": (MomentumTransport, "what then becomes of its momentum: project, reset or keep"),
    "lr_probe": (LearningRateProbe, "measure the learning rate in the first steps of a run"),
    "lr_control": (LearningRateControl, "lower the learning rate where training stalls"),
}


def add_slots(parser: LightningArgumentParser) -> None:
    """Adds the slots to a parser."""
    for slot, (kind, help_text) in _OPTIONS.items():
        parser.add_argument(f"--{slot}", type=kind | None, help=help_text)
    # What the Trainer gives them is not a setting.
    for slot, argument in {"method": "params", "lr_scheduler": "optimizer"}.items():
        action: Any = parser._option_string_actions[f"--{slot}.help"]
        action.sub_add_kwargs = {"skip": {argument}}
    parser.add_class_arguments(ZerothOrder, "evaluation", skip={"method", "lr_scheduler"}, instantiate=False)


def slot_callbacks(config: Namespace, made: Namespace) -> list[Callback]:
    """The callbacks of the slots, checked against each other and those of ``trainer.callbacks``.

    Raises:
        MisconfigurationException: naming a slot that has nothing to act on, or whose callback is in the list too.
        ValueError: from a method or scheduler, naming the argument, its value and what is accepted.
    """
    listed: list[Callback] = made.trainer.callbacks or []
    _require_one(config, made, listed)
    # The probe first: the head that it unties is there when a scope chooses.
    callbacks: list[Callback] = [made[slot] for slot in ("linear_probing", "scope") if made[slot] is not None]
    if made.method is None:
        _require_none_for_a_method(config, listed)
        return callbacks
    optimizer = trial(made.method)
    check_method(optimizer)
    if made.lr_scheduler is not None:
        made_scheduler(made.lr_scheduler, optimizer)
    for slot in _OF_ANY_METHOD:
        if made[slot] is not None:
            _require_unlisted(slot, type(made[slot]), listed)
            callbacks.append(made[slot])
    callbacks += _of_a_subspace(config, made, optimizer, listed)
    return [*callbacks, ZerothOrder(made.method, made.lr_scheduler, **made.evaluation.as_dict())]


def _require_one(config: Namespace, made: Namespace, listed: Sequence[Callback]) -> None:
    """Refuses two methods and two orders of blocks."""
    methods = [callback for callback in listed if isinstance(callback, ZerothOrder)]
    if len(methods) + (made.method is not None) > 1:
        names = [type(trial(callback.method)).__name__ for callback in methods]
        where = f"`method` is {config.method['class_path'].rpartition('.')[2]}, but " if made.method is not None else ""
        raise MisconfigurationException(
            f"{where}`trainer.callbacks` holds ZerothOrder of {' and of '.join(names)}: one method can train. Keep one."
        )
    schedules = sum(isinstance(callback, BlockCoordinateDescent) for callback in listed)
    if schedules > 1:
        raise MisconfigurationException(
            f"`trainer.callbacks` holds {schedules} BlockCoordinateDescent callbacks: blocks have one order. Keep one."
        )


def _require_none_for_a_method(config: Namespace, listed: Sequence[Callback]) -> None:
    """Refuses slots that only a method reads, where `method` is not given."""
    given = [slot for slot in _NEED_A_METHOD if config[slot] is not None]
    given += [f"evaluation.{key}" for key, value in config.evaluation.items() if value != _EVALUATION[key]]
    if given and _has(listed, ZerothOrder):
        raise MisconfigurationException(
            f"`{given[0]}` is given for `method`, which is in `trainer.callbacks`: give both in the same place."
        )
    if given:
        raise MisconfigurationException(
            f"`{given[0]}` is given without a `method`, and nothing else reads it. Name a method, or leave "
            f"`{given[0]}` out."
        )


def _require_unlisted(slot: str, kind: type[Callback], listed: Sequence[Callback]) -> None:
    """Refuses a slot that is given where ``trainer.callbacks`` holds such a callback too."""
    if _has(listed, kind):
        raise MisconfigurationException(
            f"`{slot}` is given, but `trainer.callbacks` holds {kind.__name__} too. Keep one of them."
        )


def _has(listed: Sequence[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in listed)


def _of_a_subspace(
    config: Namespace, made: Namespace, optimizer: ZerothOrderOptimizer, listed: Sequence[Callback]
) -> list[Callback]:
    """The callbacks for resampling and transport: the given ones, or default ones if the method needs them."""
    name = type(optimizer).__name__
    is_subspace = isinstance(optimizer, SubspaceOptimizer)
    has_momentum = is_subspace and keeps_moments(optimizer.param_groups[0])
    if is_subspace and made.resampling is not None:
        made.resampling.check_anchor(optimizer)
    found: list[Callback] = []
    for slot, callback, wanted, lack in (
        ("resampling", SubspaceResampling, is_subspace, "searches no subspaces"),
        ("transport", MomentumTransport, has_momentum, "keeps no momentum in subspaces"),
    ):
        if config[slot] is not None:
            _require_unlisted(slot, callback, listed)
            if not wanted:
                raise MisconfigurationException(f"`{slot}` is given, but {name} {lack}. Leave `{slot}` out.")
        if wanted and not _has(listed, callback):
            found.append(callback() if made[slot] is None else made[slot])
    return found


def trial(method: Method) -> ZerothOrderOptimizer:
    """The method over a parameter of one element, to check its arguments and read its settings."""
    try:
        optimizer = method([torch.nn.Parameter(torch.zeros(1, 1))])
    except TypeError as error:
        if "abstract method" not in str(error):
            raise
        raise MisconfigurationException(
            f"`method`: {error}. 'How do I add a method?' in zolightning/README.md says what a class must define."
        ) from error
    if not isinstance(optimizer, ZerothOrderOptimizer):
        raise MisconfigurationException(
            f"`method` must make a zeroth-order optimizer (MeZO, for example), got {type(optimizer).__name__}."
        )
    return optimizer
