"""The network's forward as CUDA graphs: one call launches all of its kernels.

A forward of a language model launches thousands of kernels from Python, which takes longer than the kernels themselves
if a batch has few tokens. A graph is a forward recorded once, with the kernels that perturb its weights: those read the
keys and coefficients of directions from device memory, so that one graph serves both signs, all queries and all steps.
Before a replay the inputs, and these numbers, are copied to where the graph reads them.

There is one graph for each *key*: shapes, dtypes and strides of the network's inputs, all other arguments by value,
hooks and autocast, which parameters are perturbed and by what kind of perturbation. It is recorded when its key occurs
for the second time, which takes as long as several forwards. So batches should have few different lengths:
:class:`~zolightning.data.batching.LengthBuckets` puts examples of similar length into one batch, and
`pad_to_multiple_of` of the data module rounds lengths up.

Only the network is recorded; the loss around it runs as usual. A network that cannot be recorded (it reads numbers back
from the device, draws random numbers, changes attributes of its modules, or has hooks inside) is detected and runs
without graphs, and one warning says why. Graphs are dropped when parameters, buffers or attributes of modules have been
replaced since the last step; a call around which the loss changes them runs without a graph. The first two replays of a
graph, and the first one in another step, are compared with runs without it, bit for bit.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from zolightning.evaluation.graph_capture import Capture, describe_failure
from zolightning.evaluation.graph_inputs import Arguments, CannotCapture, Parts, Tables, copy_into, static_copy
from zolightning.evaluation.graph_validity import UNSETTLED, Validity, have_same_bits, snapshot_of
from zolightning.evaluation.losses import LossAndTerms
from zolightning.evaluation.outside_memory import OutsideMemory
from zolightning.evaluation.perturbed import Perturbations, Perturbed
from zolightning.evaluation.randomness import Generators
from zolightning.evaluation.replaced import replaced_forward
from zolightning.evaluation.row_groups import RowGroups, watched_everywhere
from zolightning.evaluation.scratch import Scratch
from zolightning.rank_zero import rank_zero_warn

LIMIT = 16  # graphs that are kept: each has its own inputs and outputs, and memory that the driver needs
_PROOFS = 3  # replays that are compared with a run without the graph, the last one in another step


class GraphedNetwork:
    """Evaluates a loss with the forward of a network replayed from graphs.

    Args:
        network: called, once or several times, by the loss.
        capture: records graphs.
        limit: number of graphs to keep. Another key replaces the least used graph once it has occurred twice as often.

    Attributes:
        is_off: whether something has been found that a graph cannot hold; the network then runs without any.
    """

    def __init__(self, network: nn.Module, capture: Capture, limit: int = LIMIT) -> None:
        self.network = network
        self.is_off = False
        self._capture = capture
        self._limit = limit
        self._graphs: dict[Hashable, _Graph] = {}
        self._uses: Counter[Hashable] = Counter()
        self._has_been_full = self._has_seen_changes = False
        self._tables: WeakValueDictionary[Hashable, Tables] = WeakValueDictionary()
        self._validity = Validity(network)
        self._step = 0

    def evaluate(self, evaluate: Callable[[], LossAndTerms], contexts: Sequence[Perturbed]) -> list[LossAndTerms]:
        """The loss and its number of terms under each of several perturbations."""
        results: list[LossAndTerms] = []
        known: dict[int, Parts] = {}
        with watched_everywhere(contexts):
            for context in contexts:
                run = partial(self.run, self.network.forward, context, known)
                with context, replaced_forward(self.network, run):
                    results.append(evaluate())
        return results

    def clear(self) -> None:
        """Forgets all graphs, and what the network held."""
        self._graphs.clear()
        self._uses.clear()
        self._validity.forget()

    def begin_step(self) -> None:
        """Drops graphs that were recorded with other modules, or with their weights at other addresses."""
        if self.is_off:
            return
        self._step += 1
        if not self._validity.is_same():
            self.clear()
        self._validity.begin_step()
        if self._validity.reason:
            self._turn_off(self._validity.reason)

    def _turn_off(self, reason: str) -> None:
        self.is_off = True
        self.clear()
        rank_zero_warn(
            f"`cuda_graphs` is off from here on, and the run continues without graphs: {type(self.network).__name__} "
            f"cannot be replayed, because {reason}."
        )

    def run(
        self,
        own: Callable[..., Any],
        context: Perturbed,
        known: dict[int, Parts],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The network's forward within the active `context`, from a graph if there is one for this call.

        Args:
            own: the forward without a graph.
            context: how each group of rows sees parameters, or how all rows do; it watches all functions.
            known: the parts of perturbations that have been described in this step, by their id; added to.
            *args: the arguments of the forward.
            **kwargs: its keyword arguments.
        """
        # `own` is called instead of the network's `forward`, which would watch
        readers = None if context.reads_in(self.network) else context.readers

        def run() -> Any:
            with context.only_in(readers):
                return own(*args, **kwargs)

        if self.is_off:
            return run()
        try:
            if torch.is_grad_enabled():
                raise CannotCapture("`training_step` differentiates")
            with torch._C.DisableTorchFunction():  # nothing is read here that the context would have to replace
                arguments = Arguments(args, kwargs, self._capture.device)
                parts = Parts.of([_watched(group) for group in _groups(context)], self._capture.device, known)
        except CannotCapture as error:
            self._turn_off(str(error))
            return run()
        if not self._validity.is_as_begun():
            self._note_change()
            return run()
        key = (arguments.key, parts.key, self._validity.hooks(), *_modes(self._capture.device))
        self._uses[key] += 1
        graph = self._graphs.get(key)
        if graph is None:
            output = run()
            # A cache that it has filled may hold what belongs to this perturbation alone, and is emptied afterwards
            if not self._validity.is_changed() and self._uses[key] > 1 and self._has_room(key):
                self._add(key, own, context, readers, arguments, parts, output)
            return output
        output = graph.replay(arguments, parts, self._step)
        if graph.proofs < _PROOFS - (graph.proven_in == self._step):
            expected = run()
            self._prove(graph, output, expected)
            return expected
        context.seen |= graph.twin.seen
        if isinstance(context, RowGroups) and isinstance(graph.twin, RowGroups):
            context.cuts += graph.twin.cuts
        return output

    def _note_change(self) -> None:
        """Warns of calls that find other modules than the step began with, once this is not the run's beginning."""
        if self._step > UNSETTLED and not self._has_seen_changes:
            self._has_seen_changes = True
            rank_zero_warn(
                "`cuda_graphs`: the loss changes buffers, attributes or hooks of the network before it calls it, and "
                "these calls run without a graph."
            )

    def _has_room(self, key: Hashable) -> bool:
        """Whether a graph for this key may be added; drops the least used graph if it is used half as often or less."""
        if len(self._graphs) < self._limit:
            return True
        if not self._has_been_full:
            self._has_been_full = True
            rank_zero_warn(
                f"`cuda_graphs`: batches have more than {self._limit} shapes, and the rarest run without a graph. "
                "Round lengths up (`data.pad_to_multiple_of`) to have fewer shapes."
            )
        least = min(self._graphs, key=lambda other: self._uses[other])
        if self._uses[key] < 2 * self._uses[least]:
            return False
        del self._graphs[least]
        return True

    def _add(
        self,
        key: Hashable,
        own: Callable[..., Any],
        context: Perturbed,
        readers: Iterable[nn.Module] | None,
        arguments: Arguments,
        parts: Parts,
        expected: Any,
    ) -> None:
        """Records a graph, and compares its first replay with `expected`, the output of the network without it."""
        tables = self._tables.get(parts.key)
        if tables is None:
            tables = self._tables[parts.key] = Tables(parts)
        tables.fill(parts, self._step)
        try:
            graph = _Graph(arguments, tables)
            args, kwargs = arguments.with_tensors(graph.inputs)

            def run() -> Any:
                graph.twin = _twin(context, tables.groups)
                graph.twin.readers = readers
                with context.paused(), graph.twin:
                    output = own(*args, **kwargs)
                graph.twin.scratch = Scratch()  # the memory of the one used so far returns to the pool
                return output

            copy_into(graph.inputs, arguments.tensors)
            with OutsideMemory() as outside:
                self._warm_up(run, graph.inputs)
            graph.memory = outside.kept
            graph.output, graph.launch = self._capture.record(run)
            output = graph.replay(arguments, parts, self._step)
        except CannotCapture as error:
            self._turn_off(str(error))
        except Exception as error:
            self._turn_off(describe_failure(error))
        else:
            self._graphs[key] = graph
            self._prove(graph, output, expected)

    def _warm_up(self, run: Callable[[], Any], inputs: Sequence[Tensor]) -> None:
        """Runs the callable once before it is recorded; refuses it if it has effects that a replay would not have."""
        before, generators = snapshot_of(self.network), Generators([self._capture.device])
        states, versions = generators.states(), [tensor._version for tensor in inputs]
        for leaf in tree_flatten(self._capture.warm_up(run))[0]:
            if not isinstance(leaf, Tensor | int | float | str | None):
                raise CannotCapture(f"it returns {type(leaf).__name__}, which a replay would not make anew")
        if not generators.states().equal(states):
            raise CannotCapture("it draws random numbers")
        if not before.is_now():
            raise CannotCapture("it changes what its modules hold, a buffer or a counter")
        if versions != [tensor._version for tensor in inputs]:
            raise CannotCapture("it writes to its inputs")

    def _prove(self, graph: "_Graph", output: Any, expected: Any) -> None:
        graph.proofs, graph.proven_in = graph.proofs + 1, self._step
        if not have_same_bits(output, expected):
            self._turn_off("a replay returned different numbers from a run")


