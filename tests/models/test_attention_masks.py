"""Masks that networks hand on to their attention, without a look into them."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stacked_runs import DEVICES
from tiny_llama import TINY_LLAMA
from waits import Waits
from zolightning.models.attention_masks import TAKE_CAUSAL_MASKS, attention_mask_for, causal_mask
from zolightning.models.scoring import last_logits
from zolightning.network.prefix import add_prefix

SIZES = {
    **TINY_LLAMA,
    "rotary_dim": 8,
    "sliding_window": 64,
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace"], 1),
    "num_experts_per_tok": 2,
}
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])


def taking_causal_masks(model_type: str) -> nn.Module:
    if model_type not in CONFIG_MAPPING:
        pytest.skip("unknown to this version of transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **SIZES)
        model = AutoModelForCausalLM.from_config(config).eval()
    if model.config._attn_implementation != "sdpa":
        pytest.skip("has no attention by sdpa in this version of transformers")
    return model


def has_experts(model: nn.Module) -> bool:
    return any("expert" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("model_type", sorted(TAKE_CAUSAL_MASKS))
@torch.no_grad()
def test_same_logits_and_no_wait(monkeypatch, model_type):
    model, outputs = taking_causal_masks(model_type), []
    assert model.config.model_type == model_type
    model.register_forward_hook(lambda _, __, output: outputs.append(output))
    ids = torch.arange(2, 20).view(MASK.shape)
    with Waits() as looks:
        expected = last_logits(model, ids, MASK, count=6)
    assert looks.found
    monkeypatch.setattr("zolightning.models.scoring.attention_mask_for", lambda _, mask: causal_mask(mask))
    with Waits() as watch:
        found = last_logits(model, ids, MASK, count=6)
    assert watch.found == []
    assert outputs and all(output.past_key_values is None for output in outputs)
    # Padding attends to other tokens and so goes to other experts, whose products round otherwise with more rows
    assert (found - expected)[MASK > 0].abs().max() <= (1e-5 if has_experts(model) else 0)


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        ({}, False),
        ({"model_type": "bloom"}, True),
        ({"_attn_implementation": "eager"}, True),
        ({"is_causal": False}, True),
        ({"use_bidirectional_attention": True}, True),
        ({"sliding_window": 5}, True),
        ({"sliding_window": 6}, False),
    ],
    ids=str,
)
def test_networks_that_need_the_mask_keep_it(make_model, changes, is_kept):
    network, mask = make_model("gemma3"), MASK.to("meta")
    network.config.sliding_window = None
    for name, value in changes.items():
        setattr(network.config, name, value)
    assert (attention_mask_for(network, mask) is mask) == is_kept
    assert attention_mask_for(network, MASK) is MASK
    assert attention_mask_for(nn.Identity(), mask) is mask


def test_a_prefix_is_a_part_of_what_a_window_holds(make_model):
    network, mask = make_model("llama"), MASK.to("meta")
    add_prefix(network, 2)
    for window, is_kept in {7: True, 8: False}.items():
        network.config.sliding_window = window
        assert (attention_mask_for(network, mask) is mask) == is_kept


def test_no_token_is_left_without_any_to_attend_to():
    mask = causal_mask(torch.cat([MASK, MASK.flip(1)]))[:, 0]
    assert mask.any(dim=-1).all()
    padding = torch.cat([MASK, MASK.flip(1)]) == 0
    assert not mask.logical_and(padding[:, None]).tril(-1).any()  # by others


@DEVICES
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_gradients_are_finite(make_model, monkeypatch, device, model_type):
    monkeypatch.setattr("zolightning.models.scoring.attention_mask_for", lambda _, mask: causal_mask(mask))
    model, ids = make_model(model_type).to(device, torch.bfloat16), torch.arange(2, 20).view(MASK.shape).to(device)
    last_logits(model, ids, MASK.to(device), count=2).float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", sorted(TAKE_CAUSAL_MASKS))
@torch.no_grad()
def test_no_wait_on_a_gpu(model_type):
    model, ids = taking_causal_masks(model_type), torch.arange(2, 20).view(MASK.shape)
    if has_experts(model):
        pytest.skip("in float32 torch reads the sizes of grouped products back")
    expected = last_logits(model, ids, MASK, count=6)
    ids, mask = ids.cuda(), MASK.cuda()
    last_logits(model.cuda(), ids, mask, count=6)  # which sets up libraries
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = last_logits(model, ids, mask, count=6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu()[MASK > 0], expected[MASK > 0], rtol=1e-4, atol=1e-4)
