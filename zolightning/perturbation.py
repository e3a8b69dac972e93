"""Perturbed weights that are never stored: a loss sees ``W + direction`` while ``W`` stays as it is.

While a :class:`Perturbed` context is active, every torch function that is handed a perturbed parameter gets a
scratch copy of ``W + direction`` instead, filled just before the call and reused by the next one. So there is no
restore pass and no drift, memory is one layer above inference, and an exception inside a loss loses nothing. Since
the exchange happens where a weight is read, not where a module owns it, tied weights, functional use and modules
that read another's parameter (``nn.MultiheadAttention``) need no special care.

Code that torch's Python layer cannot see (TorchScript, a compiled network, custom kernels) would silently miss the
perturbation. :func:`audit` finds such parameters before the first step; they are perturbed in place, from a copy.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Getters that return a tensor that holds the parameter's values; all others (shape, dtype, ...) only describe it.
_VALUE_GETTERS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_DESCRIPTIONS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "__len__"}
    | {"is_floating_point", "is_complex", "__hash__", "get_device", "storage_offset"}
)


class Perturbation(Protocol):
    """Anything that can write a perturbed weight: a :class:`~zolightning.direction.Direction`, for one."""

    def add_to(self, weight: Tensor, out: Tensor) -> None:
        """Writes the perturbed `weight` to `out`; both contiguous, of the same shape and dtype."""

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        """Writes the perturbed ``table[rows]`` to `out`."""


class Scratch:
    """Buffers that successive layers share; the largest layer decides their size."""

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Tensor]] = {}

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of the shape, dtype and device of `like`."""
        free = self._free.setdefault(like.device, [])
        size = like.numel() * like.element_size()
        buffer = free.pop() if free else None
        if buffer is None or buffer.numel() < size:
            del buffer
            buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        return buffer[:size].view(like.dtype).view(like.shape)

    def give_back(self, tensor: Tensor) -> None:
        """Makes the memory of `tensor`, from :meth:`take`, available again."""
        storage = tensor.untyped_storage()
        buffer = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        self._free[tensor.device].append(buffer)


