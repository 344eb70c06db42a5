"""`dropout_add_layer_norm`: LayerNorm(residual + dropout(x)) on T rows of C columns; with bias=1, of x + x_bias.

Floors: forward reads x and residual and writes y; backward reads dy and one tensor from which the normalised rows are
had again, and writes dx and dresidual, which are one where nothing was dropped.
"""

from collections.abc import Callable
from itertools import product

import torch.nn.functional as F
from torch import Tensor

from .ceilings import DTYPES, Work
from .harness import Case, Provider
from .op import OpBenchmark, generator_on, imported, normal

EPS = 1e-12


class DropoutAddLayerNormBenchmark(OpBenchmark):
    op = "dropout_add_layer_norm"
    tiny = {"T": 8, "C": 64}
    sweep = (
        "layer_norm",
        [
            {"kernel": kernel, "BLOCK_M": m, "BLOCK_N": 1024, "num_warps": warps}
            for kernel, m, warps in product(("forward", "backward"), (1, 2, 4), (1, 2, 4, 8))
            if 4 <= m * 32 // warps <= 32
        ],
    )

    def shapes(self, cuda: bool) -> list[dict]:
        rows = [(16384, 768), (16384, 1024), (4096, 768)] if cuda else [(1024, 384)]
        plain = [{"T": t, "C": c, "dropout": p} for t, c in rows for p in (0.1, 0.0)]
        return [*plain, {**plain[0], "bias": 1}] if cuda else plain

    def flags(self, case: Case) -> dict:
        return {"eps": EPS, "dropout_p": case["dropout"]}

    def small(self, case: Case) -> Case:
        return case if case.cuda else case.but(T=min(case["T"], 128))

    def inputs(self, case: Case, seed: int) -> dict:
        generator = generator_on(case.device, seed)
        rows, columns = (case["T"], case["C"]), (case["C"],)
        shapes = {"x": rows, "residual": rows, "weight": columns, "bias": columns}
        if case.shape.get("bias"):
            shapes["x_bias"] = columns
        return {name: normal(shape, case, generator) for name, shape in shapes.items()}

    def work(self, case: Case, mode: str) -> Work:
        backward = 4 if case["dropout"] else 3
        tensors = {"fwd": 3, "bwd": backward, "fwd+bwd": 3 + backward}[mode]
        return Work(bytes=tensors * case["T"] * case["C"] * DTYPES[case.dtype].itemsize)

    def peers(self, case: Case) -> list[Provider]:
        return [Provider("torch", _torch), Provider("liger-kernel", _liger, package="liger-kernel", gpu=True)]


def _torch(case: Case) -> Callable:
    """PyTorch's own fused pieces: dropout, sum, layer_norm."""
    columns = (case["C"],)
    return lambda x, residual, weight, bias, x_bias=None: F.layer_norm(
        residual + _dropped(case, x, x_bias), columns, weight, bias, EPS
    )


def _liger(case: Case) -> Callable:
    norm = imported("liger_kernel.transformers.functional", "liger_layer_norm", "liger-kernel")
    return lambda x, residual, weight, bias, x_bias=None: norm(residual + _dropped(case, x, x_bias), weight, bias, EPS)


def _dropped(case: Case, x: Tensor, x_bias: Tensor | None) -> Tensor:
    return F.dropout(x if x_bias is None else x + x_bias, case["dropout"])


BENCHMARK = DropoutAddLayerNormBenchmark()
