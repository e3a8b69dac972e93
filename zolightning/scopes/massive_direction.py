"""Trains a layer along the direction of its massive activations only."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from zolightning.directions.second_moment import SecondMoment
from zolightning.layers import LayerStack, mlp_of
from zolightning.scopes.input_moments import InputMoments
from zolightning.scopes.parts import ChosenParameters, Part, model_around, require_adapter
from zolightning.scopes.token_mask import TokenMask


class MassiveDirection(Part):
    """The response of a layer's MLP to the leading direction of its down projection's inputs: one number per output.

    Massive activations (Sun et al. 2024, arXiv 2402.17762) arise where the inputs of a down projection are very large
    along one direction v, on a single token. In the dominant layer of SmolLM2-135M, v has 0.9997 of the energy of the
    inputs on SST-2 prompts (of the first token, in two of 1,536 channels). Rows of the gradient of the weight W are
    sums of inputs, so nearly all of it lies along v. This part trains b in ``W + b v'``: 576 numbers in that model.

    v is the leading unit eigenvector of the mean of ``x x'`` over the tokens of the calibration prompts. It is fixed,
    as the first matrix of a rank-one LoRA adapter whose second matrix is b. `eps` and `lr` therefore mean the same as
    for W, any optimizer can train it, and checkpoints and ``zolightning export`` treat it as an adapter. For models of
    transformers only.
    """

    def select(
        self, module: nn.Module, stack: LayerStack, indices: Sequence[int], calibrate: Callable[[], None]
    ) -> ChosenParameters:
        _, model = model_around(self, module, stack)
        mlps = {index: mlp_of(stack.layers[index]) for index in indices}
        indices_of = {cast(nn.Parameter, mlp.down.weight): index for index, mlp in mlps.items()}

        def new(weight: nn.Parameter, side: str) -> SecondMoment:
            index = indices_of[weight]
            return SecondMoment(mlps[index].width, 1, 0, stack.names[index], weight.device)

        tokens = TokenMask(module, stack)
        watch = InputMoments(dict.fromkeys(indices_of), tokens, new)
        for _ in range(2):  # a second pass makes the leading one of many channels exact
            for _, moment in watch.moments.values():
                moment.again()
            with tokens, watch:
                calibrate()
        directions: dict[int, Tensor] = {}
        for weight, (_, moment) in watch.moments.items():
            if (leading := moment.leading(1)) is not None:
                directions[indices_of[weight]] = leading.directions
        if missing := [index for index in indices if index not in directions]:
            raise ValueError(
                f"`part` is {self!r}, but what the down projection of layer {missing[0]} of `{stack.name}` reads is "
                "zero, not finite (use bfloat16 or float32), or not read by a plain product."
            )

        names = {submodule: name.removesuffix(".base_layer") for name, submodule in model.named_modules()}
        targets = {index: names[mlp.down] for index, mlp in mlps.items()}
        require_adapter(self, model, 1, 1.0, list(targets.values()))
        chosen: ChosenParameters = {}
        for index, direction in directions.items():
            adapter = model.get_submodule(targets[index])
            with torch.no_grad():
                adapter.lora_A["default"].weight.copy_(direction.T)
            chosen[adapter.lora_B["default"].weight] = None
        return chosen
