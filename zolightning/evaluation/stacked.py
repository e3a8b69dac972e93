"""Several evaluations of a step by one run of the network, on the batch repeated once for each of them.

What small batches wait for is then done less often: a low-rank method multiplies by stored weights and by shared
factors once for all evaluations, and a dense one reads each weight and draws its noise once for both signs of a
direction. Activations take as many times the memory.

The loss is a function of whoever wrote it, so it is evaluated as often as ever, and each time with its own
perturbation: only the network inside it is replaced. In the first evaluation it runs on the repeated rows, each
group of them under the perturbation of one evaluation, and returns the first group's output; in the others it
returns what it has. Where a network does not let itself be run like this, :class:`CannotStack` says why.

A network's ``generate``, which writes texts in the way of transformers, is replaced likewise: the texts of all
evaluations grow together, each from tokens of its own, as long as they are the likeliest ones. Sampled tokens would be
other ones in each group of rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.flipped_bit import FlippedBit
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.network_run import NetworkRun, computes_in_half
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.randomness import Generators
from zolightning.evaluation.replaced import replaced, replaced_forward
from zolightning.evaluation.row_groups import CannotStack, perturbed_by

Evaluate = Callable[[], tuple[Tensor, Tensor]]


def network_of(
    module: nn.Module, parameters: Iterable[nn.Parameter], option: str = "evaluations_per_forward"
) -> nn.Module:
    """The outermost submodule with a forward of its own that holds all `parameters`, which `option` asks for.

    Raises:
        ValueError: if there is none.
    """
    wanted = set(parameters)
    for submodule in module.modules():
        has_forward = submodule is not module and type(submodule).forward is not nn.Module.forward
        if has_forward and wanted <= set(submodule.parameters()):
            return submodule
    children = ", ".join(name for name, _ in module.named_children()) or "none"
    raise ValueError(
        f"`{option}` needs one submodule that holds all trainable parameters and is called in `training_step`, and "
        f"{type(module).__name__} has none such: its children are {children}. Put the network into one module, or "
        f"leave `{option}` at its default."
    )


class StackedNetwork:
    """Evaluates a loss under several perturbations at once.

    Args:
        network: called, once or several times, by the loss.
        size: evaluations that share a run.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        self.network = network
        self.size = size
        self._trusted: set[tuple[Any, ...]] = set()
        self._generators = Generators()
        self._graphs: GraphedNetwork | None = None

    @torch.no_grad()
    def evaluate(
        self,
        evaluate: Evaluate,
        contexts: Sequence[Perturbed],
        generators: Generators,
        graphs: GraphedNetwork | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Losses and their weights under each of some perturbations, none in place.

        Where the network has not been run with the same arguments repeated and the same tensors cut before, its
        losses are compared with those of separate runs first.

        Raises:
            CannotStack: if the network cannot be run like this, or gives other losses.
        """
        self._generators, self._graphs = generators, graphs
        results: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(contexts), self.size):
            chunk = contexts[start : start + self.size]
            if len(chunk) == 1:
                results += _one_by_one(evaluate, chunk) if graphs is None else graphs.evaluate(evaluate, chunk)
                continue
            run = self._run(evaluate, chunk)
            found, cuts = run.losses, (len(chunk), *run.cuts)
            if run.calls and cuts not in self._trusted:
                # A text says little of the numbers it is made from: what is compared then is the tokens' scores.
                compared = partial(self._scores, run.prompts) if any(run.prompts) else evaluate
                if self._agrees(compared, chunk):
                    self._trusted.add(cuts)
                else:
                    found = _one_by_one(evaluate, chunk)
            results += found
        return results

    def _run(self, evaluate: Evaluate, contexts: Sequence[Perturbed]) -> NetworkRun:
        """Evaluates losses by calls of the network for all contexts at once; none for a batch without terms."""
        run = NetworkRun(self.network, contexts, self._generators, self._graphs)
        with ExitStack() as stack:
            stack.enter_context(replaced_forward(self.network, run.forward))
            if hasattr(self.network, "generate"):
                stack.enter_context(replaced(self.network, "generate", run.generate))
            for context in contexts:
                with context:
                    run.begin()
                    run.losses.append(evaluate())
        run.finish()
        if not run.calls and any(terms for _, terms in run.losses):
            raise CannotStack(f"`training_step` does not call the {type(self.network).__name__} that is trained")
        return run

    def _scores(self, prompts: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """In the place of a loss: the mean square of what the network says of the next token."""
        logits = [self.network(**prompt, use_cache=False).logits[:, -1].double() for prompt in prompts]
        loss = torch.cat(logits).square().mean()
        return loss, torch.ones_like(loss)

    def _agrees(self, evaluate: Evaluate, contexts: Sequence[Perturbed]) -> bool:
        """Whether stacked losses are right where every other group changes by a few percent: more than `eps` would.

        False where a loss is not finite, so that nothing can be compared.
        """
        flip = FlippedBit()
        parameters = perturbed_by(contexts)
        changed = [Perturbed(dict.fromkeys(parameters, flip if i % 2 else None)) for i in range(len(contexts))]
        plain, flipped = (loss for loss, _ in _one_by_one(evaluate, changed[:2]))
        found = torch.stack([loss for loss, _ in self._run(evaluate, changed).losses])
        expected = torch.stack([flipped if i % 2 else plain for i in range(len(changed))])
        if not torch.isfinite(expected).all():
            return False
        # Kernels round in another way for another number of rows.
        rounding = 5e-3 if computes_in_half(self.network, plain.device) else 1e-5
        tolerance = rounding * plain.abs() + 0.05 * (flipped - plain).abs()
        if not (found - expected).abs().le(tolerance).all():
            raise CannotStack(
                f"the losses of {type(self.network).__name__} for repeated rows, {found.tolist()}, are not those of "
                f"separate runs, {expected.tolist()}: its rows are not along the first dimension, or not independent"
            )
        return True


def _one_by_one(evaluate: Evaluate, contexts: Sequence[Perturbed]) -> list[tuple[Tensor, Tensor]]:
    results = []
    for context in contexts:
        with context:
            results.append(evaluate())
    return results
