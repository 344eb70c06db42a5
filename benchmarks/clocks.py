"""How long a step takes: the clocks of a CPU and a GPU, and turns.

On a GPU a step is captured as a CUDA graph where that is possible and replayed between two events; before each replay a
buffer of FLUSH bytes is read, which leaves the L2 cache full of clean lines of something else (writing it would leave
dirty ones, whose way to memory would be timed too) and lets the host run ahead. A step that waits for the device cannot
be captured, and a capture that fails can leave the process unusable: so a warm-up in which PyTorch forbids waiting
decides first.
"""

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

import torch

FLUSH = 256 * 2**20  # bytes; five times the L2 cache of an H100
Step = Callable[[], object]


def time_in_turns(steps: Mapping, rounds: int, clock) -> tuple[dict, dict]:
    """(microseconds by name, one for each round, in which every name has a turn with the next of its steps; the errors
    of those that failed, whose turns ended there). All turns end with an error after which the clock is not sound."""
    names = list(steps)
    times, errors = {name: [] for name in names}, {}
    turns = {name: itertools.cycle(steps[name]) for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(-1, rounds):  # the first round warms up
            shift = number % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                if name in errors:
                    continue
                try:
                    elapsed = clock.time(next(turns[name]))
                except Exception as error:
                    errors[name] = error
                    if not clock.sound():
                        return {}, errors
                    continue
                if number >= 0:
                    times[name].append(elapsed)
    finally:
        gc.enable()
    return {name: found for name, found in times.items() if name not in errors}, errors


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, interpolated."""
    tenths = quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return {"p20_us": tenths[1], "p50_us": tenths[4], "p80_us": tenths[7]}


@dataclass(frozen=True)
class Prepared:
    """A step that was made and warmed up, how it is timed, and the MiB that it allocates; why it is no graph; and what
    a graph was captured from, for it reads the tensors that live in there."""

    step: Step
    timer: str
    peak_mib: float | None = None
    no_graph: str | None = None
    captured: Step | None = None


class CpuClock:
    """Wall time of a step."""

    def prepare(self, make: Callable[[], Step], graph: bool, rest: Callable[[], None]) -> Prepared:
        step = make()
        step()
        return Prepared(step, "clock")

    def time(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return 1e6 * (time.perf_counter() - start)

    def sound(self) -> bool:
        return True


class GpuClock:
    """Time on the device between two events around a step, with nothing of its own in the L2 cache."""

    def __init__(self, device: str):
        self.buffer = torch.zeros(FLUSH // 4, dtype=torch.int32, device=device)
        self.stream = torch.cuda.Stream(device)
        # Graphs share their memory: they are replayed one after another, and nobody reads what they leave.
        self.pool = torch.cuda.graph_pool_handle()
        self.capture_failed = False

    def prepare(self, make: Callable[[], Step], graph: bool, rest: Callable[[], None]) -> Prepared:
        """The step, as a CUDA graph if it may and can be one. It is made and warmed up on the stream on which it is
        captured, where a backward follows its forward."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step = make()
            step()
            rest()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            waits = _waits(step) if graph else None
        torch.cuda.synchronize()
        if graph and not waits:
            return Prepared(self._captured(step), "graph", peak, captured=step)
        return Prepared(step, "events", peak, waits)

    def _captured(self, step: Step) -> Step:
        replayed = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(replayed, pool=self.pool, stream=self.stream):
                step()
        except Exception:
            self.capture_failed = True
            raise
        return replayed.replay

    def time(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):  # where it was warmed up, and its memory is at hand
            self.buffer.sum()
            start.record()
            step()
            end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def sound(self) -> bool:
        """Whether the device still does what it is told: an illegal access, say, stays an error for ever."""
        if self.capture_failed:
            return False
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
        return True


def _waits(step: Step) -> str | None:
    """What makes the host wait for the device in this step; None if nothing does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def timer(prepared: Sequence[Prepared]) -> dict[str, str]:
    """The columns timer and, for steps that were to be graphs, no_graph."""
    least = next((each for each in prepared if each.timer != "graph"), prepared[0])
    return {"timer": least.timer} | ({"no_graph": least.no_graph} if least.no_graph else {})
