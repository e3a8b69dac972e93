"""The losses of single examples, each at its own perturbed weights, from one run of the network on the whole batch.

The rows of the batch form groups, one for each example, and each group sees its own perturbed parameters. With low-rank
perturbations that is ``x_i W' + (x_i B) A_i'`` for the rows x_i of example i: one product with the stored weight for
all examples and thin products for each, so a direction for each example costs about as much as one for all.

The loss function is the user's. It is called once for the whole batch, where the network runs, and then for each
example as a batch of one, where the network returns the example's rows of that run. So the loss of a batch must be a
mean over its examples, and rows must be independent of each other. A network that cannot be run like this raises
:class:`~zolightning.evaluation.row_groups.CannotStack`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zolightning.directions.flipped_bit import FlippedBit
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.losses import Evaluate, LossAndTerms
from zolightning.evaluation.network_run import Call, NetworkRun, computes_in_half
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.randomness import Generators
from zolightning.evaluation.replaced import replaced_forward
from zolightning.evaluation.row_groups import CannotStack, perturbed_by, tensors_in
from zolightning.evaluation.shared_prefix import SharedPrefix
from zolightning.evaluation.watched_everywhere import watched_everywhere

EvaluateThis = Callable[..., LossAndTerms]  # evaluates the loss function given as `loss`
Losses = list[LossAndTerms]

_MOST_COMPARED = 8  # examples whose losses are compared with those of separate runs


class MicroBatch(NamedTuple):
    """Examples that run together.

    Attributes:
        loss: computes the loss of all of them, anew at each call.
        examples: by the number of each example in the batch, in the order of rows, the function that computes the loss
            of this example alone.
    """

    loss: Callable[[], Any]
    examples: Mapping[int, Callable[[], Any]]


class _Found(NamedTuple):
    """The result of one run of the network.

    Attributes:
        losses: the loss of each example and its number of terms.
        whole: the loss of all of them, from the same run.
        cuts: which tensors were split into examples; None if none was, because there was one example, or the loss did
            not run the network or had no terms.
    """

    losses: Losses
    whole: LossAndTerms
    cuts: tuple[Any, ...] | None


class ExampleNetwork:
    """Evaluates the losses of a batch's examples at once.

    Args:
        network: called, once or several times, by the loss.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._trusted: set[tuple[Any, ...]] = set()

    @torch.no_grad()
    def evaluate(
        self,
        evaluate: EvaluateThis,
        batches: Sequence[MicroBatch],
        contexts: Sequence[Perturbed],
        generators: Generators,
        prefix: SharedPrefix | None,
        graphs: GraphedNetwork | None = None,
    ) -> Losses:
        """The loss and the number of terms of each example, each within its own context, none of them in place.

        The first time that a certain set of tensors is split into examples, the losses of a few examples are compared
        with those of separate runs.

        Args:
            evaluate: evaluates the loss function that it is given.
            batches: the parts of the batch.
            contexts: for each example of these parts, in order, how it sees parameters.
            generators: the random number generators that losses may draw from.
            prefix: the layer outputs that the evaluations of a step share; None if the whole network runs each time.
            graphs: the network's forward as CUDA graphs, if any.

        Raises:
            CannotStack: if the network cannot be run like this, or gives other losses.
            ValueError: if the loss of a batch is not the mean of those of its examples.
        """
        shares = [contexts[start:stop] for start, stop in pairwise([0, *accumulate(len(b.examples) for b in batches)])]
        found: list[_Found] = []

        def run(_: Perturbed, within: AbstractContextManager[None]) -> LossAndTerms:
            with within:
                arguments = generators, graphs
                found[:] = [self._together(evaluate, *pair, *arguments) for pair in zip(batches, shares, strict=True)]
            losses, terms = (
                torch.stack(values) for values in zip(*(pair for each in found for pair in each.losses), strict=True)
            )
            return losses.sum(), terms.sum()

        if prefix is None:
            run(contexts[0], nullcontext())
        else:
            prefix.evaluate(run, contexts[0])
        results: Losses = []
        for batch, own, (losses, whole, cuts) in zip(batches, shares, found, strict=True):
            if cuts is not None and cuts not in self._trusted:
                self._require_mean(losses, whole)
                if self._agrees(evaluate, batch, own, generators):
                    self._trusted.add(cuts)
                else:
                    losses = one_by_one(evaluate, batch, own)
            results += losses
        return results

    def _together(
        self,
        evaluate: EvaluateThis,
        batch: MicroBatch,
        contexts: Sequence[Perturbed],
        generators: Generators,
        graphs: GraphedNetwork | None,
    ) -> _Found:
        if len(contexts) == 1:
            losses = one_by_one(evaluate, batch, contexts)
            return _Found(losses, losses[0], None)
        with watched_everywhere(contexts) as readers:
            run = _Run(self.network, contexts, readers, generators, graphs)
            with replaced_forward(self.network, run.forward):
                whole = run.evaluate_whole(contexts[0], partial(evaluate, loss=batch.loss))
                for context, loss in zip(contexts, batch.examples.values(), strict=True):
                    run.evaluate(context, partial(evaluate, loss=loss))
        run.finish()
        if not run.calls and not any(terms for _, terms in run.losses):
            return _Found(run.losses, whole, None)
        if not run.calls:
            raise CannotStack(f"the loss does not call the {type(self.network).__name__} that is trained")
        return _Found(run.losses, whole, (len(contexts), *run.cuts))

    def _require_mean(self, losses: Losses, whole: LossAndTerms) -> None:
        """Raises a ValueError unless the loss of a batch is the mean of those of its examples, from one output."""
        terms = torch.stack([terms for _, terms in losses])
        mean = torch.stack([torch.where(terms == 0, 0, loss * terms) for loss, terms in losses]).sum() / terms.sum()
        tolerance = 1e-2 if computes_in_half(self.network, mean.device) else 1e-3
        if (mean - whole[0]).abs() > tolerance * whole[0].abs() and (terms >= 0).all():
            raise ValueError(
                f"`estimator` is PerExample(), and the loss of a batch, {whole[0].item():g}, is not the mean of those "
                f"of its examples, {mean.item():g}. Return the number of terms that it averages as `num_terms`, or, "
                "if it compares examples with each other, choose TwoSided()."
            )

    def _agrees(
        self, evaluate: EvaluateThis, batch: MicroBatch, contexts: Sequence[Perturbed], generators: Generators
    ) -> bool:
        """Whether losses are those of separate runs, tried with parameters a few percent off for every other example.

        False if a loss is not finite, so that nothing can be compared.
        """
        compared = range(0, len(contexts), -(-len(contexts) // _MOST_COMPARED))
        parameters, flip = perturbed_by(contexts), FlippedBit()
        plain, flipped = (Perturbed(dict.fromkeys(parameters, change)) for change in (None, flip))
        changed = [plain] * len(contexts)
        for place in compared[::2]:
            changed[place] = Perturbed(dict.fromkeys(parameters, flip))
        own = list(batch.examples.items())
        few = MicroBatch(batch.loss, dict(own[place] for place in compared))
        alone = [
            torch.stack([loss for loss, _ in one_by_one(evaluate, few, [c] * len(compared))]) for c in (plain, flipped)
        ]
        expected = torch.where(torch.arange(len(compared), device=alone[0].device) % 2 == 0, alone[1], alone[0])
        losses = [loss for loss, _ in self._together(evaluate, batch, changed, generators, None).losses]
        found = torch.stack([losses[place] for place in compared])
        if not torch.isfinite(torch.stack(alone)).all():
            return False
        half = computes_in_half(self.network, found.device)
        # Kernels round in another way for another number of rows.
        tolerance = (5e-3 if half else 1e-5) * alone[0].norm() + (0.2 if half else 0.05) * (alone[1] - alone[0]).norm()
        if not (found - expected).norm() <= tolerance:
            raise CannotStack(
                f"losses of examples by one run of {type(self.network).__name__}, {found.tolist()}, are not those of "
                f"separate runs, {expected.tolist()}: its rows are not along the first dimension, or not independent"
            )
        return True


class _Run(NetworkRun):
    """The calls of a network, first for all examples, then for each one, which gets its rows of the first output."""

    _is_whole = False  # whether all examples are evaluated together now

    def evaluate_whole(self, context: Perturbed, loss: Evaluate) -> LossAndTerms:
        """The loss of all examples, for which the network runs; evaluations of single ones come after it."""
        self._is_whole = True
        try:
            with context:
                return loss()
        finally:
            self._is_whole = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = tensors_in((args, kwargs))
        if torch.is_grad_enabled():
            raise CannotStack("`training_step` differentiates")
        if not self._is_whole:
            return self.output_for(inputs)
        self.run(inputs, args, kwargs)
        return self.calls[-1].output

    def given(self, tensor: Tensor, call: Call) -> Tensor:
        is_rows = bool(tensor.ndim) and len(tensor) == call.rows
        return tensor.chunk(len(self._contexts))[len(self.losses)] if is_rows else tensor

    def count_rows(self, rows: int) -> int:
        if rows % len(self._contexts):
            raise CannotStack(f"the network is called with {rows} rows for {len(self._contexts)} examples")
        return rows

    def spread(self, tensor: Tensor) -> Tensor:
        return tensor


def one_by_one(evaluate: EvaluateThis, batch: MicroBatch, contexts: Sequence[Perturbed]) -> Losses:
    """Losses of examples, each by its own run of the network."""
    results = []
    for context, loss in zip(contexts, batch.examples.values(), strict=True):
        with context:
            results.append(evaluate(loss=loss))
    return results
