"""Attention with rotary position embedding: RoFormer."""

import math

from torch import Tensor

from fastbert import portable, reference
from fastbert.ops import checks, fused_attention, sequences

_TWINS = {
    "triton": fused_attention.rotary_attention,
    "torch": portable.rotary_attention,
    "reference": reference.rotary_attention,
}


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    theta: float = 10000.0,
    rotate_value: bool = False,
    interleaved: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Attention over q and k that arrive as projected and are turned by their positions first: see fastbert.reference.

    All that `attention` says holds. D must be even. The position of a token is its index in its sequence: its column if
    dense, its distance from the sequence's first row if packed.

    theta: base of the frequencies theta^(-2k/D). rotate_value: turn v as well. interleaved: pairs are elements
    (2k, 2k + 1), as in RoFormer's weights; False takes (k, k + D/2). Angles come from float64, and 16-bit inputs are
    turned in float32. Backend "triton" turns on the way to the matrix unit, and keeps turned q and k for the backward
    instead of those it got.

    Raises ShapeError, DtypeError, ConfigError (scale, dropout_p, seed, max_seqlen, theta), BackendError.
    Source: Su et al., RoFormer (2021), arXiv 2104.09864, equations 16 and 34.
    """
    sequences.check(q, k, v, key_padding_mask, cu_seqlens, max_seqlen, scale, dropout_p, seed, pairs=True)
    checks.number("theta", theta, lambda x: 0 < x < math.inf, "a positive number")
    return sequences.call(
        "rotary_attention",
        _TWINS,
        backend,
        q,
        k,
        v,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        theta=theta,
        rotate_value=rotate_value,
        interleaved=interleaved,
    )
