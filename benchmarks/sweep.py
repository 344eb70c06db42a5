"""Launch configurations of a kernel against each other: what `launch_config` answers could be, timed like providers.

The fastest of each dtype and mode is what to write into launch_config, with the device and the command beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from unittest import mock

from fastbert.errors import ConfigError

from .ceilings import Work
from .clocks import Step
from .harness import OURS, Benchmark, Case, Provider


@dataclass(frozen=True)
class Configured:
    """An op whose kernels are launched as `config` says: all of them, or the one that it names as "kernel"."""

    op: Callable
    kernels: str
    config: dict

    def during(self, function: Callable) -> Callable:
        """The function with the configuration in place while it runs. Also a backward sees it, whatever its thread."""
        module = import_module(f"fastbert.kernels.{self.kernels}")
        config, usual = dict(self.config), module.launch_config
        chosen = config.pop("kernel", None)

        def answer(*args):
            return dict(config) if chosen in (None, args[0]) else usual(*args)

        def run(*args, **kwargs):
            with mock.patch.object(module, "launch_config", answer):
                return function(*args, **kwargs)

        return run


class Sweep(Benchmark):
    """The benchmark of an op, with its Triton backend in every configuration instead of its providers."""

    def __init__(self, benchmark: Benchmark):
        if benchmark.sweep is None:
            raise ConfigError(f"--sweep: {benchmark.op} has no launch configurations to choose from")
        self.inner = benchmark
        self.op = f"{benchmark.op} sweep"  # rows of another name: they are no evidence about providers
        self.modes, self.tiny = benchmark.modes, benchmark.tiny

    def shapes(self, cuda: bool) -> list[dict]:
        return self.inner.shapes(cuda)

    def dtypes(self, cuda: bool):
        return self.inner.dtypes(cuda)

    def graphs(self, case: Case, mode: str) -> bool:
        return self.inner.graphs(case, mode)

    def inputs(self, case: Case, seed: int) -> dict:
        return self.inner.inputs(case, seed)

    def work(self, case: Case, mode: str) -> Work:
        return self.inner.work(case, mode)

    def providers(self, case: Case) -> list[Provider]:
        kernels, configurations = self.inner.sweep

        def make(config: dict, case: Case) -> Configured:
            return Configured(self._triton(case).make(case), kernels, config)

        return [
            Provider(" ".join(f"{name}={value}" for name, value in config.items()), partial(make, config))
            for config in configurations
        ]

    def check(self, provider: Provider, op: Configured, case: Case) -> str:
        return op.during(self.inner.check)(self._triton(case), op.op, case)

    def _triton(self, case: Case) -> Provider:
        return next(p for p in self.inner.providers(case) if p.name == f"{OURS}-triton")

    def step(self, op: Configured, inputs: dict, mode: str) -> Step:
        return op.during(op.during(self.inner.step)(op.op, inputs, mode))
