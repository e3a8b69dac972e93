"""Only the first evaluation of a step leaves traces in the module.

A loss may change its module: running statistics, metrics (torchmetrics), counters, lists, a hidden state carried from
batch to batch, an exponential moving average of the weights in a teacher. Every evaluation of a step begins with the
state before the step, and after the step the module is in the state after the first evaluation.

Covered are buffers, frozen parameters, forward hooks, and attributes of submodules that are numbers, tensors, random
number generators, or lists, dictionaries, sets and deques of these. Other objects behind an attribute, and files, are
not covered. The memory is a copy of each tensor that an evaluation writes to, which is found out by watching the first
one. If a large tensor (above 4,096 elements) is written to for the first time in a later step, the other evaluations of
that one step begin with what the first one left in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zolightning.evaluation.forward_hooks import ForwardHooks
from zolightning.evaluation.snapshot import Lasting, Snapshot, TensorSnapshot

_NOTHING = Snapshot((), set(), frozenset())


class Traces:
    """Undoes what the evaluations of a step write, except for the first one.

    From step to step it remembers which tensors evaluations write to, and which parts of the modules have not changed.
    """

    def __init__(self) -> None:
        self._modules: Sequence[nn.Module] = ()
        self._hooks = ForwardHooks()
        self._perturbed: Set[int] = frozenset()
        self._written: set[int] = set()  # ids of tensors that evaluations write to
        self._is_watched = False  # whether one evaluation has been watched for these
        self._lasting: Lasting = ()  # what the modules held before the last step
        self._before = _NOTHING
        self._first: Snapshot | None = None  # after the first evaluation, if it wrote anything

    def forget(self) -> None:
        """Makes the next evaluation be watched again, and the state of all modules be read again."""
        self._is_watched, self._modules, self._lasting = False, (), ()

    @contextmanager
    def step(self, modules: Sequence[nn.Module], perturbed: Set[int]) -> Iterator[None]:
        """A context for the evaluations of a step, at whose end the module is in the state after the first one.

        Args:
            modules: all submodules of the network, in one object for as long as they are the same; none if only a
                function is known.
            perturbed: ids of the parameters that the evaluations perturb.
        """
        if modules is not self._modules or perturbed != self._perturbed:
            self._modules, self._perturbed, self._lasting = modules, perturbed, ()
            self._hooks = ForwardHooks(modules)
        self._before = Snapshot(modules, self._written, perturbed, self._lasting, self._hooks)
        try:
            yield
            if self._first is not None:
                self._first.restore()
            self._lasting = self._before.lasting()
        finally:
            self._before, self._first = _NOTHING, None  # which hold copies of tensors

    def evaluate(self, evaluate: Callable[[], Any], is_first: bool) -> Any:
        """Evaluates a loss and undoes what it wrote, even if it fails; `is_first` keeps it for the step's end."""
        is_written = True
        try:
            result = evaluate()
            is_written = not self._before.is_now()
            if is_first and is_written:
                lasting = self._before.lasting()
                self._first = Snapshot(self._modules, self._written, self._perturbed, lasting, self._hooks)
            return result
        finally:
            self._is_watched = True
            if is_written:
                self._before.restore()

    @property
    def found(self) -> bool:
        """Whether the first evaluation of the present step wrote anything."""
        return self._first is not None

    def watched(self) -> AbstractContextManager[object]:
        """A context for an evaluation, the very first of which copies large tensors just before they are written to."""
        return nullcontext() if self._is_watched else CopyOnWrite(self._before, self._written)


class CopyOnWrite(TorchFunctionMode):
    """Copies tensors without a copy before a function of torch's writes to them."""

    def __init__(self, snapshot: Snapshot, written: set[int]) -> None:
        super().__init__()
        self._written = written
        self._by_storage: dict[int, list[TensorSnapshot]] = {}
        for large in snapshot.large():
            self._by_storage.setdefault(_storage(large.tensor), []).append(large)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._by_storage and _writes(func.__name__, kwargs):
            for tensor in _tensors((args[:1], kwargs.get("out"))):
                for owner in self._by_storage.get(_storage(tensor), ()):
                    owner.add_copy()
                    self._written.add(id(owner.tensor))
        return func(*args, **kwargs)


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes to its first argument, or to `out`, by the naming rules of torch."""
    is_in_place = name.endswith("_") and not name.endswith("__")
    return is_in_place or name in ("__setitem__", "__set__") or name.startswith("__i") or "out" in kwargs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _tensors(member)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # no memory of its own: sparse, meta, or inside a function transform
        return 0
