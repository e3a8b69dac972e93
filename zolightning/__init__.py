"""Zeroth-order fine-tuning of language models with PyTorch Lightning: forward passes only."""

from zolightning.models import CausalLM
from zolightning.step import zeroth_order_step

__all__ = ["CausalLM", "zeroth_order_step"]
