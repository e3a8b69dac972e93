"""What Python asks of ``torch.cuda``, on the emulated device: its stand-ins have the names of what they stand for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import lightning  # noqa: F401
import torch
import torch._dynamo
import torch._inductor.utils
import transformers.modeling_utils  # noqa: F401

# Above: what looks for CUDA's half of torch._C when it is imported, which must be before there seems to be a device.

TOTAL_BYTES = 8 * 2**30
MODES = {"default": 0, "warn": 1, "error": 2}
PROPERTIES = SimpleNamespace(
    name="an emulated device",
    major=9,
    minor=0,
    total_memory=TOTAL_BYTES,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    L2_cache_size=50 * 2**20,
)


class Stream:
    """Nothing runs beside the host, so that streams differ by name only."""

    current: "Stream"
    created = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.stream_id, self.device = Stream.created, torch.device("cuda", index_of(device))
        Stream.created += 1

    def synchronize(self) -> None:
        _device.host_waits("a stream is waited for")

    def wait_stream(self, stream: "Stream") -> None: ...
    def wait_event(self, event: "Event") -> None: ...
    def query(self) -> bool:
        return True


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.record()

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return (end.time - self.time) * 1e3

    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class CUDAGraph:
    replay: Callable[[], None]


@contextmanager
def stream(stream: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, stream
    _device.set_stream(stream.stream_id)
    try:
        yield
    finally:
        Stream.current = before
        _device.set_stream(before.stream_id)


@contextmanager
def graph(cuda_graph: CUDAGraph, **_: Any) -> Iterator[None]:
    with stream(Stream()):
        _device.begin_recording()
        try:
            yield
        finally:
            cuda_graph.replay = _device.end_recording()


def index_of(device: Any) -> int:
    index = device if isinstance(device, int | None) else torch.device(device).index
    return _device.current_device() if index is None else index


@contextmanager
def on_device(device: Any) -> Iterator[None]:
    before = _device.current_device()
    set_device(device)
    try:
        yield
    finally:
        _device.set_device(before)


def set_device(device: Any) -> None:
    _device.set_device(index_of(device))


def install(device: Any, count: int) -> None:
    """Puts the stand-ins in their places, for the rest of the process."""
    global _device
    _device = device
    Stream.current = default_stream = Stream()
    stands_in: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "device_count": lambda: count,
        "device": on_device,
        "device_of": lambda tensor: on_device(tensor.get_device()),
        "set_device": set_device,
        "current_device": device.current_device,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": lambda of=None: Stream.current,
        "default_stream": lambda of=None: default_stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": device.is_recording,
        "set_sync_debug_mode": lambda mode: device.make_waiting_an_error(MODES.get(mode, mode) == 2),
        "get_sync_debug_mode": lambda: 2 * device.is_waiting_an_error(),
        "memory_allocated": lambda of=None: device.memory_allocated(),
        "memory_reserved": lambda of=None: device.memory_allocated(),
        "max_memory_allocated": lambda of=None: device.max_memory_allocated(),
        "max_memory_reserved": lambda of=None: device.max_memory_allocated(),
        "reset_peak_memory_stats": lambda of=None: device.reset_peak_memory_stats(),
        "mem_get_info": lambda of=None: (TOTAL_BYTES - device.memory_allocated(), TOTAL_BYTES),
        "empty_cache": lambda: None,
        "get_rng_state": lambda of=None: torch.get_rng_state(),
        "set_rng_state": lambda state, of=None: None,
        "get_rng_state_all": lambda: [torch.get_rng_state()] * count,
        "set_rng_state_all": lambda states: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    for name, stand_in in stands_in.items():
        setattr(torch.cuda, name, stand_in)
    torch.backends.cuda.is_built = lambda: True
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    torch._C._cuda_getCurrentRawStream = lambda index: 0
