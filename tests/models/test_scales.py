"""QZO: of a quantised model the scales train alone. Steps against autograd and the formula, with nothing else moved."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from optimizer_steps import standard
from zolightning.kernels.noise import key
from zolightning.network.quantization import Quantization, quantize, quantized_linears
from zolightning.optim import MeZO

IDS = torch.tensor([[5, 9, 3, 6], [2, 4, 7, 11]])
CODES_OF_A_SCALE = {"int8": None, "nf4": 64}  # None: as many as there are columns


def loss(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradients_of_scales(model: PreTrainedModel, twin: PreTrainedModel, kind: Quantization) -> dict[str, Tensor]:
    """By autograd on ordinary weights W, scale times code each: the sum of dL/dW W over a scale's codes, over it."""
    linears = dict(quantized_linears(model))
    for name, linear in linears.items():
        twin.get_submodule(name).weight.data = linear.dequantized(torch.float64)
    loss(twin).backward()
    found = {}
    for name, linear in linears.items():
        weight, scale = twin.get_submodule(name).weight, linear.weight_scale
        by_code = (weight.grad * weight.detach()).view(-1, CODES_OF_A_SCALE[kind] or linear.in_features)
        found[f"{name}.weight_scale"] = by_code.sum(dim=1).view_as(scale) / scale.detach()
    return found


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_step_follows_the_gradient_of_the_scales(
    kind: Quantization, make_model: Callable[..., PreTrainedModel]
) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes (the extra `quantization`)")
    model = make_model().double()
    quantize(model, kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".weight_scale"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = gradients_of_scales(model, make_model().double(), kind)
    z = {name: standard(gradient.shape, key(0, 0, 0, name)).double() for name, gradient in gradients.items()}

    # A thousandth of the scales: nf4 computes in float32, whose rounding is 1e-4 of such a move
    eps = 1e-3 * torch.cat([before[name].flatten() for name in gradients]).mean().item()
    optimizer = MeZO(model.named_parameters(), lr=1e-3 * eps, eps=eps)
    optimizer.attach(model)
    record = optimizer.estimate(lambda: loss(model))  # parameters perturbed in place are a warning, which is an error
    after_estimate = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()

    (g,) = record.projected_grads
    assert g == pytest.approx(sum((gradients[name] * z[name]).sum().item() for name in z), rel=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.equal(after_estimate[name], before[name]), name
        if name in z:
            move = -1e-3 * eps * g * z[name]
            torch.testing.assert_close(parameter.detach() - before[name], move, rtol=1e-5, atol=1e-15, msg=name)
        else:
            assert torch.equal(parameter, before[name]), name
