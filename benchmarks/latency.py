"""Latency of one short batch through an encoder in evaluation mode, weights in the dtype: BERT, RoFormer, and ALBERT,
whose layers share their weights.

fwd: what the GPU takes; steps are CUDA graphs where they can be; a model that waits for the host cannot. call: what a
caller waits for, launched from Python as callers do. fastbert-latency is fastbert.compile_for_latency, in fwd without
its own graphs. transformers-max-autotune is torch.compile in that mode, in fwd without its own graphs.
"""

from functools import partial

import torch
from torch import nn

import fastbert

from .ceilings import DTYPES, Work
from .clocks import Step
from .harness import Case, Provider
from .models import BASE, CPU_SIZES, ModelBenchmark, Runnable, has_sdpa
from .op import compiled


class LatencyBenchmark(ModelBenchmark):
    op = "latency"
    modes = ("fwd", "call")
    graph = True

    def graphs(self, case: Case, mode: str) -> bool:
        return mode == "fwd"

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

    def providers(self, case: Case) -> list[Provider]:
        first, *others = super().providers(case)
        latency = Provider("fastbert-latency", self._latency)
        tuned = Provider("transformers-max-autotune", self._tuned, package="transformers", gpu=True)
        return [first, latency, *others, tuned]

    def inputs(self, case: Case, seed: int) -> dict:
        """Without padding there is no mask to pass."""
        found = super().inputs(case, seed)
        if case["fill"] == 1:
            del found["attention_mask"]
        return found

    def prepared(self, model: nn.Module, case: Case) -> nn.Module:
        return model.to(DTYPES[case.dtype])

    def _latency(self, case: Case) -> Runnable:
        model = self._ours({}, case).model
        made = fastbert.compile_for_latency(model, max_batch=case["B"], max_length=case["L"])
        return Runnable(model, case, call=torch.no_grad()(made.uncaptured), called=made)

    def _tuned(self, case: Case) -> Runnable:
        model = self._theirs("sdpa" if has_sdpa(case) else "eager", case).model
        uncaptured, captured = (compiled(model, mode=f"max-autotune{end}") for end in ("-no-cudagraphs", ""))
        return Runnable(model, case, call=uncaptured, called=captured)

    def work(self, case: Case, mode: str) -> Work:
        return super().work(case, "fwd")

    def step(self, op: Runnable, inputs: dict, mode: str) -> Step:
        if mode == "call" and op.called is not None:
            return torch.no_grad()(partial(op.called, **op.batch(inputs)))
        return super().step(op, inputs, "fwd")


BENCHMARK = LatencyBenchmark()
