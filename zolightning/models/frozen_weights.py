"""Checkpoints without the frozen weights of a pretrained network, which ``model_name`` has anyway."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zolightning.checkpoints.weights_digest import digests
from zolightning.directions.shards import whole
from zolightning.messages import some
from zolightning.network.head import belongs_to_head

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
        self._loaded = [  # not by name, which adapters change
            tensor for name, tensor in _tensors(network) if not (has_new_head and belongs_to_head(network, name))
        ]
        self._digests: dict[str, str] | None = None
        self._replaced: set[str] = set()

    def replaced(self, names: Iterable[str]) -> None:
        """Notes that weights of these names are no longer as they were loaded, unless :meth:`remember` was called."""
        if self._digests is None:
            self._replaced.update(names)

    def remember(self, module: nn.Module) -> None:
        """Takes the digests of the weights that do not train in the first fit, before it changes or shards them."""
        if self._digests is None:
            loaded = {id(tensor) for tensor in self._loaded}
            frozen = {name: t for name, t in _tensors(module) if id(t) in loaded and not t.requires_grad}
            self._digests = _digests({name: t for name, t in frozen.items() if name not in self._replaced})

    def leave_out(self, checkpoint: dict[str, Any]) -> None:
        """Removes what did not train and has not changed since :meth:`remember` from a checkpoint's weights."""
        weights, before = checkpoint["state_dict"], self._digests or {}
        offloaded = {name for name, weight in weights.items() if weight.is_meta}  # accelerate replaces these objects
        found = _digests({name: weight for name, weight in weights.items() if name in before or name in offloaded})
        unchanged = {name for name, digest in found.items() if digest in (before.get(name), _OFFLOADED)}
        checkpoint[_KEY] = {name: (str(weights.pop(name).dtype), found[name]) for name in sorted(unchanged)}


def put_back(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Completes the ``state_dict`` of a checkpoint by the module's own weights, in the dtypes of the checkpoint.

    Raises:
        ValueError: if they are not those that were left out.
    """
    left_out, own = checkpoint.get(_KEY, {}), dict(_tensors(module))
    found = {
        name: whole(own[name].detach()).to(getattr(torch, dtype.removeprefix("torch.")))
        for name, (dtype, _) in left_out.items()
        if name in own
    }
    different = set(left_out) - set(found)
    for name, digest in _digests(found).items():
        if digest != (saved := left_out[name][1]) and _OFFLOADED not in (digest, saved):
            different.add(name)
    if different:
        raise ValueError(
            f"`ckpt_path` leaves out {len(left_out)} frozen weights (`save_frozen` was False), and {len(different)} "
            f"of this model are different from them ({some(sorted(different))}): `model_name` must be that of the run."
        )
    checkpoint["state_dict"].update(found)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    offloaded = {name: _OFFLOADED for name, tensor in tensors.items() if tensor.is_meta}
    return offloaded | digests({name: tensor for name, tensor in tensors.items() if name not in offloaded})


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by all of their names."""
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
