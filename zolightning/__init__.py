"""Zeroth-order fine-tuning of language models with PyTorch Lightning: forward passes only."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zolightning.models import CausalLM
    from zolightning.step import zeroth_order_step

__all__ = ["CausalLM", "zeroth_order_step"]


def __getattr__(name: str) -> Any:
    # On demand: the methods in `zolightning.optim` need PyTorch only.
    if name == "CausalLM":
        from zolightning.models import CausalLM

        return CausalLM
    if name == "zeroth_order_step":
        from zolightning.step import zeroth_order_step

        return zeroth_order_step
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
