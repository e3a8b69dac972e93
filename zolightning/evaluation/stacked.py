"""Runs the network once for several evaluations of a step, on the batch repeated once for each of them.

This saves time for small batches: a low-rank method multiplies by stored weights and by shared factors once for all
evaluations, and a dense one reads each weight and draws its noise once for both signs of a direction. Activations take
as many times the memory.

The loss function is the user's, so it is still called once for each evaluation, with the perturbation of that
evaluation; only the network inside it is replaced. In the first evaluation the network runs on the repeated rows, each
group of them under the perturbation of one evaluation, and returns the first group's output. In the other evaluations
it returns the output of their group. A network that cannot be run like this raises :class:`CannotStack`.

The network's ``generate`` (that of transformers) is replaced likewise: the texts of all evaluations grow together, each
from its own tokens, as long as the likeliest token is chosen. Sampled tokens would differ between groups of rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from inspect import getattr_static
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.trials import FlippedBit
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.losses import LossAndTerms
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.replaced import replaced, replaced_forward
from zolightning.evaluation.row_groups import CannotStack, perturbed_by, watched_everywhere
from zolightning.evaluation.shared_forward import SharedForward, computes_in_half, one_by_one, require_same_inputs
from zolightning.rank_zero import rank_zero_warn

_NO_FORWARD = getattr_static(nn.Module, "forward")


def networks_of(
    module: nn.Module, parameters: Iterable[nn.Parameter], option: str = "evaluations_per_forward"
) -> list[nn.Module]:
    """Networks for several evaluations at once, the best first: modules with a forward that hold all `parameters`.

    A module that computes the loss holds its network, the outermost such submodule. In a plain loop the module itself
    may be the network, and comes first; its submodule is the network where it computes its loss itself.

    Args:
        module: what computes the loss: a LightningModule, or what is attached in a plain loop.
        parameters: those that train.
        option: the setting that needs it.

    Raises:
        ValueError: if there is none.
    """
    wanted = set(parameters)
    inner = (m for m in module.modules() if m is not module and _has_forward(m) and wanted <= set(m.parameters()))
    found = list(islice(inner, 1))
    if _has_forward(module) and (not found or not hasattr(module, "training_step")):
        found.insert(0, module)
    if not found:
        children = ", ".join(name for name, _ in module.named_children()) or "none"
        raise ValueError(
            f"`{option}` needs one submodule that holds all trainable parameters and is called for the loss, but "
            f"{type(module).__name__} has none: its children are {children}. Put the network into one module, or "
            f"leave `{option}` at its default."
        )
    return found


def _has_forward(module: nn.Module) -> bool:
    """Whether the class of a module has a forward of its own, looked up without asking classes of TorchScript."""
    forward = getattr_static(type(module), "forward")
    return forward is not _NO_FORWARD and getattr(forward, "__qualname__", "") != "LightningModule.forward"


class StackedNetwork:
    """Evaluates a loss under several perturbations at once, with the first of some networks for which that works.

    Its truth value is False where there is no such network, or none is left.

    Args:
        networks: those that may run for several evaluations, the best first; the loss calls them, once or several
            times.
        size: evaluations that share a run.
    """

    def __init__(self, networks: Sequence[nn.Module] = (), size: int = 1) -> None:
        self._networks = list(networks)
        self._size = size
        self._trusted: set[tuple[Any, ...]] = set()  # sets of tensors whose repetition has given the right losses

    def __bool__(self) -> bool:
        return bool(self._networks)

    @property
    def _network(self) -> nn.Module:
        return self._networks[0]

    @property
    def size(self) -> int:
        """Evaluations that share a run."""
        return self._size if self._networks else 1

    def forget(self) -> None:
        """Forgets which ways to stack rows gave the right losses."""
        self._trusted.clear()

    def give_up(self, reason: str) -> None:
        """Makes each evaluation run separately from here on."""
        if self._networks:
            self._networks.clear()
            rank_zero_warn(f"`evaluations_per_forward` is 1 from here on: {reason}.")

    @torch.no_grad()
    def evaluate(
        self,
        evaluate: Callable[[], LossAndTerms],
        contexts: Sequence[Perturbed],
        graphs: GraphedNetwork | None,
        begin: Callable[[], None],
    ) -> list[LossAndTerms] | None:
        """The loss and its number of terms within each of several contexts; None if no network can be run like this.

        The first time that a certain set of tensors is repeated and split, the losses are compared with those of
        separate runs.

        Args:
            evaluate: evaluates the loss of the batch.
            contexts: for each evaluation how it sees parameters, none of them in place.
            graphs: the network's forward as CUDA graphs, if any.
            begin: called before the evaluations begin anew, with the next network or by themselves.
        """
        reason = ""
        while self._networks:
            try:
                return self._evaluate(evaluate, contexts, graphs)
            except CannotStack as error:
                reason = reason or str(error)
                if len(self._networks) > 1:
                    del self._networks[0]
                    self._trusted.clear()
                else:
                    how = "Set it to 1, or freeze a parameter that is in the way, or give it a `vector_lr` of 0"
                    self.give_up(f"{reason}. {how}")
                for context in contexts:
                    context.seen.clear()  # all functions were watched; by themselves only those in readers are
                begin()
        return None

    def _evaluate(
        self, evaluate: Callable[[], LossAndTerms], contexts: Sequence[Perturbed], graphs: GraphedNetwork | None
    ) -> list[LossAndTerms]:
        """The losses from the first network; raises CannotStack if they are not those of separate runs."""
        results: list[LossAndTerms] = []
        differ: list[Tensor] = []
        for start in range(0, len(contexts), self.size):
            chunk = contexts[start : start + self.size]
            if len(chunk) == 1:
                results += one_by_one([evaluate], chunk) if graphs is None else graphs.evaluate(evaluate, chunk)
                continue
            run = self._run(evaluate, chunk, graphs)
            differ += run.differ
            found, cuts = run.losses, (len(chunk), *run.cuts)
            if run.calls and cuts not in self._trusted:
                # Equal texts say little about equal numbers, so the scores of tokens are compared instead.
                compared = partial(self._scores, run.prompts) if any(run.prompts) else evaluate
                if self._agrees(compared, chunk, graphs):
                    self._trusted.add(cuts)
                else:
                    found = one_by_one([evaluate] * len(chunk), chunk)
            results += found
        require_same_inputs(differ)
        return results

    def _run(
        self, evaluate: Callable[[], LossAndTerms], contexts: Sequence[Perturbed], graphs: GraphedNetwork | None
    ) -> SharedForward:
        """Evaluates the loss in each context, with runs of the network for all of them; no run for an empty batch."""
        run = SharedForward(self._network, contexts, graphs)
        with ExitStack() as stack:
            stack.enter_context(watched_everywhere(contexts))
            stack.enter_context(replaced_forward(self._network, run.forward))
            if hasattr(self._network, "generate"):
                stack.enter_context(replaced(self._network, "generate", run.generate))
            for context in contexts:
                run.evaluate(context, evaluate)
        if not run.calls and any(terms for _, terms in run.losses):
            raise CannotStack(f"the loss does not call the {type(self._network).__name__} that is trained")
        return run

    def _scores(self, prompts: Sequence[Mapping[str, Tensor]]) -> LossAndTerms:
        """Instead of a loss, the mean square of the logits of the next token, with 1 as its number of terms."""
        logits = [self._network(**prompt, use_cache=False).logits[:, -1].double() for prompt in prompts]
        loss = torch.cat(logits).square().mean()
        return LossAndTerms(loss, torch.ones_like(loss))

    def _agrees(
        self, evaluate: Callable[[], LossAndTerms], contexts: Sequence[Perturbed], graphs: GraphedNetwork | None
    ) -> bool:
        """Whether stacked losses are those of separate runs, tried with half of the groups a few percent off.

        False if a loss is not finite, so that nothing can be compared.
        """
        flip, parameters = FlippedBit(), perturbed_by(contexts)
        plain, flipped = (dict.fromkeys(parameters, change) for change in (None, flip))
        mixed = [Perturbed(flipped if i % 2 else plain) for i in range(len(contexts))]
        alone = torch.stack([found.loss for found in one_by_one([evaluate] * 2, mixed[:2])])
        runs = [self._run(evaluate, groups, graphs) for groups in (mixed, [Perturbed(flipped) for _ in contexts])]
        require_same_inputs([differ for run in runs for differ in run.differ])
        together, all_flipped = (torch.stack([found.loss for found in run.losses]) for run in runs)
        if not torch.isfinite(alone).all():
            return False
        expected = alone.repeat(len(contexts))[: len(contexts)]
        # Kernels round differently for another number of rows.
        rounding = (5e-3 if computes_in_half(self._network, alone.device) else 1e-5) * alone[0].abs()
        is_same = (together - expected).abs() <= rounding + 0.05 * (alone[1] - alone[0]).abs()
        # With the same number of rows they round as before, so that few effects of other groups on a group are missed.
        is_independent = (together - all_flipped)[1::2].abs() <= rounding
        if not (is_same.all() and is_independent.all()):
            raise CannotStack(
                f"the losses of {type(self._network).__name__} for repeated rows, {together.tolist()}, are not those "
                f"of separate runs, {expected.tolist()}: its rows are not along the first dimension, or not independent"
            )
        return True
