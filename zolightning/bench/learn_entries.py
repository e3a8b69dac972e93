"""What takes part in ``learn``: files of ``configs/`` and settings, read by the parser of ``zolightning fit``."""

import shlex
from functools import cache
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.callbacks import Callback

from zolightning.commands.arguments import prepared
from zolightning.commands.explanations import explain
from zolightning.commands.options import fit_parser
from zolightning.commands.slots import SLOTS, slot_callbacks

# Settings of the Trainer that all entries share, whatever their files say
_BY_PROTOCOL = {
    "max_steps": -1,
    "max_epochs": -1,
    "max_time": None,
    "val_check_interval": None,
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
}

_parser = cache(fit_parser)  # which takes seconds


def read(words: str) -> Namespace:
    """The config that files and settings make; later ones override earlier ones.

    Args:
        words: such as ``configs/methods/mezo.yaml scope=DominantLayer method.lr=1e-4``, split as by a shell: what
            would be ``--config configs/methods/mezo.yaml --scope=DominantLayer --method.lr=1e-4`` of ``zolightning
            fit``. Lengths of runs, loggers and numbers of devices are ignored.

    Raises:
        ValueError: naming a file or a setting, and what is wrong with it.
    """
    arguments: list[str] = []
    for word in shlex.split(words):
        arguments += [f"--{word}"] if "=" in word else ["--config", word]
    try:
        config: Namespace = _parser().parse_args(prepared(arguments))
    except ArgumentError as error:
        raise ValueError(explain(str(error), _parser().option_names(error))) from None
    for name, value in _BY_PROTOCOL.items():
        config.trainer[name] = value
    return config


def described(config: Namespace) -> str:
    """All settings that a run depends on and that are not the defaults, as JSON."""
    own = Namespace({field: config[field] for field in (*SLOTS, "model", "data", "trainer")})
    text: str = _parser().dump(own, format="json", skip_default=True, skip_validation=True)
    return text


def learning_rate(config: Namespace) -> float:
    """The learning rate that a grid multiplies: the method's, or that of ``model.optimizer`` where there is no method.

    Raises:
        ValueError: there is none.
    """
    try:
        return float(_with_learning_rate(config)["lr"])
    except (KeyError, TypeError):
        raise ValueError("`method.lr`, or `model.optimizer.lr` without a method, must be given.") from None


def with_learning_rate(config: Namespace, lr: float) -> Namespace:
    """A copy with this learning rate."""
    changed = config.clone()
    _with_learning_rate(changed)["lr"] = lr
    return changed


def make(config: Namespace, *fields: str) -> Namespace:
    """New objects made from these fields of a config."""
    made: Namespace = _parser().instantiate_classes(Namespace({field: config[field] for field in fields}))
    return made


def callbacks(config: Namespace) -> list[Callback]:
    """New callbacks for the method and the fields that belong to it; none for backpropagation.

    Raises:
        MisconfigurationException: naming a field that has nothing to act on.
        ValueError: from a method or scheduler, naming the argument, its value and what is accepted.
    """
    made = make(config, *SLOTS, "trainer")
    return [*slot_callbacks(config, made), *(made.trainer.callbacks or [])]


def _with_learning_rate(config: Namespace) -> Any:
    of = config.model.init_args["optimizer"] if config.method is None else config.method
    return of["init_args"]
