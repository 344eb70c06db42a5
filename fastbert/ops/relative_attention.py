"""Attention with clipped sinusoidal relative positions in keys and values: NEZHA."""

from torch import Tensor

from fastbert import portable, reference
from fastbert.ops import checks, fused_attention, sequences

_TWINS = {
    "triton": fused_attention.relative_attention,
    "torch": portable.relative_attention,
    "reference": reference.relative_attention,
}


def relative_attention(
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
    max_relative_position: int = 64,
    backend: str | None = None,
) -> Tensor:
    """Attention that adds the same constant vector a_ij to key j and to value j as query i sees them: see
    fastbert.reference, also for how NEZHA's paper and its released code, which is followed, differ in a_ij.

    All that `attention` says holds. D must be even. max_relative_position, R: a_ij depends on j - i, clipped to
    -R ... R; 64 in NEZHA's Chinese models, 127 in the English one; at most 2^30. The sinusoids are implied, any length
    is served, and no backend but "reference" makes a tensor of size [L, L, D]. The transforms of torch.func (grad,
    vmap) need that backend, with dropout or without.

    Raises ShapeError, DtypeError, ConfigError (scale, dropout_p, seed, max_seqlen, max_relative_position),
    BackendError.
    Source: Wei et al., NEZHA (2019), arXiv 1909.00204, section 2.2; Shaw et al. (2018), arXiv 1803.02155, equations 3
    and 4.
    """
    sequences.check(q, k, v, key_padding_mask, cu_seqlens, max_seqlen, scale, dropout_p, seed, pairs=True)
    checks.number(
        "max_relative_position", max_relative_position, lambda x: 1 <= x <= 2**30, "from 1 to 2^30, an int", whole=True
    )
    return sequences.call(
        "relative_attention",
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
        max_relative_position=max_relative_position,
    )
