"""Evaluates a loss at perturbed weights; the optimizer says which perturbations."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from typing import Any

from torch import nn

from zolightning.evaluation.capture import CudaCapture
from zolightning.evaluation.examples import ExampleNetwork, MicroBatch, one_by_one
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.known_reads import KnownReads, Perturbations
from zolightning.evaluation.losses import Evaluate, LossAndTerms
from zolightning.evaluation.mode import all_in_evaluation_mode
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.randomness import Generators
from zolightning.evaluation.row_groups import CannotStack
from zolightning.evaluation.shared_prefix import SharedPrefix, layers_of
from zolightning.evaluation.snapshot import Lasting
from zolightning.evaluation.stacked import StackedNetwork, network_of
from zolightning.evaluation.submodules import Submodules
from zolightning.evaluation.traces import Traces
from zolightning.messages import some
from zolightning.rank_zero import rank_zero_warn


class Evaluator:
    """Evaluates the losses of a step, each under perturbations of its own; the stored weights stay as they are.

    From step to step it remembers what the first evaluations have shown: in which modules parameters are read, to which
    tensors evaluations write, how many layers they share, and which ways to stack rows gave the right losses. If the
    module gets other submodules or parameters, this is forgotten, and found out again in the next step.

    Attributes:
        module: the module that owns the parameters; None for parameters without a module.
        prefix: the layer outputs that the evaluations of a step share.
        graphs: the network's forward as CUDA graphs, used instead of `prefix`; None without graphs.
        is_first: whether the present evaluation is the one of its step that is logged and may change the module.
        left_traces: whether the first evaluation of the last step changed the module.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.prefix = SharedPrefix(())
        self.graphs: GraphedNetwork | None = None
        self.is_first = self.left_traces = False
        self._reads = KnownReads()
        self._submodules: Submodules | None = None  # at the last step
        self._held: Lasting = ()  # what they held before it, see `Traces`
        self._moving: set[int] = set()  # the parameters that moved in it
        self._written: set[int] = set()  # tensors beside the weights that evaluations write to
        self._is_watched = False  # whether one evaluation has been watched for these
        self._stack: StackedNetwork | None = None
        self._examples: ExampleNetwork | None = None
        self._runs_one_by_one = False  # whether each example has a forward of its own

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
            ValueError: if evaluations are to share runs, or graphs to be recorded, and no network holds all parameters;
                or graphs on a device that has none.
        """
        self.module = module
        self._submodules, self._held = None, ()
        self._is_watched = False
        self._reads = KnownReads(module)
        self.prefix = SharedPrefix(self._layers(), keep_prefix_bytes)
        if evaluations_per_forward > 1:
            self._stack = StackedNetwork(network_of(module, parameters), evaluations_per_forward)
        if cuda_graphs:
            network = network_of(module, parameters, "cuda_graphs")
            self.graphs = GraphedNetwork(network, CudaCapture(parameters[0].device))

    def detach(self) -> None:
        """Undoes :meth:`attach`."""
        self.module = None
        self._submodules, self._held = None, ()
        self.graphs = None
        self._reads = KnownReads()

    @property
    def evaluations_per_forward(self) -> int:
        """How many evaluations share a run of the network."""
        return 1 if self._stack is None else self._stack.size

    def evaluate(
        self,
        evaluate: Evaluate,
        trainable: Mapping[nn.Parameter, str],
        perturbations: Sequence[Perturbations],
        randomness: tuple[int, ...],
        resting: Mapping[nn.Parameter, str] | None = None,
        leaves_traces: bool = True,
        micro_batches: Sequence[MicroBatch] | None = None,
    ) -> list[LossAndTerms]:
        """Evaluates a loss once under each of some perturbations.

        The module is in evaluation mode, and all evaluations see the same random numbers and the same state of it.

        Args:
            evaluate: computes the loss of one batch anew at each call.
            trainable: the parameters that train, and their names.
            perturbations: the perturbed parameters of each evaluation; others are read as they are stored.
            randomness: integers that determine the random numbers that the loss draws.
            resting: others that train in other steps, or are moved, and their names; where these are read is found out
                as well.
            leaves_traces: whether the module keeps the changes that the first evaluation makes to it.
            micro_batches: the batch in parts, if the losses of single examples are wanted. There is then a perturbation
                for each example in turn, and the list may go through all examples several times.

        Returns:
            The loss and its number of terms for each of the `perturbations`.
        """
        resting = resting or {}
        gathered = self._reads.gathered
        gathered.give_back()  # what others' forwards have left
        generators = Generators({parameter.device for parameter in trainable})
        moving = set(map(id, chain(trainable, resting, *perturbations)))
        modules = self._found_submodules()
        with ExitStack() as stack:
            stack.enter_context(all_in_evaluation_mode(modules))
            rewind = stack.enter_context(generators.rewound(*randomness))
            if moving != self._moving:
                self._held, self._moving = (), moving
            traces = Traces(modules, self._written, moving, self._held)

            def run(*within: AbstractContextManager[Any], loss: Evaluate = evaluate) -> LossAndTerms:
                """One evaluation within these contexts, by the step's random numbers; what it writes is undone."""

                def evaluated() -> LossAndTerms:
                    with ExitStack() as stack:
                        for context in (*within, *(() if self._is_watched else (traces.watched(),))):
                            stack.enter_context(context)
                        stack.callback(gathered.give_back)
                        return loss()

                rewind()
                try:
                    return traces.evaluate(evaluated, self.is_first)
                finally:
                    self.is_first, self._is_watched = False, True

            arguments = run, trainable, resting, perturbations, generators, leaves_traces, micro_batches
            results, unread = self._losses(*arguments)
            if gathered and not self._reads.knows(trainable):
                unread = []  # the loss was not finite, so it is not known yet which parameters are read at all
            if unread and gathered:  # other ranks would not know that it is to be found out anew
                raise RuntimeError(
                    f"{len(unread)} parameters have been read by the losses of earlier steps and not by those of this "
                    f"one, of shape {some([str(tuple(parameter.shape)) for parameter in unread])}. Where parameters "
                    "are sharded over ranks, the same must be read in each step."
                )
            if unread:  # at least not where they were read before
                self._reads.forget(unread)
                results, _ = self._losses(*arguments)
            self._held, self.left_traces = traces.finish(), traces.found
        return results

    def forget(self) -> None:
        """Forgets where parameters are read and what evaluations share, so that the next step finds it out anew."""
        self._reads.forget()
        self._is_watched = False
        if self.module is not None:
            self.prefix = SharedPrefix(self._layers(), self.prefix.keep_bytes)
        if self._stack is not None:
            self._stack = StackedNetwork(self._stack.network, self._stack.size)
        if self._examples is not None:
            self._examples = ExampleNetwork(self._examples.network)
        if self.graphs is not None:
            self.graphs.clear()

    def _found_submodules(self) -> list[nn.Module]:
        """All submodules; if they, or their parameters, are not those of the last step, what was found is forgotten."""
        if self.module is None:
            return []
        if self._submodules is None or not self._submodules.are_same():
            if self._submodules is not None:
                self.forget()
            self._submodules, self._held = Submodules(self.module), ()
        return self._submodules.modules

    def _losses(
        self,
        evaluate: Callable[..., LossAndTerms],
        trainable: Mapping[nn.Parameter, str],
        resting: Mapping[nn.Parameter, str],
        perturbations: Sequence[Perturbations],
        generators: Generators,
        leaves_traces: bool,
        micro_batches: Sequence[MicroBatch] | None,
    ) -> tuple[list[LossAndTerms], list[nn.Parameter]]:
        """Losses with their numbers of terms, and the parameters whose perturbation no function has read."""
        contexts = self._reads.contexts(trainable, resting, perturbations, lambda: evaluate()[0])
        if self._stack is not None and self._reads.has_unseen:
            self._stack = None
            rank_zero_warn("`evaluations_per_forward` is 1 from here on: such parameters cannot be stacked.")
        if self.graphs is not None:
            self.graphs.begin_step(generators)
        if micro_batches is not None:
            self.is_first = leaves_traces
            return self._of_examples(evaluate, micro_batches, contexts, generators, leaves_traces), []
        if self._stack is not None and not contexts[0].in_place:
            self.is_first = leaves_traces
            try:
                return self._stack.evaluate(evaluate, contexts, generators, self.graphs), []
            except CannotStack as error:
                self._stack = None
                for context in contexts:
                    context.seen.clear()  # all functions were watched; below only those in readers are
                rank_zero_warn(
                    f"`evaluations_per_forward` is 1 from here on: {error}. Set it to 1, or freeze a parameter that "
                    "is in the way, or give it a `vector_lr` of 0."
                )
        self.is_first = leaves_traces
        if self.graphs is not None and not self.graphs.is_off:
            return self.graphs.evaluate(evaluate, contexts), contexts[0].unread()
        results = []
        with self.prefix.one_step(generators):
            for context in contexts:
                results.append(self.prefix.evaluate(evaluate, context))
        return results, contexts[0].unread()

    def _of_examples(
        self,
        evaluate: Callable[..., LossAndTerms],
        micro_batches: Sequence[MicroBatch],
        contexts: Sequence[Perturbed],
        generators: Generators,
        leaves_traces: bool,
    ) -> list[LossAndTerms]:
        """The losses of all examples in turn, as many times as there are contexts for each example."""
        results: list[LossAndTerms] = []
        size = sum(len(batch.examples) for batch in micro_batches)
        prefix = self.prefix if self.graphs is None or self.graphs.is_off else None
        with self.prefix.one_step(generators):
            for start in range(0, len(contexts), size):
                own = contexts[start : start + size]
                try:
                    network = self._network_of_examples(own[0])
                    results += network.evaluate(evaluate, micro_batches, own, generators, prefix, self.graphs)
                except CannotStack as error:
                    if not self._runs_one_by_one:
                        rank_zero_warn(f"The network runs once an example from here on, which takes longer: {error}.")
                    self._runs_one_by_one = True
                    if not results and leaves_traces:  # those that stay are of all examples
                        self.is_first = True
                        with own[0]:
                            evaluate(loss=micro_batches[0].loss)
                    for batch in micro_batches:
                        done = len(results) - start
                        results += one_by_one(evaluate, batch, own[done : done + len(batch.examples)])
        return results

    def _network_of_examples(self, context: Perturbed) -> ExampleNetwork:
        """The network that runs examples together.

        Raises:
            CannotStack: if there is no such network.
        """
        if self._runs_one_by_one or self.module is None:
            raise CannotStack("the optimizer is not attached to a module")
        if context.in_place:
            raise CannotStack("some parameters are perturbed in place, which no example has to itself")
        if self._examples is None:
            try:
                self._examples = ExampleNetwork(network_of(self.module, context.perturbations))
            except ValueError:
                name = type(self.module).__name__
                raise CannotStack(f"no submodule of {name} holds all parameters that train") from None
        return self._examples

    def _layers(self) -> Sequence[nn.Module]:
        """The layers that may be skipped; none with sharded parameters, where all ranks must run the same forwards."""
        return () if self._reads.gathered or self.module is None else layers_of(self.module)
