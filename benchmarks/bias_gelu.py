"""`bias_gelu`: gelu(x + bias), exact (erf) and tanh, on T rows of I columns.

Floors: forward reads x and writes y; backward reads dy and x and writes dx; training keeps x.
"""

from itertools import product

from .ceilings import DTYPES, Work
from .harness import Case
from .op import OpBenchmark, generator_on, normal


class BiasGeluBenchmark(OpBenchmark):
    op = "bias_gelu"
    tiny = {"T": 8, "I": 512}
    sweep = (
        "gelu",
        [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps}
            for m, n, warps in product((1, 2, 4, 8), (256, 512, 1024), (2, 4, 8))
            if m * n <= 64 * 32 * warps
        ],
    )

    def shapes(self, cuda: bool) -> list[dict]:
        rows = [(16384, 3072), (4096, 3072), (32768, 3072), (16384, 4096)] if cuda else [(1024, 1536)]
        return [{"T": t, "I": i, "form": form} for t, i in rows for form in ("none", "tanh")]

    def flags(self, case: Case) -> dict:
        return {"approximate": case["form"]}

    def small(self, case: Case) -> Case:
        return case if case.cuda else case.but(T=min(case["T"], 64))

    def inputs(self, case: Case, seed: int) -> dict:
        generator = generator_on(case.device, seed)
        x, bias = (normal(s, case, generator) for s in ((case["T"], case["I"]), (case["I"],)))
        return {"x": x, "bias": bias}

    def work(self, case: Case, mode: str) -> Work:
        tensors = {"fwd": 2, "bwd": 3, "fwd+bwd": 5}[mode]
        return Work(bytes=tensors * case["T"] * case["I"] * DTYPES[case.dtype].itemsize)


BENCHMARK = BiasGeluBenchmark()
