"""`relative_attention`: clipped sinusoids of the distance on keys and values, as in NEZHA.

No other library has a fused kernel. The peers are the materialised form, eager (the reference) and through
torch.compile; no attention that only changes scores can express the value side, and rows say so. Not rivals but
measures, hence not comparable: `sdpa-plain`, attention of the same shape without positions, and `rotary`, our own
rotary_attention.
"""

from functools import partial

from torch.nn.attention import SDPBackend

from fastbert import ops

from .attention import AttentionBenchmark, configurations, lengths, padded
from .harness import Case, Missing, Provider


class RelativeAttentionBenchmark(AttentionBenchmark):
    op = "relative_attention"
    sweep = (
        "relative_attention",
        configurations(
            forward=((64, 64, 4), (128, 32, 8), (128, 64, 8)),
            backward_q=((64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)),
            backward_kv=((32, 128, 8), (64, 64, 4), (64, 128, 8)),
        ),
    )

    def shapes(self, cuda: bool) -> list[dict]:
        return [shape | {"R": 64} for shape in super().shapes(cuda)]

    def flags(self, case: Case) -> dict:
        return super().flags(case) | {"max_relative_position": case["R"]}

    def extra_flops(self, case: Case, mode: str) -> float:
        """Inside the band |j - i| < R: a second product for scores and for values; backward, three more."""
        pairs = case["H"] * sum(band(n, case["R"]) for n in lengths(case))
        return 2 * {"fwd": 2, "bwd": 3, "fwd+bwd": 5}[mode] * pairs * case["D"]

    def peers(self, case: Case) -> list[Provider]:
        found = [Provider(name, _cannot) for name in ("flex", "flash-attn-4")]
        arrange = {"arrange": padded} if case["fill"] < 1 else {}
        flash = partial(self._sdpa, SDPBackend.FLASH_ATTENTION)
        rotary = partial(ops.rotary_attention, dropout_p=case["dropout"])
        other = {"comparable": False, "checked": False}
        return [
            *found,
            Provider("sdpa-plain", flash, **other, **arrange),
            Provider("rotary", lambda case: rotary, **other),
        ]


def band(length: int, reach: int) -> int:
    """Pairs (i, j) of a sequence with |j - i| < reach."""
    outside = max(0, length - reach)
    return length * length - outside * (outside + 1)


def _cannot(case: Case):
    raise Missing("cannot express the relative term of the values")


BENCHMARK = RelativeAttentionBenchmark()
