"""The losses of single examples, each at its own perturbed weights, from one run of the network on the whole batch.

The rows of the batch form groups, one for each example, and each group sees its own perturbed parameters. With low-rank
perturbations that is ``x_i W' + (x_i B) A_i'`` for the rows x_i of example i: one product with the stored weight for
all examples and thin products for each, so a direction for each example costs about as much as one direction for all.

The loss function is the user's. It is called once for the whole batch, where the network runs, and then for each
example as a batch of one, where the network returns the example's rows of that run. So the loss of a batch must be a
mean over its examples, and rows must be independent of each other. A network that cannot be run like this raises
:class:`~zolightning.evaluation.row_groups.CannotStack`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from zolightning.directions.trials import FlippedBit
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.losses import LossAndTerms, LossFunction, LossOutput
from zolightning.evaluation.nested import tensors_in
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.replaced import replaced_forward
from zolightning.evaluation.row_groups import CannotStack, perturbed_by, watched_everywhere
from zolightning.evaluation.shared_forward import Call, SharedForward, computes_in_half, one_by_one, require_same_inputs
from zolightning.evaluation.shared_prefix import SharedPrefix
from zolightning.evaluation.stacked import networks_of
from zolightning.rank_zero import rank_zero_warn

Output = TypeVar("Output", bound=LossOutput, covariant=True)
Other = TypeVar("Other", bound=LossOutput)

_MOST_COMPARED = 8  # examples whose losses are compared with those of separate runs


class MicroBatch(NamedTuple, Generic[Output]):
    """Examples that run together.

    Attributes:
        loss: computes the loss of all of them, anew at each call.
        examples: by the number of each example in the batch, in the order of rows, the function that computes the loss
            of this example alone.
    """

    loss: Callable[[], Output]
    examples: Mapping[int, Callable[[], Output]]

    def each(self, evaluate: Callable[[LossFunction], Other]) -> "MicroBatch[Other]":
        """The same examples, where `evaluate` is given each loss function and returns the loss."""
        own = {number: partial(evaluate, loss) for number, loss in self.examples.items()}
        return MicroBatch(partial(evaluate, self.loss), own)


MicroBatches = Sequence[MicroBatch[LossOutput]]
"""A batch in parts, with the user's loss functions."""


class _Found(NamedTuple):
    """The result of one run of the network.

    Attributes:
        losses: the loss of each example and its number of terms.
        whole: the loss of all of them, from the same run.
        cuts: which tensors were split into examples; None if none was, because there was one example, or the loss did
            not run the network or had no terms.
    """

    losses: list[LossAndTerms]
    whole: LossAndTerms
    cuts: tuple[Any, ...] | None


