"""Models by shape: as large as the published ones, and random where these are trained."""

import pytest
import torch

from zolightning.bench.shapes import SHAPES, model_of_shape

# Parameters of the published checkpoints, as the model cards or their safetensors indices count them.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
}


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("tiny", "small")])
def test_a_shape_has_as_many_parameters_as_the_published_model(name: str) -> None:
    parameters = list(model_of_shape(name, device="meta").parameters())  # tied ones once
    assert sum(parameter.numel() for parameter in parameters) == PUBLISHED[name]
    assert {(parameter.dtype, parameter.device.type) for parameter in parameters} == {(torch.bfloat16, "meta")}


def test_matrices_are_drawn_from_the_seed_and_nothing_else() -> None:
    state = torch.get_rng_state()
    model, other = model_of_shape("tiny"), model_of_shape("tiny", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    for (name, one), again, another in zip(
        model.named_parameters(), model_of_shape("tiny").parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, again)
        if one.ndim > 1:
            assert not torch.equal(one, another), name
            assert one.float().std().item() == pytest.approx(0.02, rel=0.05), name
    assert not model.training
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of tiny, small, smollm2-135m, .* after 'config:', got 'llama-4'"):
        model_of_shape("llama-4")
