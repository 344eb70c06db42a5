"""The harness: providers side by side, checked before they are timed, taking turns on cold inputs.

A Benchmark says what is measured (cases, inputs, how much work that is) and who does it (providers); a Runner yields a
row per provider and mode. What a provider cannot do becomes a row that says so; nothing that a provider raises ends it.

Every provider of a case has several sets of inputs, which it takes in turn, and the providers take turns with each
other, in an order that rotates. How a turn is timed: clocks.py.
"""

import gc
import re
import time
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch

from fastbert.errors import BackendError
from fastbert.testing import Mismatch

from . import ceilings
from .ceilings import Work
from .clocks import CpuClock, GpuClock, Prepared, Step, percentiles, time_in_turns, timer
from .rows import FAILED, MEASURED, MISSING, WRONG, environment, package_version

INPUT_BYTES = 2**28  # what the sets of inputs of one case may take together; every set also keeps a forward's memory
OURS = "fastbert"
NOT_CHECKED = "not checked: it computes something else"


class Missing(Exception):
    """A provider is not installed or not built, or cannot express what is asked; the message says which."""


class Spoilt(Exception):
    """A capture or a kernel failed in such a way that nothing which this process still measures can be trusted."""


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
    this provider takes them, outside of the time. comparable: False if it computes something else by design, so that
    its time is nobody's rival; checked: False if what it computes cannot be checked either.
    """

    name: str
    make: Callable[[Case], Callable]
    package: str | None = None
    gpu: bool = False
    arrange: Callable[[dict], dict] = field(default=_as_they_are)
    comparable: bool = True
    checked: bool = True

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
    graph = True  # whether steps may be CUDA graphs; False: launched from Python, as users launch them

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
    def check(self, provider: Provider, op: Callable, case: Case) -> str:
        """What agreed of op, which is provider.make(case). Raises Mismatch if something did not."""

    @abstractmethod
    def step(self, op: Callable, inputs: dict, mode: str) -> Step:
        """A function that runs `op` once in the mode."""

    def rest(self, op: Callable) -> None:
        """Give back what one step of `op` leaves for the next, so that the memory it takes is all seen."""
        return

    def held(self, op: Callable) -> int | None:
        """Bytes that `op` keeps from step to step where others allocate them in each, to be counted with its memory;
        None if what it takes cannot be told."""
        return 0

    def breakdown(
        self, op: Callable, step: Step, case: Case, mode: str, ceilings: ceilings.Ceilings
    ) -> list[tuple] | None:
        """What a step is made of, as breakdown.Part, or None."""
        return None

    @abstractmethod
    def work(self, case: Case, mode: str) -> Work:
        """What the mode cannot do without."""

    def graphs(self, case: Case, mode: str) -> bool:
        """Whether the steps of a mode may be CUDA graphs."""
        return self.graph

    def figures(self, case: Case, mode: str, p50_us: float) -> dict[str, float]:
        """Columns of its own."""
        return {}


@dataclass(frozen=True)
class Settings:
    """What holds for all cases of a run. deadline: by time.monotonic(); after it no case, provider or mode is begun.
    graphs: whether steps may be CUDA graphs."""

    device: str = "cpu"
    modes: Sequence[str] | None = None
    providers: Sequence[str] | None = None
    rounds: int = 10
    deadline: float = float("inf")
    graphs: bool = True

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
        self.ceilings = ceilings.measure(self.clock, settings.device, sorted(dtypes), settings.graphs)

    def ceiling_rows(self) -> Iterator[dict]:
        for dtype in self.ceilings.flops:
            about = {"op": "ceilings", "provider": "device", "shape": {}, "dtype": dtype, "status": MEASURED}
            yield about | {"ceilings": self.ceilings.row(dtype)} | self.every_row

    def rows(self, benchmark: Benchmark, cases: Sequence[Case]) -> Iterator[dict]:
        """A row per case, mode and provider, each as soon as it is there; what time ran out for is a row too. Raises
        Spoilt after the row of who did it."""
        for number, case in enumerate(cases):
            if self._late:
                left = _out_of_time("; ".join(map(str, cases[number:])))
                yield {"op": benchmark.op, "provider": "all"} | left | self.every_row
                return
            for row in self._case(benchmark, case):
                yield row | self.every_row
            self._release()

    @property
    def _late(self) -> bool:
        return time.monotonic() > self.settings.deadline

    def _case(self, benchmark: Benchmark, case: Case) -> Iterator[dict]:
        ready = {}
        for provider in filter(self.settings.wants, benchmark.providers(case)):
            if self._late:
                yield _about(benchmark, case, provider) | _out_of_time("not checked")
                continue
            self.progress(f"{benchmark.op} {case}: checking {provider.name}")
            with _reasons() as failure:
                if provider.gpu and not case.cuda:
                    raise Missing("needs an NVIDIA GPU")
                op = provider.make(case)
                ready[provider] = op, benchmark.check(provider, op, case) if provider.checked else NOT_CHECKED
            if failure:
                yield _about(benchmark, case, provider) | failure
                self._stop_if_spoilt()
            self._release()
        with _reasons() as failure:
            sets = Sets(benchmark, case)
        if failure:
            yield {"op": benchmark.op, "provider": "all", "shape": dict(case.shape), "dtype": case.dtype} | failure
            self._stop_if_spoilt()
            return
        for mode in self.settings.modes_of(benchmark):
            yield from self._mode(benchmark, case, mode, ready, sets)
            self._release()

    def _mode(self, benchmark: Benchmark, case: Case, mode: str, ready: Mapping, sets: "Sets") -> Iterator[dict]:
        prepared: dict[Provider, list[Prepared]] = {}
        rows = {provider: _about(benchmark, case, provider) | {"mode": mode} for provider in ready}
        for provider, (op, _) in ready.items():
            if self._late:
                yield rows[provider] | _out_of_time("not timed")
                continue
            self.progress(f"{benchmark.op} {case}: preparing {mode} of {provider.name}")
            with _reasons() as failure:
                makers = [partial(benchmark.step, op, inputs, mode) for inputs in sets.of(provider)]
                graphs = benchmark.graphs(case, mode) and self.settings.graphs
                prepared[provider] = [self.clock.prepare(make, graphs, partial(benchmark.rest, op)) for make in makers]
            if failure:
                yield rows[provider] | failure
                self._stop_if_spoilt()
                self._release()
        self.progress(f"{benchmark.op} {case}: timing {mode}")
        steps = {provider: [each.step for each in found] for provider, found in prepared.items()}
        times, errors = time_in_turns(steps, self.settings.rounds, self.clock)
        for provider, error in errors.items():
            yield rows[provider] | _reason(error)
        self._stop_if_spoilt()
        timers = {provider: timer(prepared[provider]) for provider in times}
        for provider, found in times.items():
            rivals = [
                median(times[other])
                for other in times
                if other.rivals(provider) and timers[other]["timer"] == timers[provider]["timer"]
            ]
            about = {"status": MEASURED, "checked": ready[provider][1], "comparable": provider.comparable}
            op, first = ready[provider][0], prepared[provider][0]
            held = benchmark.held(op)
            peak = None if None in (first.peak_mib, held) else first.peak_mib + held / 2**20
            about |= timers[provider] | {"rounds": self.settings.rounds, "peak_mib": peak}
            about |= self._figures(benchmark, case, mode, found, rivals)
            parts = benchmark.breakdown(op, first.step, case, mode, self.ceilings)
            yield rows[provider] | about | ({} if parts is None else {"breakdown": [part._asdict() for part in parts]})

    def _figures(self, benchmark: Benchmark, case: Case, mode: str, times: list[float], rivals: list[float]) -> dict:
        """The columns with numbers, to five digits."""
        work, p50 = benchmark.work(case, mode), median(times)
        floor, by = self.ceilings.floor_us(work, case.dtype)
        figures = percentiles(times) | {
            "tflops": work.flops / p50 / 1e6,
            "gb_per_s": work.bytes / p50 / 1e3,
            "floor_us": floor,
            "percent_of_floor": 100 * floor / p50,
            "ratio": min(rivals) / p50 if rivals else None,
            **benchmark.figures(case, mode, p50),
        }
        rounded = {key: None if value is None else float(f"{value:.5g}") for key, value in figures.items()}
        return rounded | {"floor_by": by, "ceilings": self.ceilings.row(case.dtype)}

    def _stop_if_spoilt(self) -> None:
        if not self.clock.sound():
            raise Spoilt("see the row above")

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
            failure |= _reason(error, warned)


def _reason(error: Exception, warned: Iterable[warnings.WarningMessage] = ()) -> dict[str, str]:
    """The status and the reason of a row without numbers."""
    status, kind = FAILED, f"{type(error).__name__}: "
    if isinstance(error, Missing | BackendError | ModuleNotFoundError):
        status, kind = MISSING, ""
    elif isinstance(error, Mismatch):
        status, kind = WRONG, ""
    said = " ".join(str(error).split())
    if status == FAILED:
        texts = (re.sub(r"\(Triggered internally.*", "", str(w.message)) for w in warned)
        said += "".join(f" ({' '.join(text.split())})" for text in texts if "ernel" in text)
    return {"status": status, "reason": (kind + said)[:500]}


def _out_of_time(what: str) -> dict[str, str]:
    return {"status": MISSING, "reason": f"out of time: {what}"}


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
