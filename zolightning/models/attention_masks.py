"""The attention mask in the form in which a network asks its device for nothing.

Hugging Face's networks look into a mask of padding to find out whether anything is masked, and into the positions
where there is no mask: either way the host waits for the device once a forward pass, and a CUDA graph of the pass holds
for one answer. A mask of four dimensions they hand on to their attention as it is.
"""

import math

import torch
from torch import Tensor, nn

from zolightning.prefix import prefix_of

# Architectures that do nothing else with such a mask, each tested. Others derive positions or biases from it.
TAKE_CAUSAL_MASKS = frozenset({"gemma3_text", "gpt2", "llama", "mistral", "opt", "qwen2", "qwen3"})


def attention_mask_for(network: nn.Module, mask: Tensor) -> Tensor:
    """What to call a network of Hugging Face's with, position ids beside it, in the place of a mask of padding.

    Args:
        network: any.
        mask: (rows, length), 0 on padding.

    Returns:
        :func:`causal_mask`; `mask` itself for networks that need it: other architectures than
        :data:`TAKE_CAUSAL_MASKS`, another attention than sdpa, both ways or in a window that is shorter than the rows;
        and on a CPU, where nobody waits: without padding, its kernels for causal attention do half the work.
    """
    config, prefix = getattr(network, "config", None), prefix_of(network)
    window = getattr(config, "sliding_window", None)
    if (
        mask.device.type == "cpu"
        or getattr(config, "model_type", None) not in TAKE_CAUSAL_MASKS
        or getattr(config, "_attn_implementation", None) != "sdpa"
        or not getattr(config, "is_causal", True)
        or getattr(config, "use_bidirectional_attention", False)
        or mask.shape[1] + (0 if prefix is None else prefix.num_tokens) > (window or math.inf)
    ):
        return mask
    return causal_mask(mask)


def causal_mask(mask: Tensor) -> Tensor:
    """Whether each token attends to each, (rows, 1, length, length): to those before it and itself, but to no padding.

    Padding on the left, which has nothing else, attends to itself: kernels of attention for CUDA differentiate a row
    of nothing as NaN.

    Args:
        mask: (rows, length), 0 on padding.
    """
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    attended = causal & mask.to(torch.bool)[:, None, None, :]
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    return attended | (itself & ~attended.any(dim=-1, keepdim=True))
