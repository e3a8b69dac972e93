"""What a CUDA graph of a network relies on: the objects its modules hold, and where their tensors lie."""

from torch import Tensor, nn

from zolightning.evaluation.snapshot import Snapshot


class NetworkState:
    """What the modules of a network hold, and where their tensors lie."""

    def __init__(self, network: nn.Module) -> None:
        self._inner = [(name, module) for name, module in network.named_modules() if module is not network]
        self._snapshot = snapshot_of(network)
        self._tensors = [*network.parameters(), *network.buffers()]
        self._addresses = self._now()

    def is_same(self) -> bool:
        """Whether nothing has been exchanged; what is in the tensors may differ."""
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
    """What the modules of a network hold now, but for its parameters."""
    return Snapshot(list(network.modules()), set(), {id(parameter) for parameter in network.parameters()}, {})


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (NotImplementedError, RuntimeError):  # of a subclass that wraps other tensors, of a quantised weight say
        return 0
