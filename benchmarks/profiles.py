"""`fastbert bench --profile`: where the time of each provider's step goes, by PyTorch's profiler."""

from collections.abc import Iterator, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from .harness import Benchmark, Case, Missing, Settings

STEPS = 3
LINES = 18


def profiles(benchmark: Benchmark, cases: Sequence[Case], settings: Settings) -> Iterator[str]:
    """A table for each case, mode and provider, of STEPS steps together. Nothing is checked, and no time is a row."""
    for case in cases:
        for provider in filter(settings.wants, benchmark.providers(case)):
            for mode in settings.modes_of(benchmark):
                head = f"\n{benchmark.op} {case} {mode} {provider.name}, {STEPS} steps"
                try:
                    yield f"{head}\n{_table(benchmark, case, provider, mode)}"
                except Exception as error:  # a provider that is missing or fails is a line, as everywhere
                    yield f"{head}: {type(error).__name__}: {error}"


def _table(benchmark: Benchmark, case: Case, provider, mode: str) -> str:
    if provider.gpu and not case.cuda:
        raise Missing("needs an NVIDIA GPU")
    step = benchmark.step(provider.make(case), provider.arrange(benchmark.inputs(case, seed=0)), mode)
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if case.cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if case.cuda:
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if case.cuda else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=LINES, max_name_column_width=60)
