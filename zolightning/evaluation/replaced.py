"""Temporarily replaces methods of one module instance."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper, wraps
from typing import Any

from torch import nn


class StandIn(partial[Any]):
    """A function in place of a module's ``forward``, which is its first argument. It is not copied with the module.

    A loss may copy the network that it evaluates (``copy.deepcopy``), to make a teacher, for example: the copy has its
    own forward.
    """

    def __reduce__(self) -> Any:
        return _itself, self.args


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


class replaced:
    """A context in which a module, or any object, has another method or attribute of this name.

    A class and not a generator, because it must be possible to copy it while it is open: a module may copy its Trainer.
    """

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._attributes = vars(owner)  # bypasses nn.Module's own attribute access, which takes longer
        self._name, self._value = name, value

    def __enter__(self) -> None:
        self._own = self._attributes.get(self._name)
        self._attributes[self._name] = self._value

    def __exit__(self, *_: Any) -> None:
        del self._attributes[self._name]
        if self._own is not None:
            self._attributes[self._name] = self._own


def followed(own: Callable[..., None], after: Callable[..., None], *arguments: Any) -> Callable[..., None]:
    """A method that calls another function after its own, under whose name others see whose method it is."""

    @wraps(own)
    def method(*args: Any) -> None:
        own(*args)
        after(*arguments)

    return method


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which a module has another ``forward``, with the signature of its own, which ``generate`` reads."""
    stand_in = StandIn(lambda _, *args, **kwargs: forward(*args, **kwargs), module.forward)
    with replaced(module, "forward", update_wrapper(stand_in, module.forward)):
        yield


@contextmanager
def replaced_forwards(modules: Iterable[nn.Module], made: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Gives each of some modules another ``forward``, which is made from the module."""
    own: list[tuple[dict[str, Any], Any]] = []  # attributes, and their own "forward" or None
    try:
        for module in modules:
            attributes = vars(module)
            own.append((attributes, attributes.get("forward")))
            attributes["forward"] = made(module)
        yield
    finally:
        while own:
            attributes, forward = own.pop()
            if forward is not None:
                attributes["forward"] = forward
            else:
                attributes.pop("forward", None)  # not there yet if an interrupt came in between
