"""Attention masks that spare a network reading anything back from its device.

Given a padding mask, Hugging Face's networks check whether anything is masked, and without one they check the
positions. Either way the host waits for the device once in each forward pass, and a CUDA graph of the pass would be
valid for one result only. A four-dimensional mask is passed to attention as it is.
"""

import math

import torch
from torch import Tensor, nn

from zolightning.network.prefix import prefix_of

# Architectures that do nothing else with such a mask, each tested. Others derive positions or biases from it, or have
# layers that need to know where padding is.
# fmt: off
TAKE_CAUSAL_MASKS = frozenset({
    "apertus", "arcee", "bitnet", "codegen", "cohere", "cohere2", "diffllama", "ernie4_5", "ernie4_5_moe",
    "exaone4", "gemma", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gptj",
    "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral",
    "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"
})
# fmt: on


def attention_mask_for(network: nn.Module, mask: Tensor) -> Tensor:
    """The mask to pass to a network of Hugging Face's, together with position ids, instead of a padding mask.

    It is the :func:`causal_mask`, or `mask` itself where that cannot be used: for architectures that are not in
    :data:`TAKE_CAUSAL_MASKS`, and for attention that is not sdpa, not causal, or in a window shorter than the rows.
    Also on a CPU, where nobody waits, and where kernels for causal attention do half the work without padding.
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
    """Which tokens each token attends to, (rows, 1, length, length): itself and those before it, but no padding.

    `mask` is (rows, length), 0 on padding. Padding on the left, which has nothing else to attend to, attends to itself:
    CUDA's attention kernels give NaN gradients for an empty row.
    """
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    attended = causal & mask.to(torch.bool)[:, None, None, :]
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    return attended | (itself & ~attended.any(dim=-1, keepdim=True))
