"""Several evaluations of a step by one run of the network, on the batch repeated once for each of them.

The weights are then read once for all evaluations instead of once for each, which is what small batches wait for,
and a low-rank method multiplies by its shared factors once. Activations take as many times the memory.

The loss is a function of whoever wrote it, so it is evaluated as often as ever, and each time with its own
perturbation: only the network inside it is replaced. In the first evaluation it runs on the repeated rows, each
group of them under the perturbation of one evaluation, and returns the first group's output; in the others it
returns what it has. Where a network does not let itself be run like this, :class:`CannotStack` says why.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from zolightning.directions.low_rank import LowRank, stacked_product
from zolightning.directions.perturbation import Perturbation
from zolightning.evaluation.perturbed import PRODUCTS, Perturbed, factors_of
from zolightning.evaluation.randomness import Generators
from zolightning.evaluation.reads import FlippedBit
from zolightning.evaluation.shared_prefix import replaced_forward

Evaluate = Callable[[], tuple[Tensor, Tensor]]

_ELEMENTWISE = frozenset({Tensor.mul, Tensor.add, torch.mul, torch.add})


class CannotStack(Exception):
    """Why the evaluations of a step cannot be stacked."""


def network_of(module: nn.Module, parameters: Iterable[nn.Parameter]) -> nn.Module:
    """The outermost submodule with a forward of its own that holds all `parameters`.

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
        "`evaluations_per_forward` above 1 needs one submodule that holds all trainable parameters and is called in "
        f"`training_step`, and {type(module).__name__} has none such: its children are {children}. Put the network "
        "into one module, or leave `evaluations_per_forward` at 1."
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

    @torch.no_grad()
    def evaluate(
        self, evaluate: Evaluate, contexts: Sequence[Perturbed], generators: Generators
    ) -> list[tuple[Tensor, Tensor]]:
        """Losses and their weights under each of some perturbations, none in place.

        Where the network has not been run with the same arguments repeated and the same tensors cut before, its
        losses are compared with those of separate runs first.

        Raises:
            CannotStack: if the network cannot be run like this, or gives other losses.
        """
        self._generators = generators
        results: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(contexts), self.size):
            chunk = contexts[start : start + self.size]
            if len(chunk) == 1:
                results += _one_by_one(evaluate, chunk)
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
        run = _Run(self.network, contexts, self._generators)
        with replaced_forward(self.network, run.forward):
            for context in contexts:
                with context:
                    run.begin()
                    run.losses.append(evaluate())
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
        parameters = _perturbed_by(contexts)
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


