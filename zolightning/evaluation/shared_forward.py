"""Runs a network once for several evaluations of a step, each of which has its own rows."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.losses import LossAndTerms
from zolightning.evaluation.nested import map_tensors, tensors_in
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.randomness import Generators
from zolightning.evaluation.row_groups import CannotStack, RowGroups

_OTHER_INPUTS = "the network is called with other inputs in each evaluation"


class Call(NamedTuple):
    """A call of a network, which ran for all evaluations at once."""

    inputs: list[Tensor]
    versions: list[int | None]  # of the inputs: how often each had been written to
    output: Any
    rows: int  # of the output, all evaluations together


class SharedForward:
    """Stands in for a network during several evaluations: it runs in the first one, on the rows of all of them.

    :meth:`forward` and :meth:`generate` replace the network's methods. In the first evaluation they run the network and
    return the first evaluation's rows of the output; in later ones they return the rows of that evaluation. In the end
    :func:`require_same_inputs` must be called with `differ`.

    Args:
        network: the network.
        contexts: how each evaluation sees parameters, all functions being watched.
        graphs: the network's forward as CUDA graphs, if any.
    """

    def __init__(self, network: nn.Module, contexts: Sequence[Perturbed], graphs: GraphedNetwork | None) -> None:
        self.losses: list[LossAndTerms] = []
        self.calls: list[Call] = []
        self.cuts: list[Any] = []  # which tensors were split, in order
        self._contexts = contexts
        self._network = network
        self._network_forward = network.forward
        self._network_generate = getattr(network, "generate", None)
        self._is_writing = False
        self.prompts: list[dict[str, Tensor]] = []  # the inputs of each call of `generate`, if it is a decoder's
        self._graphs = graphs
        buffers = dict(network.named_buffers())
        self._memory = {buffer.untyped_storage().data_ptr() for buffer in buffers.values() if buffer.numel()}
        self._held = {id(buffer): name for name, buffer in buffers.items()}
        parameters = dict(network.named_parameters())
        self._held |= {id(parameter): name for name, parameter in parameters.items()}
        self._generators = Generators({parameter.device for parameter in parameters.values()})
        self._call = 0
        self.differ: list[Tensor] = []  # whether an input of a later evaluation has other values, on its device

    def evaluate(self, context: Perturbed, evaluate: Callable[[], LossAndTerms]) -> None:
        """Evaluates a loss in its context, in which the network is replaced, and adds the result to `losses`."""
        self._call = 0
        with context:
            self.losses.append(evaluate())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_writing:
            return self._network_forward(*args, **kwargs)
        inputs = tensors_in((args, kwargs))
        if not self.losses:
            self.run(inputs, args, kwargs)
        return self.output_for(inputs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the network's ``generate`` in this evaluation; the texts of all evaluations grow together."""
        inputs = tensors_in((args, kwargs))
        if not self.losses:
            self._is_writing = True
            try:
                self.run(inputs, args, kwargs)
            finally:
                self._is_writing = False
            if not getattr(getattr(self._network, "config", None), "is_encoder_decoder", False):
                self.prompts.append({name: kwargs[name] for name in ("input_ids", "attention_mask") if name in kwargs})
        return self.output_for(inputs)

    def output_for(self, inputs: list[Tensor]) -> Any:
        """The network's output in this evaluation, which has called it with `inputs`."""
        if self._call >= len(self.calls):
            raise CannotStack("the network is called more often in one evaluation than in another")
        call = self.calls[self._call]
        expected = [self.given(tensor, call) for tensor in call.inputs]
        if list(map(_layout, inputs)) != list(map(_layout, expected)):
            raise CannotStack(_OTHER_INPUTS)
        if list(map(_version, call.inputs)) != call.versions:
            raise CannotStack("an input of the network is changed in place between evaluations")
        self.differ += [(one != other).any() for one, other in zip(inputs, expected, strict=True) if one is not other]
        self._call += 1
        return _part(call.output, len(self.losses), len(self._contexts), call.rows)

    def given(self, tensor: Tensor, call: Call) -> Tensor:
        """The input that this evaluation must give to the network if the first one gave it `tensor`."""
        return tensor

    def count_rows(self, rows: int) -> int:
        """The number of rows that the network runs on when it is called with `rows` rows."""
        return len(self._contexts) * rows

    def spread(self, tensor: Tensor) -> Tensor:
        """The input that the network runs on when it is called with `tensor`, which has rows."""
        return tensor.repeat(len(self._contexts), *[1] * (tensor.ndim - 1))

    def run(self, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs the network for all evaluations."""
        rows = next((len(tensor) for tensor in inputs if tensor.ndim), 0)
        if not rows:
            raise CannotStack("the network is called without a tensor that has rows")

        def spread(tensor: Tensor) -> Tensor:
            is_rows = bool(tensor.ndim) and len(tensor) == rows
            self.cuts.append(is_rows)
            return self.spread(tensor) if is_rows else tensor

        args, kwargs = map_tensors(spread, (args, kwargs))
        total = self.count_rows(rows)
        stacked = RowGroups(self._contexts, total, self._held, self._memory)
        function: Any = self._network_generate if self._is_writing else self._network_forward
        graphs = None if self._is_writing else self._graphs
        # The network's own forward runs, not the one that would watch
        stacked.is_everywhere = graphs is not None or stacked.reads_in(self._network)
        if graphs is not None:
            function = partial(graphs.run, function, stacked, {})
        before = self._generators.states()
        try:
            with self._contexts[0].paused(), stacked:
                output = function(*args, **kwargs)
        except CannotStack:
            raise
        except Exception as error:  # the same network without repeated rows will tell if it is to blame
            raise CannotStack(f"the network fails on stacked rows: {type(error).__name__}: {error}") from error
        if not self._generators.states().equal(before):
            raise CannotStack("the network draws random numbers, and stacked rows would not draw the same ones")
        # Texts differ in length; what is split is the same at every token.
        self.cuts += [frozenset(stacked.cuts)] if self._is_writing else stacked.cuts
        self.calls.append(Call(inputs, list(map(_version, inputs)), output, total))


def require_same_inputs(differ: Sequence[Tensor]) -> None:
    """Raises CannotStack if any of the ``differ`` of some runs is True.

    It waits for the device, so it is called once for all runs of a step; not if no evaluation created its own inputs.
    """
    if differ and torch.stack([each.to(differ[0].device) for each in differ]).any():
        raise CannotStack(_OTHER_INPUTS)


def one_by_one(evaluations: Iterable[Callable[[], LossAndTerms]], contexts: Iterable[Perturbed]) -> list[LossAndTerms]:
    """The result of each evaluation in its context, each by its own run of the network."""
    results = []
    for evaluate, context in zip(evaluations, contexts, strict=True):
        with context:
            results.append(evaluate())
    return results


def computes_in_half(network: nn.Module, device: torch.device) -> bool:
    """Whether a network may multiply in half precision, where the rounding of kernels depends on the number of rows."""
    is_autocast = torch.is_autocast_enabled(device.type)
    return is_autocast or any(parameter.element_size() == 2 for parameter in network.parameters())


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _version(tensor: Tensor) -> int | None:
    """A number that grows with each write to a tensor; None for inference tensors, for which torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _part(output: Any, index: int, count: int, rows: int) -> Any:
    def part(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) % rows:
            raise CannotStack(
                f"the network returns a tensor of shape {tuple(tensor.shape)} for {rows} rows, which cannot be split; "
                "a loss must be computed outside of the network"
            )
        return tensor.chunk(count)[index]

    return map_tensors(part, output)
