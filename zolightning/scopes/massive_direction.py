"""The one direction in which the massive activations of a layer lie, as a part of it."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from zolightning.directions.moments import SecondMoment
from zolightning.layers import LayerStack, mlp_of
from zolightning.scopes.input_moments import InputMoments
from zolightning.scopes.parts import ChosenParameters, Part, model_around, require_adapter
from zolightning.scopes.token_mask import TokenMask


class MassiveDirection(Part):
    """What a layer writes along the leading direction of its channels: as many numbers as the layer is wide.

    Massive activations (Sun et al. 2024, arXiv 2402.17762) arise where one direction v of what the down projection
    reads becomes larger than all else on a single token. In the dominant layer of SmolLM2-135M, v holds 0.9997 of the
    energy of its inputs on SST-2 prompts (the first token's, in two of 1,536 channels), and so nearly all of the
    gradient of its weight W, whose rows are sums of inputs. This part trains b in ``W + b v'``: 576 numbers there.

    v, of length 1, is the leading eigenvector of the mean of x x' over the tokens of the calibration prompts. It stays,
    as the first matrix of a rank-one LoRA adapter whose second one is b; so `eps` and `lr` mean what they do for W, any
    optimizer trains it, backpropagation too, and checkpoints and ``zolightning export`` treat it as an adapter. For
    models of transformers only.
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
                f"`part` is {self!r}, and what the down projection of layer {missing[0]} of `{stack.name}` reads is "
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
