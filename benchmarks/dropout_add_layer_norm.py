"""`dropout_add_layer_norm`: LayerNorm(residual + dropout(x)) on T rows of C columns.

Floors: forward reads x and residual and writes y; backward reads dy and one tensor from which the normalised rows are
had again, and writes dx and dresidual, which are one where nothing was dropped.
"""

from collections.abc import Callable

import torch.nn.functional as F

from .ceilings import DTYPES, Work
from .harness import Case, Provider
from .op import OpBenchmark, generator_on, imported, normal

EPS = 1e-12


class DropoutAddLayerNormBenchmark(OpBenchmark):
    op = "dropout_add_layer_norm"
    tiny = {"T": 8, "C": 64}

    def shapes(self, cuda: bool) -> list[dict]:
        rows = [(16384, 768), (16384, 1024), (4096, 768)] if cuda else [(1024, 384)]
        return [{"T": t, "C": c, "dropout": p} for t, c in rows for p in (0.1, 0.0)]

    def flags(self, case: Case) -> dict:
        return {"eps": EPS, "dropout_p": case["dropout"]}

    def small(self, case: Case) -> Case:
        return case if case.cuda else case.but(T=min(case["T"], 128))

    def inputs(self, case: Case, seed: int) -> dict:
        generator = generator_on(case.device, seed)
        rows, columns = (case["T"], case["C"]), (case["C"],)
        shapes = {"x": rows, "residual": rows, "weight": columns, "bias": columns}
        return {name: normal(shape, case, generator) for name, shape in shapes.items()}

    def work(self, case: Case, mode: str) -> Work:
        backward = 4 if case["dropout"] else 3
        tensors = {"fwd": 3, "bwd": backward, "fwd+bwd": 3 + backward}[mode]
        return Work(bytes=tensors * case["T"] * case["C"] * DTYPES[case.dtype].itemsize)

    def peers(self, case: Case) -> list[Provider]:
        return [Provider("torch", _torch), Provider("liger-kernel", _liger, package="liger-kernel", gpu=True)]


def _torch(case: Case) -> Callable:
    """PyTorch's own fused pieces: dropout, sum, layer_norm."""
    p, columns = case["dropout"], (case["C"],)
    return lambda x, residual, weight, bias: F.layer_norm(residual + F.dropout(x, p), columns, weight, bias, EPS)


def _liger(case: Case) -> Callable:
    norm = imported("liger_kernel.transformers.functional", "liger_layer_norm", "liger-kernel")
    p = case["dropout"]
    return lambda x, residual, weight, bias: norm(residual + F.dropout(x, p), weight, bias, EPS)


BENCHMARK = DropoutAddLayerNormBenchmark()
