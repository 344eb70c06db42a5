"""How an op of fastbert.ops is measured: fresh tensors, compare(), forward and backward through autograd.

A file per op adds its shapes, its inputs, what work it is, and the peers that users would pick otherwise.
"""

import importlib
from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._functorch import config as functorch

from fastbert import ops, reference
from fastbert.testing import compare

from .ceilings import DTYPES
from .clocks import Step
from .harness import Benchmark, Case, Missing, Provider


class OpBenchmark(Benchmark):
    """One op: our backends, the reference as it is (eager) and through torch.compile (compiled), and peers."""

    modes = ("fwd", "bwd", "fwd+bwd")
    backends = ("triton", "torch")

    @abstractmethod
    def flags(self, case: Case) -> dict:
        """The arguments that are not tensors, for ours and for the reference."""

    def small(self, case: Case) -> Case:
        """The case on which a provider is checked against float64: the real one if float64 can be afforded."""
        return case

    def checked_form(self, op: Callable, case: Case) -> Callable:
        """What is compared in place of op and reference: they themselves."""
        return op

    def peers(self, case: Case) -> list[Provider]:
        return []

    def providers(self, case: Case) -> list[Provider]:
        """The compiled ones last: they take the longest to be ready."""
        ours = [Provider(f"fastbert-{name}", partial(self._ours, name)) for name in self.backends]
        return [*ours, *self.peers(case), Provider("eager", self._eager), Provider("compiled", self._compiled)]

    def truth(self, case: Case) -> Callable:
        """What is computed, in any dtype."""
        return self._eager(case)

    def _ours(self, backend: str, case: Case) -> Callable:
        return partial(getattr(ops, self.op), **self.flags(case), backend=backend)

    def _eager(self, case: Case) -> Callable:
        return partial(getattr(reference, self.op), **self.flags(case))

    def _compiled(self, case: Case) -> Callable:
        return compiled(self._eager(case))

    def check(self, provider: Provider, op: Callable, case: Case) -> str:
        """compare() against the reference. Dropout is exact for ours, which draw the reference's mask from a seed;
        others have generators of their own and are checked without it. Fresh memory is poisoned for ours only: others
        would have to be compiled for it once more."""
        small, seed = self.small(case), {}
        if case.shape.get("dropout"):
            small, seed = (small, {"seed": 1}) if provider.ours else (small.but(dropout=0.0), {})
        op = op if small == case or provider.ours else provider.make(small)
        inputs = provider.arrange(self.inputs(small, seed=1))
        pair = (self.checked_form(partial(f, **seed), small) for f in (op, self.truth(small)))
        rows = compare(*pair, inputs, poison=provider.ours)
        largest = max(row.error / row.bound for row in rows)
        return f"{', '.join(row.name for row in rows)}: at most {largest:.2f} of the bound at {small}"

    def step(self, op: Callable, inputs: dict, mode: str) -> Step:
        return autograd_step(op, inputs, mode)


def autograd_step(op: Callable, inputs: dict, mode: str) -> Step:
    """A function that runs the op (fwd), its backward alone (bwd), or both, for fixed random output gradients."""
    if mode == "fwd":
        return torch.no_grad()(lambda: op(**inputs))
    leaves = [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]
    y = op(**inputs)
    dy = torch.randn_like(y)
    if mode == "bwd":
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    return lambda: torch.autograd.grad(op(**inputs), leaves, dy)


def compiled(function: Callable, **options) -> Callable:
    """torch.compile for exactly the shapes that come, without what was compiled before."""
    torch.compiler.reset()
    functorch.donated_buffer = False  # or a backward could not be timed again and again on one forward
    return torch.compile(function, dynamic=False, **options)


def imported(module: str, name: str, package: str) -> Callable:
    """`name` of a peer's module; Missing if it, or what it needs, is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise Missing(f"{package} cannot be imported: there is no module {error.name}") from None


def normal(shape: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    """Normal numbers in the dtype of the case, on the generator's device, that require gradients."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=DTYPES[case.dtype]).requires_grad_()


def generator_on(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
