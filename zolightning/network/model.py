"""Finds the model of transformers in a module around it."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pretrained_model(module: nn.Module) -> "PreTrainedModel | None":
    """The outermost model of transformers in a module; None if there is none."""
    from transformers import PreTrainedModel

    return next((submodule for submodule in module.modules() if isinstance(submodule, PreTrainedModel)), None)
