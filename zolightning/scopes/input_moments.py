"""Gathers second moments of the inputs of linear maps while a network runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zolightning.directions.second_moment import SecondMoment
from zolightning.directions.slices import Slice
from zolightning.evaluation.torch_functions import PRODUCTS, factors_of
from zolightning.scopes.token_mask import TokenMask

Side = Literal["left", "right"]  # of a weight, where its inputs are: ``x W'`` has them on the right
INPUT_DIM: dict[Side, int] = {"left": 0, "right": 1}


class InputMoments(TorchFunctionMode):
    """A context that gathers the second moments of the inputs of weights, without keeping activations.

    Weights with the same input tensor, such as the query, key and value projections of a layer, share a moment. Weights
    that are used in other ways than by a product (embeddings, convolutions) have none.

    Args:
        weights: the weights, each with the slice of it that trains, or None if all of it does.
        tokens: the mask of tokens, which must be active as well.
        new: makes an empty moment, given a weight and the side on which its inputs are.
        first_token: whether to count the first token of each sequence.

    Attributes:
        moments: for weights whose inputs were seen, their side ("right" for ``x W'``, "left" for ``x W``) and moment.
    """

    def __init__(
        self,
        weights: Mapping[nn.Parameter, Slice | None],
        tokens: TokenMask,
        new: Callable[[nn.Parameter, Side], SecondMoment],
        first_token: bool = True,
    ) -> None:
        super().__init__()
        self.moments: dict[nn.Parameter, tuple[Side, SecondMoment]] = {}
        self._wanted = {id(weight): weight for weight in weights}
        self._parts = {weight: part for weight, part in weights.items() if part is not None}
        self._tokens = tokens
        self._new = new
        self._first_token = first_token
        self._last: tuple[Any, tuple[Side, SecondMoment] | None] = (None, None)  # an input, and its moment

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._last = (None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_compiling():  # a compiled graph is not looked into
            pass
        elif func in PRODUCTS:
            weight, inputs, _ = factors_of(func, args)
            if id(weight) in self._wanted and isinstance(inputs, Tensor):
                self._add(self._wanted[id(weight)], inputs.detach(), inputs, "right" if func is F.linear else "left")
        elif func is F.embedding and len(args) > 1 and id(args[1]) in self._wanted:
            self.moments.pop(self._wanted.pop(id(args[1])), None)  # also read by rows, which are not inputs
        return func(*args, **(kwargs or {}))

    def of(self, readers: Sequence[tuple[nn.Parameter, Side]]) -> SecondMoment:
        """The moment of the first of these weights, which all of them share from now on; made if there is none yet."""
        weight, side = readers[0]
        moment = self.moments[weight][1] if weight in self.moments else self._new(weight, side)
        self.moments |= {reader: (side, moment) for reader, side in readers}
        return moment

    def _add(self, weight: nn.Parameter, values: Tensor, inputs: Tensor, side: Side) -> None:
        last, shared = self._last
        part = self._parts.get(weight)
        entries = part.index if part is not None and part.dim == INPUT_DIM[side] else None
        is_last = entries is None and last is inputs
        if is_last and shared and shared[0] == side and self.moments.setdefault(weight, shared) is shared:
            return
        if weight not in self.moments:
            self.moments[weight] = (side, self._new(weight, side))
        if entries is None:
            self._last = (inputs, self.moments[weight])
        counted = self._tokens.of(values, self._first_token) if self._tokens.fits(values) else None
        rows = values.reshape(-1, values.shape[-1]) if counted is None else values[counted]
        self.moments[weight][1].add(rows if entries is None else rows[:, entries.to(rows.device)])
