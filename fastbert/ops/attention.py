"""Bidirectional attention: BERT, RoBERTa, ALBERT, ELECTRA."""

from torch import Tensor

from fastbert import portable, reference
from fastbert.ops import fused_attention, sequences

_TWINS = {"triton": fused_attention.attention, "torch": portable.attention, "reference": reference.attention}


def attention(
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
    backend: str | None = None,
) -> Tensor:
    """dropout(softmax(scale q k^T)) v for every head of every sequence: see fastbert.reference.

    q, k, v: one shape, one floating dtype, any strides (views of a fused projection need no copy). Either dense
    [B, L, H, D], with key_padding_mask bool [B, L] where sequences are shorter (True for a real token); or packed
    [T, H, D], the tokens of B sequences one after another, with cu_seqlens int32 [B + 1], where sequence b is rows
    cu_seqlens[b] to cu_seqlens[b + 1], and max_seqlen, an int no smaller than the longest (None: backend "torch"
    computes it, for which a GPU has to be waited for; "triton" does without). Sequences may be empty, and so may the
    batch.

    The mask hides keys: a query at a masked position is answered too. What q, k and v hold at masked positions reaches
    no other, even NaN, and k and v get zero gradients there. A sequence without a real key gives zeros.

    scale: None for 1/sqrt(D). dropout_p: 0 <= dropout_p < 1, on the probabilities. seed: None takes PyTorch's
    generator, an int gives the same mask in every backend. backend: see fastbert.use_backend. Under autocast q, k, v
    are cast to its dtype. Returns a tensor of q's shape. Differentiable once, in q, k, v; the transforms of torch.func
    (grad, vmap) need backend "reference", or "torch" without dropout.

    Backend "triton", the default on CUDA for float16 and bfloat16: D up to 128, scale at least 1e-30, compute
    capability 8.0 and up. Its gradients have the same bits in every run. A last dimension that is not contiguous is
    copied. For the backward it keeps the operands, the output and float32 [H, T]. If asked for, it also serves float32,
    in IEEE arithmetic without the matrix unit, and on the CPU, in Triton's interpreter, float16 and float32.

    Raises ShapeError, DtypeError, ConfigError (scale, dropout_p, seed, max_seqlen), BackendError. On a GPU the values
    in cu_seqlens and max_seqlen are not checked.
    Source: Vaswani et al. (2017), arXiv 1706.03762, equation 1; Devlin et al., BERT (2018), arXiv 1810.04805; Dao,
    FlashAttention-2 (2023), arXiv 2307.08691.
    """
    sequences.check(q, k, v, key_padding_mask, cu_seqlens, max_seqlen, scale, dropout_p, seed)
    return sequences.call(
        "attention",
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
    )
