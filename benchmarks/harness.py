"""The harness: providers side by side, checked before they are timed, taking turns on cold inputs.

A Benchmark says what is measured (cases, inputs, how much work that is) and who does it (providers); a Runner yields a
row per provider and mode. What a provider cannot do becomes a row that says so; nothing that a provider raises ends it.

Timing. Every provider of a case has several sets of inputs, which it takes in turn, and the providers take turns with
each other, in an order that rotates. On a GPU a step is captured as a CUDA graph where that is possible and replayed
between two events; before each replay a buffer of FLUSH bytes is read, which leaves the L2 cache full of clean lines of
something else (writing it would leave dirty ones, whose way to memory would be timed too) and lets the host run ahead.
"""

import gc
import itertools
import re
import time
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median, quantiles

import torch

from fastbert.errors import BackendError

from . import ceilings
from .ceilings import Work
from .rows import FAILED, MEASURED, MISSING, WRONG, environment, package_version

FLUSH = 256 * 2**20  # bytes; five times the L2 cache of an H100
INPUT_BYTES = 2**28  # what the sets of inputs of one case may take together; every set also keeps a forward's memory
OURS = "fastbert"
NOT_COMPARABLE = "not comparable"
Step = Callable[[], object]


class Missing(Exception):
    """A provider is not installed or not built, or cannot express what is asked; the message says which."""


@dataclass(frozen=True)
class Case:
    """One shape, by the legend of fastbert/reference.py, in one dtype on one device."""

    shape: Mapping[str, int | float | str]
    dtype: str
    device: str = "cpu"

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def but(self, **sizes: int | float | str) -> "Case":
        return replace(self, shape={**self.shape, **sizes})

    def __getitem__(self, name: str) -> int | float | str:
        return self.shape[name]

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.shape.items()) + f" {self.dtype}"


def _as_they_are(inputs: dict) -> dict:
    return inputs


@dataclass(frozen=True)
class Provider:
    """Somebody's implementation: make(case) returns a function of the case's inputs, or raises Missing.

    package: where it comes from, if not from PyTorch or fastbert. gpu: whether it needs one. arrange: the inputs as
    this provider takes them, outside of the time. comparable: False if it computes something else by design, so that it
    cannot be checked.
    """

    name: str
    make: Callable[[Case], Callable]
    package: str | None = None
    gpu: bool = False
    arrange: Callable[[dict], dict] = field(default=_as_they_are)
    comparable: bool = True

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    def rivals(self, other: "Provider") -> bool:
        """Whether this one's time may be held against the other's: it computes the same, and they are not both ours."""
        return self is not other and self.comparable and not (self.ours and other.ours)


class Benchmark(ABC):
    """What one file of this folder offers: see OpBenchmark (op.py) and ModelBenchmark (models.py)."""

    op: str
    modes: tuple[str, ...]
    tiny: dict  # sizes for a rehearsal that an interpreter can do in seconds
    sweep: tuple[str, list[dict]] | None = None  # a file of kernels/, and what its launch_config could answer
    graph = True  # whether steps are replayed as CUDA graphs; False: launched from Python, as users launch them

    @abstractmethod
    def shapes(self, cuda: bool) -> list[dict]:
        """Shapes worth measuring, the most telling first; small ones for a CPU."""

    def dtypes(self, cuda: bool) -> Sequence[str]:
        return ("fp16", "bf16", "fp32") if cuda else ("fp32",)

    @abstractmethod
    def providers(self, case: Case) -> list[Provider]: ...

    @abstractmethod
    def inputs(self, case: Case, seed: int) -> dict:
        """Fresh arguments of the op."""

    @abstractmethod
    def check(self, provider: Provider, case: Case) -> str:
        """What agreed. Raises AssertionError if something did not."""

    @abstractmethod
    def step(self, op: Callable, inputs: dict, mode: str) -> Step:
        """A function that runs `op` once in the mode."""

    @abstractmethod
    def work(self, case: Case, mode: str) -> Work:
        """What the mode cannot do without."""

    def figures(self, case: Case, mode: str, p50_us: float) -> dict[str, float]:
        """Columns of its own."""
        return {}


