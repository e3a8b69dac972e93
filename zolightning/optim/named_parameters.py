"""The parameters of a method: their names, which of them train, slices of them, and their state."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.shards import is_sharded
from zolightning.directions.slices import Slice
from zolightning.optim.settings import require_same_settings, settings_of


class NamedParameters(torch.optim.Optimizer):
    """An optimizer that knows its parameters by name and can train slices of them."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._names: dict[nn.Parameter, str] = {}
        self.slices: dict[nn.Parameter, Slice] = {}
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:
        """Raises a ValueError that names a hyperparameter of `group`, its value and what is accepted."""

    def trainable(self) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
        """Group, name and parameter of everything that may move; frozen parameters are left out."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.moves(parameter):
                    yield group, self._names[parameter], parameter

    def moves(self, parameter: nn.Parameter) -> bool:
        """Whether a step may change a parameter."""
        return parameter.requires_grad

    def restrict(self, slices: Mapping[nn.Parameter, Slice]) -> None:
        """Trains only slices of some parameters; the method sees each slice as a compact tensor.

        Raises:
            ValueError: if a slice does not fit its parameter, or comes after a step of that parameter.
        """
        for parameter, part in slices.items():
            name = self._names[parameter]
            if is_sharded(parameter):
                raise ValueError(
                    f"A slice of `{name}` is to train, and its rows are sharded over ranks: train whole parameters, or "
                    "use a strategy under which every rank holds all of them ('zo_ddp')."
                )
            part.check(name, parameter)
            if self.state.get(parameter):
                raise ValueError(f"`{name}` has been trained as a whole already: restrict it before the first step.")
        # Indices are kept on the device, because copying them at each use would synchronize with it.
        self.slices |= {p: replace(part, index=part.index.to(p.device)) for p, part in slices.items()}

    def trainable_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of a parameter, or of the slice of it that trains."""
        part = self.slices.get(parameter)
        return tuple(parameter.shape) if part is None else part.shape(parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, named by the module the optimizer is attached to, if it is."""
        super().add_param_group(param_group)
        group, number = self.param_groups[-1], len(self.param_groups) - 1
        self.check(group)
        given = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
        for parameter, name in zip(group["params"], given, strict=True):
            self._names.setdefault(parameter, name)
        names = [self._names[parameter] for group in self.param_groups for parameter in group["params"]]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Two parameters are named `{max(names, key=names.count)}`, and directions depend on names: take those "
                "of one module's `named_parameters()`, or pass parameters without names."
            )

    def is_by_element(self, parameter: nn.Parameter, name: str) -> bool:
        """Whether the tensor of this name in a parameter's state has one entry for each element of the parameter.

        If the parameter is sharded (FSDP2), such a tensor is too; other tensors are whole on every rank.
        """
        return True

    def state_bytes(self) -> int:
        """Bytes of the tensors that the method keeps at present on the devices of the weights."""
        tensors = (t for state in self.state.values() for t in state.values() if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    def host_bytes(self) -> int:
        """Bytes of the tensors that it keeps in host memory instead."""
        return 0

    def numbered(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[int, nn.Parameter]]:
        """The parameters, each after its number in a ``state_dict``, by which torch refers to it there."""
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return zip(numbers, parameters, strict=False)  # torch compares their numbers itself, and says so better

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, and under ``method`` the class and its constructor's arguments."""
        return super().state_dict() | {"method": settings_of(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores hyperparameters, counters and tensors, these in their own dtype.

        Raises:
            ValueError: if the state is that of another class, or of the same class with other arguments.
        """
        require_same_settings(self, state_dict.get("method"))
        # torch casts restored state to the parameter's dtype, which would ruin low words, masters and moments.
        super().load_state_dict({**state_dict, "state": {}})
        for index, parameter in self.numbered(state_dict):
            for name, value in state_dict["state"].get(index, {}).items():
                is_tensor = isinstance(value, Tensor)
                self.state[parameter][name] = value.to(parameter.device, copy=True) if is_tensor else value
