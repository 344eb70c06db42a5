"""A pretraining step: forward, backward and AdamW of a masked language model with dropout.

fastbert gets packed rows, as its loader makes them, and computes the vocabulary for labelled tokens only; transformers
gets the padded batch that its users have: both end with the same gradients. tokens_per_s counts real tokens.
"""

from functools import partial

import torch

from .harness import Case, Provider
from .models import BASE, CPU_SIZES, LABELLED_ONLY, LARGE, ModelBenchmark


class TrainStepBenchmark(ModelBenchmark):
    op = "train_step"
    modes = ("step",)

    def shapes(self, cuda: bool) -> list[dict]:
        families = ("bert", "roformer", "nezha", "albert", "electra", "roberta")
        if not cuda:
            return [self._shape(family, 2, 128, CPU_SIZES, 0.75) for family in families[:2]]
        base = [self._shape(family, 32, 512, BASE, fill) for fill in (1.0, 0.5) for family in families]
        return [base[0], self._shape("bert", 32, 512, LARGE, 0.5), *base[1:]]

    @staticmethod
    def _shape(family: str, batch: int, length: int, sizes: dict, fill: float) -> dict:
        batch_sizes = {"B": batch, "L": length}
        return {"family": family, "part": "masked_lm", **batch_sizes, **sizes, "dropout": 0.1, "fill": fill}

    def providers(self, case: Case) -> list[Provider]:
        ours = Provider("fastbert", partial(self._ours, LABELLED_ONLY), arrange=packed)
        return [ours, *(p for p in super().providers(case) if not p.ours)]


def packed(inputs: dict) -> dict:
    """The real tokens of a padded batch, end to end."""
    real = inputs["attention_mask"].bool()
    lengths = real.sum(1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    rows = {name: inputs[name][real] for name in ("input_ids", "labels", "probe")}
    return rows | {"cu_seqlens": ends, "max_seqlen": int(lengths.max())}


BENCHMARK = TrainStepBenchmark()
