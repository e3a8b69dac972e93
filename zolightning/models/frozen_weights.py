"""Checkpoints without the frozen weights of a pretrained network, which ``model_name`` has anyway."""

from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from zolightning.directions.shards import is_sharded, whole
from zolightning.messages import some
from zolightning.network.head import belongs_to_head
from zolightning.weights_digest import digests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OFFLOADED = "offloaded"  # in place of a digest: weights that cannot be read here, and are not compared
_KEY = "frozen_weights"  # in a checkpoint: dtypes and digests of what it leaves out, by name


class FrozenWeights:
    """The weights of a network as they were loaded, which a checkpoint may leave out if they still have these bits.

    Args:
        network: the network as it was loaded, before it gets adapters.
        has_new_head: whether its head may be a new one, which depends on the seed and so is never left out.
    """

    def __init__(self, network: "PreTrainedModel", has_new_head: bool) -> None:
        self._loaded = [  # not by name, which adapters change; with the number of writes to each so far
            (tensor, _version(tensor))
            for name, tensor in _tensors(network)
            if not (has_new_head and belongs_to_head(network, name))
        ]
        self._digests: dict[str, str] | None = None

    def setup(self, module: L.LightningModule, stage: str) -> None:
        """Takes the digests of the weights that do not train in the first fit, before it changes or shards them.

        A validation that shards them before the first fit does not know which: it takes those of all weights.

        To be called in each ``setup`` of the module: before a strategy sends the weights of rank 0 to the others.
        """
        self._forget_written()
        replaces_weights = isinstance(module.trainer.strategy, ModelParallelStrategy)  # in a validation, too
        if self._digests is None and (stage == "fit" or replaces_weights):
            module.trainer.precision_plugin.convert_module(module)  # as Lightning does after this
            loaded = {id(tensor) for tensor, _ in self._loaded}
            is_fit = stage == "fit"
            kept = {name: t for name, t in _tensors(module) if id(t) in loaded and not (is_fit and t.requires_grad)}
            self._digests = _digests(kept)
            self._loaded = []  # what sharding or a scope replaces is not to stay in memory

    def loads(self, module: nn.Module, names: Collection[str]) -> None:
        """Forgets weights of these names, which a checkpoint replaces, unless :meth:`setup` has taken digests."""
        self._forget_written()
        gone = {id(tensor) for name, tensor in _tensors(module) if name in names}
        self._loaded = [entry for entry in self._loaded if id(entry[0]) not in gone]

    def leave_out(self, checkpoint: dict[str, Any]) -> None:
        """Removes what did not train and has not changed since :meth:`setup` from a checkpoint's weights."""
        weights, before = checkpoint["state_dict"], self._digests or {}
        offloaded = {name for name, weight in weights.items() if weight.is_meta}  # accelerate replaces these objects
        found = _digests({name: weight for name, weight in weights.items() if name in before or name in offloaded})
        unchanged = {name for name, digest in found.items() if digest in (before.get(name), _OFFLOADED)}
        checkpoint[_KEY] = {name: (str(weights.pop(name).dtype), found[name]) for name in sorted(unchanged)}

    def _forget_written(self) -> None:
        """Forgets weights that were written to in place; later a strategy or a checkpoint writes the same ones."""
        self._loaded = [(tensor, None) for tensor, version in self._loaded if version in (None, _version(tensor))]


def put_back(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Completes the ``state_dict`` of a checkpoint by the module's own weights, in the dtypes of the checkpoint.

    Raises:
        ValueError: if they are not those that were left out.
    """
    left_out, own = checkpoint.get(_KEY, {}), dict(_tensors(module))
    found = {}
    for name, (dtype, _) in left_out.items():
        if name in own:
            place = "cpu" if is_sharded(own[name]) else own[name].device  # a device has no room for all whole ones
            found[name] = whole(own[name].detach()).to(place, getattr(torch, dtype.removeprefix("torch.")))
    different = set(left_out) - set(found)
    for name, digest in _digests(found).items():
        if digest != (saved := left_out[name][1]) and _OFFLOADED not in (digest, saved):
            different.add(name)
    if different:
        raise ValueError(
            f"`ckpt_path` leaves out {len(left_out)} frozen weights (`save_frozen` was False), and {len(different)} "
            f"of this model are different from them ({some(sorted(different))}): `model_name` must be that of the run, "
            "and a model that was trained further must be made anew."
        )
    checkpoint["state_dict"].update(found)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    offloaded = {name: _OFFLOADED for name, tensor in tensors.items() if tensor.is_meta}
    return offloaded | digests({name: tensor for name, tensor in tensors.items() if name not in offloaded})


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place, as far as torch counts it."""
    return None if tensor.is_inference() else tensor._version


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by all of their names."""
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
