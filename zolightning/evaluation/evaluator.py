"""Evaluates a loss at perturbed weights; the optimizer says which perturbations."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from zolightning.evaluation.examples import Examples, MicroBatch, MicroBatches
from zolightning.evaluation.graph_capture import CudaCapture
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.known_reads import KnownReads
from zolightning.evaluation.losses import LossAndTerms, LossFunction, loss_and_terms
from zolightning.evaluation.mode import all_in_evaluation_mode
from zolightning.evaluation.perturbed import Perturbations, Perturbed
from zolightning.evaluation.randomness import Generators
from zolightning.evaluation.shared_prefix import SharedPrefix, layers_of
from zolightning.evaluation.stacked import StackedNetwork, networks_of
from zolightning.evaluation.submodules import Submodules
from zolightning.evaluation.traces import Traces


class Evaluator:
    """Evaluates the losses of a step, each under perturbations of its own; the stored weights stay as they are.

    From step to step it remembers what the first evaluations have shown: in which modules parameters are read, to which
    tensors evaluations write, how many layers they share, and which ways to stack rows gave the right losses. If the
    module's submodules or parameters are replaced, all this is forgotten, and found out again in the next step.

    Attributes:
        module: the module that owns the parameters; None for parameters without a module.
        prefix: the layer outputs that the evaluations of a step share.
        graphs: the network's forward as CUDA graphs, used instead of `prefix`; None without graphs.
        is_first: whether the current evaluation is the one of its step that is logged and may change the module.
        left_traces: whether the first evaluation of the last step changed the module, or left more elsewhere.
        leaves_more: whether it has left something elsewhere, such as a value in the mean of an epoch; to be set by the
            loss, and unset before a step.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.prefix = SharedPrefix(())
        self.graphs: GraphedNetwork | None = None
        self.is_first = self.left_traces = self.leaves_more = False
        self._reads = KnownReads()
        self._submodules: Submodules | None = None  # at the last step
        self._traces = Traces()
        self._stacked = StackedNetwork()
        self._examples = Examples()

    def attach(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        evaluations_per_forward: int = 1,
        keep_prefix_bytes: int = 0,
        cuda_graphs: bool = False,
    ) -> None:
        """Sets the module whose losses are evaluated from now on.

        Args:
            module: the module that owns the parameters.
            parameters: the parameters that train.
            evaluations_per_forward: how many evaluations of a step share a run of the network, see
                :mod:`zolightning.evaluation.stacked`.
            keep_prefix_bytes: bytes of layer outputs to keep from step to step, see
                :class:`~zolightning.evaluation.shared_prefix.SharedPrefix`.
            cuda_graphs: whether the network's forward is replayed from CUDA graphs.

        Raises:
            ValueError: if evaluations are to share runs, or graphs to be recorded, but no network holds all parameters;
                or if graphs are to be recorded on a device that has none.
        """
        self.module, self._submodules = module, None
        self._traces.forget()
        self._reads = KnownReads(module)
        self.prefix = SharedPrefix(self._layers(), keep_prefix_bytes)
        networks = networks_of(module, parameters) if evaluations_per_forward > 1 else ()
        self._stacked, self._examples = StackedNetwork(networks, evaluations_per_forward), Examples(module)
        if cuda_graphs:
            network, *_ = networks_of(module, parameters, "cuda_graphs")
            self.graphs = GraphedNetwork(network, CudaCapture(parameters[0].device))

    def detach(self) -> None:
        """Undoes :meth:`attach`."""
        self.module = self._submodules = self.graphs = None
        self._traces.forget()
        self._reads = KnownReads()

    def forget(self) -> None:
        """Forgets where parameters are read and what evaluations share, so that the next step finds it out again."""
        self._reads.forget()
        self._traces.forget()
        if self.module is not None:
            self.prefix = SharedPrefix(self._layers(), self.prefix.keep_bytes)
        self._stacked.forget()
        self._examples.forget()
        if self.graphs is not None:
            self.graphs.clear()

    @property
    def evaluations_per_forward(self) -> int:
        """How many evaluations share a run of the network."""
        return self._stacked.size

    def evaluate(
        self,
        loss_fn: LossFunction,
        trainable: Mapping[nn.Parameter, str],
        perturbations: Sequence[Perturbations],
        randomness: tuple[int, ...],
        resting: Mapping[nn.Parameter, str] | None = None,
        leaves_traces: bool = True,
        micro_batches: MicroBatches | None = None,
        first: Callable[[], Sequence[Perturbations]] | None = None,
    ) -> list[LossAndTerms]:
        """Evaluates a loss once under each of several perturbations.

        The module is in evaluation mode, and all evaluations see the same random numbers and the same state of it.

        Args:
            loss_fn: computes the loss of one batch anew at each call.
            trainable: the parameters that train, and their names.
            perturbations: the perturbed parameters of each evaluation; others are read as they are stored.
            randomness: integers that determine the random numbers that the loss draws.
            resting: other parameters that train in other steps, or are moved, and their names; where these are read is
                found out as well.
            leaves_traces: whether the module keeps the changes that the first evaluation makes to it.
            micro_batches: the batch in parts, if the losses of single examples are wanted. There is then a perturbation
                for each example in turn, and the list may go through all examples several times.
            first: makes the perturbations of the step's first run of the network, if another rank makes that run. If
                the module is changed, the run is made here as well, so that all ranks keep what its first evaluation
                leaves.

        Returns:
            The loss and its number of terms for each of the `perturbations`.
        """
        self._reads.gathered.give_back()  # what other code's forwards have left
        generators = Generators({parameter.device for parameter in trainable})
        modules, moving = self._found_submodules(), set(map(id, chain(trainable, resting or {}, *perturbations)))
        with (
            all_in_evaluation_mode(modules),
            generators.rewound(*randomness) as rewind,
            self._traces.step(modules, moving),
        ):
            run = partial(self._run, rewind)
            parts = None if micro_batches is None else [part.each(run) for part in micro_batches]

            def losses(changes: Sequence[Perturbations]) -> tuple[list[LossAndTerms], list[nn.Parameter]]:
                contexts = self._reads.contexts(trainable, resting or {}, changes, lambda: run(loss_fn).loss)
                with self._reads.unwritten(trainable):
                    return self._losses(partial(run, loss_fn), parts, generators, leaves_traces, contexts)

            results, unread = losses(perturbations)
            if self._reads.are_outdated(unread, trainable):
                self._reads.forget(unread)
                results, _ = losses(perturbations)
            if first is not None and self._traces.found:
                losses(first())
            if leaves_traces:  # others are made in addition to the step's own
                self.left_traces = self._traces.found or self.leaves_more
        return results

    def _run(
        self, rewind: Callable[[], None], loss_fn: LossFunction, *contexts: AbstractContextManager[Any]
    ) -> LossAndTerms:
        """One evaluation of a step within some contexts, with the step's random numbers; what it writes is undone."""

        def evaluated() -> LossAndTerms:
            with ExitStack() as stack:
                for context in (*contexts, self._traces.watched()):
                    stack.enter_context(context)
                stack.callback(self._reads.gathered.give_back)
                return loss_and_terms(loss_fn())

        rewind()
        try:
            return self._traces.evaluate(evaluated, self.is_first)
        finally:
            self.is_first = False

    def _losses(
        self,
        evaluate: Callable[..., LossAndTerms],
        parts: Sequence[MicroBatch[LossAndTerms]] | None,
        generators: Generators,
        leaves_traces: bool,
        contexts: Sequence[Perturbed],
    ) -> tuple[list[LossAndTerms], list[nn.Parameter]]:
        """The loss of a step in each context, and the parameters whose perturbation no function has read.

        Args:
            evaluate: evaluates the loss of the batch, within contexts that it is given.
            parts: the batch in parts, if the losses of single examples are wanted.
            generators: the random number generators that losses may draw from.
            leaves_traces: whether the module keeps the changes that the first evaluation makes to it.
            contexts: for each evaluation, how it sees parameters.
        """
        if self.graphs is not None:
            self.graphs.begin_step()
        if self._reads.has_unseen:
            self._stacked.give_up("such parameters cannot be stacked")
            if parts is not None:
                self._examples.give_up("parameters cannot be perturbed in place for single examples")

        def begin() -> None:
            self.is_first = leaves_traces

        begin()
        if parts is not None:
            with self.prefix.one_step(generators):
                return self._examples.evaluate(parts, contexts, self.prefix, self.graphs, begin), []
        if self._stacked and not contexts[0].in_place:
            results = self._stacked.evaluate(evaluate, contexts, self.graphs, begin)
            if results is not None:
                return results, []
        if self.graphs is not None and not self.graphs.is_off:
            return self.graphs.evaluate(evaluate, contexts), contexts[0].unread()
        with self.prefix.one_step(generators):
            results = [self.prefix.evaluate(partial(evaluate, context), context) for context in contexts]
        return results, contexts[0].unread()

    def _found_submodules(self) -> list[nn.Module]:
        """All submodules; if they or their parameters are not those of the last step, what was found is forgotten."""
        if self.module is None:
            return []
        if self._submodules is None or not self._submodules.are_same():
            if self._submodules is not None:
                self.forget()
            self._submodules = Submodules(self.module)
        return self._submodules.modules

    def _layers(self) -> Sequence[nn.Module]:
        """The layers that may be skipped; none with sharded parameters, where all ranks must run the same forwards."""
        return () if self._reads.gathered or self.module is None else layers_of(self.module)
