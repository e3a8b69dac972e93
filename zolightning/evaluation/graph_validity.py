"""Tells whether CUDA graphs of a network are still valid: the same objects in its modules, at the same addresses."""

from torch import Tensor, nn

from zolightning.evaluation.snapshot import Snapshot


class NetworkState:
    """The objects that the modules of a network hold, and the addresses of their tensors."""

    def __init__(self, network: nn.Module) -> None:
        self._inner = [(name, module) for name, module in network.named_modules() if module is not network]
        self._snapshot = snapshot_of(network)
        self._tensors = [*network.parameters(), *network.buffers()]
        self._addresses = self._now()

    def is_same(self) -> bool:
        """Whether no object has been replaced or moved; the values in tensors may differ."""
        return self._snapshot.holds_the_same() and self._addresses == self._now()

    def hooked(self) -> str | None:
        """The name of a module inside the network with a hook around its forward."""
        return next((name for name, m in self._inner if m._forward_hooks or m._forward_pre_hooks), None)

    def _now(self) -> list[int]:
        try:
            return list(map(Tensor.data_ptr, self._tensors))
        except (NotImplementedError, RuntimeError):
            return [_address(tensor) for tensor in self._tensors]


def snapshot_of(network: nn.Module) -> Snapshot:
    """A snapshot of what the modules of a network hold now, without its parameters."""
    return Snapshot(list(network.modules()), set(), {id(parameter) for parameter in network.parameters()})


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (NotImplementedError, RuntimeError):  # for a subclass that wraps other tensors, such as a quantised weight
        return 0
