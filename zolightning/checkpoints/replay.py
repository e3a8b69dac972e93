"""From base weights and a ledger to trained weights: no data, no forward passes."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zolightning.checkpoints.given_bases import load_bases
from zolightning.checkpoints.ledger import Header, Ledger
from zolightning.checkpoints.weights_digest import base_tensors, weights_digest
from zolightning.directions.slices import Slice
from zolightning.kernels.noise import codes, key
from zolightning.messages import some
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.blocks import LeftState
from zolightning.optim.settings import settings_of
from zolightning.optim.subspace_weights import SubspaceWeights
from zolightning.versions import installed_version

_PLAIN = (bool, int, float, str, tuple, type(None))
_APART = ("param_names", "blocks", "block_weight", "lr_scale")
_IN_RECORDS = ("lr", "vector_lr")  # whatever a method is made with


@dataclass(frozen=True)
class Replayed:
    """What a replay did.

    Attributes:
        steps: how many were replayed.
        sealed: whether the weights are, to the last bit, those that the run ended with; None where it is not known,
            because the run went on or did not end.
    """

    steps: int
    sealed: bool | None


def describe(optimizer: ZerothOrderOptimizer, module: nn.Module) -> Header:
    """What a replay has to know of a run whose first step comes next."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    tensors = base_tensors(module)
    group = optimizer.param_groups[0]
    many = {
        "lr": len(optimizer.param_groups),
        "projected_grads": optimizer.num_queries,
        "losses": len(optimizer.estimator.probes(optimizer.num_queries)),
    }
    fields = [["step", "<u4", 1], ["forward_passes", "<u4", 1], ["flags", "<u1", 1]]
    fields += [[name, "<u4", 1] for name in ("refresh", "folds") if name in group]
    fields += [[name, "<f8", count] for name, count in many.items()]
    fields += [["blocks", "<u1", -(-len(optimizer.blocks) // 8)]] if optimizer.blocks else []
    structure = getattr(module, "structure_dict", None)
    return Header(
        zolightning=_release(),
        noise=_first_numbers(),
        seed=group["seed"],
        method=_as_json(settings_of(optimizer)),
        groups=[
            {
                "names": [names[parameter] for parameter in group["params"] if parameter.requires_grad],
                **{name: value for name, value in group.items() if name not in _APART and isinstance(value, _PLAIN)},
            }
            for group in optimizer.param_groups
        ],
        slices={names[p]: {"dim": part.dim, "index": part.index.tolist()} for p, part in optimizer.slices.items()},
        blocks=[sorted(names[parameter] for parameter in block) for block in optimizer.blocks],
        structure=None if structure is None else structure(),
        tensors={name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()},
        weights=weights_digest(tensors),
        fields=[*fields, ["checksum", "<u4", 1]],
    )


class Replay:
    """A module on its way from a run's base weights to the trained ones: a context, at whose end it is as any module.

    Args:
        path: of the run's ledger.
        module: with the base weights, and on the device on which to replay; it gets the dtypes that it had in the run.
        method: what the run was trained by; learning rates come from the ledger.

    Attributes:
        ledger: the run's.
        steps: how many have been replayed.

    Raises:
        FileNotFoundError: if there is no ledger.
        DamagedLedgerError: if it was changed.
        ValueError: if the ledger is of another model, other weights, another method or setting, another version of the
            layout or of the noise; in one line, before anything is changed but dtypes.
    """

    def __init__(
        self, path: str | Path, module: nn.Module, method: Callable[[Iterable[Any]], ZerothOrderOptimizer]
    ) -> None:
        self.ledger, self.steps = Ledger(Path(path)), 0
        self._module, header = module, self.ledger.header
        if header.noise != _first_numbers():
            raise ValueError(
                f"The ledger {path} was written by zolightning {header.zolightning}, whose directions are not those of "
                f"{_release()}. Replay it with that release."
            )
        if header.structure is not None:
            _cast(self.ledger, module)  # what a prefix begins with depends on it
            cast(Any, module).load_structure_dict(header.structure)
        _take_dtypes(self.ledger, module)
        if weights_digest(base_tensors(module)) != header.weights:
            raise ValueError(f"The ledger {path} begins with other weights than these: name the run's base model.")
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
        """Applies the records up to this number of steps.

        Raises:
            DamagedLedgerError: if one was changed; the module is then of no use.
            FileNotFoundError, DamagedCheckpointError, ValueError: if bases that a record needs are not there whole.
        """
        parameters = dict(self._module.named_parameters())
        for record in self.ledger.records(steps, self.steps):
            if record.given and record.refresh > self.optimizer.param_groups[0]["refresh"]:
                bases = {parameters[name]: basis for name, basis in load_bases(self.ledger, record.refresh).items()}
                cast(SubspaceWeights, self.optimizer).recorded[record.refresh] = bases
            self.optimizer.apply(record)
            self.steps += 1

    def is_sealed(self) -> bool | None:
        """What :attr:`Replayed.sealed` says; after the end of the context."""
        seal = self.ledger.seal()
        if seal is None or seal[0] != self.steps:
            return None
        return weights_digest(dict(self._module.named_parameters())) == seal[1]


def replay(
    path: str | Path,
    module: nn.Module,
    method: Callable[[Iterable[Any]], ZerothOrderOptimizer],
    step: int | None = None,
) -> Replayed:
    """Makes of a module with a run's base weights the module that the run trained.

    Bits are those of the run on any device for methods with dense directions; methods with subspaces draw their bases
    by the linear algebra library of the device, so theirs are the run's where that is the same one. Nothing but the
    method's steps is replayed: if somebody else changed weights in the run (a hook that clamps or averages them), the
    result is another, which :attr:`Replayed.sealed` tells.

    Args:
        path, module, method: as of :class:`Replay`.
        step: after which step of the run to stop, counted as Lightning's ``global_step``; None replays all of them.

    Raises:
        ValueError: also if the ledger has no such step, before anything is changed.

    Example::

        replay("logs/run/version_0/ledger.bin", module, partial(MeZO, lr=1e-6), step=500)
    """
    steps = _steps(Ledger(Path(path)), step)
    with Replay(path, module, method) as replaying:
        replaying.apply(steps)
    return Replayed(steps, replaying.is_sealed())


def _steps(ledger: Ledger, step: int | None) -> int:
    """How many entries lead to a step."""
    first, last = ledger.header.first_step, ledger.header.first_step + len(ledger)
    if step is not None and not first <= step <= last:
        raise ValueError(f"`step` must be at least {first} and at most {last}, where {ledger.path} ends, got {step}.")
    return (last if step is None else step) - first


def _take_dtypes(ledger: Ledger, module: nn.Module) -> None:
    """Gives a module's tensors the dtypes of the run's, which the Trainer's precision may have changed."""
    tensors, saved = base_tensors(module), ledger.header.tensors
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: shape for name, (_, shape) in saved.items()}
    if found != wanted:
        differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ValueError(
            f"The ledger {ledger.path} is of another model: {len(differ)} weights have other names or shapes, or are "
            f"missing there or here ({some(differ)})."
        )
    _cast(ledger, module)


def _cast(ledger: Ledger, module: nn.Module) -> None:
    for name, tensor in base_tensors(module).items():
        if name in ledger.header.tensors:
            dtype, _ = ledger.header.tensors[name]
            tensor.data = tensor.data.to(getattr(torch, dtype.removeprefix("torch.")))


def _rebuild(
    ledger: Ledger, parameters: dict[str, nn.Parameter], method: Callable[[Iterable[Any]], ZerothOrderOptimizer]
) -> ZerothOrderOptimizer:
    """The run's method over the run's groups, as it was before its first step."""
    groups = ledger.header.groups
    optimizer = method([{"params": [(name, parameters[name]) for name in group["names"]]} for group in groups])
    found, saved = _as_json(settings_of(optimizer)), ledger.header.method
    different = [key for key in found.keys() | saved.keys() if found.get(key) != saved.get(key)]
    values = [f"`{k}` {saved.get(k)!r}, not {found.get(k)!r}" for k in sorted(different) if k not in _IN_RECORDS]
    if values:
        raise ValueError(f"The ledger {ledger.path} is of a run with other settings: it has {'; '.join(values)}.")
    for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
        values_of = {name: value for name, value in saved_group.items() if name != "names"}
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in values_of.items()})
    return optimizer


def _slice(saved: dict[str, Any]) -> Slice:
    return Slice(saved["dim"], torch.tensor(saved["index"], dtype=torch.int64))


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values as they come back from a file: with lists in place of tuples."""
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


def _release() -> str:
    return installed_version("zolightning") or "of no release"


def _first_numbers() -> list[int]:
    """The first numbers of a direction: of another release's noise they would be others."""
    words = torch.tensor(key(1234, 7, 3, "weight"), dtype=torch.int32)
    index = torch.arange(16, dtype=torch.int32)
    return [*words.tolist(), *codes(index, words, "gaussian").tolist(), *codes(index, words, "rademacher").tolist()]
