"""Trains the blocks with large gradients and small curvature."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
from torch import nn

from zolightning.blocks.partition import find_blocks
from zolightning.checks import require_integer, require_patterns, require_positive
from zolightning.layers import find_layers
from zolightning.messages import counted
from zolightning.rank_zero import rank_zero_info
from zolightning.scopes.calibration import calibration_batches, calibration_forward
from zolightning.scopes.parts import ChosenParameters, Part, WholeLayer
from zolightning.scopes.scope import Scope, Selection
from zolightning.scopes.signal import measure_signal, table
from zolightning.training_loop import after_restoring


class TrainBySignal(Scope):
    """Trains the blocks with the largest ``|g|^2 / tr H``, estimated by forward passes before training.

    A zeroth-order step in a block with gradient g and Hessian H lowers the loss by at most ``|g|^2 / (2 tr H)``,
    whatever the block's size (:class:`~zolightning.scopes.signal.BlockSignal`). Blocks are layers, the same part of
    each layer, or sets of parameters given by patterns, such as all query projections. ``|g|^2`` is estimated without
    bias, from products of gradients of different batches, so `num_prompts` examples must make at least two batches.

    Costs about ``B (2 num_queries + 1)`` forwards per block for B batches, without gradients or an optimizer; a message
    says how many, and the first step counts them. They are run once: a resumed run trains what its checkpoint says. In
    TensorBoard the text ``scope`` shows the estimates for all blocks.

    Args:
        num_blocks: number of blocks that train.
        part: which parameters of each layer are measured and train; all of them by default.
        patterns: regular expressions, one for each block, instead of layers; a parameter belongs to the first one that
            matches somewhere in its name.
        num_queries: number of directions for each block. The relative error of ``|g|^2`` is about
            ``sqrt(2 / num_queries)``.
        num_prompts: number of training examples to evaluate.
        eps: standard deviation of the perturbation of each weight.
        layers_name: where the layers are, see :func:`~zolightning.layers.find_layers`; found by structure if not given.

    Raises:
        ValueError: naming the argument, before anything trains.

    Example::

        callbacks = [TrainBySignal(num_blocks=3), ZerothOrder(partial(MeZO, lr=1e-5))]
    """

    def __init__(
        self,
        num_blocks: int = 1,
        part: Part | None = None,
        patterns: Sequence[str] | None = None,
        num_queries: int = 8,
        num_prompts: int = 32,
        eps: float = 1e-3,
        layers_name: str | None = None,
    ) -> None:
        super().__init__()
        require_integer("num_blocks", num_blocks)
        require_integer("num_queries", num_queries, least=2)  # their spread says how exact they are
        require_integer("num_prompts", num_prompts)
        require_positive("eps", eps)
        if patterns is not None:
            require_patterns(patterns)
        if patterns is not None and part is not None:
            raise ValueError(
                f"`part` is {part!r}, which is for layers, but `patterns` define the blocks: give one of them."
            )
        self.num_blocks = num_blocks
        self.part = WholeLayer() if part is None else part
        self.patterns = patterns
        self.num_queries = num_queries
        self.num_prompts = num_prompts
        self.eps = eps
        self.layers_name = layers_name

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.patterns is not None:
            self._blocks(pl_module, ())
        else:
            self.part.check(pl_module, find_layers(pl_module, self.layers_name))

    def select(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Selection:
        pl_module.to(trainer.strategy.root_device)
        batches = calibration_batches(trainer, pl_module, self.num_prompts)
        blocks = self._blocks(pl_module, batches)
        if self.num_blocks > len(blocks):
            raise ValueError(
                f"`num_blocks` must be at most {len(blocks)}, the number of blocks, got {self.num_blocks}."
            )
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        if len(batches) < 2:
            raise ValueError(
                f"`num_prompts` is {self.num_prompts}, which is one batch of the training data, but it takes two to "
                "tell a signal from noise. Set it to twice the batch size, or more."
            )
        forwards = len(blocks) * len(batches) * (2 * self.num_queries + 1)
        rank_zero_info(
            f"TrainBySignal: {forwards:,} forwards over {counted(len(blocks), 'block')}, and a few more for each to "
            "find where parameters are read."
        )
        losses = [partial(calibration_forward, pl_module, batch) for batch in batches]
        signals = measure_signal(pl_module, blocks, losses, self.num_queries, self.eps)
        best = sorted(signals, key=lambda signal: -signal.ratio)[: self.num_blocks]
        found = ", ".join(f"{signal.name} ({signal.ratio:.2g})" for signal in best)
        parameters = {names[p]: part for signal in best for p, part in blocks[signal.name].items()}
        reason = f"of {len(blocks)} blocks those of largest |g|^2 / tr H: {found}"
        return Selection(parameters, reason, details=table(signals), forward_passes=forwards)

    def _choose(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures only if no checkpoint says what trains."""
        self._selection, choose = None, super()._choose

        def choose_unless_restored() -> None:
            if self._selection is None:
                choose(trainer, pl_module)

        after_restoring(trainer, choose_unless_restored)

    def _blocks(self, pl_module: L.LightningModule, batches: Sequence[Any]) -> dict[str, ChosenParameters]:
        """The parameters of each block that may train."""
        if self.patterns is not None:
            trainable = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
            blocks = find_blocks(pl_module, trainable, self.patterns, "never").parameters
            return {name: dict.fromkeys(block) for name, block in blocks.items()}

        def calibrate() -> None:
            for batch in batches:
                calibration_forward(pl_module, batch)

        stack = find_layers(pl_module, self.layers_name)
        chosen = self.part.select(pl_module, stack, range(len(stack)), calibrate)
        before = self._trainable
        found: dict[str, ChosenParameters] = {}
        taken: set[nn.Parameter] = set()
        for index in range(len(stack)):
            own = [
                p for p in stack.parameters(index).values() if p in chosen and p not in taken and before.get(p, True)
            ]
            if own:  # layers may share parameters: these are the first one's
                found[f"layer {index}"] = {parameter: chosen[parameter] for parameter in own}
                taken.update(own)
        return found