class _Run:
    """The calls of a network during the evaluations of one chunk."""

    def __init__(self, network: nn.Module, contexts: Sequence[Perturbed], generators: Generators) -> None:
        self.losses: list[tuple[Tensor, Tensor]] = []
        self.calls: list[tuple[list[Tensor], Any, int]] = []  # inputs, stacked output and its rows
        self.cuts: list[Any] = []  # decisions taken on the way
        self._contexts = contexts
        self._generators = generators
        self._network = network
        self._network_forward = network.forward
        self._held = {id(buffer): name for name, buffer in network.named_buffers()}
        self._held |= {id(parameter): name for name, parameter in network.named_parameters()}
        self._call = 0

    def begin(self) -> None:
        """Starts an evaluation; those finished so far are in `losses`."""
        self._call = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = _tensors((args, kwargs))
        if not self.losses:
            self._run(inputs, args, kwargs)
        if self._call >= len(self.calls):
            raise CannotStack("the network is called more often in one evaluation than in another")
        first_inputs, output, rows = self.calls[self._call]
        if len(inputs) != len(first_inputs) or not all(map(torch.equal, inputs, first_inputs)):
            raise CannotStack("the network is called with other inputs in each evaluation")
        self._call += 1
        return _part(output, len(self.losses), len(self._contexts), rows)

    def _run(self, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count = len(self._contexts)
        rows = next((len(tensor) for tensor in inputs if tensor.ndim), 0)
        if not rows:
            raise CannotStack("the network is called without a tensor that has rows to repeat")

        def repeat(tensor: Tensor) -> Tensor:
            is_rows = bool(tensor.ndim) and len(tensor) == rows
            self.cuts.append(is_rows)
            return tensor.repeat(count, *[1] * (tensor.ndim - 1)) if is_rows else tensor

        args, kwargs = apply_to_collection((args, kwargs), Tensor, repeat)
        stacked = Stacked(self._contexts, count * rows, self._held)
        if stacked.readers is not None and self._network in stacked.readers:
            stacked.readers = None  # its own forward runs, past the one that would watch
        before = self._generators.states()
        try:
            with self._contexts[0].paused(), stacked:
                output = self._network_forward(*args, **kwargs)
        except CannotStack:
            raise
        except Exception as error:  # the same network without repeated rows will tell if it is to blame
            raise CannotStack(f"the network fails on repeated rows: {type(error).__name__}: {error}") from error
        if not self._generators.states().equal(before):
            raise CannotStack("the network draws random numbers, and repeated rows would not draw the same ones")
        self.cuts += stacked.cuts
        self.calls.append((inputs, output, count * rows))


class Stacked(Perturbed):
    """A context in which the rows of a batch come in groups, and each group sees parameters perturbed in its own way.

    Args:
        groups: what each group would see; none of them perturbs in place.
        rows: of all groups together. Tensors whose first dimension is a multiple of it are cut.
        held: tensors of the network, which are not cut whatever their shape, and their names; by id.
    """

    def __init__(self, groups: Sequence[Perturbed], rows: int, held: Mapping[int, str]) -> None:
        super().__init__(_perturbed_by(groups), scratch=groups[0].scratch, readers=groups[0].readers)
        self.groups = groups
        self.rows = rows
        self.held = held
        self.cuts: list[tuple[Any, ...]] = []  # which parameter was read, and which arguments beside it were cut

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():  # the contexts around this one have nothing to do with it
            return self._run(func, args, kwargs)

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = _arguments(args, kwargs)
        cut = [self._has_rows(tensor) for tensor in tensors]
        held = [id(tensor) for tensor in tensors if id(tensor) in self.held]
        self.cuts.append((func, *held, *cut))
        if func in PRODUCTS and (output := self._stacked_product(func, args, kwargs)) is not None:
            return output
        if func in _ELEMENTWISE and (output := self._broadcast(func, args, kwargs)) is not None:
            return output
        count = len(self.groups)
        outputs = []
        for index, group in enumerate(self.groups):

            def part(tensor: Tensor, index: int = index) -> Tensor:
                return tensor.chunk(count)[index] if self._has_rows(tensor) else tensor

            own_args, own_kwargs = apply_to_collection((args, kwargs), Tensor, part)
            outputs.append(group.run(func, own_args, own_kwargs))
        if not any(cut):
            outputs = [self._spread(output, index, tensors) for index, output in enumerate(outputs)]
        return _joined(outputs)

    def _has_rows(self, tensor: Tensor) -> bool:
        return bool(tensor.ndim) and len(tensor) % self.rows == 0 and id(tensor) not in self.held

    def _spread(self, output: Any, index: int, tensors: list[Tensor]) -> Tensor:
        """A group's rows of an output that was made without rows: position embeddings, a class token."""
        group_rows = self.rows // len(self.groups)
        if isinstance(output, Tensor) and output.ndim > 1 and len(output) in (1, self.rows):
            return output.expand(self.rows, *output.shape[1:])[:group_rows]
        names = ", ".join(f"`{self.held[id(tensor)]}`" for tensor in tensors if id(tensor) in self.held)
        raise CannotStack(f"the network reads {names} without the rows of a batch")

    def _stacked_product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The output of low-rank perturbations in one basis; None for all other products."""
        weight, inputs, bias = factors_of(func, args)
        found = [p for group in self.groups if isinstance(p := group.perturbations.get(weight), LowRank)]
        if kwargs or len(found) < len(self.groups) or not self._has_rows(inputs):
            return None
        taken: list[Tensor] = []
        biases = [group.exchange(bias, taken) for group in self.groups]
        output = stacked_product(found, func, inputs, weight.detach(), biases)
        for scratch in taken:
            self.scratch.give_back(scratch)
        return output

    def _broadcast(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The output for a parameter that all rows share, a norm's gain: groups are then a dimension of its own."""
        if kwargs or len(args) != 2 or not all(isinstance(arg, Tensor) for arg in args):
            return None
        is_first = id(args[0]) in self.held
        weight, inputs = args if is_first else args[::-1]
        # A tensor without dimensions would no longer leave the output's dtype to the other one.
        if not self._has_rows(inputs) or not 0 < weight.ndim < inputs.ndim:
            return None
        taken: list[Tensor] = []
        weights = torch.stack([group.exchange(weight, taken) for group in self.groups])
        for scratch in taken:
            self.scratch.give_back(scratch)
        weights = weights.view(len(weights), *[1] * (inputs.ndim - weight.ndim), *weight.shape)
        parts = inputs.unflatten(0, (len(weights), -1))
        return func(*((weights, parts) if is_first else (parts, weights))).flatten(0, 1)


def _one_by_one(evaluate: Evaluate, contexts: Sequence[Perturbed]) -> list[tuple[Tensor, Tensor]]:
    results = []
    for context in contexts:
        with context:
            results.append(evaluate())
    return results


def _perturbed_by(contexts: Sequence[Perturbed]) -> dict[nn.Parameter, Perturbation]:
    return {p: w for context in contexts for p, w in context.perturbations.items() if w is not None}


def _tensors(data: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    apply_to_collection(data, Tensor, keep)
    return found


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a function is called with: seldom in containers, which take long to search."""
    values = [*args, *kwargs.values()]
    if any(isinstance(value, list | tuple | dict) for value in values):
        return _tensors(values)
    return [value for value in values if isinstance(value, Tensor)]


def _part(output: Any, index: int, count: int, rows: int) -> Any:
    def part(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) % rows:
            raise CannotStack(
                f"the network returns a tensor of shape {tuple(tensor.shape)} for {rows} rows, which cannot be split; "
                "a loss must be computed outside of the network"
            )
        return tensor.chunk(count)[index]

    return apply_to_collection(output, Tensor, part)


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, list | tuple):
        return type(first)(_joined(list(members)) for members in zip(*outputs, strict=True))
    if first is None:
        return None
    raise CannotStack(f"a function returns {type(first).__name__} for a parameter")