@dataclass(frozen=True)
class Settings:
    """What holds for all cases of a run. deadline: by time.monotonic(); no case is begun after it."""

    device: str = "cpu"
    modes: Sequence[str] | None = None
    providers: Sequence[str] | None = None
    rounds: int = 10
    deadline: float = float("inf")

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def wants(self, provider: Provider) -> bool:
        return not self.providers or provider.name.startswith(tuple(self.providers))

    def modes_of(self, benchmark: Benchmark) -> list[str]:
        return [mode for mode in benchmark.modes if not self.modes or mode in self.modes]


class Runner:
    """One run on one device: its clock, its ceilings, what all its rows say. progress(text) is told what it does."""

    def __init__(self, settings: Settings, dtypes: Iterable[str], progress: Callable[[str], None] = lambda _: None):
        self.settings, self.progress = settings, progress
        self.clock = GpuClock(settings.device) if settings.cuda else CpuClock()
        self.every_row = {"run": uuid.uuid4().hex[:12], **environment(settings.device)}
        progress("measuring the ceilings of the device")
        self.ceilings = ceilings.measure(self.clock.time, settings.device, sorted(dtypes))

    def ceiling_rows(self) -> Iterator[dict]:
        for dtype in self.ceilings.flops:
            about = {"op": "ceilings", "provider": "device", "shape": {}, "dtype": dtype, "status": MEASURED}
            yield about | {"ceilings": self.ceilings.row(dtype)} | self.every_row

    def rows(self, benchmark: Benchmark, cases: Sequence[Case]) -> Iterator[dict]:
        """A row per case, mode and provider, each as soon as it is there; if time ran out, one that says what is left
        out."""
        for number, case in enumerate(cases):
            if time.monotonic() > self.settings.deadline:
                left = {"status": MISSING, "reason": f"out of time: {'; '.join(map(str, cases[number:]))}"}
                yield {"op": benchmark.op, "provider": "all"} | left | self.every_row
                return
            for row in self._case(benchmark, case):
                yield row | self.every_row
            self._release()

    def _case(self, benchmark: Benchmark, case: Case) -> Iterator[dict]:
        ready = {}
        for provider in filter(self.settings.wants, benchmark.providers(case)):
            self.progress(f"{benchmark.op} {case}: checking {provider.name}")
            with _reasons() as failure:
                if provider.gpu and not case.cuda:
                    raise Missing("needs an NVIDIA GPU")
                op = provider.make(case)
                checked = benchmark.check(provider, case) if provider.comparable else NOT_COMPARABLE
                ready[provider] = op, checked
            if failure:
                yield _about(benchmark, case, provider) | failure
            self._release()
        sets = Sets(benchmark, case)
        for mode in self.settings.modes_of(benchmark):
            self.progress(f"{benchmark.op} {case}: timing {mode}")
            yield from self._mode(benchmark, case, mode, ready, sets)
            self._release()

    def _mode(self, benchmark: Benchmark, case: Case, mode: str, ready: Mapping, sets: "Sets") -> Iterator[dict]:
        steps, rows = {}, {}
        for provider, (op, checked) in ready.items():
            row = _about(benchmark, case, provider) | {"mode": mode}
            with _reasons() as failure:
                makers = [partial(benchmark.step, op, inputs, mode) for inputs in sets.of(provider)]
                made, peaks = zip(*(self.clock.prepare(make, benchmark.graph) for make in makers), strict=True)
                timer = {"checked": checked, "timer": self.clock.kind(made), "rounds": self.settings.rounds}
                steps[provider] = made
                rows[provider] = row | {"status": MEASURED, "peak_mib": peaks[0]} | timer
            if failure:
                yield row | failure
                self._release()
        times = time_in_turns(steps, self.settings.rounds, self.clock.time)
        work = benchmark.work(case, mode)
        floor, by = self.ceilings.floor_us(work, case.dtype)
        for provider, found in times.items():
            p50 = median(found)
            rivals = [median(times[other]) for other in times if other.rivals(provider)]
            figures = percentiles(found) | {
                "tflops": work.flops / p50 / 1e6,
                "gb_per_s": work.bytes / p50 / 1e3,
                "floor_us": floor,
                "percent_of_floor": 100 * floor / p50,
                "ratio": min(rivals) / p50 if rivals else None,
                **benchmark.figures(case, mode, p50),
            }
            rounded = {key: None if value is None else float(f"{value:.5g}") for key, value in figures.items()}
            yield rows[provider] | rounded | {"floor_by": by, "ceilings": self.ceilings.row(case.dtype)}

    def _release(self) -> None:
        """Give back what failed or finished providers hold: graphs and their memory wait for the collector."""
        gc.collect()
        if self.settings.cuda:
            torch.cuda.empty_cache()


