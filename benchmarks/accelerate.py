"""A live model of transformers as it is, and after `fastbert.hf.accelerate`: forward, and forward and backward.

The same module either way: what is measured is what the user of a model, a Trainer or a pipeline gains by one line.
The heads stay transformers' own, so masked_lm shows less of it than encoder does. Shapes and checks: see models.py.
"""

import fastbert

from .harness import Case, Provider
from .models import BASE, CPU_SIZES, ModelBenchmark, Runnable, has_sdpa


class AccelerateBenchmark(ModelBenchmark):
    op = "accelerate"
    modes = ("fwd", "fwd+bwd")

    def shapes(self, cuda: bool) -> list[dict]:
        batch, sizes = ({"B": 32, "L": 512}, BASE) if cuda else ({"B": 8, "L": 128}, CPU_SIZES)
        families = ("bert", "albert", "roformer", "roberta", "electra")
        return [
            {"family": family, "part": part, **batch, **sizes, "dropout": 0.1, "fill": fill}
            for part in ("encoder", "masked_lm")
            for family in families
            for fill in (1.0, 0.6)
        ]

    def providers(self, case: Case) -> list[Provider]:
        theirs = (p for p in super().providers(case) if p.name in ("transformers-eager", "transformers-sdpa"))
        return [Provider("fastbert-accelerated", self._accelerated, package="transformers"), *theirs]

    def _accelerated(self, case: Case) -> Runnable:
        found = self._theirs("sdpa" if has_sdpa(case) else "eager", case)
        fastbert.hf.accelerate(found.model)
        return found


BENCHMARK = AccelerateBenchmark()
