"""The loops in C in the place of those in Triton, whose interpreter takes a third of a second for a launch."""

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from zolightning import kernels
from zolightning.kernels import native
from zolightning.kernels.noise import Noise

NAMES = ("perturb", "perturb_both", "perturb_rows", "add", "add_curved", "add_adam", "curve", "add_delta")


def install(device: Any) -> None:
    """Makes :mod:`zolightning.kernels` find them for tensors of the device, except in float16, which C has not."""

    def on_host(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.is_cuda:  # in Triton's words
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            return device.host_view(value.detach())
        if isinstance(value, Noise):
            return Noise(on_host(value.keys), on_host(value.coefficients), value.kind)
        return type(value)(*map(on_host, value)) if hasattr(value, "_fields") else value

    def loop(name: str) -> Callable[..., None]:
        def call(*arguments: Any, **named: Any) -> None:
            views, named_views = list(map(on_host, arguments)), {key: on_host(named[key]) for key in named}
            if named_views.get("weight", views) is None:  # which Triton's loops take for zeros
                named_views["weight"] = torch.zeros_like(named_views["out"])
            device.run_and_record(lambda: getattr(native, name)(*views, **named_views))

        call.__name__ = name
        return call

    def available(*tensors: torch.Tensor | None, start: int = 0) -> bool:
        return start % 2 == 0 and all(tensor is None or tensor.dtype != torch.float16 for tensor in tensors)

    def for_each(loop: Callable[..., None], calls: Iterable[Mapping[str, Any]]) -> None:
        for call in calls:
            loop(**call)

    stand_in = SimpleNamespace(__name__="emulated triton_loops", available=available, for_each=for_each)
    for name in NAMES:
        setattr(stand_in, name, loop(name))
    kernels._triton_loops = lambda: stand_in
