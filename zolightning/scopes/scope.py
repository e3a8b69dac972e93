"""The base class of the callbacks that choose which parameters train."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from zolightning.directions.slices import Slice
from zolightning.network.quantization import num_weights, unquantize
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.partners import add_text, find_callbacks, methods_of
from zolightning.rank_zero import rank_zero_info

_KEY = "scope"


@dataclass(frozen=True)
class Selection:
    """The parameters that a scope chose."""

    parameters: dict[str, Slice | None]  # names of those that train, with their slices; None for a whole parameter
    reason: str  # what was chosen and why, in a few words
    layers: tuple[int, ...] = ()  # indices of the chosen layers, if layers were chosen
    details: str = ""  # the figures behind the choice, as a table
    forward_passes: int = 0  # that the choice took; the first step counts them


class Scope(Callback, ABC):
    """Abstract base of the callbacks that choose which parameters train; everything else is frozen during ``fit``.

    The choice is made once, before the optimizer is made, and saved in checkpoints: a resumed run trains what its
    checkpoint says. Parameters that were frozen before stay frozen, and after the fit every ``requires_grad`` is what
    it was. Chosen weights that are quantised (``model.quantization``) train as they were before the quantisation. A
    scope works with any optimizer that respects ``requires_grad``, except that slices of parameters need a zeroth-order
    method. A Trainer can have one scope.
    """

    def __init__(self) -> None:
        self._selection: Selection | None = None
        self._trainable: dict[nn.Parameter, bool] = {}  # as it was before

    @abstractmethod
    def select(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Selection:
        """Chooses the parameters; may add parameters to the module first."""

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises what ``select`` would raise. The command line calls it before the validation that precedes a fit."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        refuse_two_scopes(trainer)
        self._trainable = {parameter: parameter.requires_grad for parameter in pl_module.parameters()}
        self._choose(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if _KEY not in checkpoint:
            raise MisconfigurationException(
                f"`ckpt_path` is a checkpoint of a run without a scope, and {type(self).__name__} would train "
                "different parameters. Resume it with the callbacks that it had."
            )
        saved = checkpoint[_KEY]
        parameters = {name: part if part is None else Slice(**part) for name, part in saved["parameters"].items()}
        reason = f"{saved['reason']}, as the checkpoint says"
        self._apply(pl_module, Selection(parameters, reason, tuple(saved["layers"])))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._selection is not None:
            checkpoint[_KEY] = {
                "layers": list(self._selection.layers),
                "reason": self._selection.reason.removesuffix(", as the checkpoint says"),
                "parameters": {
                    name: part if part is None else {"dim": part.dim, "index": part.index}
                    for name, part in self._selection.parameters.items()
                },
            }

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        selection = self._selection
        assert selection is not None, "`setup` selects"
        parameters = dict(pl_module.named_parameters())
        chosen = {name: part for name, part in selection.parameters.items() if parameters[name].requires_grad}
        slices = {parameters[name]: part for name, part in chosen.items() if part is not None}
        for optimizer in trainer.optimizers if slices else ():
            if not isinstance(optimizer, ZerothOrderOptimizer):
                raise MisconfigurationException(
                    f"{type(self).__name__} chose slices of parameters ({selection.reason}), but "
                    f"{type(optimizer).__name__} trains whole ones. Use a zeroth-order method (the ZerothOrder "
                    "callback), or a `part` without channels."
                )
            optimizer.restrict(slices)
        for method in methods_of(trainer):
            method.count(selection.forward_passes)
        count = sum(_size(parameters[name], part) for name, part in chosen.items())
        total = num_weights(pl_module)
        summary = (
            f"{type(self).__name__}: {selection.reason}; {count:,} of {total:,} parameters train "
            f"({100 * count / total:.3g} %)."
        )
        rank_zero_info(summary)
        lines = [summary, *selection.details.splitlines(), *map(_describe, chosen, chosen.values())]
        add_text(trainer, "scope", "\n".join(lines))

    def teardown(self, *_: Any, **__: Any) -> None:
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)
        self._trainable = {}

    on_exception = teardown  # Lightning calls no teardown after an exception or an interrupt

    def _choose(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # All ranks look at the same prompts, but different processors may differ in the last bits.
        self._apply(pl_module, trainer.strategy.broadcast(self.select(trainer, pl_module)))

    def _apply(self, pl_module: L.LightningModule, selection: Selection) -> None:
        gone = unquantize(pl_module, selection.parameters)
        kept = {name: part for name, part in selection.parameters.items() if name not in gone}
        selection = replace(selection, parameters=kept)
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name in selection.parameters and self._trainable.get(parameter, True))
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise MisconfigurationException(
                f"{type(self).__name__} chose {selection.reason}, but there all parameters are frozen "
                "(`requires_grad=False`). Unfreeze at least one."
            )
        self._selection = selection


def scopes_of(trainer: L.Trainer) -> list[Scope]:
    """The scopes among a Trainer's callbacks: one, or none."""
    return find_callbacks(trainer, Scope)  # type: ignore[type-abstract]  # they need not be made


def refuse_two_scopes(trainer: L.Trainer) -> None:
    """Raises a MisconfigurationException where callbacks of a Trainer would freeze what others train."""
    scopes = [type(scope).__name__ for scope in scopes_of(trainer)]
    if len(scopes) > 1:
        raise MisconfigurationException(
            f"`trainer.callbacks` has {len(scopes)} scopes, {', '.join(scopes)}: each would freeze what the others "
            "train. Keep one; DominantLayer takes `extra_layers`, TrainParameters several `patterns`."
        )


@contextmanager
def trainable_as(wanted: Mapping[nn.Parameter, bool]) -> Iterator[None]:
    """A context in which ``requires_grad`` of these parameters is as wanted; afterwards it is what it was before."""
    before = {parameter: parameter.requires_grad for parameter in wanted}
    try:
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)


def _size(parameter: nn.Parameter, part: Slice | None) -> int:
    return parameter.numel() if part is None else parameter.numel() // parameter.shape[part.dim] * len(part.index)


def _describe(name: str, part: Slice | None) -> str:
    return name if part is None else f"{name}, {len(part.index)} entries along dimension {part.dim}"
