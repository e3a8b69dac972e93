"""Perturbed weights that are never stored: a loss sees ``W + direction`` while ``W`` stays as it is.

While a :class:`Perturbed` context is active, every torch function that is called with a perturbed parameter gets a
scratch copy of ``W + direction`` instead, filled just before the call and reused by the next one. So there is no
restore pass and no drift, memory is one layer above inference, and an exception inside a loss loses nothing. Since the
replacement happens where a weight is read, not where a module owns it, tied weights, functional use and modules that
read another's parameter (``nn.MultiheadAttention``) need no special care. If a trial shows that parameters are read
only in the forward of the modules that own them, which is usually the case, only calls in there are watched.

Code that torch's Python layer cannot see (TorchScript, a compiled network, custom kernels) would silently miss the
perturbation. Parameters that it reads are found before the first step (:mod:`zolightning.evaluation.find_reads`), and
perturbed in place, from a copy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as outside_of_transforms
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from zolightning.directions.low_rank import LowRank
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.tangent import Tangent
from zolightning.evaluation.buffer import Buffer
from zolightning.evaluation.replaced import StandIn, replaced_forwards
from zolightning.evaluation.scratch import Scratch
from zolightning.evaluation.torch_functions import (
    HOST,
    PRODUCTS,
    ByRows,
    describes,
    factors_of,
    is_cut,
    is_transformed,
    linear_in_pieces,
    table_of,
)

_CONTAINERS = (list, tuple)  # in which parameters may be passed to a function

Perturbations = Mapping[nn.Parameter, Perturbation | None]
"""How each parameter is perturbed in an evaluation; None only records that the parameter is read."""


class Perturbed(TorchFunctionMode):
    """A context in which torch functions see perturbed parameters.

    Args:
        perturbations: how each parameter is perturbed. Parameters that are left out are read as they are stored.
        in_place: parameters that are perturbed in place and restored from a copy on exit; their reads are not noticed.
        scratch: buffers to reuse from one context to the next.
        readers: the modules in whose ``forward`` the other parameters are read, and nowhere else
            (:func:`zolightning.evaluation.find_reads.find_readers`); functions called elsewhere then cost nothing
            extra. None watches all functions.

    Attributes:
        is_everywhere: whether all functions are watched, though the readers are known.
        seen: ids of the parameters that some function has read.
    """

    def __init__(
        self,
        perturbations: Perturbations,
        in_place: Iterable[nn.Parameter] = (),
        scratch: Scratch | None = None,
        readers: Iterable[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.perturbations = perturbations
        self.in_place = frozenset(in_place)
        self._ids = set(map(id, perturbations)).difference(map(id, self.in_place))  # that functions are watched for
        self.scratch = scratch or Scratch()
        self.readers = readers
        self.is_everywhere = False
        self.seen: set[int] = set()
        self._restore = ExitStack()
        self._is_paused = False
        self._is_watching = False
        # Small tensors, perturbed together at the first read of one of them, by device and id; None outside the context
        self._small: dict[torch.device, dict[int, Tensor]] | None = None

    @cached_property
    def _by_id(self) -> dict[int, Perturbation | None]:
        """The perturbations of the parameters that functions are watched for, asked for when one is read."""
        return {key: change for p, change in self.perturbations.items() if (key := id(p)) in self._ids}

    def has_touched_any(self) -> bool:
        """Whether any of the parameters may have been read so far."""
        return bool(self.seen or self.in_place)

    def reads_in(self, module: nn.Module) -> bool:
        """Whether a module is one of the readers."""
        return self.readers is not None and module in self.readers

    def unread(self) -> list[nn.Parameter]:
        """The parameters that no function has read so far, without those perturbed in place."""
        if self._ids <= self.seen:
            return []
        return [p for p in self.perturbations if p not in self.in_place and id(p) not in self.seen]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which functions get the stored parameters."""
        self._is_paused = True
        try:
            with self.only_in(()):
                yield
        finally:
            self._is_paused = False

    @contextmanager
    def only_in(self, readers: Iterable[nn.Module] | None) -> Iterator[None]:
        """Watches functions in the forwards of `readers` alone, unless it is None or an inner context is watching."""
        if readers is None or _get_current_function_mode() is not self:
            yield
            return
        super().__exit__(None, None, None)
        try:
            with replaced_forwards(readers, self._forward_of):
                yield
        finally:
            super().__enter__()

    def __enter__(self) -> "Perturbed":
        with ExitStack() as restore:  # an interrupt or a lack of memory in here undoes what was done so far
            # Autocast caches half-precision copies of parameters: stale here, or as large as the model.
            restore.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
            for parameter in self.in_place:
                if (perturbation := self.perturbations[parameter]) is None:
                    continue
                original = parameter.detach().clone(memory_format=torch.contiguous_format)
                perturbed = torch.empty_like(original)
                perturbation.add_to(original, perturbed)
                restore.callback(parameter.detach().copy_, original)
                parameter.detach().copy_(perturbed)
            if self.readers is None or self.is_everywhere:
                super().__enter__()
                restore.push(super().__exit__)
            else:
                restore.enter_context(replaced_forwards(self.readers, self._forward_of))
            self._restore = restore.pop_all()
        self._small = {}
        return self

    def __exit__(self, *exception: Any) -> None:
        self._small = None
        self._restore.__exit__(*exception)

    def _forward_of(self, reader: Any) -> Callable[..., Any]:
        """A forward in which functions are watched."""
        attributes = vars(reader)  # bypasses nn.Module's own attribute access, which takes longer
        is_linear = type(reader).forward is nn.Linear.forward and "forward" not in attributes
        if is_linear and {"weight", "bias"} <= attributes["_parameters"].keys():
            return StandIn(self._linear_forward, reader.forward)
        return StandIn(self._watch, reader.forward)

    def _watch(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replaces the forward of a module that reads parameters: watches the functions called in there."""
        if self._is_watching or self._is_paused:
            return forward(*args, **kwargs)
        self._is_watching = True
        super().__enter__()
        try:
            return forward(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)
            self._is_watching = False

    def _linear_forward(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces the forward of an ``nn.Linear``, which is known to call ``F.linear``: nothing has to be watched."""
        if len(args) != 1 or kwargs or self._is_watching or self._is_paused or is_compiling():
            return self._watch(forward, *args, **kwargs)
        own = forward.__self__._parameters
        return self.run(F.linear, (args[0], own["weight"], own["bias"]), {})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A compiled graph would keep the noise of the step it was traced in.
        if self._is_paused or is_compiling():
            return func(*args, **(kwargs or {}))
        if not self._reads(args) and not (kwargs and self._reads(kwargs.values())):
            return func(*args, **kwargs) if kwargs else func(*args)
        if describes(func):
            return func(*args, **(kwargs or {}))
        return self.run(func, args, kwargs or {})

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a function that was given a parameter, with the perturbed parameter."""
        if is_transformed():
            with outside_of_transforms():  # whose tensors have no memory to write to, and end with the transform
                args = tuple([self.exchange(arg) for arg in args])
                kwargs = {name: self.exchange(arg) for name, arg in kwargs.items()}
            return func(*args, **kwargs)
        if func is F.linear and len(args) == 3 and not kwargs:
            return self._linear(*args)
        if func is F.embedding and (output := self._lookup(args, kwargs)) is not None:
            return output
        if func in PRODUCTS and (output := self._product(func, args, kwargs)) is not None:
            return output
        taken: list[Buffer] = []
        args = tuple([self.exchange(arg, taken) for arg in args])
        kwargs = {name: self.exchange(arg, taken) for name, arg in kwargs.items()}
        output = func(*args, **kwargs)
        if taken:
            self.scratch.give_back(taken, output)  # a view keeps its buffer; the next call gets a new one
        for device in self._small or ():
            self.scratch.small_tensors(device).spare(output)
        return output

    def _reads(self, values: Iterable[Any]) -> bool:
        ids = self._ids
        for value in values:
            if id(value) in ids:
                return True
            if isinstance(value, _CONTAINERS) and self._reads(value):
                return True
        return False

    def exchange(self, value: Any, taken: list[Buffer] | None = None) -> Any:
        """Replaces parameters by perturbed copies, in buffers that are added to `taken`.

        With None, and while autograd records, which may keep its inputs, the copies have memory of their own.
        """
        if isinstance(value, _CONTAINERS):
            return type(value)(self.exchange(v, taken) for v in value) if self._reads(value) else value
        if id(value) not in self._ids:
            return value
        self.seen.add(id(value))
        perturbation = self._by_id[id(value)]
        if perturbation is None:
            return value
        return self._copy(value, perturbation, taken)

    def _copy(self, weight: nn.Parameter, perturbation: Perturbation, taken: list[Buffer] | None) -> Tensor:
        if isinstance(perturbation, Tangent):
            return perturbation.dual(weight)
        if taken is None or torch.is_grad_enabled():
            with torch.no_grad():
                stored = weight.detach().contiguous()
                perturbed = torch.empty_like(stored)
                perturbation.add_to(stored, perturbed)
                return nn.Parameter(perturbed, weight.requires_grad)
        made = None if isinstance(perturbation, LowRank) else self._made(weight)  # for a LowRank it would be the core
        if made is not None:
            return made
        taken.append(buffer := self.scratch.take(weight.device))
        out = buffer.tensor(weight.shape, weight.dtype, weight.requires_grad)
        perturbation.add_to(weight if weight.is_contiguous() else weight.contiguous(), out)
        return out

    def _made(self, parameter: nn.Parameter) -> Tensor | None:
        """The perturbed vector, or the perturbed core of a matrix, if it was made together with others, on a GPU.

        None for tensors that are made separately: larger ones, and all of them while a CUDA graph is recorded, since
        its launches cost the host nothing later.
        """
        device = parameter.device
        if self._small is None or device.type == HOST or torch.is_grad_enabled():
            return None
        if device not in self._small:
            is_recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            watched = ((p, change) for p, change in self.perturbations.items() if id(p) in self._ids)
            self._small[device] = {} if is_recorded else self.scratch.small_tensors(device).make(watched)
        return self._small[device].get(id(parameter))

    def _linear(self, inputs: Any, weight: Any, bias: Any) -> Any:
        """``F.linear`` with perturbed tensors, a separate method because it is called most often."""
        by_id, key = self._by_id, id(weight)
        perturbation = by_id.get(key)
        if isinstance(perturbation, LowRank):
            output = self._product(F.linear, (inputs, weight, bias), {})
            if output is not None:
                return output
        taken: list[Buffer] = []
        if id(inputs) in by_id:
            inputs = self.exchange(inputs, taken)
        if id(bias) in by_id:
            bias = self.exchange(bias, taken)
        if perturbation is None:
            output = F.linear(inputs, self.exchange(weight, taken), bias)
        elif is_cut(weight) and isinstance(perturbation, ByRows):
            self.seen.add(key)
            taken.append(buffer := self.scratch.take(weight.device))
            output = linear_in_pieces(inputs, weight, bias, perturbation, buffer)
        else:
            self.seen.add(key)
            output = F.linear(inputs, self._copy(weight, perturbation, taken), bias)
        if taken:
            self.scratch.give_back(taken)
        return output

    def _lookup(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """``F.embedding`` with a perturbed table; None for calls that do more."""
        if (found := table_of(args, kwargs)) is None:
            return None
        ids, table = found
        perturbation = self._by_id.get(id(table))
        if perturbation is None or isinstance(perturbation, Tangent):
            return None
        self.seen.add(id(table))
        rows = ids.reshape(-1)
        out = torch.empty(rows.numel(), table.shape[1], dtype=table.dtype, device=table.device)
        perturbation.add_to_rows(table.detach().contiguous(), rows, out)
        return out.view(*ids.shape, table.shape[1])

    def _product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The output of a product with a low-rank perturbation, without building the weight; None for other calls."""
        weight, inputs, bias = factors_of(func, args)
        perturbation = self._by_id.get(id(weight))
        if kwargs or not isinstance(perturbation, LowRank) or id(inputs) in self._by_id:
            return None
        taken: list[Buffer] = []
        bias = self.exchange(bias, taken)
        output = perturbation.product(func, inputs, weight.detach(), bias, self._made(weight))
        if output is not None:
            self.seen.add(id(weight))
        self.scratch.give_back(taken)
        return output
