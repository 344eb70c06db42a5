"""`attention`: softmax(q k^T) v without a causal mask, with dropout and without padding; and what users would pick.

Shapes: B sequences of at most L tokens, H heads of D, `dropout` on the probabilities, `fill` = mean length / L. Where
fill is below 1 lengths are spread evenly between L and (2 fill - 1) L; ours then get packed rows, the others what their
users have: the batch padded to L with a mask, or packed rows where they take them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .ceilings import DTYPES, Work
from .harness import Case, Missing, Provider
from .op import OpBenchmark, compiled, generator_on, imported, normal

FLOAT64_SCORES = 2**27  # 1 GiB each for scores, probabilities and their gradients
Operands = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def configurations(**kernels: Sequence[tuple[int, int, int]]) -> list[dict]:
    """What to try for kernels in turn: tiles of queries by keys and warps, each with two and three stages."""
    return [
        {"kernel": kernel, "BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        for kernel, tiles in kernels.items()
        for m, n, warps in tiles
        for stages in (2, 3)
    ]


class AttentionBenchmark(OpBenchmark):
    op = "attention"
    tiny = {"B": 1, "L": 64, "H": 1}
    sweep = (
        "attention",
        configurations(
            forward=((64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8)),
            backward_q=((64, 64, 4), (128, 32, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8)),
            backward_kv=((32, 128, 8), (64, 64, 4), (64, 128, 8), (128, 128, 8)),
        ),
    )

    def shapes(self, cuda: bool) -> list[dict]:
        if not cuda:
            plain = {"H": 6, "D": 64, "dropout": 0.0, "fill": 1.0}
            return [{"B": 1024 // length, "L": length, **plain} for length in (512, 128, 256, 1024)]
        base, large = {"H": 12, "D": 64}, {"H": 16, "D": 64}
        plain, dropped, ragged = ({"dropout": p, "fill": f} for p, f in ((0.0, 1.0), (0.1, 1.0), (0.0, 0.5)))
        tokens = 16384
        return [
            *({"B": 32, "L": 512, **base, **how} for how in (plain, dropped, ragged)),
            *({"B": tokens // length, "L": length, **base, **plain} for length in (128, 256, 1536, 4096)),
            {"B": 32, "L": 512, **base, "dropout": 0.1, "fill": 0.5},
            *({"B": 32, "L": 512, **large, **how} for how in (plain, dropped)),
            {"B": 128, "L": 128, **base, **dropped},
        ]

    def flags(self, case: Case) -> dict:
        return {"dropout_p": case["dropout"]}

    def small(self, case: Case) -> Case:
        """As many sequences as have FLOAT64_SCORES scores; on a CPU, and if it must be, fewer heads too."""
        per_head = case["L"] ** 2
        heads = min(case["H"], max(1, FLOAT64_SCORES // per_head)) if case.cuda else min(case["H"], 2)
        batch = max(1, FLOAT64_SCORES // (heads * per_head)) if case.cuda else 2
        return case.but(B=min(case["B"], batch), H=heads)

    def graphs(self, case: Case, mode: str) -> bool:
        """Not the backward alone of a forward with dropout: outside of a graph, PyTorch's attention keeps the state of
        its generator on the host, where a graph of the backward must not look for it."""
        return not (mode == "bwd" and case["dropout"])

    def inputs(self, case: Case, seed: int) -> dict:
        """q, k, v as views of one projection, as a layer's fused projection leaves them; packed where fill < 1."""
        packed, found = case["fill"] < 1, lengths(case)
        rows = (sum(found),) if packed else (case["B"], case["L"])
        projection = normal((*rows, 3, case["H"], case["D"]), case, generator_on(case.device, seed)).detach()
        inputs = dict(zip("qkv", (t.requires_grad_() for t in projection.unbind(-3)), strict=True))
        if packed:
            ends = torch.tensor([0, *found]).cumsum(0)
            inputs |= {"cu_seqlens": ends.to(case.device, torch.int32), "max_seqlen": case["L"]}
        return inputs

    def work(self, case: Case, mode: str) -> Work:
        """Two products forward; five backward, which computes the scores again. Every operand moves once."""
        pairs = case["H"] * sum(n * n for n in lengths(case))
        operand = sum(lengths(case)) * case["H"] * case["D"] * DTYPES[case.dtype].itemsize
        products, operands = {"fwd": (2, 4), "bwd": (5, 8), "fwd+bwd": (7, 12)}[mode]
        exps = pairs * (2 if mode == "fwd+bwd" else 1)
        return Work(2 * products * pairs * case["D"] + self.extra_flops(case, mode), operands * operand, exps)

    def extra_flops(self, case: Case, mode: str) -> float:
        return 0.0

    def operands(self, case: Case, dense: bool) -> Operands:
        """What is done to q, k, v before a plain attention: nothing."""
        return lambda q, k, v: (q, k, v)

    def peers(self, case: Case) -> list[Provider]:
        packed = case["fill"] < 1
        arrange = {"arrange": padded} if packed else {}
        found = [
            Provider(f"sdpa-{name}", partial(self._sdpa, backend), gpu=name in ("cudnn", "efficient"), **arrange)
            for name, backend in _SDPA.items()
        ]
        found.append(Provider("flash-attn-4", self._flash_attn_4, package="flash-attn-4", gpu=True))
        if packed:
            found.append(Provider("varlen", self._varlen, gpu=True))
        return [*found, Provider("flex", self._flex, **arrange)]

    def providers(self, case: Case) -> list[Provider]:
        """The eager forms of a ragged batch are the padded ones: nobody loops over sequences in Python."""
        found = super().providers(case)
        if case["fill"] == 1:
            return found
        return [replace(p, arrange=padded) if p.name in ("eager", "compiled") else p for p in found]

    def _sdpa(self, backend: SDPBackend, case: Case) -> Callable:
        prepare, p = self.operands(case, dense=True), case["dropout"]

        def run(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in prepare(q, k, v))
            mask = None if key_padding_mask is None else key_padding_mask[:, None, None]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p).transpose(1, 2)

        return run

    def _flex(self, case: Case) -> Callable:
        if case["dropout"]:
            raise Missing("FlexAttention has no dropout")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        prepare, attend = self.operands(case, dense=True), compiled(flex_attention)

        @cache  # built once for a batch
        def blocks(mask: Tensor):
            shape = len(mask), None, mask.shape[1], mask.shape[1]
            return create_block_mask(lambda b, h, i, j: mask[b, j], *shape, device=mask.device)

        def run(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in prepare(q, k, v))
            block_mask = None if key_padding_mask is None else blocks(key_padding_mask)
            return attend(q, k, v, block_mask=block_mask).transpose(1, 2)

        return run

    def _flash_attn_4(self, case: Case) -> Callable:
        if case["dropout"]:
            raise Missing("flash-attn-4 has no dropout")
        packed = case["fill"] < 1
        name = "flash_attn_varlen_func" if packed else "flash_attn_func"
        attend = imported("flash_attn.cute.interface", name, "flash-attn-4")
        prepare = self.operands(case, dense=not packed)

        def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None):
            ends = {}
            if packed:
                ends = {f"cu_seqlens_{side}": cu_seqlens for side in "qk"}
                ends |= {f"max_seqlen_{side}": max_seqlen for side in "qk"}
            out = attend(*prepare(q, k, v), **ends)
            return out[0] if isinstance(out, tuple) else out

        return run

    def _varlen(self, case: Case) -> Callable:
        if case["dropout"]:
            raise Missing("torch.nn.attention.varlen has no dropout")
        attend = imported("torch.nn.attention.varlen", "varlen_attn", "torch 2.10")
        prepare = self.operands(case, dense=False)

        def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
            return attend(*prepare(q, k, v), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

        return run


_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def lengths(case: Case) -> list[int]:
    """The lengths of a case's sequences, longest first: the middles of B equal parts of what lies between L and
    (2 fill - 1) L, but at least 1."""
    missing = 2 * (1 - case["fill"]) / case["B"]
    return [max(1, round(case["L"] * (1 - missing * (i + 0.5)))) for i in range(case["B"])]


def padded(inputs: dict) -> dict:
    """Packed inputs as the padded batch [B, L, H, D] with key_padding_mask; NaN-free: zeros at padded positions."""
    ends = inputs["cu_seqlens"].tolist()
    batch, longest = len(ends) - 1, inputs["max_seqlen"]
    mask = torch.zeros(batch, longest, dtype=torch.bool, device=inputs["q"].device)
    for row, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        mask[row, : end - start] = True
    found = {}
    for name in "qkv":
        t = inputs[name].detach()
        dense = t.new_zeros(batch, longest, *t.shape[1:])
        dense[mask] = t
        found[name] = dense.requires_grad_()
    return found | {"key_padding_mask": mask}


BENCHMARK = AttentionBenchmark()
