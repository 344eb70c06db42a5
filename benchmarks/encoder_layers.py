"""`encoder_layers`: all layers of an encoder for B sequences of L, without gradients; `groups` of layers share their
weights (ALBERT: 1; 0: every layer has its own).

Floors: the products and those of attention; every weight is read once, so a shared one once for all layers.
"""

from functools import partial
from itertools import product

import torch

from fastbert import ops, reference
from fastbert.ops.encoder_layers import ACTIVATIONS, LayerWeights

from .ceilings import DTYPES, Work
from .harness import Case, Provider
from .op import OpBenchmark, generator_on


class EncoderLayersBenchmark(OpBenchmark):
    op = "encoder_layers"
    modes = ("fwd",)
    backends = ("triton", "cuda", "torch")
    tiny = {"B": 1, "L": 16, "C": 64, "I": 128, "H": 1, "layers": 1}
    sweep = (
        "encoder_layers",
        [
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "SPLIT": split, "num_warps": warps, "num_stages": stages}
            for m, n, split, warps, stages in product((16, 32, 64, 128), (32, 64, 128), (1, 2, 4), (4, 8), (3, 4))
            if (m * n > 64 * 64) == (warps == 8)
        ],
    )

    def shapes(self, cuda: bool) -> list[dict]:
        sizes = {"C": 768, "I": 3072, "H": 12, "layers": 12} if cuda else {"C": 384, "I": 1536, "H": 6, "layers": 4}
        places = ((1, 128), (1, 32), (1, 512), (8, 128)) if cuda else ((1, 128), (1, 32))
        return [{"B": b, "L": length, **sizes, "groups": groups} for b, length in places for groups in (1, 0)]

    def providers(self, case: Case) -> list[Provider]:
        """All layers in one launch is for 16 bits."""
        return [p for p in super().providers(case) if p.name != "fastbert-cuda" or case.dtype != "fp32"]

    def flags(self, case: Case) -> dict:
        return {"heads": case["H"], "eps": 1e-12}

    def inputs(self, case: Case, seed: int) -> dict:
        """Rows and weights of a size at which no activation grows or dies."""
        generator, dtype = generator_on(case.device, seed), DTYPES[case.dtype]
        width, inner = case["C"], case["I"]

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=generator.device).mul(scale).to(dtype)

        def layer() -> LayerWeights:
            ones = torch.ones(width, device=generator.device)
            return LayerWeights(
                *(normal(3 * width, width, scale=width**-0.5), normal(3 * width, scale=0.1)),
                *(normal(width, width, scale=width**-0.5), normal(width, scale=0.1), ones, 0 * ones),
                *(normal(inner, width, scale=width**-0.5), normal(inner, scale=0.1)),
                *(normal(width, inner, scale=inner**-0.5), normal(width, scale=0.1), ones, 0 * ones),
            )

        count, groups = case["layers"], case["groups"] or case["layers"]
        own = [list(layer()) for _ in range(groups)]
        return {
            "x": normal(case["B"], case["L"], width, scale=1.0),
            "layers": [own[i * groups // count] for i in range(count)],
        }

    def small(self, case: Case) -> Case:
        return case.but(layers=min(case["layers"], 2))

    def _ours(self, backend: str, case: Case):
        options = {"attend": ops.attention, "hidden_act": "gelu_new", "backend": backend}
        return partial(_call, partial(ops.encoder_layers, **options), self.flags(case))

    def _eager(self, case: Case):
        options = {"attend": reference.attention, "act": ACTIVATIONS["gelu_new"]}
        return partial(_call, partial(reference.encoder_layers, **options), self.flags(case))

    def work(self, case: Case, mode: str) -> Work:
        rows, width, inner = case["B"] * case["L"], case["C"], case["I"]
        matrices = width * (4 * width + 2 * inner)
        flops = case["layers"] * (2 * rows * matrices + 4 * rows * case["L"] * width)
        return Work(flops, (case["groups"] or case["layers"]) * matrices * DTYPES[case.dtype].itemsize)


def _call(function, flags: dict, x, layers) -> torch.Tensor:
    """The last result. The weights come as lists, which compare() can take apart; one list is one layer."""
    own = {id(layer): LayerWeights(*layer) for layer in layers}
    with torch.no_grad():
        return function(x, [own[id(layer)] for layer in layers], **flags)[-1]


BENCHMARK = EncoderLayersBenchmark()
