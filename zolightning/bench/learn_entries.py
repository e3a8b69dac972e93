"""What takes part in ``learn``: files of ``configs/`` and settings, read without the packages of the command line.

They mean what they mean to ``zolightning fit``, whose parser is not needed: a later file or setting goes first, one
that names a class replaces the earlier one with its settings, and a new method drops the earlier one's scheduler,
resampling and transport. A class is named by its path, or by its name alone where this package or ``torch.optim`` has
it.
"""

import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cache, partial
from importlib import import_module
from typing import Any, get_args

import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import nn

from zolightning.callbacks import BlockCoordinateDescent, MomentumTransport, SubspaceResampling, ZerothOrder
from zolightning.optim import SubspaceOptimizer
from zolightning.packaged import packaged

Config = dict[str, Any]

_OF_A_METHOD = ("lr_scheduler", "resampling", "transport")
_READ = ("method", *_OF_A_METHOD, "scope", "blocks", "evaluation", "model", "data", "trainer")
_BY_PROTOCOL = ("seed_everything", "test_last")  # what every run gets from the command
_WITH_CLASSES = (
    *("zolightning.optim", "zolightning.optim.estimators", "zolightning.scopes", "zolightning.blocks"),
    *("zolightning.callbacks", "torch.optim", "torch.optim.lr_scheduler"),
)


class _Loader(yaml.SafeLoader):
    """Reads ``1e-5`` as a number, as YAML 1.2 and the command line do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(words: str) -> Config:
    """The config that files and settings make.

    Args:
        words: such as ``configs/methods/mezo.yaml scope=DominantLayer method.lr=1e-4``, split as by a shell. Of a
            setting, what comes after ``=`` is YAML.

    Raises:
        ValueError: a word is neither a file nor a setting, or there is a field that no run reads.
    """
    config: Config = {}
    for word in shlex.split(words):
        name, equals, value = word.partition("=")
        if equals:
            update = yaml.load(value, _Loader)
            for key in reversed(name.split(".")):
                update = {key: update}
        else:
            path = packaged(word)
            if not path.is_file():
                raise ValueError(f"{word!r} is neither a YAML file nor a setting such as method.lr=1e-5.")
            update = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        _merge(config, {key: value for key, value in update.items() if key not in _BY_PROTOCOL})
    if unread := [key for key in config if key not in _READ]:
        raise ValueError(f"`{unread[0]}` is a field that no run reads; accepted: {', '.join(_READ)}.")
    return config


def learning_rate(config: Config) -> float:
    """What a grid multiplies: the method's ``lr``, or that of ``model.optimizer`` where there is no method.

    Raises:
        ValueError: there is none.
    """
    try:
        return float(_with_learning_rate(config)["lr"])
    except (KeyError, TypeError):
        raise ValueError("`method.lr`, or `model.optimizer.lr` without a method, must be given.") from None


def with_learning_rate(config: Config, lr: float) -> Config:
    """A copy with this learning rate."""
    changed = deepcopy(config)
    _with_learning_rate(changed)["lr"] = lr
    return changed


def callbacks(config: Config) -> list[Callback]:
    """The method and what belongs to it, as callbacks that have not been used; none for backpropagation."""
    found: list[Callback] = [] if config.get("scope") is None else [_factory(config["scope"])()]
    if config.get("method") is None:
        return found
    method = _factory(config["method"])
    if config.get("blocks") is not None:
        found.append(_factory(config["blocks"], BlockCoordinateDescent)())
    trial = method([nn.Parameter(torch.zeros(1, 1))])
    if isinstance(trial, SubspaceOptimizer):
        found.append(_factory(config.get("resampling") or {}, SubspaceResampling)())
        if trial.param_groups[0]["momentum"] or trial.param_groups[0]["betas"]:
            found.append(_factory(config.get("transport") or {}, MomentumTransport)())
    scheduler = config.get("lr_scheduler")
    return [
        *found,
        ZerothOrder(method, None if scheduler is None else _factory(scheduler), **config.get("evaluation", {})),
    ]


def model_arguments(config: Config) -> dict[str, Any]:
    """Those of :class:`~zolightning.models.CausalLM`."""
    factories = {"optimizer", "lr_scheduler"}
    return {name: _factory(v) if name in factories and v else v for name, v in config.get("model", {}).items()}


def _merge(config: Config, update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if key == "method" and (not isinstance(value, Mapping) or "class_path" in value):
            for other in _OF_A_METHOD:
                config.pop(other, None)
        before = config.get(key)
        if before is None or not isinstance(value, Mapping) or "class_path" in value:
            config[key] = deepcopy(value)
            continue
        if not isinstance(before, dict):
            before = config[key] = {"class_path": before}
        is_class = "class_path" in before and "init_args" not in value
        _merge(before, {"init_args": value} if is_class else value)


def _with_learning_rate(config: Config) -> Config:
    of = config["method"] if config.get("method") is not None else config["model"]["optimizer"]
    arguments: Config = of["init_args"]
    return arguments


def _made(value: Any, of: type | None = None, name: str = "") -> Any:
    """A setting, called `name` by the class `of`, with objects for the classes that it names."""
    if isinstance(value, Mapping):
        # Where the class goes without saying, only its settings are given.
        parameter = None if of is None else inspect.signature(of).parameters.get(name)
        types = () if parameter is None else (parameter.annotation, *get_args(parameter.annotation))
        expected = [cls for cls in types if getattr(cls, "__module__", "").startswith("zolightning")]
        if "class_path" in value or expected:
            return _factory(value, *expected[:1])()
        return {key: _made(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_made(item) for item in value]
    return _classes()[value]() if isinstance(value, str) and value in _classes() else value


def _factory(value: Any, default: type | None = None) -> Callable[..., Any]:
    """What makes an object of the class that a value names, with the settings there."""
    if isinstance(value, str):
        return _class(value)
    if default is None or "class_path" in value:
        default, value = _class(value["class_path"]), value.get("init_args", {})
    return partial(default, **{name: _made(item, default, name) for name, item in value.items()})


def _class(name: str) -> type:
    module, _, last = name.rpartition(".")
    found = getattr(import_module(module), last, None) if module else _classes().get(name)
    if not isinstance(found, type):
        raise ValueError(f"{name!r} names no class.")
    return found


@cache
def _classes() -> dict[str, type]:
    """Classes that have a name of their own."""
    modules: Iterable[Any] = map(import_module, _WITH_CLASSES)
    return {n: v for module in modules for n, v in vars(module).items() if isinstance(v, type) and n[0] != "_"}