class Perturbed(TorchFunctionMode):
    """A context in which torch functions see perturbed parameters.

    Args:
        perturbations: what to do to each parameter; the others are left alone.
        in_place: parameters to be perturbed where they lie, restored from a copy on exit.
        scratch: buffers to reuse from one context to the next.
    """

    def __init__(
        self,
        perturbations: Mapping[nn.Parameter, Perturbation],
        in_place: Iterable[nn.Parameter] = (),
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__()
        self._in_place = {p: perturbations[p] for p in in_place if p in perturbations}
        self._perturbations = {id(p): w for p, w in perturbations.items() if p not in self._in_place}
        self._scratch = scratch or Scratch()
        self._restore = ExitStack()
        self.seen: set[int] = set()  # ids of the parameters that some function has read

    def __enter__(self) -> "Perturbed":
        with ExitStack() as restore:  # an interrupt or a lack of memory on the way restores what was done so far
            # Autocast keeps its half-precision copies of parameters: stale here, or as large as the model.
            restore.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
            for parameter, perturbation in self._in_place.items():
                original = parameter.detach().clone(memory_format=torch.contiguous_format)
                perturbed = torch.empty_like(original)
                perturbation.add_to(original, perturbed)
                restore.callback(parameter.detach().copy_, original)
                parameter.detach().copy_(perturbed)
            super().__enter__()
            self._restore = restore.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        with self._restore:
            super().__exit__(*exception)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled graph would keep the noise of the step it was traced in
            return func(*args, **kwargs)
        if (not self._reads(args) and not (kwargs and self._reads(kwargs.values()))) or _describes(func):
            return func(*args, **kwargs)
        if func is F.embedding and self._is_plain_lookup(args, kwargs):
            return self._lookup(*args[:2])
        taken: list[Tensor] = []
        try:
            args = tuple(self._exchange(arg, taken) for arg in args)
            kwargs = {name: self._exchange(arg, taken) for name, arg in kwargs.items()}
            output = func(*args, **kwargs)
        except BaseException:
            taken.clear()
            raise
        if not torch.is_grad_enabled():  # autograd may have saved the buffers
            for tensor in reversed(taken):
                if not _may_share_memory(output, tensor):  # a view keeps its buffer; the next call gets a new one
                    self._scratch.give_back(tensor)
        return output

    def _reads(self, values: Iterable[Any]) -> bool:
        perturbations = self._perturbations
        for value in values:
            if id(value) in perturbations or (isinstance(value, list | tuple) and self._reads(value)):
                return True
        return False

    def _exchange(self, value: Any, taken: list[Tensor]) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._exchange(v, taken) for v in value) if self._reads(value) else value
        perturbation = self._perturbations.get(id(value))
        if perturbation is None:
            return value
        self.seen.add(id(value))
        weight = value.detach().contiguous()
        scratch = self._scratch.take(weight)
        taken.append(scratch)
        perturbation.add_to(weight, scratch)
        # torch takes other paths for weights that require gradients (matmul folds its batch): keep to the same ones.
        return nn.Parameter(scratch, value.requires_grad)

    def _is_plain_lookup(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an embedding call only gathers rows: no renormalisation in place (`max_norm`)."""
        max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
        return len(args) >= 2 and id(args[1]) in self._perturbations and max_norm is None

    def _lookup(self, ids: Tensor, table: nn.Parameter) -> Tensor:
        self.seen.add(id(table))
        rows = ids.reshape(-1)
        out = torch.empty(rows.numel(), table.shape[1], dtype=table.dtype, device=table.device)
        self._perturbations[id(table)].add_to_rows(table.detach().contiguous(), rows, out)
        return out.view(*ids.shape, table.shape[1])


def _describes(func: Callable[..., Any]) -> bool:
    name = func.__name__
    if name == "__get__":
        return getattr(func.__self__, "__name__", None) not in _VALUE_GETTERS  # type: ignore[attr-defined]
    return name in _DESCRIPTIONS


def _may_share_memory(output: Any, tensor: Tensor) -> bool:
    if isinstance(output, list | tuple):
        return any(_may_share_memory(value, tensor) for value in output)
    if output is None or isinstance(output, bool | int | float):
        return False
    try:
        return output.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    except (AttributeError, NotImplementedError):  # not a tensor, or one without memory of its own (vmap, sparse)
        return True


class FlippedBit:
    """Changes every element by about 3 % by flipping one bit of its mantissa: exact to undo, and free of memory."""

    _MANTISSA = {torch.float64: (52, torch.int64), torch.float32: (23, torch.int32)} | {
        torch.bfloat16: (7, torch.int16),
        torch.float16: (10, torch.int16),
    }

    def flip_(self, weight: Tensor) -> None:
        """Flips the bit in place; a second call restores the weight."""
        bits, integer = self._MANTISSA[weight.dtype]
        weight.view(integer).bitwise_xor_(1 << (bits - 5))

    def add_to(self, weight: Tensor, out: Tensor) -> None:
        out.copy_(weight)
        self.flip_(out)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        out.copy_(table[rows])
        self.flip_(out)


@torch.no_grad()
def audit(parameters: Iterable[nn.Parameter], evaluate: Callable[[], Tensor]) -> set[nn.Parameter] | None:
    """The parameters that :class:`Perturbed` must perturb in place, found with three or four evaluations.

    The loss is evaluated as it is, once with all parameters exchanged and once with all of them changed in place,
    by the same amount. Parameters that no function has read are returned; when the two losses still differ, some
    function has read one of the others unseen, and all are returned.

    Args:
        parameters: those to be perturbed.
        evaluate: the loss of one batch, a scalar; must be deterministic.

    Returns:
        The parameters, or None where the loss is not finite, so that nothing can be compared.

    Raises:
        ValueError: if the evaluation writes to a parameter.
    """
    parameters = list(parameters)
    versions = [parameter._version for parameter in parameters]
    loss = evaluate()
    for parameter, version in zip(parameters, versions, strict=True):
        if parameter._version != version:
            raise ValueError(
                f"A parameter of shape {tuple(parameter.shape)} is changed by the forward pass itself, as that of "
                "nn.Embedding is with `max_norm`, so that its losses cannot be compared. Freeze it, or leave that out."
            )
    if not torch.isfinite(loss):
        return None
    flip = FlippedBit()
    with Perturbed(dict.fromkeys(parameters, flip)) as exchanged:
        loss_exchanged = evaluate()
    unseen = {p for p in parameters if id(p) not in exchanged.seen}
    with Perturbed(dict.fromkeys(parameters, flip), in_place=unseen):
        loss_exchanged = evaluate() if unseen else loss_exchanged
    flipped: list[nn.Parameter] = []
    try:
        for parameter in parameters:
            flip.flip_(parameter.detach())
            flipped.append(parameter)
        torch.clear_autocast_cache()
        loss_in_place = evaluate()
    finally:
        for parameter in flipped:
            flip.flip_(parameter.detach())
        torch.clear_autocast_cache()
    # Kernels that add in varying order differ in the last bits: small against what the change itself did.
    agree = (loss_exchanged - loss_in_place).abs() <= 1e-2 * (loss_in_place - loss).abs()
    return unseen if agree else set(parameters)
