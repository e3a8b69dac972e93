"""Computes trained weights from base weights and a ledger, without data or forward passes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zolightning.checkpoints.given_bases import load_bases
from zolightning.checkpoints.ledger import Ledger
from zolightning.checkpoints.ledger_header import as_json_values, first_numbers, this_release
from zolightning.directions.slices import Slice
from zolightning.messages import differing
from zolightning.optim.base import Method, ZerothOrderOptimizer
from zolightning.optim.blocks import LeftState
from zolightning.optim.settings import settings_of
from zolightning.optim.subspace_weights import SubspaceWeights
from zolightning.weights_digest import base_tensors, weights_digest

_IN_RECORDS = ("lr", "vector_lr")  # records hold the rates, so the method's own may differ


@dataclass(frozen=True)
class Replayed:
    """The result of a replay."""

    steps: int  # that were replayed
    sealed: bool | None  # whether weights have the bits of the run's end; None if it continued or has not ended


class Replay:
    """A context in which the steps of a run are replayed on a module with the run's base weights.

    Args:
        path: path of the run's ledger.
        module: the module, on the device on which to replay; its weights get the dtypes that they had in the run.
        method: makes the run's method; learning rates come from the ledger.

    Attributes:
        ledger: the run's ledger.
        steps: number of steps replayed so far.

    Raises:
        FileNotFoundError: if there is no ledger.
        DamagedLedgerError: if it was changed.
        ValueError: if the ledger belongs to a different model, weights, method or setting, or has another version of
            the layout or of the noise; in one line, before anything but dtypes is changed.
    """

    def __init__(self, path: str | Path, module: nn.Module, method: Method) -> None:
        self.ledger, self.steps = Ledger(Path(path)), 0
        self._module, header = module, self.ledger.header
        if header.noise != first_numbers():
            raise ValueError(
                f"The ledger {path} was written by zolightning {header.zolightning}, whose directions are not those of "
                f"this one ({this_release()}). Replay it with that release."
            )
        if header.structure is not None:
            _cast(self.ledger, module)  # first, because the initial values of a prefix depend on it
            cast(Any, module).load_structure_dict(header.structure)
        _take_dtypes(self.ledger, module)
        if weights_digest(base_tensors(module)) != header.weights:
            raise ValueError(
                f"The ledger {path} begins with different weights: use the base model and the settings of its run."
            )
        parameters = dict(module.named_parameters())
        self.optimizer = _rebuild(self.ledger, parameters, method)
        self._trainable = {parameter: parameter.requires_grad for parameter in parameters.values()}
        trained = {name for group in header.groups for name in group["names"]}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        self.optimizer.attach(module)
        self.optimizer.restrict({parameters[name]: _slice(part) for name, part in header.slices.items()})
        if header.blocks:
            left_state = cast(LeftState, header.groups[0]["left_state"])
            self.optimizer.set_blocks([[parameters[name] for name in block] for block in header.blocks], left_state)

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *_: object) -> None:
        self.optimizer.fold()
        self.optimizer.detach()
        for parameter, requires_grad in self._trainable.items():
            parameter.requires_grad_(requires_grad)

    @torch.no_grad()
    def apply(self, steps: int) -> None:
        """Applies records until this number of steps have been replayed.

        Raises:
            DamagedLedgerError: if a record was changed; the module's weights are then of no use.
            FileNotFoundError, DamagedCheckpointError, ValueError: if a file of given bases is missing or damaged.
        """
        parameters = dict(self._module.named_parameters())
        for record in self.ledger.records(steps, self.steps):
            if record.given and record.refresh > self.optimizer.param_groups[0]["refresh"]:
                bases = {parameters[name]: basis for name, basis in load_bases(self.ledger, record.refresh).items()}
                cast(SubspaceWeights, self.optimizer).recorded[record.refresh] = bases
            self.optimizer.apply(record)
            self.steps += 1

    def is_sealed(self) -> bool | None:
        """:attr:`Replayed.sealed`; to be called after the end of the context."""
        seal = self.ledger.seal()
        if seal is None or seal[0] != self.steps:
            return None
        return weights_digest(dict(self._module.named_parameters())) == seal[1]


def replay(path: str | Path, module: nn.Module, method: Method, step: int | None = None) -> Replayed:
    """Turns a module with a run's base weights into the module that the run trained.

    For methods with dense directions the weights have the bits of the run on any device. Subspace methods compute bases
    with the linear algebra library of the device, and have the run's bits if that is the same. Only the method's steps
    are replayed: if other code changed weights during the run (by clamping or averaging them), the result differs, and
    :attr:`Replayed.sealed` is False.

    Args:
        path, module, method: see :class:`Replay`.
        step: the step of the run after which to stop, as counted by Lightning's ``global_step``; None replays all.

    Raises:
        ValueError: see :class:`Replay`; also if the ledger has no such step. Nothing is changed then.

    Example::

        replay("logs/run/version_0/ledger.bin", module, partial(MeZO, lr=1e-6), step=500)
    """
    steps = _steps(Ledger(Path(path)), step)
    with Replay(path, module, method) as replaying:
        replaying.apply(steps)
    return Replayed(steps, replaying.is_sealed())


def _steps(ledger: Ledger, step: int | None) -> int:
    """The number of entries up to a step."""
    first, last = ledger.header.first_step, ledger.header.first_step + len(ledger)
    if step is not None and not first <= step <= last:
        raise ValueError(f"`step` must be at least {first} and at most {last}, where {ledger.path} ends, got {step}.")
    return (last if step is None else step) - first


def _take_dtypes(ledger: Ledger, module: nn.Module) -> None:
    """Converts a module's tensors to the dtypes that they had in the run, which depend on the Trainer's precision."""
    tensors, saved = base_tensors(module), ledger.header.tensors
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: shape for name, (_, shape) in saved.items()}
    if different := differing(found, wanted):
        raise ValueError(f"The ledger {ledger.path} belongs to a different model: {different}.")
    _cast(ledger, module)


def _cast(ledger: Ledger, module: nn.Module) -> None:
    for name, tensor in base_tensors(module).items():
        if name in ledger.header.tensors:
            dtype, _ = ledger.header.tensors[name]
            tensor.data = tensor.data.to(getattr(torch, dtype.removeprefix("torch.")))


def _rebuild(ledger: Ledger, parameters: dict[str, nn.Parameter], method: Method) -> ZerothOrderOptimizer:
    """The run's method over the run's parameter groups, in its state before the first step."""
    groups = ledger.header.groups
    optimizer = method([{"params": [(name, parameters[name]) for name in group["names"]]} for group in groups])
    found, saved = as_json_values(settings_of(optimizer)), ledger.header.method
    different = [key for key in found.keys() | saved.keys() if found.get(key) != saved.get(key)]
    values = [f"`{k}` {saved.get(k)!r}, not {found.get(k)!r}" for k in sorted(different) if k not in _IN_RECORDS]
    if values:
        raise ValueError(f"The ledger {ledger.path} belongs to a run with different settings: {'; '.join(values)}.")
    for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
        values_of = {name: value for name, value in saved_group.items() if name != "names"}
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in values_of.items()})
    return optimizer


def _slice(saved: dict[str, Any]) -> Slice:
    return Slice(saved["dim"], torch.tensor(saved["index"], dtype=torch.int64))
