"""Several evaluations of a step by one run of the network, on the batch repeated once for each of them.

What small batches wait for is then done less often: a low-rank method multiplies by stored weights and by shared
factors once for all evaluations, and a dense one reads each weight and draws its noise once for both signs of a
direction. Activations take as many times the memory.

The loss is a function of whoever wrote it, so it is evaluated as often as ever, and each time with its own
perturbation: only the network inside it is replaced. In the first evaluation it runs on the repeated rows, each
group of them under the perturbation of one evaluation, and returns the first group's output; in the others it
returns what it has. Where a network does not let itself be run like this, :class:`CannotStack` says why.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from zolightning.directions.flipped_bit import FlippedBit
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.randomness import Generators
from zolightning.evaluation.row_groups import CannotStack, RowGroups, perturbed_by, tensors_in
from zolightning.evaluation.shared_prefix import replaced_forward

Evaluate = Callable[[], tuple[Tensor, Tensor]]

_OTHER_INPUTS = "the network is called with other inputs in each evaluation"


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
            found, cuts = self._stacked(evaluate, chunk)
            if cuts is not None and cuts not in self._trusted:
                if self._agrees(evaluate, chunk):
                    self._trusted.add(cuts)
                else:
                    found = _one_by_one(evaluate, chunk)
            results += found
        return results

    def _stacked(
        self, evaluate: Evaluate, contexts: Sequence[Perturbed]
    ) -> tuple[list[tuple[Tensor, Tensor]], tuple[Any, ...] | None]:
        """Losses, and where tensors were cut; None for a batch without terms, which does without the network."""
        run = NetworkRun(self.network, contexts, self._generators, self._graphs)
        with replaced_forward(self.network, run.forward):
            for context in contexts:
                with context:
                    run.begin()
                    run.losses.append(evaluate())
        run.finish()
        if not run.calls and not any(terms for _, terms in run.losses):
            return run.losses, None
        if not run.calls:
            raise CannotStack(f"`training_step` does not call the {type(self.network).__name__} that is trained")
        return run.losses, (len(contexts), *run.cuts)

    def _agrees(self, evaluate: Evaluate, contexts: Sequence[Perturbed]) -> bool:
        """Whether stacked losses are right where every other group changes by a few percent: more than `eps` would.

        False where a loss is not finite, so that nothing can be compared.
        """
        flip = FlippedBit()
        parameters = perturbed_by(contexts)
        changed = [Perturbed(dict.fromkeys(parameters, flip if i % 2 else None)) for i in range(len(contexts))]
        plain, flipped = (loss for loss, _ in _one_by_one(evaluate, changed[:2]))
        found = torch.stack([loss for loss, _ in self._stacked(evaluate, changed)[0]])
        expected = torch.stack([flipped if i % 2 else plain for i in range(len(changed))])
        if not torch.isfinite(expected).all():
            return False
        autocast = torch.is_autocast_enabled(plain.device.type)
        half = autocast or any(parameter.element_size() == 2 for parameter in self.network.parameters())
        # Kernels round in another way for another number of rows.
        tolerance = (5e-3 if half else 1e-5) * plain.abs() + 0.05 * (flipped - plain).abs()
        if not (found - expected).abs().le(tolerance).all():
            raise CannotStack(
                f"the losses of {type(self.network).__name__} for repeated rows, {found.tolist()}, are not those of "
                f"separate runs, {expected.tolist()}: its rows are not along the first dimension, or not independent"
            )
        return True


class Call(NamedTuple):
    """A call of a network, which ran for all evaluations at once."""

    inputs: list[Tensor]
    versions: list[int | None]  # of the inputs: how often each had been written to
    output: Any
    rows: int  # of the output, all evaluations together


class NetworkRun:
    """The calls of a network during some evaluations: in the first of them it runs for all, each with rows of its own.

    Args:
        network: whose calls they are.
        contexts: how each evaluation sees parameters.
        generators: what evaluations draw from.
        graphs: the network's forward as CUDA graphs, if any.
    """

    def __init__(
        self,
        network: nn.Module,
        contexts: Sequence[Perturbed],
        generators: Generators,
        graphs: GraphedNetwork | None,
    ) -> None:
        self.losses: list[tuple[Tensor, Tensor]] = []
        self.calls: list[Call] = []
        self.cuts: list[Any] = []  # decisions taken on the way
        self._contexts = contexts
        self._generators = generators
        self._network = network
        self._network_forward = network.forward
        self._graphs = graphs
        self._held = {id(buffer): name for name, buffer in network.named_buffers()}
        self._held |= {id(parameter): name for name, parameter in network.named_parameters()}
        self._call = 0
        self._differ: list[Tensor] = []  # whether an input of a later evaluation has other values, on its device

    def begin(self) -> None:
        """Starts an evaluation; those finished so far are in `losses`."""
        self._call = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = tensors_in((args, kwargs))
        if not self.losses:
            self.run(inputs, args, kwargs)
        return self.output_for(inputs)

    def output_for(self, inputs: list[Tensor]) -> Any:
        """What the network returns in this evaluation, which calls it with `inputs`."""
        if self._call >= len(self.calls):
            raise CannotStack("the network is called more often in one evaluation than in another")
        call = self.calls[self._call]
        expected = [self.given(tensor, call) for tensor in call.inputs]
        if list(map(_layout, inputs)) != list(map(_layout, expected)):
            raise CannotStack(_OTHER_INPUTS)
        if list(map(_version, call.inputs)) != call.versions:
            raise CannotStack("an input of the network is changed in place between evaluations")
        self._differ += [(one != other).any() for one, other in zip(inputs, expected, strict=True) if one is not other]
        self._call += 1
        return _part(call.output, len(self.losses), len(self._contexts), call.rows)

    def given(self, tensor: Tensor, call: "Call") -> Tensor:
        """What this evaluation calls the network with, where the first one has called it with `tensor`."""
        return tensor

    def count_rows(self, rows: int) -> int:
        """Rows of the run, given those of a call."""
        return len(self._contexts) * rows

    def spread(self, tensor: Tensor) -> Tensor:
        """Rows of the run, given those of a call."""
        return tensor.repeat(len(self._contexts), *[1] * (tensor.ndim - 1))

    def finish(self) -> None:
        """Ends the last evaluation: the only place that waits for a device, and only where inputs were made anew.

        Raises:
            CannotStack: if the inputs of an evaluation had other values than those of the first.
        """
        if self._differ and torch.stack([differ.to(self._differ[0].device) for differ in self._differ]).any():
            raise CannotStack(_OTHER_INPUTS)

    def run(self, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs the network for all evaluations."""
        rows = next((len(tensor) for tensor in inputs if tensor.ndim), 0)
        if not rows:
            raise CannotStack("the network is called without a tensor that has rows")

        def spread(tensor: Tensor) -> Tensor:
            is_rows = bool(tensor.ndim) and len(tensor) == rows
            self.cuts.append(is_rows)
            return self.spread(tensor) if is_rows else tensor

        args, kwargs = apply_to_collection((args, kwargs), Tensor, spread)
        total = self.count_rows(rows)
        stacked = RowGroups(self._contexts, total, self._held)
        if stacked.readers is not None and self._network in stacked.readers:
            stacked.readers = None  # its own forward runs, past the one that would watch
        forward = self._network_forward
        if self._graphs is not None:
            forward = partial(self._graphs.run, forward, stacked)
        before = self._generators.states()
        try:
            with self._contexts[0].paused(), stacked:
                output = forward(*args, **kwargs)
        except CannotStack:
            raise
        except Exception as error:  # the same network without repeated rows will tell if it is to blame
            raise CannotStack(f"the network fails on stacked rows: {type(error).__name__}: {error}") from error
        if not self._generators.states().equal(before):
            raise CannotStack("the network draws random numbers, and stacked rows would not draw the same ones")
        self.cuts += stacked.cuts
        self.calls.append(Call(inputs, list(map(_version, inputs)), output, total))


def _one_by_one(evaluate: Evaluate, contexts: Sequence[Perturbed]) -> list[tuple[Tensor, Tensor]]:
    results = []
    for context in contexts:
        with context:
            results.append(evaluate())
    return results


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _version(tensor: Tensor) -> int | None:
    """Grows with each write to a tensor's memory; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _part(output: Any, index: int, count: int, rows: int) -> Any:
    def part(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) % rows:
            raise CannotStack(
                f"the network returns a tensor of shape {tuple(tensor.shape)} for {rows} rows, which cannot be split; "
                "a loss must be computed outside of the network"
            )
        return tensor.chunk(count)[index]

    return apply_to_collection(output, Tensor, part)
