"""The backward of relative_attention.py: two kernels and no atomics, as in attention.py.

What the second, for dk and dv, has to know of each query is computed by the first, and left in `rows`, float32
[10, H, T]: log-sum-exp; what takes its place to the left and to the right of the band; delta, and likewise; then the
terms of both edges for q, and for do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import band, tile
from fastbert.kernels.launch import LOG2_E, Dropout, Relative, Sequences
from fastbert.kernels.relative_attention import RELATIVE_VARYING, settings, tables_and_dropout


@triton.jit
def _differentiate(
    b_dq, b_a, b_before, b_after, b_q, b_q_turned, b_do, b_do_turned, b_lse, b_delta,
    b_q_left, b_q_right, b_do_left, b_do_right, low, high, near_low, near_high, p_k, p_v, p_mask, p_waves, key, x, y,
    length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOTH: tl.constexpr, NEAR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq's loop over keys: see _attend. b_a, b_before, b_after: the sums with dS_ij."""
    zero = scale * 0.0
    for first_n in tl.range(low, high, BLOCK_N):
        if not NEAR:
            first_n = band.far(first_n, near_low, near_high)
        crossed, side = band.place(first_m, first_n, radius, BLOCK_M, BLOCK_N)
        o_n = first_n + tl.arange(0, BLOCK_N)
        m_n = tile.real(p_mask, o_n, stride_mask, length) if MASKED else None
        b_k = tile.load(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, False)
        b_v = tile.load(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, False)
        # [BLOCK_M, BLOCK_N]
        if NEAR:
            b_sin = band.sinusoids(p_waves, o_n, first_m, BLOCK_D)
            b_s = tl.dot(b_q_turned, tl.trans(b_sin), input_precision="ieee")
            b_dp = tl.dot(b_do_turned, tl.trans(b_sin), input_precision="ieee")
            if crossed:
                o_m = (first_m + tile.rows(BLOCK_M))[:, None]
                b_s = band.clip(b_s, b_q_left[:, None], b_q_right[:, None], o_m, o_n[None, :], side, radius, BOTH)
                b_dp = band.clip(b_dp, b_do_left[:, None], b_do_right[:, None], o_m, o_n[None, :], side, radius, BOTH)
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
            b_dp = tl.dot(b_do, tl.trans(b_v), b_dp, input_precision="ieee")
            b_shift, b_less = b_lse, b_delta
        else:
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_shift = b_lse - scale * tl.where(side > 0, b_q_right, b_q_left)
            b_less = b_delta - tl.where(side > 0, b_do_right, b_do_left)
        b_p = tile.probabilities(b_s * scale - b_shift[:, None], p_mask)
        if MASKED:
            b_p = tl.where(m_n[None, :], b_p, zero)
        b_dp -= b_less[:, None]
        if key is not None:
            b_keep = tile.keep(key, x, y, first_m, first_n, drop, BLOCK_M, BLOCK_N)
            b_dp = tl.where(b_keep, b_dp, -b_delta[:, None])
        b_ds = b_p * b_dp
        b_total = tl.sum(b_ds, 1)
        if NEAR:
            b_inside, b_to_left, b_to_right = b_ds, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
            if crossed:
                o_m = (first_m + tile.rows(BLOCK_M))[:, None]
                b_inside, b_to_left, b_to_right = band.part(b_ds, b_total, o_m, o_n[None, :], side, radius, zero, BOTH)
            b_a = tl.dot(b_inside.to(b_k.dtype), b_sin, b_a, input_precision="ieee")
        else:
            b_to_left, b_to_right = tl.where(side > 0, 0, b_total), tl.where(side > 0, b_total, 0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
        b_before += b_to_left
        b_after += b_to_right
    return b_dq, b_a, b_before, b_after


@triton.jit(do_not_specialize=RELATIVE_VARYING)
def _relative_attention_backward_q_kernel(
    p_q, p_k, p_v, p_mask, p_ends, p_cos, p_sin, p_waves, p_edges, p_seed, p_do, p_o, p_lse, p_rows, p_dq, p_q_given,
    batch, length, total, heads, stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh,
    stride_vb, stride_v, stride_vh, stride_dob, stride_do, stride_doh, stride_gb, stride_g, stride_gh,
    stride_mb, stride_mask, scale, drop, factor, factor_dq, radius,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOTH: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and what _relative_attention_backward_kv_kernel wants to know of each row."""
    i_head = tl.program_id(0) % heads
    i_batch, start, length, first_m = tile.locate(tl.program_id(0) // heads, p_ends, batch, length, BLOCK_M)
    if first_m >= length:
        return
    p_q, stride_q = tile.head(p_q, i_batch, start, i_head, stride_qb, stride_q, stride_qh, ALIGN)
    p_k, stride_k = tile.head(p_k, i_batch, start, i_head, stride_kb, stride_k, stride_kh, ALIGN)
    p_v, stride_v = tile.head(p_v, i_batch, start, i_head, stride_vb, stride_v, stride_vh, ALIGN)
    p_do, stride_do = tile.head(p_do, i_batch, start, i_head, stride_dob, stride_do, stride_doh, ALIGN)
    row = (start if p_ends is not None else i_batch * length) + first_m
    rest = length - first_m
    o_head = (tl.cast(row - first_m, tl.int64) * heads + i_head) * HEAD_DIM
    stride = heads * HEAD_DIM
    o_m = first_m + tile.rows(BLOCK_M)
    m_m = o_m < length
    # [BLOCK_M, BLOCK_D]
    b_q = tile.load(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, False)
    b_do = tile.load(p_do, o_m, m_m, stride_do, HEAD_DIM, BLOCK_D, False)
    b_o = tile.load(p_o + o_head, o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
    b_cos, b_sin = tile.angles(p_cos, p_sin, tile.rows(BLOCK_M), BLOCK_D, BLOCK_D)
    b_q_turned, b_do_turned = tile.turn(b_q, b_cos, b_sin), tile.turn(b_do, b_cos, b_sin)
    b_q_left, b_q_right = band.edge_terms(b_q, p_edges, BLOCK_D)
    b_do_left, b_do_right = band.edge_terms(b_do, p_edges, BLOCK_D)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1) / factor
    plane = tl.cast(heads, tl.int64) * total
    o_row = tl.cast(i_head, tl.int64) * total + row - first_m + o_m
    b_lse = tl.load(p_lse + o_row, mask=m_m, other=float("inf"))
    p_rows += o_row
    tl.store(p_rows, b_lse, mask=m_m)
    tl.store(p_rows + plane, b_lse - scale * b_q_left, mask=m_m)
    tl.store(p_rows + 2 * plane, b_lse - scale * b_q_right, mask=m_m)
    tl.store(p_rows + 3 * plane, b_delta, mask=m_m)
    tl.store(p_rows + 4 * plane, b_delta - b_do_left, mask=m_m)
    tl.store(p_rows + 5 * plane, b_delta - b_do_right, mask=m_m)
    tl.store(p_rows + 6 * plane, b_q_left, mask=m_m)
    tl.store(p_rows + 7 * plane, b_q_right, mask=m_m)
    tl.store(p_rows + 8 * plane, b_do_left, mask=m_m)
    tl.store(p_rows + 9 * plane, b_do_right, mask=m_m)
    key, x, y = None, None, None
    if p_seed is not None:
        key, x, y = tile.stream(p_seed, i_batch, i_head)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_a = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_before = tl.zeros([BLOCK_M], tl.float32)
    b_after = tl.zeros([BLOCK_M], tl.float32)
    near_low, near_high = band.near(first_m, length, radius, BLOCK_M, BLOCK_N)
    tl.assume(near_low < near_high)
    first_near, first_far = near_low, 0
    if p_mask is None:
        full = length // BLOCK_N * BLOCK_N
        first_near, first_far = tl.minimum(near_high, full), near_low + tl.maximum(full - near_high, 0)
        b_dq, b_a, b_before, b_after = _differentiate(
            b_dq, b_a, b_before, b_after, b_q, b_q_turned, b_do, b_do_turned, b_lse, b_delta,
            b_q_left, b_q_right, b_do_left, b_do_right, near_low, first_near, near_low, near_high,
            p_k, p_v, p_mask, p_waves, key, x, y,
            length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, True, False,
        )  # fmt: skip
    else:
        p_mask += tl.cast(i_batch, tl.int64) * stride_mb
    b_dq, b_a, b_before, b_after = _differentiate(
        b_dq, b_a, b_before, b_after, b_q, b_q_turned, b_do, b_do_turned, b_lse, b_delta,
        b_q_left, b_q_right, b_do_left, b_do_right, first_near, near_high, near_low, near_high,
        p_k, p_v, p_mask, p_waves, key, x, y,
        length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, True, True,
    )  # fmt: skip
    b_cos, b_sin = tile.angles(p_cos, p_sin, tile.rows(BLOCK_M), BLOCK_D, BLOCK_D)
    b_dq += tile.turn(b_a, b_cos, -b_sin)
    if p_mask is None:
        b_dq, b_a, b_before, b_after = _differentiate(
            b_dq, b_a, b_before, b_after, b_q, b_q_turned, b_do, b_do_turned, b_lse, b_delta,
            b_q_left, b_q_right, b_do_left, b_do_right, 0, first_far, near_low, near_high,
            p_k, p_v, p_mask, p_waves, key, x, y,
            length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, False, False,
        )  # fmt: skip
    b_dq, b_a, b_before, b_after = _differentiate(
        b_dq, b_a, b_before, b_after, b_q, b_q_turned, b_do, b_do_turned, b_lse, b_delta,
        b_q_left, b_q_right, b_do_left, b_do_right, first_far, near_low + length - near_high, near_low, near_high,
        p_k, p_v, p_mask, p_waves, key, x, y,
        length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, False, True,
    )  # fmt: skip
    o_m = tile.rows(BLOCK_M)
    m_m = o_m < rest
    b_dq += band.mix_edges(b_before, b_after, p_edges, BLOCK_D)
    if p_mask is not None:
        p_given, stride_g = tile.head(p_q_given, i_batch, start, i_head, stride_gb, stride_g, stride_gh, ALIGN)
        b_given = tile.load(p_given + first_m * stride_g, o_m, m_m, stride_g, HEAD_DIM, BLOCK_D, False).to(tl.float32)
        m_real = tile.real(p_mask + first_m * stride_mask, o_m, stride_mask, rest)
        b_dq = tl.where(m_real[:, None] | (tl.abs(b_given) < float("inf")), b_dq, 0)
    p_dq += (tl.cast(row, tl.int64) * heads + i_head) * HEAD_DIM
    tile.store(p_dq, b_dq * factor_dq, o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)


@triton.jit
def _accumulate(
    b_dk, b_dv, b_k, b_v, b_waves, low, high, near_low, near_high,
    p_q, p_do, p_rows, plane, p_mask, p_cos, p_sin,
    key, x, y, length, stride_q, stride_do, scale, drop, radius, first_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOTH: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """dk's and dv's loop over queries `low` to `high`, of those that are NEAR or by their numbers among the others.
    Angles are counted from the first key on, so that b_waves, its sinusoids, stay."""
    for first_m in tl.range(low, high, BLOCK_M):
        if not NEAR:
            first_m = band.far(first_m, near_low, near_high)
        crossed, side = band.place(first_m, first_n, radius, BLOCK_M, BLOCK_N)
        o_m = first_m + tile.rows(BLOCK_M)
        m_m = o_m < length
        p_at = p_rows + o_m
        b_q = tile.load(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, False)
        b_do = tile.load(p_do, o_m, m_m, stride_do, HEAD_DIM, BLOCK_D, False)
        # [BLOCK_N, BLOCK_M]
        if NEAR:
            o_n = first_n + tl.arange(0, BLOCK_N)
            b_cos, b_sin = tile.angles(p_cos, p_sin, o_m - first_n, BLOCK_D, BLOCK_D)
            b_s = tl.dot(b_waves, tl.trans(tile.turn(b_q, b_cos, b_sin)), input_precision="ieee")
            b_dp = tl.dot(b_waves, tl.trans(tile.turn(b_do, b_cos, b_sin)), input_precision="ieee")
            if crossed:
                p_left = p_at + (6 if BOTH else 6 + (side > 0).to(tl.int32)) * plane
                b_q_left = tl.load(p_left, mask=m_m, other=0)[None, :]
                b_do_left = tl.load(p_left + 2 * plane, mask=m_m, other=0)[None, :]
                b_q_right = tl.load(p_left + plane, mask=m_m, other=0)[None, :] if BOTH else b_q_left
                b_do_right = tl.load(p_left + 3 * plane, mask=m_m, other=0)[None, :] if BOTH else b_do_left
                b_s = band.clip(b_s, b_q_left, b_q_right, o_m[None, :], o_n[:, None], side, radius, BOTH)
                b_dp = band.clip(b_dp, b_do_left, b_do_right, o_m[None, :], o_n[:, None], side, radius, BOTH)
            b_s = tl.dot(b_k, tl.trans(b_q), b_s, input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_do), b_dp, input_precision="ieee")
            p_of = p_at
        else:
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            p_of = p_at + tl.where(side > 0, 2, 1) * plane
        b_shift = tl.load(p_of, mask=m_m, other=float("inf"))
        b_less = tl.load(p_of + 3 * plane, mask=m_m, other=0)
        b_p = tile.probabilities(b_s * scale - b_shift[None, :], p_mask)
        b_dropped = b_p
        b_dp -= b_less[None, :]
        if key is not None:
            b_keep = tl.trans(tile.keep(key, x, y, first_m, first_n, drop, BLOCK_M, BLOCK_N))
            b_dropped = tl.where(b_keep, b_p, scale * 0.0)
            b_delta = b_less if NEAR else tl.load(p_at + 3 * plane, mask=m_m, other=0)
            b_dp = tl.where(b_keep, b_dp, -b_delta[None, :])
        b_dv = tl.dot(b_dropped.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_ds = b_p * b_dp
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(do_not_specialize=RELATIVE_VARYING)
def _relative_attention_backward_kv_kernel(
    p_q, p_k, p_v, p_mask, p_ends, p_cos, p_sin, p_waves, p_edges, p_seed, p_do, p_rows, p_dk, p_dv,
    batch, length, total, heads, stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh,
    stride_vb, stride_v, stride_vh, stride_dob, stride_do, stride_doh, stride_mb, stride_mask,
    scale, drop, factor, factor_dk, radius,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOTH: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv, from what the kernel of dq leaves of each row. q: as the forward multiplied it."""
    i_head = tl.program_id(0) % heads
    i_batch, start, length, first_n = tile.locate(tl.program_id(0) // heads, p_ends, batch, length, BLOCK_N)
    if first_n >= length:
        return
    p_q, stride_q = tile.head(p_q, i_batch, start, i_head, stride_qb, stride_q, stride_qh, ALIGN)
    p_k, stride_k = tile.head(p_k, i_batch, start, i_head, stride_kb, stride_k, stride_kh, ALIGN)
    p_v, stride_v = tile.head(p_v, i_batch, start, i_head, stride_vb, stride_v, stride_vh, ALIGN)
    p_do, stride_do = tile.head(p_do, i_batch, start, i_head, stride_dob, stride_do, stride_doh, ALIGN)
    row = (start if p_ends is not None else i_batch * length) + first_n
    rest = length - first_n
    plane = tl.cast(heads, tl.int64) * total
    p_rows += tl.cast(i_head, tl.int64) * total + row - first_n
    o_n = first_n + tl.arange(0, BLOCK_N)
    if p_mask is not None:
        p_mask += tl.cast(i_batch, tl.int64) * stride_mb
    m_real = tile.real(p_mask, o_n, stride_mask, length)
    # [BLOCK_N, BLOCK_D]
    b_k = tile.load(p_k, o_n, m_real, stride_k, HEAD_DIM, BLOCK_D, False)
    b_v = tile.load(p_v, o_n, m_real, stride_v, HEAD_DIM, BLOCK_D, False)
    b_waves = band.sinusoids(p_waves, o_n, first_n, BLOCK_D)
    key, x, y = None, None, None
    if p_seed is not None:
        key, x, y = tile.stream(p_seed, i_batch, i_head)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    near_low, near_high = band.near(first_n, length, radius, BLOCK_N, BLOCK_M)
    b_dk, b_dv = _accumulate(
        b_dk, b_dv, b_k, b_v, b_waves, near_low, near_high, near_low, near_high,
        p_q, p_do, p_rows, plane, p_mask, p_cos, p_sin,
        key, x, y, length, stride_q, stride_do, scale, drop, radius, first_n,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, True,
    )  # fmt: skip
    b_dk, b_dv = _accumulate(
        b_dk, b_dv, b_k, b_v, b_waves, 0, near_low + length - near_high, near_low, near_high,
        p_q, p_do, p_rows, plane, p_mask, p_cos, p_sin,
        key, x, y, length, stride_q, stride_do, scale, drop, radius, first_n,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, False,
    )  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < rest
    if p_mask is not None:
        m_real = tile.real(p_mask + first_n * stride_mask, o_n, stride_mask, rest)
        b_dk = tl.where(m_real[:, None], b_dk, 0)
        b_dv = tl.where(m_real[:, None], b_dv, 0)
    o_head = (tl.cast(row, tl.int64) * heads + i_head) * HEAD_DIM
    stride = heads * HEAD_DIM
    tile.store(p_dk + o_head, b_dk * factor_dk, o_n, m_n, stride, HEAD_DIM, BLOCK_D, False)
    tile.store(p_dv + o_head, b_dv * factor, o_n, m_n, stride, HEAD_DIM, BLOCK_D, False)


def relative_attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    sequences: Sequences,
    relative: Relative,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous. q: as relative_attention_fwd returned it, or as it got it where it returned None.
    given: with a mask, q as relative_attention_fwd got it. o, lse: what it returned; the rest: what it got."""
    dq, dk, dv = (torch.empty_like(o) for _ in "qkv")
    rows = torch.empty(10, *lse.shape, dtype=torch.float32, device=lse.device)
    given = None if sequences.mask is None else sequences.operand(given)
    do, q, k, v = (sequences.operand(t) for t in (do, q, k, v))
    shape, strides = sequences.arguments(q), [s for t in (q, k, v, do) for s in sequences.strides(t)]
    of_given = (0, 0, 0) if given is None else sequences.strides(given)
    tables, (drop, factor) = tables_and_dropout(relative, dropout)
    operands = q, k, v, sequences.mask, sequences.ends, *tables, do
    scales = *sequences.mask_strides, scale * LOG2_E, drop, factor, scale * factor, relative.radius
    with torch.cuda.device_of(q):
        config = settings("backward_q", q, sequences, relative, dropout, [*strides, *of_given])
        _relative_attention_backward_q_kernel[sequences.grid(q, config["BLOCK_M"])](
            *(*operands, o, lse, rows, dq, given, *shape, *strides, *of_given, *scales), **config
        )
        config = settings("backward_kv", q, sequences, relative, dropout, strides)
        _relative_attention_backward_kv_kernel[sequences.grid(q, config["BLOCK_N"])](
            *(*operands, rows, dk, dv, *shape, *strides, *scales), **config
        )
    return dq, dk, dv