class _Graph:
    """A recorded forward.

    Attributes:
        inputs: the tensors from which it reads the tensors among the arguments.
        output: the output, which each replay overwrites.
        launch: replays it.
        twin: the context in which it was recorded, which knows which parameters were read and which tensors split.
        memory: what it reads of the device's memory besides what it writes.
        proofs: number of replays that have been compared with a run without the graph.
        proven_in: the step of the last of these.
    """

    def __init__(self, arguments: Arguments, tables: Tables) -> None:
        self.inputs = [static_copy(tensor) for tensor in arguments.tensors]
        self.output: Any = None
        self.launch: Callable[[], None]
        self.twin: Perturbed
        self.memory: Mapping[int, torch.UntypedStorage] = {}
        self.proofs = self.proven_in = 0
        self._tables = tables

    def replay(self, arguments: Arguments, parts: Parts, step: int) -> Any:
        """The output of the forward for these arguments and perturbations, as a copy."""
        with torch._C.DisableTorchFunction():
            self._tables.fill(parts, step)
            copy_into(self.inputs, arguments.tensors)
        self.launch()
        return tree_map_only(Tensor, Tensor.clone, self.output)


def _groups(context: Perturbed) -> Sequence[Perturbed]:
    return context.groups if isinstance(context, RowGroups) else [context]


def _twin(context: Perturbed, groups: Sequence[Perturbations]) -> Perturbed:
    """A copy of a context with other perturbations and its own scratch memory."""
    scratch = Scratch()
    contexts = [Perturbed(group, scratch=scratch) for group in groups]
    if not isinstance(context, RowGroups):
        return contexts[0]
    return RowGroups(contexts, context.rows, context.held, context.memory)


def _watched(context: Perturbed) -> Perturbations:
    """The perturbations that a graph has to apply; parameters perturbed in place are read as they are."""
    if not context.in_place:
        return context.perturbations
    return {p: change for p, change in context.perturbations.items() if p not in context.in_place}


def _modes(device: torch.device) -> tuple[Hashable, ...]:
    is_autocast = torch.is_autocast_enabled(device.type)
    return torch.is_inference_mode_enabled(), is_autocast and torch.get_autocast_dtype(device.type)