class Sets:
    """The sets of inputs of a case: drawn once, arranged once for all providers that want them so."""

    def __init__(self, benchmark: Benchmark, case: Case):
        first = benchmark.inputs(case, seed=0)
        size = sum(t.nbytes for t in _tensors(first.values()))
        count = max(2, min(4, INPUT_BYTES // max(size, 1))) if case.cuda else 2
        plain = [first, *(benchmark.inputs(case, seed=i) for i in range(1, count))]
        self._arranged = {_as_they_are: plain}

    def of(self, provider: Provider) -> list[dict]:
        if provider.arrange not in self._arranged:
            self._arranged[provider.arrange] = [provider.arrange(inputs) for inputs in self._arranged[_as_they_are]]
        return self._arranged[provider.arrange]


def time_in_turns(steps: Mapping, rounds: int, clock: Callable[[Step], float]) -> dict:
    """Microseconds by name, one for each round, in which every name has a turn with the next of its steps."""
    names = list(steps)
    times = {name: [] for name in names}
    turns = {name: itertools.cycle(steps[name]) for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(-1, rounds):  # the first round warms up
            shift = number % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                elapsed = clock(next(turns[name]))
                if number >= 0:
                    times[name].append(elapsed)
    finally:
        gc.enable()
    return times


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, interpolated."""
    fifths = quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return {"p20_us": fifths[1], "p50_us": fifths[4], "p80_us": fifths[7]}


class CpuClock:
    """Wall time of a step."""

    def prepare(self, make: Callable[[], Step], graph: bool) -> tuple[Step, None]:
        step = make()
        step()
        return step, None

    def kind(self, _steps: Sequence[Step]) -> str:
        return "clock"

    def time(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return 1e6 * (time.perf_counter() - start)


class GpuClock:
    """Time on the device between two events around a step, with nothing of its own in the L2 cache."""

    def __init__(self, device: str):
        self.buffer = torch.zeros(FLUSH // 4, dtype=torch.int32, device=device)
        self.stream = torch.cuda.Stream(device)
        # Graphs share their memory: they are replayed one after another, and nobody reads what they leave.
        self.pool = torch.cuda.graph_pool_handle()

    def prepare(self, make: Callable[[], Step], graph: bool) -> tuple[Step, float]:
        """The step, as a CUDA graph if it can be one, and the MiB that it allocates. It is made and warmed up on the
        stream on which it is captured, where a backward follows its forward."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step = make()
            for _ in range(2):
                step()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        torch.cuda.synchronize()
        return (self._captured(step) if graph else step), peak

    def _captured(self, step: Step) -> Step:
        replayed = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(replayed, pool=self.pool, stream=self.stream):
                step()
        except Exception:
            torch.cuda.synchronize()
            return step
        return replayed.replay

    def kind(self, steps: Sequence[Step]) -> str:
        graphs = [isinstance(getattr(step, "__self__", None), torch.cuda.CUDAGraph) for step in steps]
        return "graph" if all(graphs) else "events"

    def time(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.sum()
        start.record()
        step()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)


def _about(benchmark: Benchmark, case: Case, provider: Provider) -> dict:
    installed = package_version(provider.package) if provider.package else None
    package = f"{provider.package} {installed}" if installed else None
    about = {"op": benchmark.op, "provider": provider.name, "package": package}
    return about | {"shape": dict(case.shape), "dtype": case.dtype}


@contextmanager
def _reasons() -> Iterator[dict[str, str]]:
    """A dict that stays empty if the block runs through; else it gets the status and the reason for a row, with what
    was warned of before, which is where PyTorch says why a kernel does not serve."""
    failure: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            yield failure
        except Exception as error:
            status, kind = FAILED, f"{type(error).__name__}: "
            if isinstance(error, Missing | BackendError | ModuleNotFoundError):
                status, kind = MISSING, ""
            elif isinstance(error, AssertionError):
                status, kind = WRONG, ""
            said = " ".join(str(error).split())
            if status == FAILED:
                warnings_said = (re.sub(r"\(Triggered internally.*", "", str(w.message)) for w in warned)
                said += "".join(f" ({' '.join(text.split())})" for text in warnings_said if "ernel" in text)
            failure |= {"status": status, "reason": (kind + said)[:500]}


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
