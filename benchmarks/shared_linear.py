"""`shared_linear`: forward and backward of one linear layer with bias that is applied `times` times to T rows each.

fastbert adds every application's product to one float32 sum. concatenated: one product over the inputs and output
gradients of all applications side by side, kept until the last. autograd: what PyTorch does by itself, a gradient per
application, rounded and summed in the dtype. The column `checked` tells the error of the weight's gradient.

Floors: three products per application; weight, its gradient, inputs and their gradients, outputs and theirs, once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops.shared_linear import share, shared_linear
from fastbert.testing import FLOOR, Mismatch

from .ceilings import DTYPES, Work
from .clocks import Step
from .harness import Benchmark, Case, Provider
from .op import generator_on


class SharedLinearBenchmark(Benchmark):
    op = "shared_linear"
    modes = ("fwd+bwd",)
    tiny = {"T": 64, "C": 64, "N": 64, "times": 3}

    def shapes(self, cuda: bool) -> list[dict]:
        rows, width = (16384, 768) if cuda else (1024, 384)
        return [{"T": rows, "C": c * width, "N": n * width, "times": 12} for c, n in ((1, 3), (1, 1), (1, 4), (4, 1))]

    def providers(self, case: Case) -> list[Provider]:
        others = {"concatenated": _concatenated, "autograd": _autograd}
        found = [Provider("fastbert", lambda case: _accumulated)]
        return found + [Provider(name, lambda case, f=f: f) for name, f in others.items()]

    def inputs(self, case: Case, seed: int) -> dict:
        """An input and an output gradient for each application, and the parameters."""
        generator, dtype = generator_on(case.device, seed), DTYPES[case.dtype]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)

        width, columns, times = case["C"], case["N"], case["times"]
        weight, bias = normal(columns, width).mul_(width**-0.5), normal(columns)
        return {
            "xs": [normal(case["T"], width).requires_grad_() for _ in range(times)],
            "dys": [normal(case["T"], columns) for _ in range(times)],
            "weight": weight.requires_grad_(),
            "bias": bias.requires_grad_(),
        }

    def check(self, provider: Provider, op: Callable, case: Case) -> str:
        """Against float64; the bound is twice the error of one product per application, rounded to the dtype."""
        small = case.but(T=min(case["T"], 256))
        inputs = self.inputs(small, seed=1)
        wide = {name: _double(value) for name, value in inputs.items()}
        truth, found, yardstick = _autograd(**wide), op(**inputs), _autograd(**inputs)
        shares, dtype = [], DTYPES[case.dtype]
        for name, want, got, other in zip(("weight", "bias", "x"), truth, found, yardstick, strict=True):
            error, slack = (((t.double() - want).norm() / want.norm()).item() for t in (got, other))
            bound = 2 * slack + FLOOR[dtype] * torch.finfo(dtype).eps
            if not error <= bound:
                raise Mismatch(f"gradient of {name}: relative error {error:.3g}, bound {bound:.3g}")
            shares.append(error / bound)
            if name == "weight":
                of_weight = error
        about = f"weight, bias, x: at most {max(shares):.2f} of the bound at {small}"
        return f"{about}; relative error of the weight's gradient {of_weight:.2g}"

    def step(self, op: Callable, inputs: dict, mode: str) -> Step:
        return lambda: op(**inputs)

    def work(self, case: Case, mode: str) -> Work:
        rows, width, columns, times = (case[name] for name in ("T", "C", "N", "times"))
        elements = 2 * width * columns + 2 * times * rows * (width + columns)
        return Work(6 * times * rows * width * columns, elements * DTYPES[case.dtype].itemsize)


def _double(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(value, list):
        return [_double(each) for each in value]
    return value.detach().double().requires_grad_(value.requires_grad)


# Each returns the gradients of the weight, of the bias and of the first input.


def _accumulated(xs: list[Tensor], dys: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    (shared,), total = share(weight.dtype, [([weight], [bias])])
    ys = []
    for x in xs:
        y, total = shared_linear(x, shared, total)
        ys.append(y)
    return _gradients(ys, xs, dys, weight, bias)


def _autograd(xs: list[Tensor], dys: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return _gradients([F.linear(x, weight, bias) for x in xs], xs, dys, weight, bias)


def _concatenated(xs: list[Tensor], dys: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    frozen = weight.detach(), bias.detach()
    ys = [F.linear(x, *frozen) for x in xs]
    dxs = torch.autograd.grad(ys, xs, dys)
    dy = torch.cat(dys)
    return dy.T @ torch.cat(xs).detach(), dy.sum(0), dxs[0]


def _gradients(ys: list[Tensor], xs: list[Tensor], dys: list[Tensor], weight: Tensor, bias: Tensor):
    dw, db, dx, *_ = torch.autograd.grad(ys, [weight, bias, *xs], dys)
    return dw, db, dx


BENCHMARK = SharedLinearBenchmark()
