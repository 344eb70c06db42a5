"""A pretraining step: gradients of a masked language model with dropout, and the optimizer.

fastbert is what `fastbert pretrain` runs (fastbert.train.step): packed rows that cross from the host's memory in every
step, the vocabulary and the last layer for labelled tokens only, float32 weights with a working copy in 16 bits;
fastbert-compile and fastbert-cuda-graphs are its options of these names, on batches filled up to few sizes.
transformers gets the padded batch that its users have, on the device already, with autocast and PyTorch's fused AdamW;
it has no LAMB. All end with the same gradients.

tokens_per_s counts real tokens, no padding. mfu, model FLOP utilisation, is

    100 x 3 x FLOP of the forward / (seconds x peak FLOP/s of the data sheet)

where the FLOP of the forward are those of the matrix products and of attention on real tokens, all layers in full, and
of the head on labelled tokens: 2 per multiplication and addition. Nothing that is computed twice counts, nor what is
left out of the last layer. breakdown: see breakdown.py.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from fastbert.errors import ConfigError
from fastbert.optim import FusedLAMB, param_groups
from fastbert.train.feed import Buckets, MicroBatch, labelled
from fastbert.train.step import TrainStep
from fastbert.train.world import World

from .attention import lengths
from .breakdown import Part, breakdown
from .ceilings import DTYPES, Ceilings, Work
from .clocks import Step
from .harness import Case, Missing, Provider
from .models import BASE, CPU_SIZES, LABELLED, LARGE, ModelBenchmark, Runnable, fastbert_config, parameters

# Dense 16-bit operations per second by data sheet, of what torch.cuda.get_device_name begins with.
PEAKS = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}


@dataclass(eq=False)
class Updates:
    """Updates on one batch after another, each with dropout of its own."""

    step: TrainStep
    graphs: bool
    seeds: itertools.count = field(default_factory=itertools.count)

    def run(self, batch: MicroBatch) -> None:
        self.step.accumulate(batch, batch.labels, next(self.seeds))
        self.step.apply()

    @property
    def held(self) -> int | None:
        """Bytes kept beside parameters and optimizer state: gradients, and the working copy. None: CUDA graphs keep
        their own, and allocate nothing when they are replayed."""
        if self.graphs:
            return None
        copied = () if self.step.working is self.step.model else self.step.working.parameters()
        return self.step.gradients.buffer.nbytes + sum(p.nbytes for p in copied)


class TrainBenchmark(ModelBenchmark):
    op = "train"
    modes = ("step",)

    def shapes(self, cuda: bool) -> list[dict]:
        families = ("bert", "roformer", "nezha", "albert", "electra", "roberta")
        if not cuda:
            return [_shape(family, 2, 128, CPU_SIZES, 0.75, "adamw") for family in families[:2]]
        first = [_shape("bert", 32, 512, BASE, 1.0, "lamb"), _shape("bert", 32, 512, LARGE, 0.5, "lamb")]
        rivals = [_shape("bert", 128, 128, BASE, 1.0, "adamw"), _shape("bert", 32, 512, BASE, 0.5, "adamw")]
        rivals.append(_shape("roformer", 32, 512, BASE, 1.0, "adamw"))
        return [*first, *rivals, *(_shape(family, 32, 512, BASE, 1.0, "lamb") for family in families[1:])]

    def providers(self, case: Case) -> list[Provider]:
        if case["optimizer"] not in ("adamw", "lamb"):
            raise ConfigError(f"optimizer: got {case['optimizer']!r}, expected adamw or lamb")
        if case["part"] != "masked_lm":
            raise ConfigError(f"part: got {case['part']!r}, expected masked_lm: what is trained has a loss")
        filled = partial(packed, case, True)
        ours = [
            Provider("fastbert", partial(self._updates, {}), arrange=partial(packed, case, False)),
            Provider("fastbert-compile", partial(self._updates, {"compile": True}), gpu=True, arrange=filled),
            Provider("fastbert-cuda-graphs", partial(self._updates, {"graphs": True}), gpu=True, arrange=filled),
        ]
        return [*ours, *(p for p in super().providers(case) if not p.ours)]

    def _updates(self, options: dict, case: Case) -> Updates:
        model = super()._ours({}, case).model
        groups, lamb = param_groups(model, 0.01), case["optimizer"] == "lamb"
        optimizer = FusedLAMB(groups) if lamb else torch.optim.AdamW(groups, fused=True, capturable=case.cuda)
        dtype = None if case.dtype == "fp32" else DTYPES[case.dtype]
        world = World(torch.device(case.device))
        return Updates(
            TrainStep(model, optimizer, lambda _: 1e-5, world=world, dtype=dtype, clip=1.0, **options),
            "graphs" in options,
        )

    def _theirs(self, form: str, case: Case) -> Runnable:
        if case["optimizer"] == "lamb":
            raise Missing("transformers has no LAMB")
        return super()._theirs(form, case)

    def yardstick(self, case: Case) -> Runnable:
        return super()._theirs("eager", case)

    def found(self, op: Updates | Runnable, inputs: dict) -> dict[str, torch.Tensor]:
        if isinstance(op, Runnable):
            return super().found(op, inputs)
        batch: MicroBatch = inputs["batch"]
        op.step.accumulate(batch, batch.labels, seed=0)
        scale = 1.0 if op.step.loss_scale is None else op.step.loss_scale.scale
        gradients = op.step.gradients.buffer.double() / scale
        words = op.step.model.model.embeddings.word.weight.grad.double() / scale
        loss = op.step.progress.losses[0] / max(batch.labels, 1)
        return {"grad words": words, "norm of gradients": gradients.norm(), "loss": loss}

    def rest(self, op: Updates | Runnable) -> None:
        if isinstance(op, Runnable):
            super().rest(op)

    def held(self, op: Updates | Runnable) -> int | None:
        return op.held if isinstance(op, Updates) else 0

    def step(self, op: Updates | Runnable, inputs: dict, mode: str) -> Step:
        return partial(op.run, inputs["batch"]) if isinstance(op, Updates) else super().step(op, inputs, mode)

    def figures(self, case: Case, mode: str, p50_us: float) -> dict[str, float]:
        found = super().figures(case, mode, p50_us)
        name = torch.cuda.get_device_name(case.device) if case.cuda else ""
        peak = next((peak for known, peak in PEAKS.items() if name.startswith(known)), None)
        if peak is not None and case.dtype != "fp32":
            found["mfu"] = 100 * self.work(case, mode).flops / (1e-6 * p50_us * peak)
        return found

    def breakdown(self, op: object, step: Callable, case: Case, mode: str, ceilings: Ceilings) -> list[Part] | None:
        return breakdown(step, parts(case), case, ceilings) if isinstance(op, Updates) else None


def _shape(family: str, batch: int, length: int, sizes: dict, fill: float, optimizer: str) -> dict:
    batch_sizes = {"B": batch, "L": length}
    about = {"family": family, "part": "masked_lm", **batch_sizes, **sizes, "dropout": 0.1, "fill": fill}
    return about | {"optimizer": optimizer}


def packed(case: Case, filled: bool, inputs: dict) -> dict:
    """The real tokens of a padded batch, end to end, in the host's memory; filled up to one of a few sizes."""
    real = inputs["attention_mask"].bool()
    ends = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32).cpu()
    rows = {name: inputs[name][real].cpu() for name in ("input_ids", "labels")}
    batch = labelled(rows["input_ids"], rows["labels"], ends, int(ends.diff().max()))
    if filled:
        pad_id = fastbert_config(case).pad_token_id or 0
        batch = Buckets(case["B"], case["L"], 1.2 * LABELLED, pad_id).fill(batch)
    if case.cuda:
        batch = batch._replace(inputs={name: t.pin_memory() for name, t in batch.inputs.items()})
    return {"batch": batch}


