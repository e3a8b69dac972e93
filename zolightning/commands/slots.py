"""Slots: the fields of the command line's config that become callbacks.

``method``, ``lr_scheduler`` and ``evaluation`` become the ZerothOrder callback; ``linear_probing``, ``scope``,
``blocks``, ``lr_probe``, ``lr_control``, ``resampling`` and ``transport`` are callbacks themselves. A slot holds one
object, so a later file or flag replaces it, where a list of callbacks would grow.
"""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import yaml
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
from zolightning.callbacks.zeroth_order import Method
from zolightning.commands.checks import check_method
from zolightning.optim import SubspaceOptimizer, ZerothOrderOptimizer
from zolightning.packaged import packaged
from zolightning.scopes import Scope

_OF_A_METHOD = ("lr_scheduler", "resampling", "transport")
_OF_ANY_METHOD = ("blocks", "lr_probe", "lr_control")
_NEED_A_METHOD = (*_OF_ANY_METHOD, *_OF_A_METHOD)
_CLASSES = ("method", "scope", "linear_probing", *_NEED_A_METHOD)
SLOTS = (*_CLASSES, "evaluation")
_FILES = ("--config", "-c")
_EVALUATION = {name: parameter.default for name, parameter in inspect.signature(ZerothOrder).parameters.items()}


def add_slots(parser: LightningArgumentParser) -> None:
    """Adds the slots to a parser."""
    parser.add_argument(
        "--method",
        type=Method | None,
        help="zeroth-order method: MeZO, LOZO, SubZero, ...; without one `model.optimizer` trains by backpropagation",
    )
    parser.add_argument(
        "--lr_scheduler", type=LRSchedulerCallable | None, help="scheduler of the method, stepped after every step"
    )
    parser.add_argument(
        "--scope",
        type=Scope | None,
        help="which parameters train: DominantLayer, TrainLayers, ...; all of them if none",
    )
    parser.add_argument(
        "--linear_probing",
        type=LinearProbing | None,
        help="fit the head by logistic regression before the first step",
    )
    parser.add_argument(
        "--blocks", type=BlockCoordinateDescent | None, help="which of them move when: block coordinate descent"
    )
    parser.add_argument(
        "--resampling", type=SubspaceResampling | None, help="when a subspace method draws new subspaces"
    )
    parser.add_argument(
        "--transport", type=MomentumTransport | None, help="what becomes of its momentum then: project, reset or keep"
    )
    parser.add_argument(
        "--lr_probe", type=LearningRateProbe | None, help="measure the learning rate in the first steps of a run"
    )
    parser.add_argument(
        "--lr_control", type=LearningRateControl | None, help="lower the learning rate where training stalls"
    )
    parser.add_class_arguments(ZerothOrder, "evaluation", skip={"method", "lr_scheduler"}, instantiate=False)