class Examples:
    """Evaluates the losses of a batch's examples, all at once or, where that is not possible, one by one.

    Args:
        module: holds the network; None if only functions are known.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module = module
        self._network: Any = None  # in it, which the loss calls, once or several times
        self._runs_one_by_one = False  # from the first failure on
        self._trusted: set[tuple[Any, ...]] = set()  # sets of tensors whose division has given the right losses

    def forget(self) -> None:
        """Forgets which ways to divide rows gave the right losses."""
        self._trusted.clear()

    def give_up(self, reason: object) -> None:
        """Makes the network run once per example from here on."""
        if not self._runs_one_by_one:
            self._runs_one_by_one = True
            rank_zero_warn(f"The network runs once per example from here on, which takes longer: {reason}.")

    @torch.no_grad()
    def evaluate(
        self,
        parts: Sequence[MicroBatch[LossAndTerms]],
        contexts: Sequence[Perturbed],
        prefix: SharedPrefix,
        graphs: GraphedNetwork | None,
        begin: Callable[[], None],
    ) -> list[LossAndTerms]:
        """The loss and the number of terms of each example, as many times as there are contexts for each.

        The first time that a certain set of tensors is split into examples, the losses of a few examples are compared
        with those of separate runs.

        Args:
            parts: the batch in parts, whose functions evaluate its losses.
            contexts: for each example in turn, how it sees parameters.
            prefix: the layer outputs that the evaluations of a step share.
            graphs: the network's forward as CUDA graphs, if any.
            begin: called before the evaluations begin anew.

        Raises:
            ValueError: if the loss of a batch is not the mean of those of its examples.
        """
        results: list[LossAndTerms] = []
        examples = [evaluate for part in parts for evaluate in part.examples.values()]
        shared = prefix if graphs is None or graphs.is_off else None
        for start in range(0, len(contexts), len(examples)):
            own = contexts[start : start + len(examples)]
            # In place as long as no loss was finite: this step is skipped, and later ones run as they do in any run
            if not self._runs_one_by_one and not own[0].in_place:
                try:
                    self._network = self._network or _network_in(self._module, own[0])
                    results += self._at_once(parts, own, shared, graphs)
                    continue
                except CannotStack as error:
                    self.give_up(error)
            if not results:  # what remains of the first evaluation must be that of all examples
                begin()
                with own[0]:
                    parts[0].loss()
            results += one_by_one(examples, own)
        return results

    def _at_once(
        self,
        batches: Sequence[MicroBatch[LossAndTerms]],
        contexts: Sequence[Perturbed],
        prefix: SharedPrefix | None,
        graphs: GraphedNetwork | None,
    ) -> list[LossAndTerms]:
        """The losses of all examples once; raises CannotStack if they differ from those of separate runs."""
        shares = [contexts[start:stop] for start, stop in pairwise([0, *accumulate(len(b.examples) for b in batches)])]
        found: list[_Found] = []

        def run(within: AbstractContextManager[None]) -> LossAndTerms:
            """Evaluates all examples, and returns the sums of their losses and terms, with which runs are compared."""
            with within:
                found[:] = [self._together(batch, own, graphs) for batch, own in zip(batches, shares, strict=True)]
            losses, terms = zip(*(pair for each in found for pair in each.losses), strict=True)
            return LossAndTerms(torch.stack(losses).sum(), torch.stack(terms).sum())

        if prefix is None:
            run(nullcontext())
        else:
            prefix.evaluate(run, contexts[0])
        results: list[LossAndTerms] = []
        for batch, own, (losses, whole, cuts) in zip(batches, shares, found, strict=True):
            if cuts is not None and cuts not in self._trusted:
                self._require_mean(losses, whole)
                if self._agrees(batch, own):
                    self._trusted.add(cuts)
                else:
                    losses = one_by_one(batch.examples.values(), own)
            results += losses
        return results

    def _together(
        self, batch: MicroBatch[LossAndTerms], contexts: Sequence[Perturbed], graphs: GraphedNetwork | None
    ) -> _Found:
        if len(contexts) == 1:
            losses = one_by_one(batch.examples.values(), contexts)
            return _Found(losses, losses[0], None)
        run = _Run(self._network, contexts, graphs)
        with watched_everywhere(contexts), replaced_forward(self._network, run.forward):
            whole = run.evaluate_whole(contexts[0], batch.loss)
            for context, evaluate in zip(contexts, batch.examples.values(), strict=True):
                run.evaluate(context, evaluate)
        require_same_inputs(run.differ)
        if not run.calls and not any(terms for _, terms in run.losses):
            return _Found(run.losses, whole, None)
        if not run.calls:
            raise CannotStack(f"the loss does not call the {type(self._network).__name__} that is trained")
        return _Found(run.losses, whole, (len(contexts), *run.cuts))

    def _require_mean(self, losses: list[LossAndTerms], whole: LossAndTerms) -> None:
        """Raises a ValueError unless the loss of a batch is the mean of those of its examples, from one output."""
        terms = torch.stack([terms for _, terms in losses])
        mean = torch.stack([torch.where(terms == 0, 0, loss * terms) for loss, terms in losses]).sum() / terms.sum()
        tolerance = 1e-2 if computes_in_half(self._network, mean.device) else 1e-3
        if (mean - whole.loss).abs() > tolerance * whole.loss.abs() and (terms >= 0).all():
            raise ValueError(
                f"`estimator` is PerExample(), but the loss of a batch, {whole.loss.item():g}, is not the mean of "
                f"those of its examples, {mean.item():g}. Return the number of terms that it averages as `num_terms`, "
                "or, if it compares examples with each other, choose TwoSided()."
            )

    def _agrees(self, batch: MicroBatch[LossAndTerms], contexts: Sequence[Perturbed]) -> bool:
        """Whether losses are those of separate runs, tried with parameters a few percent off for every other example.

        False if a loss is not finite, so that nothing can be compared.
        """
        compared = range(0, len(contexts), -(-len(contexts) // _MOST_COMPARED))
        parameters, flip = perturbed_by(contexts), FlippedBit()
        plain, flipped = (Perturbed(dict.fromkeys(parameters, change)) for change in (None, flip))
        changed = [plain] * len(contexts)
        for place in compared[::2]:
            changed[place] = Perturbed(dict.fromkeys(parameters, flip))
        few = list(batch.examples.values())[:: compared.step]
        alone = [torch.stack([found.loss for found in one_by_one(few, [c] * len(few))]) for c in (plain, flipped)]
        expected = torch.where(torch.arange(len(compared), device=alone[0].device) % 2 == 0, alone[1], alone[0])
        losses = [found.loss for found in self._together(batch, changed, None).losses]
        found = torch.stack([losses[place] for place in compared])
        if not torch.isfinite(torch.stack(alone)).all():
            return False
        half = computes_in_half(self._network, found.device)
        # Kernels round differently for another number of rows.
        tolerance = (5e-3 if half else 1e-5) * alone[0].norm() + (0.2 if half else 0.05) * (alone[1] - alone[0]).norm()
        if not (found - expected).norm() <= tolerance:
            raise CannotStack(
                f"losses of examples by one run of {type(self._network).__name__}, {found.tolist()}, are not those of "
                f"separate runs, {expected.tolist()}: its rows are not along the first dimension, or not independent"
            )
        return True


def _network_in(module: nn.Module | None, context: Perturbed) -> nn.Module:
    """The network that may run examples together; raises CannotStack if there is none."""
    if module is None:
        raise CannotStack("the optimizer is not attached to a module")
    try:
        return networks_of(module, context.perturbations)[0]
    except ValueError:
        raise CannotStack(f"no submodule of {type(module).__name__} holds all parameters that train") from None


class _Run(SharedForward):
    """The calls of a network, first for all examples, then for each one, which gets its rows of the first output."""

    _is_whole = False  # whether all examples are evaluated together now

    def evaluate_whole(self, context: Perturbed, evaluate: Callable[[], LossAndTerms]) -> LossAndTerms:
        """The loss of all examples, for which the network runs; evaluations of single ones come after it."""
        self._is_whole = True
        try:
            with context:
                return evaluate()
        except CannotStack:
            raise
        except Exception as error:  # the loss of single runs will tell if it is to blame
            if not self.calls:
                raise
            raise CannotStack(f"the loss fails on its output: {type(error).__name__}: {error}") from error
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
