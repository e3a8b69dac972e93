"""What was measured of a step, and the lines of its tables."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zolightning.bench.floors import Ceilings
from zolightning.bench.rows import FORWARD, PUBLISHED

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes used by a process that does nothing but a few steps; on CUDA, bytes of its tensors on the card."""

    loading: int  # peak until the model was loaded
    loaded: int | None  # bytes held before the first step; None where the system does not say
    peak: int  # peak during the steps, or of the whole process where the system cannot tell them apart
    state: int  # bytes that the step keeps besides the weights
    reserved: int | None = None  # peak of the memory that torch's allocator reserved on the card; None on a CPU
    free: int | None = None  # free memory of the card after the steps; None on a CPU


@dataclass(frozen=True)
class Workload:
    """What the figures of a row are computed from, besides its seconds."""

    forwards: int  # number of forwards in a step
    tokens: float  # number of tokens in a forward
    flops: float  # floating point operations of a forward
    # least number of bytes that a step moves besides its forwards; None where that is not known
    parameter_bytes: int | None


@dataclass(frozen=True)
class Cost:
    """Times of a row's steps, and the work that they did."""

    seconds: list[float]  # time of each timed step on random tokens; empty where that was not measured
    prompt_seconds: float  # mean time of a step on prompts
    tokens: Workload  # work of a step on random tokens
    prompts: Workload  # mean work of a step on prompts

    @property
    def median(self) -> float:
        """Median seconds of a step on random tokens."""
        return statistics.median(self.seconds)


def token_record(name: str, costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Seconds of a step on random tokens, beside those of a forward and of the published recipe where it is known."""
    median, forward = costs[name].median, costs[FORWARD.name].median
    published = costs.get(PUBLISHED.name)
    return {
        "row": name,
        "seconds": median,
        "min_seconds": min(costs[name].seconds),
        "over_its_forwards": median / (costs[name].tokens.forwards * forward),
        "published_over_row": None if published is None else published.median / median,
    }


def memory_record(used: Memory, memory: Mapping[str, Memory]) -> dict[str, Any]:
    """Memory of a row, compared with a forward's; `peak_beyond_mib` is neither in the forward's peak nor in `state`."""
    forward_peak = memory[FORWARD.name].peak
    return {
        "loading_peak_mib": used.loading / MIB,
        "loaded_mib": None if used.loaded is None else used.loaded / MIB,
        "peak_mib": used.peak / MIB,
        "peak_over_forward": used.peak / forward_peak,
        "state_mib": used.state / MIB,
        "stateless_peak_over_forward": (used.peak - used.state) / forward_peak,
        "peak_beyond_mib": (used.peak - used.state - forward_peak) / MIB,
        "reserved_peak_mib": None if used.reserved is None else used.reserved / MIB,
        "free_mib": None if used.free is None else used.free / MIB,
    }


def prompt_record(name: str, costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Seconds of a step on prompts, beside those of a forward and of the published recipe where it is known."""
    cost, forward, published = costs[name], costs[FORWARD.name], costs.get(PUBLISHED.name)
    own_forwards = cost.prompts.forwards * forward.prompt_seconds
    return {
        "row": name,
        "mean_seconds": cost.prompt_seconds,
        # The recipe's own forwards differ: they have all candidates and all logits.
        "over_its_forwards": None if name == PUBLISHED.name else cost.prompt_seconds / own_forwards,
        "published_over_row": None if published is None else published.prompt_seconds / cost.prompt_seconds,
        "tokens_per_forward": cost.prompts.tokens,
    }


def rates(
    name: str, seconds: float, work: Workload, weights: int, ceilings: Ceilings, forward_seconds: float
) -> dict[str, Any]:
    """Compares a step with the best that the machine can do."""
    products, moved = work.forwards * work.flops / ceilings.flops_per_second, work.parameter_bytes
    rest = seconds - work.forwards * forward_seconds
    floor = None if moved is None else products + moved / ceilings.bytes_per_second
    return {
        "row": name,
        "tokens_per_second": work.tokens / seconds,
        "flop_utilisation": products / seconds,
        # As if all that a step adds to its forwards were passes at the bandwidth of a copy
        "parameter_side_bytes_per_weight": rest * ceilings.bytes_per_second / weights,
        "floor_bytes_per_weight": None if moved is None else moved / weights,
        "floor_seconds": floor,
        "over_floor": None if floor is None else seconds / floor,
    }
