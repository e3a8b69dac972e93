"""Parameters that are sharded over ranks by rows (``fully_shard``, FSDP2).

Such a parameter is a ``DTensor``, with the shape of the whole parameter and the data of one rank. Elements are numbered
within the whole, so that noise does not depend on how it is sharded.
"""

import math
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:  # importing it takes half a second, and no parameter is sharded unless it has been imported
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether a tensor is sharded over ranks."""
    return hasattr(tensor, "placements")


def own_rows(tensor: Tensor) -> Tensor:
    """The data that this rank holds, to read from or write to: all of it if the tensor is not sharded."""
    data = tensor.detach()
    return data.to_local() if is_sharded(data) else data


def first_element(tensor: Tensor) -> int:
    """Index of the first element of :func:`own_rows` in the whole tensor."""
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0] * math.prod(tensor.shape[1:]) if offset else 0


def whole(tensor: Tensor) -> Tensor:
    """All elements, copied to every rank; to be called on all ranks."""
    data = tensor.detach()
    return data.full_tensor() if is_sharded(data) else data


def gathered(own: Tensor, parameter: Tensor) -> Tensor:
    """Gathers a tensor that has an entry for each element of a sharded parameter; to be called on all ranks.

    Args:
        own: the entries of this rank, (k,), for the k elements of :func:`own_rows`.
        parameter: the parameter, of n elements.

    Returns:
        (n,), of the dtype of `own`.
    """
    if not is_sharded(parameter):
        return own
    import torch
    from torch.distributed.tensor import DTensor

    # Collectives do not support int16; the bits are only moved.
    sent = own.view(torch.bfloat16) if own.dtype == torch.int16 else own
    spread = DTensor.from_local(
        sent.view(own_rows(parameter).shape),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return spread.full_tensor().flatten().view(own.dtype)


def own_part(kept: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of the result of :func:`gathered`."""
    if not is_sharded(parameter):
        return kept
    start = first_element(parameter)
    return kept[start : start + own_rows(parameter).numel()]


def require_rows(name: str, parameter: nn.Parameter) -> None:
    """Raises a ValueError that names the parameter if it is sharded in another way than by rows."""
    if not is_sharded(parameter):
        return
    own = own_rows(parameter)
    if parameter.ndim == 0 or own.shape[1:] != parameter.shape[1:] or not own.is_contiguous():
        raise ValueError(
            f"Parameter `{name}` is sharded as {parameter.placements} over {tuple(parameter.device_mesh.shape)} ranks, "
            "but zeroth-order methods train shards of rows: `Shard(0)`, as `fully_shard` makes them."
        )
    if own.device.type != parameter.device_mesh.device_type:
        raise ValueError(
            f"Parameter `{name}` is on '{own.device}' but used on '{parameter.device_mesh.device_type}': "
            "leave out the `offload_policy` of `fully_shard`."
        )
