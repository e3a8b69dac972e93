"""Networks that are too large for one device, spread over several by accelerate's device maps.

Transformers loads each layer where it belongs, and accelerate's hooks bring the inputs of a layer to its device. Noise
and updates are made on the device of each parameter, so a zeroth-order step needs nothing more.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from zolightning.checkpoints.keep_ledger import KeepLedger
from zolightning.messages import some
from zolightning.partners import find_callbacks

DeviceMap = str | dict[str, int | str]
"""A rule of accelerate's, such as ``auto``, or the device of each module by its dotted name."""


def keep_in_place(network: nn.Module) -> None:
    """Keeps a network from being moved as a whole, as Lightning's strategies do; dtypes can be changed."""
    network._apply = MethodType(_apply_in_place, network)  # type: ignore[method-assign]  # what `nn.Module.to` calls


def refuse_misplaced(network: nn.Module, trainer: L.Trainer, stage: str, save_frozen: bool) -> None:
    """Refuses what cannot be done with a network that is spread over devices, whichever of its weights train.

    Raises:
        MisconfigurationException: if there are several processes or a strategy that places weights itself; in a fit, if
            a checkpoint or a ledger would need offloaded weights, or validations run in torch's inference mode.
    """
    if not is_spread(network):
        return
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"`model.device_map` is given, but `trainer.strategy` is {type(trainer.strategy).__name__} with "
            f"{trainer.world_size} processes: with a device map one process has all devices. Set `trainer.devices` to "
            "1 and `trainer.strategy` to 'auto', or leave `device_map` out."
        )
    if stage == "fit" and save_frozen:
        refuse_offloaded(network, "no checkpoint can hold them. Set `model.save_frozen` to False")
    if stage == "fit" and trainer.validate_loop.inference_mode:
        refuse_offloaded(
            network,
            "a validation would make them tensors that cannot be used in training. Set "
            "`trainer.inference_mode` to False",
        )
    if stage == "fit" and find_callbacks(trainer, KeepLedger):
        refuse_offloaded(network, "no ledger can begin with their digest. Set `keep_ledger` to False")


def refuse_training_offloaded(network: nn.Module) -> None:
    """Raises MisconfigurationException if offloaded weights train."""
    if any(parameter.requires_grad for parameter in offloaded(network).values()):
        refuse_offloaded(
            network,
            "they cannot be trained. Leave them out by a scope, or keep them on a device: more or larger ones, or "
            "`model.dtype` bfloat16",
        )


def refuse_offloaded(network: nn.Module, consequence: str) -> None:
    """Raises MisconfigurationException if weights of the network are offloaded, and says what follows from it."""
    if names := list(offloaded(network)):
        raise MisconfigurationException(
            f"`model.device_map` leaves {len(names)} weights ({some(names)}) in the host's memory or on the disk, from "
            f"where each forward pass fetches them: {consequence}."
        )


def offloaded(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a network that are in the host's memory or on the disk, by name."""
    named = network.named_parameters() if is_spread(network) else ()
    return {name: parameter for name, parameter in named if parameter.is_meta}


def is_spread(network: nn.Module) -> bool:
    """Whether a network was loaded with a device map."""
    return "_apply" in vars(network)


def check_devices(device_map: DeviceMap | None) -> None:
    """Raises ValueError if a device map names a GPU that is not there."""
    count = torch.cuda.device_count()
    for place in device_map.values() if isinstance(device_map, dict) else ():
        if isinstance(place, int) and not 0 <= place < count:
            raise ValueError(f"there is no GPU {place}; {count} are visible.")


def _apply_in_place(network: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Replaces ``nn.Module._apply``: converts dtypes, and leaves every tensor on its device."""

    def converted(tensor: Tensor) -> Tensor:
        dtype = convert(torch.empty(0, dtype=tensor.dtype)).dtype
        if tensor.is_meta and dtype != tensor.dtype:
            raise MisconfigurationException(
                f"`trainer.precision` makes weights {dtype}, but `model.device_map` leaves some in the host's memory "
                f"or on the disk as {tensor.dtype}. Set `model.dtype` to that of `trainer.precision`."
            )
        return tensor.to(dtype)

    return type(network)._apply(network, converted, recurse)
