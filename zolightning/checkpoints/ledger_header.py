"""The header of a ledger: what is needed to interpret the records of a run, and must not change during the run."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zolightning.kernels.noise import codes, key
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.settings import PLAIN, constructor_arguments, settings_of
from zolightning.versions import installed_version
from zolightning.weights_digest import base_tensors, weights_digest

_APART = ("param_names", "blocks", "block_weight", "lr_scale", "measured")
_SET_LATER = {"transport", "anchor", "left_state"}  # hyperparameters that callbacks set
_RECORDED = {"params", "lr", "seed"}


@dataclass(frozen=True)
class Header:
    """What is needed to interpret a run's records, as plain values of JSON."""

    zolightning: str  # version of the package that wrote the ledger
    noise: list[int]  # the first numbers of a direction, to detect a release with different noise
    seed: int  # of the run's directions
    method: dict[str, Any]  # class and settings, see :func:`~zolightning.optim.settings.settings_of`
    groups: list[dict[str, Any]]  # for each its parameters' `names`, and its values before the first step
    slices: dict[str, dict[str, Any]]  # `dim` and `index` of parameters that train in part, by name
    blocks: list[list[str]]  # names of the parameters of each block; empty if there are no blocks
    structure: dict[str, Any] | None  # what was added to the network: the module's `structure_dict()`, or None
    tensors: dict[str, list[Any]]  # dtype and shape of every parameter and saved buffer of the module
    weights: str  # their digest before the first step, see :mod:`zolightning.weights_digest`
    fields: list[list[Any]]  # name, type ("<u4", in NumPy's notation) and number of the values in an entry, in order

    @property
    def first_step(self) -> int:
        """Number of the first step."""
        return int(self.groups[0]["step"])


def describe_run(optimizer: ZerothOrderOptimizer, module: nn.Module) -> Header:
    """The header of a run's ledger, before its first step."""
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
    blocks = optimizer.blocks.parameters
    fields += [["blocks", "<u1", -(-len(blocks) // 8)]] if blocks else []
    structure = getattr(module, "structure_dict", None)
    return Header(
        zolightning=this_release(),
        noise=first_numbers(),
        seed=group["seed"],
        method=as_json_values(settings_of(optimizer)),
        groups=[
            {
                "names": [names[parameter] for parameter in group["params"] if parameter.requires_grad],
                **{name: value for name, value in group.items() if name not in _APART and isinstance(value, PLAIN)},
            }
            for group in optimizer.param_groups
        ],
        slices={names[p]: {"dim": part.dim, "index": part.index.tolist()} for p, part in optimizer.slices.items()},
        blocks=[sorted(names[parameter] for parameter in block) for block in blocks],
        structure=None if structure is None else structure(),
        tensors={name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()},
        weights=weights_digest(tensors),
        fields=[*fields, ["checksum", "<u4", 1]],
    )


def as_json_values(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values as JSON returns them, with lists instead of tuples."""
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


def this_release() -> str:
    """The version of this package, as headers and messages name it."""
    return installed_version("zolightning") or "of no release"


def first_numbers() -> list[int]:
    """The first numbers of some directions, which identify this release's noise."""
    words = torch.tensor(key(1234, 7, 3, "weight"), dtype=torch.int32)
    index = torch.arange(16, dtype=torch.int32)
    return [*words.tolist(), *codes(index, words, "gaussian").tolist(), *codes(index, words, "rademacher").tolist()]


class Unrecorded:
    """The hyperparameters of an optimizer that its records do not hold, and which of its parameters train.

    If one of them changes in mid-run, the ledger must end.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self._names = (constructor_arguments(type(optimizer)) | _SET_LATER) - _RECORDED
        self._values = self._of(optimizer)

    def change(self, optimizer: ZerothOrderOptimizer) -> str | None:
        """What has changed since, in words; None if nothing has."""
        values = self._of(optimizer)
        if values == self._values:
            return None
        pairs = zip(values, self._values, strict=False)
        names = sorted({name for now, then in pairs for name in now if now[name] != then.get(name)})
        return f"`{names[0]}` of a parameter group changed" if names else "a parameter group was added"

    def _of(self, optimizer: ZerothOrderOptimizer) -> list[dict[str, Any]]:
        """The values of each parameter group."""
        return [
            {name: group[name] for name in self._names & group.keys()}
            | {"requires_grad": [parameter.requires_grad for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
