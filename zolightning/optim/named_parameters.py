"""The parameters of a method: their names, which of them move, slices of them, and their state."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import is_
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from zolightning.checks import require_choice
from zolightning.directions.dense import Direction, of_own_rows
from zolightning.directions.shards import first_element, is_sharded, own_rows
from zolightning.directions.slices import Slice
from zolightning.kernels.bfloat16 import read_split
from zolightning.kernels.noise import key as noise_key
from zolightning.optim.blocks import LeftState, ParameterBlocks
from zolightning.optim.precision import EXTRA_BITS, State, UpdatePrecision, as_contiguous
from zolightning.optim.settings import require_same_settings, settings_of
from zolightning.optim.stochastic_rounding import round_stochastically

_SHARED = ("step", "seed", "forward_passes", "refresh", "folds", "lr_scale")  # by all groups, as parts of one run


class NamedParameters(torch.optim.Optimizer):
    """Abstract: an optimizer that knows its parameters by name, and can move some of them or slices of them only.

    Attributes:
        names: the name of each parameter in the attached module; parameters that are not in it are numbered.
        slices: the slice of each parameter that trains in part, see :meth:`restrict`.
        blocks: the blocks of parameters, see :meth:`set_blocks`.
    """

    update_precision: UpdatePrecision  # an argument of ZerothOrderOptimizer
    kept_at_rest: ClassVar[tuple[str, ...]] = ()  # entries of the state that stay when a block becomes inactive

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        # Changed in place only: wrappers of optimizers copy references to them (Fabric's does).
        self.names: dict[nn.Parameter, str] = {}
        self.slices: dict[nn.Parameter, Slice] = {}
        self.blocks = ParameterBlocks()
        self._named: dict[tuple[int, bool], dict[nn.Parameter, str]] = {}  # by the id of the group, see `named`
        super().__init__(params, defaults)

    # What a subclass defines

    def check(self, group: dict[str, Any]) -> None:
        """Raises a ValueError that names a hyperparameter of `group`, its value and what is accepted."""

    def fold(self) -> None:
        """Adds pending updates to the stored weights; most methods have none."""

    def is_by_element(self, parameter: nn.Parameter, name: str) -> bool:
        """Whether the tensor of this name in a parameter's state has one entry for each element of the parameter.

        If the parameter is sharded (FSDP2), such a tensor is too; other tensors are whole on every rank.
        """
        return True

    # Which parameters move

    def trainable(self) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
        """Group, name and parameter of everything that may move; frozen parameters are left out."""
        for group in self.param_groups:
            for parameter, name in self.named(group).items():
                yield group, name, parameter

    def named(self, group: dict[str, Any], frozen: bool = False) -> dict[nn.Parameter, str]:
        """The parameters of a group that a step may change, or with `frozen` all, and their names; not to be changed.

        It is the same object for as long as these are the same, because looking a parameter up calls Python.
        """
        parameters, at_rest = group["params"], self.blocks.at_rest
        if not frozen:
            parameters = [p for p in parameters if p.requires_grad and not (at_rest and p in at_rest)]
        known = self._named.get((id(group), frozen))
        if known is None or len(known) != len(parameters) or not all(map(is_, known, parameters)):
            known = self._named[id(group), frozen] = {parameter: self.names[parameter] for parameter in parameters}
        return known

    def at_rest(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of what trains but does not move now; the evaluator finds where losses read these, too."""
        for group in self.param_groups if self.blocks.at_rest else ():
            for parameter in group["params"]:
                if parameter.requires_grad and parameter in self.blocks.at_rest:
                    yield self.names[parameter], parameter

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, named by the module the optimizer is attached to, if it is; also between two steps."""
        super().add_param_group(param_group)
        group, number = self.param_groups[-1], len(self.param_groups) - 1
        group |= {name: self.param_groups[0][name] for name in _SHARED if name in self.param_groups[0]}
        self.check(group)
        given = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
        self.set_names(dict(zip(group["params"], given, strict=True)) | self.names)
        names = [self.names[parameter] for group in self.param_groups for parameter in group["params"]]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Two parameters are named `{max(names, key=names.count)}`, but directions depend on names: take those "
                "of one module's `named_parameters()`, or pass parameters without names."
            )

    @property
    def lr_scale(self) -> float:
        """Multiplies the learning rates of all further records; `lr` itself is set anew by schedulers."""
        return float(self.param_groups[0].get("lr_scale", 1.0))

    @lr_scale.setter
    def lr_scale(self, scale: float) -> None:
        for group in self.param_groups:
            group["lr_scale"] = scale

    def set_names(self, names: Mapping[nn.Parameter, str]) -> None:
        """Names parameters, or names them anew."""
        self.names |= names
        self._named.clear()

    def group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The group that a parameter is in."""
        return next(group for group in self.param_groups if any(p is parameter for p in group["params"]))

    def restrict(self, slices: Mapping[nn.Parameter, Slice]) -> None:
        """Trains only slices of some parameters; the method sees each slice as a compact tensor.

        Raises:
            ValueError: if a slice does not fit its parameter, or comes after a step of that parameter.
        """
        for parameter, part in slices.items():
            name = self.names[parameter]
            if is_sharded(parameter):
                raise ValueError(
                    f"A slice of `{name}` is to train, but its rows are sharded over ranks: train whole parameters, or "
                    "use a strategy under which every rank holds all of them ('zo_ddp')."
                )
            part.check(name, parameter)
            if self.state.get(parameter):
                raise ValueError(f"`{name}` has been trained as a whole already: restrict it before the first step.")
        # Indices are kept on the device, because copying them at each use would synchronize with it.
        self.slices |= {p: replace(part, index=part.index.to(p.device)) for p, part in slices.items()}

    def trainable_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of a parameter, or of the slice of it that trains."""
        part = self.slices.get(parameter) if self.slices else None
        return tuple(parameter.shape) if part is None else part.shape(parameter)

    # Blocks

    def set_blocks(self, blocks: Sequence[Iterable[nn.Parameter]], left_state: LeftState = "reset") -> None:
        """Divides parameters into blocks; all of them move until :meth:`activate` is called.

        Args:
            blocks: the parameters of each block; no parameter may be in two. Those in no block always move.
            left_state: what happens to the state of a block that becomes inactive. "reset" drops it (momentum, moments,
                curvature, and the extra bits of half-precision weights, which are then rounded stochastically: small
                updates are not lost on average, but some noise is added), so that the method's memory is that of the
                active blocks. "keep" keeps it for the next time.

        Raises:
            ValueError: if a block has no trainable parameter, shares one with another block, or has one that is not
                the optimizer's; or if blocks are active already.
        """
        require_choice("left_state", left_state, get_args(LeftState))
        if self.active:
            raise ValueError(f"Blocks {list(self.active)} are active already: set the blocks before the first step.")
        self.blocks.define(blocks, {p: self.names[p] for group in self.param_groups for p in group["params"]})
        self.param_groups[0]["left_state"] = left_state

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the blocks that move, in ascending order; empty if all parameters move."""
        return tuple(self.param_groups[0].get("blocks", ()))

    @property
    def drops_left_state(self) -> bool:
        """Whether a block loses its state when it becomes inactive."""
        return bool(self.param_groups[0].get("left_state") != "keep")

    def activate(self, blocks: Iterable[int], weight: float = 1.0) -> None:
        """Moves only these blocks from now on; without any index, all parameters.

        Pending updates are added to the weights first. Blocks that become inactive lose their state, unless
        :meth:`set_blocks` was told to keep it. Call it between two steps, and not more than once: a record only holds
        the blocks that were active in its step.

        Args:
            blocks: indices of blocks that have been set.
            weight: multiplies the learning rates for as long as these blocks are active.
        """
        blocks = tuple(sorted(set(blocks)))
        self.blocks.require(blocks)
        self.param_groups[0]["block_weight"] = weight
        if blocks != self.active:
            self.fold()
            self.param_groups[0]["blocks"] = blocks
            self.blocks.activate(blocks)
            self.release(self.blocks.at_rest)

    @contextmanager
    def only(self, block: int) -> Iterator[None]:
        """A context in which only one block moves, so that it can be probed; no state is dropped."""
        self.blocks.isolate(block, (p for group in self.param_groups for p in group["params"]))
        try:
            yield
        finally:
            self.blocks.activate(self.active)
            self.release(self.blocks.at_rest)

    # Their state

    @contextmanager
    def to_move(
        self, parameters: Collection[nn.Parameter], directions: Iterable[Direction]
    ) -> Iterator[tuple[list[Tensor], list[State], list[Direction]]]:
        """What a step along `directions` moves: weights or slices of them, contiguous, and the state of each.

        Each comes with the part of its direction that belongs to it, if parameters are sharded and only
        some rows are on this rank.
        """
        with ExitStack() as stack:
            weights = [
                (parameter.detach() if type(parameter) is nn.Parameter else own_rows(parameter))
                if not (self.slices and parameter in self.slices) and parameter.is_contiguous()
                else stack.enter_context(as_contiguous(parameter, self.slices.get(parameter)))
                for parameter in parameters
            ]
            yield weights, [self.state[parameter] for parameter in parameters], of_own_rows(directions, parameters)

    def completed(self, parameter: nn.Parameter) -> Tensor:
        """The trained values of a parameter with all the bits that are kept for them, flat.

        For a float32 parameter that trains as a whole it is a view of the weight, which the next step changes.
        """
        part, weight, extra_bits = self.slices.get(parameter), parameter.detach(), self.extra_bits(parameter)
        if "master" in extra_bits:
            return extra_bits["master"]
        flat = (weight if part is None else part.take(weight)).reshape(-1)
        low = next(iter(extra_bits.values()), None)
        return flat if low is None else read_split(flat, low.to(flat.device))

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drops the state of parameters, except for `kept_at_rest`; half-precision weights are rounded stochastically.

        The random numbers are a function of the step and of the parameter's name.
        """
        for parameter in parameters if self.drops_left_state else ():
            if extra_bits := {name: bits.to(parameter.device) for name, bits in self.extra_bits(parameter).items()}:
                key = noise_key(0, self.param_groups[0]["step"], -1, self.names[parameter])
                with as_contiguous(parameter, self.slices.get(parameter)) as weight:
                    first = first_element(parameter)
                    round_stochastically(weight, extra_bits, self.update_precision, key, first)
            state = self.state.pop(parameter, {})
            if kept := {name: state[name] for name in self.kept_at_rest if name in state}:
                self.state[parameter] = kept

    def extra_bits(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """The extra bits that are kept for a half-precision weight, by name."""
        state = self.state.get(parameter, {})
        return {name: state[name] for name in EXTRA_BITS if name in state}

    def state_bytes(self) -> int:
        """Bytes of the tensors that the method keeps at present on the devices of the weights."""
        return sum(t.nbytes for state in self.state.values() for t in state.values() if isinstance(t, Tensor))

    def host_bytes(self) -> int:
        """Bytes of the tensors that it keeps in host memory instead."""
        return 0

    def numbered(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[int, nn.Parameter]]:
        """Pairs of a number, by which a ``state_dict`` refers to a parameter, and that parameter."""
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return zip(numbers, parameters, strict=False)  # torch compares the counts itself, with a better message

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, and under ``method`` the class and its constructor's arguments."""
        return super().state_dict() | {"method": settings_of(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores hyperparameters, counters and tensors, the tensors in their own dtype.

        Raises:
            ValueError: if the state is that of another class, or of the same class with other arguments, or of a run
                with blocks, and they have not been set.
        """
        self.blocks.require(state_dict["param_groups"][0].get("blocks", ()))
        require_same_settings(self, state_dict.get("method"))
        # torch casts restored state to the parameter's dtype, which would ruin low words, masters and moments.
        super().load_state_dict({**state_dict, "state": {}})
        for index, parameter in self.numbered(state_dict):
            self.restore(parameter, state_dict["state"].get(index, {}))
        self.blocks.activate(self.active)

    def restore(self, parameter: nn.Parameter, entries: Mapping[str, Any]) -> None:
        """Takes over a parameter's state from a checkpoint."""
        for name, value in entries.items():
            is_tensor = isinstance(value, Tensor)
            self.state[parameter][name] = value.to(parameter.device, copy=True) if is_tensor else value