def parts(case: Case) -> dict[str, Work]:
    """What each part of a step cannot do without, by breakdown.PATTERNS: forward and backward, in the dtype of the
    case, weights and their gradients in float32."""
    config, size = fastbert_config(case), DTYPES[case.dtype].itemsize
    tokens, width, layers = sum(lengths(case)), case["hidden"], case["layers"]
    inner, embedded = config.intermediate_size, config.embedding_size or width
    labels, square = LABELLED * tokens, sum(n * n for n in lengths(case))
    products = layers * 2 * tokens * width * (4 * width + 2 * inner) + 2 * labels * embedded * (width + case["vocab"])
    once = layers * tokens * width * size  # one tensor of each layer, read or written
    weights = parameters(case)
    narrow = size == 2  # a working copy is written from the weights, and its gradients take the place of the last ones
    optimizer = (2 * 4 + 3 * 8) * weights  # gradients read for their norm, and again; weights and moments changed
    return {
        "matrix products": Work(flops=3 * products),
        # q, k, v, o forward; with do, dq, dk, dv besides backward, whose products are five to the forward's two
        "attention": Work(14 * layers * square * width, 12 * once, 2 * layers * case["heads"] * square),
        "dropout + residual + LayerNorm": Work(bytes=2 * (3 + 4) * once),
        "bias + GELU": Work(bytes=(2 + 3) * layers * tokens * inner * size),
        "embeddings": Work(bytes=(tokens * 4 + case["vocab"]) * embedded * size),
        # logits in float32 read, their gradient written
        "cross-entropy": Work(bytes=labels * case["vocab"] * (4 + size)),
        "optimizer": Work(bytes=optimizer),
        "gradients and copies": Work(bytes=(6 + 6 if narrow else 4 + 12) * weights),
    }


BENCHMARK = TrainBenchmark()
