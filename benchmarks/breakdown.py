"""Where the time of a step goes: kernels by name, in parts, each with the floor that the device sets for its work.

On a GPU the times are those of kernels on the device; what no kernel was running is the part `idle`. On a CPU they are
the times of PyTorch's operators without what they call, and parts that are composed of several count as `rest`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from .ceilings import Ceilings, Work
from .harness import Case

STEPS = 3
REST, IDLE = "rest", "idle"
# Part -> what the names of its kernels, or of its operators on a CPU, hold; the first that fits.
PATTERNS = {
    "attention": r"attention|flash|fmha|aten::bmm|aten::baddbmm",
    "dropout + residual + LayerNorm": r"dropout_add_layer_norm|native_layer_norm|vectorized_layer_norm|GammaBeta",
    "bias + GELU": r"gelu|Gelu",
    "embeddings": r"embedding|EmbeddingBackward|indexSelect|index_select",
    "cross-entropy": r"cross_entropy|log_softmax|LogSoftMax",
    "optimizer": r"lamb|adam|Adam|NormTwo|LpNorm|vector_norm|foreach_norm",
    "matrix products": r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitK|aten::addmm|aten::mm\b|mkldnn",
    "gradients and copies": r"column_sum|foreach|multi_tensor|Memset|fill|Memcpy|copy|aten::add_\b|aten::zero_",
}


class Part(NamedTuple):
    """A part of a step: microseconds, launches, and the floor of its work or None."""

    name: str
    us: float
    calls: int
    floor_us: float | None


def breakdown(step: Callable[[], object], works: Mapping[str, Work], case: Case, ceilings: Ceilings) -> list[Part]:
    """The parts of a step, the longest first; the mean of STEPS of them."""
    step()
    activities = [ProfilerActivity.CUDA] if case.cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if case.cuda:
            torch.cuda.synchronize()
    events = [event for event in found.events() if not case.cuda or event.device_type.name == "CUDA"]
    times = [(e.name, e.device_time if case.cuda else e.self_cpu_time_total) for e in events]
    idle = None
    if case.cuda and events:
        idle = gaps([(e.time_range.start, e.time_range.end) for e in events])
    return summed(times, idle, works, lambda work: ceilings.floor_us(work, case.dtype)[0])


def summed(
    times: Iterable[tuple[str, float]],
    idle: float | None,
    works: Mapping[str, Work],
    floor: Callable[[Work], float],
) -> list[Part]:
    """Names and microseconds of STEPS steps, and the time without a kernel, as the parts of one."""
    totals: dict[str, list[float]] = {}
    for name, us in times:
        totals.setdefault(part_of(name), []).append(us)
    rows = [
        Part(name, sum(each) / STEPS, round(len(each) / STEPS), floor(works[name]) if name in works else None)
        for name, each in totals.items()
    ]
    if idle is not None:
        rows.append(Part(IDLE, idle / STEPS, 0, None))
    return sorted(rows, key=lambda part: -part.us)


def gaps(intervals: list[tuple[float, float]]) -> float:
    """What no interval covers between the first and the last; copies may run beside kernels."""
    intervals = sorted(intervals)
    found, reached = 0.0, intervals[0][0]
    for start, end in intervals:
        found += max(0.0, start - reached)
        reached = max(reached, end)
    return found


def part_of(name: str) -> str:
    """The part that a kernel or operator belongs to."""
    return next((part for part, pattern in PATTERNS.items() if re.search(pattern, name)), REST)


def lines(parts: Iterable[Part]) -> str:
    """The parts as a table."""
    parts = list(parts)
    total = sum(part.us for part in parts)
    head = f"      {'part of the step':34}{'us':>11}{'share':>8}{'calls':>7}{'floor us':>11}{'% floor':>9}"
    rows = [head]
    for part in parts:
        floor, share = part.floor_us, f"{100 * part.us / total:.1f} %"
        ends = f"{floor:11.1f}{100 * floor / part.us:9.1f}" if floor is not None and part.us else f"{'-':>11}{'-':>9}"
        rows.append(f"      {part.name:34}{part.us:11.1f}{share:>8}{part.calls:7}{ends}")
    return "\n".join(rows)
