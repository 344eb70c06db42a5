"""Latency of one short batch through an encoder in evaluation mode, weights in the dtype: BERT, RoFormer, and ALBERT,
whose layers share their weights. Steps are CUDA graphs where they can be; a model that waits for the host cannot.
"""

from torch import nn

from .ceilings import DTYPES
from .harness import Case
from .models import BASE, CPU_SIZES, ModelBenchmark


class LatencyBenchmark(ModelBenchmark):
    op = "latency"
    modes = ("fwd",)
    graph = True

    def shapes(self, cuda: bool) -> list[dict]:
        sizes = BASE if cuda else CPU_SIZES
        places = ((1, 128), (1, 32), (1, 512), (8, 128)) if cuda else ((1, 128), (1, 32))
        return [
            {"family": family, "part": "encoder", "B": b, "L": length, **sizes, "dropout": 0.0, "fill": 1.0}
            for b, length in places
            for family in ("albert", "bert", "roformer")
        ]

    def dtypes(self, cuda: bool):
        return ("fp16", "bf16") if cuda else ("fp32",)

    def inputs(self, case: Case, seed: int) -> dict:
        """Without padding there is no mask to pass."""
        found = super().inputs(case, seed)
        if case["fill"] == 1:
            del found["attention_mask"]
        return found

    def prepared(self, model: nn.Module, case: Case) -> nn.Module:
        return model.to(DTYPES[case.dtype])


BENCHMARK = LatencyBenchmark()
