"""Records the kernels that a callable launches on a CUDA device as a graph, which one call launches again."""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch

Output = TypeVar("Output")


class Capture(Protocol):
    """The interface for recording graphs; :class:`CudaCapture` explains its methods."""

    device: torch.device

    def warm_up(self, run: Callable[[], Output]) -> Output: ...

    def record(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]: ...


class CudaCapture:
    """Records graphs that share one pool of memory.

    A graph reads and writes the addresses that it was recorded with. Tensors that a callable reads from outside must
    therefore stay where they are, and new values are copied into them. What the callable allocates lies in the pool,
    which the replay of another graph may overwrite, so copy outputs right after a replay. Replay one graph at a time.

    Args:
        device: the device of all tensors.

    Raises:
        ValueError: if it is not a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"`cuda_graphs` is True, but the parameters are on '{device}', which has none. Move the model to a "
                "CUDA device first, or leave it at False."
            )
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Output]) -> Output:
        """Runs a callable under the conditions of a recording: on its own stream, without waiting for the device.

        Raises:
            RuntimeError: from an operation that waits for the device, such as reading a number back.
        """
        stream, mode = torch.cuda.Stream(self.device), torch.cuda.get_sync_debug_mode()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        _set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                output = run()
        finally:
            _set_sync_debug_mode(mode)
            torch.cuda.current_stream(self.device).wait_stream(stream)
        return output

    def record(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """Records a callable; returns its output, and a function that replays the graph, which writes that output."""
        graph = torch.cuda.CUDAGraph()
        # A recording that fails leaves its stream in place, so this one is put back. Other threads, which load data,
        # may use the device meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            output = run()
        return output, graph.replay


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)


def describe_failure(error: Exception) -> str:
    """The error of a recording in one line, with the line of the network that caused it."""
    if isinstance(error.__context__, Exception):  # ending a recording after an error fails once more
        error = error.__context__
    words = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
    own = {str(Path(__file__).parent), str(Path(torch.__file__).parent)}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(frame.filename.startswith(folder) for folder in own):
            return f"{words} ({Path(frame.filename).name}, line {frame.lineno}: {frame.line})"
    return words
