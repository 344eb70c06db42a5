"""`rotary_attention`: attention over q and k that are turned by their positions, as in RoFormer.

Our op takes them un-rotated. The peers are those of `attention` behind a rotation of q and k that torch.compile fuses
into one pass, with tables of cosines and sines made beforehand: what a careful user would write.
"""

import torch
from torch import Tensor

from .attention import AttentionBenchmark, Operands, lengths
from .harness import Case
from .op import compiled

THETA = 10000.0


class RotaryAttentionBenchmark(AttentionBenchmark):
    op = "rotary_attention"

    def operands(self, case: Case, dense: bool) -> Operands:
        """q and k turned in pairs (2k, 2k + 1), in float32; v as it is."""
        positions = torch.arange(case["L"]) if dense else torch.cat([torch.arange(n) for n in lengths(case)])
        angles = positions[:, None].double() * THETA ** (-torch.arange(0, case["D"], 2).double() / case["D"])
        tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        turn = compiled(_turn)

        def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if q.device not in tables:
                tables[q.device] = tuple(t.float()[:, None].to(q.device) for t in (angles.cos(), angles.sin()))
            return *turn(q, k, *tables[q.device]), v

        return prepare


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[..., L, H, D] with tables [L, 1, D/2]."""
    turned = []
    for x in (q, k):
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned.append(torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype))
    return tuple(turned)


BENCHMARK = RotaryAttentionBenchmark()