def from_package(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which ``configs/...`` names the packaged file where there is no other."""
    resolved = list(arguments)
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in _FILES and equals:
            resolved[place] = f"{option}={packaged(value)}"
        elif option in _FILES and place + 1 < len(arguments):
            resolved[place + 1] = str(packaged(arguments[place + 1]))
    return resolved


def up_to_help(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments without what follows ``--method.help MeZO``, which ends the command.

    jsonargparse would take it for settings of that class; help of a setting's class, ``--scope.part.help``, stays.
    """
    kept: list[str] = []
    is_over = is_class = False
    for word in arguments:
        asks = word.startswith("--") and word.partition("=")[0].endswith(".help")
        if asks or is_class or not is_over:
            kept.append(word)
        is_over, is_class = is_over or asks, asks and "=" not in word
    return kept


def with_switches(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which ``--follow`` alone is ``--follow true``: jsonargparse asks for a value."""
    following = [*arguments[1:], "--"]
    return [
        f"{word}=true" if word == "--follow" and after.startswith("--") else word
        for word, after in zip(arguments, following, strict=True)
    ]


def replacing(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments changed so that a newly named class inherits no settings of an earlier one.

    jsonargparse keeps settings that the new class accepts too: ``momentum: 0.9`` in one file would stay with the method
    of the next file. So ``--method null`` is inserted before each file and flag that names a method, and likewise for
    the other slots. The scheduler, resampling and transport that earlier files gave go with the earlier method.
    """
    replaced: list[str] = []
    end_of_files = 0
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in _FILES:
            named = _classes_named(value or "".join(arguments[place + 1 : place + 2]))
            replaced += _nulls(
                slot for slot in _CLASSES if slot in named or ("method" in named and slot in _OF_A_METHOD)
            )
            end_of_files = len(replaced) + (1 if value else 2)
        elif option.startswith("--") and option.removeprefix("--") in _CLASSES:
            if option == "--method" and end_of_files:
                replaced[end_of_files:end_of_files] = _nulls(_OF_A_METHOD)
            replaced += _nulls([option.removeprefix("--")])
        replaced.append(argument)
    return replaced


def slot_callbacks(config: Namespace, made: Namespace) -> list[Callback]:
    """The callbacks of the slots, checked against each other and those of ``trainer.callbacks``.

    Args:
        config: the settings of a subcommand, as parsed.
        made: the same settings, instantiated; the run has its ``trainer.callbacks`` besides the returned ones.

    Raises:
        MisconfigurationException: naming a slot that has nothing to act on, or whose callback is in the list too.
        ValueError: from a method or scheduler, naming the argument, its value and what is accepted.
    """
    listed: list[Callback] = made.trainer.callbacks or []
    methods = [callback for callback in listed if isinstance(callback, ZerothOrder)]
    if len(methods) + (made.method is not None) > 1:
        names = [type(trial(callback.method)).__name__ for callback in methods]
        where = f"`method` is {class_name(config.method)}, and " if made.method is not None else ""
        raise MisconfigurationException(
            f"{where}`trainer.callbacks` holds ZerothOrder of {' and of '.join(names)}: one method can train. Keep one."
        )
    schedules = sum(isinstance(callback, BlockCoordinateDescent) for callback in listed)
    if schedules > 1:
        raise MisconfigurationException(
            f"`trainer.callbacks` holds {schedules} BlockCoordinateDescent: blocks have one order. Keep one."
        )
    # The probe first: the head that it unties is there when a scope chooses.
    callbacks: list[Callback] = [made[slot] for slot in ("linear_probing", "scope") if made[slot] is not None]
    if made.method is None:
        given = [slot for slot in _NEED_A_METHOD if config[slot] is not None]
        given += [f"evaluation.{key}" for key, value in config.evaluation.items() if value != _EVALUATION[key]]
        if given and not methods:
            raise MisconfigurationException(
                f"`{given[0]}` is given and `method` is not, and without a method nothing reads it. Name a method, or "
                f"leave `{given[0]}` out."
            )
        if given:
            raise MisconfigurationException(
                f"`{given[0]}` is given for `method`, which is in `trainer.callbacks`: give both in one of the places."
            )
        return callbacks
    optimizer = trial(made.method)
    check_method(optimizer)
    if made.lr_scheduler is not None:
        made.lr_scheduler(optimizer)
    for slot in _OF_ANY_METHOD:
        callback = made[slot]
        if callback is not None and any(isinstance(other, type(callback)) for other in listed):
            raise MisconfigurationException(
                f"`{slot}` is given, and `trainer.callbacks` holds {type(callback).__name__} too. Keep one of them."
            )
        callbacks += [] if callback is None else [callback]
    callbacks += _of_a_subspace(config, made, optimizer, listed)
    return [*callbacks, ZerothOrder(made.method, made.lr_scheduler, **made.evaluation.as_dict())]


def _of_a_subspace(
    config: Namespace, made: Namespace, optimizer: ZerothOrderOptimizer, listed: Sequence[Callback]
) -> list[Callback]:
    """The callbacks for resampling and transport: the given ones, or default ones if the method needs them."""
    name = type(optimizer).__name__
    is_subspace = isinstance(optimizer, SubspaceOptimizer)
    has_momentum = is_subspace and bool(optimizer.param_groups[0]["momentum"] or optimizer.param_groups[0]["betas"])
    found: list[Callback] = []
    for slot, callback, wanted, lack in (
        ("resampling", SubspaceResampling, is_subspace, "searches no subspaces"),
        ("transport", MomentumTransport, has_momentum, "keeps no momentum in subspaces"),
    ):
        in_list = any(isinstance(other, callback) for other in listed)
        if config[slot] is not None and in_list:
            raise MisconfigurationException(
                f"`{slot}` is given, and `trainer.callbacks` holds {callback.__name__} too. Keep one of them."
            )
        if config[slot] is not None and not wanted:
            raise MisconfigurationException(f"`{slot}` is given, and {name} {lack}. Leave `{slot}` out.")
        if wanted and not in_list:
            found.append(callback() if made[slot] is None else made[slot])
    return found


def trial(method: Method) -> ZerothOrderOptimizer:
    """The method over a parameter of one element, to check its arguments and read its settings."""
    optimizer = method([torch.nn.Parameter(torch.zeros(1, 1))])
    if not isinstance(optimizer, ZerothOrderOptimizer):
        raise MisconfigurationException(
            f"`method` must make a zeroth-order optimizer (MeZO, for example), got {type(optimizer).__name__}."
        )
    return optimizer


def class_name(spec: Namespace | None) -> str:
    """``MeZO`` of a parsed ``class_path: zolightning.optim.MeZO``."""
    return "null" if spec is None else str(spec["class_path"]).rpartition(".")[2]


def _nulls(slots: Iterable[str]) -> list[str]:
    return [word for slot in slots for word in (f"--{slot}", "null")]


def _classes_named(config: str) -> set[str]:
    """The slots for which a config names a class or null; the config is the path of a file or YAML text.

    Raises:
        ValueError: naming the file, if it is none, or not a mapping in YAML.
    """
    is_text = "\n" in config or ":" in config or config.lstrip().startswith("{")
    if not Path(config).is_file() and not is_text:
        packaged_ones = " `zolightning configs` lists those that come with the package." if "configs" in config else ""
        raise ValueError(f"`--config` is {config!r}, which is no file.{packaged_ones}")
    try:
        values = yaml.safe_load(config if is_text and not Path(config).is_file() else Path(config).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"`--config` {config} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {type(values).__name__}, not a mapping of fields"
        raise ValueError(f"`--config` {config} {found}.")
    return {
        slot
        for slot in values.keys() & set(_CLASSES)
        if not isinstance(values[slot], dict) or "class_path" in values[slot]
    }
