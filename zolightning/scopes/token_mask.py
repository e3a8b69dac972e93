"""Finds the positions of a forward pass that hold tokens rather than padding."""

import inspect
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.layers import LayerStack


class TokenMask(AbstractContextManager["TokenMask"]):
    """A context that records the ``attention_mask`` with which the network around the layers is called.

    A mask with two dimensions is 1 at tokens and 0 at padding, on either side. One with four, (rows, 1, queries, keys),
    is True where a query attends to a key, which then is a token. A mask applies until the call that it was passed to
    returns. If the network gets none, every position is a token. Masks of the layers themselves are ignored.
    """

    def __init__(self, module: nn.Module, stack: LayerStack) -> None:
        self._module = module
        self._stack = stack
        self._masks: list[Tensor | None] = []  # one for each call that is under way and takes a mask
        self._hooks = ExitStack()

    def __enter__(self) -> "TokenMask":
        for path, submodule in self._module.named_modules():
            if f"{path}.".startswith(tuple(f"{name}." for name in self._stack.names)):
                continue
            parameters = list(inspect.signature(submodule.forward).parameters)
            if "attention_mask" in parameters:
                position = parameters.index("attention_mask")

                def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int = position) -> None:
                    self._enter(kwargs.get("attention_mask", args[at] if at < len(args) else None))

                self._hooks.enter_context(submodule.register_forward_pre_hook(enter, with_kwargs=True))
                self._hooks.enter_context(submodule.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()
        self._masks.clear()

    def fits(self, activations: Tensor) -> bool:
        """Whether `activations` have the positions of the mask, or its last ones; inputs of an expert do not."""
        mask = self._masks[-1] if self._masks else None
        shape = activations.shape[:-1]
        return (
            mask is None
            or shape.numel() == mask.numel()
            or (len(shape) == 2 and len(mask) == shape[0] and shape[1] <= mask.shape[1])
        )

    def of(self, activations: Tensor, with_first: bool = True) -> Tensor:
        """True where `activations` belong to a token: as many entries as they have without their last dimension.

        They are those at all positions, or at the last ones. The first token of each row, whose activations are massive
        in many models, counts only `with_first`.

        Raises:
            ValueError: if the shape of the network's mask does not fit.
        """
        shape = activations.shape[:-1]
        mask = self._masks[-1] if self._masks else None
        if mask is None:
            found = torch.ones(shape, dtype=torch.bool, device=activations.device)
            if not with_first and len(shape) == 2:
                found[:, 0] = False
            return found
        tokens = shape.numel() // len(mask)  # a mask may begin with what is cached
        if tokens * len(mask) != shape.numel() or tokens > mask.shape[1]:
            raise ValueError(
                f"An attention mask of shape {tuple(mask.shape)} does not fit activations of shape "
                f"{tuple(activations.shape)}."
            )
        mask = mask if with_first else mask * (mask.cumsum(dim=1) > 1)
        return mask[:, mask.shape[1] - tokens :].reshape(shape).to(activations.device, torch.bool)

    def _enter(self, mask: Any) -> None:
        outer = self._masks[-1] if self._masks else None
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.bool:
            queries, keys = mask.shape[2:]
            by_others = mask[:, 0].tril(keys - queries - 1)  # padding may attend to itself, and nobody else to it
            mask = by_others.any(dim=1) | mask[:, 0, -1]
        self._masks.append(mask if isinstance(mask, Tensor) and mask.ndim == 2 else outer)

    def _leave(self, *_: Any) -> None:
        self._masks.pop()
