"""softmax(scale q k^T) v with dropout and rotary positions, as reference.attention and reference.rotary_attention.

Forward: FlashAttention's online softmax (Dao et al., arXiv 2205.14135; Dao, arXiv 2307.08691), exponents to base 2.
Backward: two kernels and no atomics, so the bits never change: one gives dq, and delta = rowsum(do o) on its way, the
other dk and dv. Products of 16-bit operands run on the matrix unit, sums are float32.

Rotation. A tile of queries is turned once, a tile of keys (and values, if they are turned) on its way from memory to
the matrix unit: by the angles of its first row and those within a tile, which stay in registers, added with the
theorems for sine and cosine. When gradients will be wanted, the forward writes each turned row once, and the backward
multiplies those: it turns nothing but dq and dk, in registers, at its end.

Sequences. Dense [B, L, H, D], or packed [T, H, D] where sequence b is rows ends[b] to ends[b + 1]. Tile t of a packed
batch is found by search: sequence b owns tiles ends[b] // BLOCK + b and following, which are enough for it, and
T // BLOCK + B for all, so nothing about the lengths needs to be known on the host.

Dropout. philox.py says which bits decide over element (i, j). One call decides over eight elements that one thread
holds, in the forward's tiles of queries by keys as in the transposed ones of dk and dv.

Floors, B 32, H 12, L 512, D 64 on an H100: forward 30 us of DRAM (4 operands), 27 us of exponentials, 26 to 33 us of
matrix products; backward 65 to 82 us of products, of which two kernels do 7/5.
"""

from collections.abc import Set

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import tile
from fastbert.kernels.launch import (
    LOG2_E,
    VARYING,
    Dropout,
    Rotation,
    Sequences,
    alignment,
    chosen,
    early,
    seed_drop_factor,
)


@triton.jit
def _attend(
    b_o, b_max, b_sum, b_q, low, high, p_k, p_v, p_mask, p_cos, p_sin, b_cos, b_sin, key, x, y,
    length, stride_k, stride_v, stride_mask, scale, drop, first_m,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURN_V: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The forward's loop over keys `low` to `high`; MASKED where some of them may not be real."""
    zero = scale * 0.0  # not a literal: LLVM would push the choice behind the cast to 16 bits, 1.3 instructions more
    for first_n in tl.range(low, high, BLOCK_N):
        o_n = first_n + tl.arange(0, BLOCK_N)
        m_n = tile.real(p_mask, o_n, stride_mask, length) if MASKED else None
        b_k = tile.load(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, HALVES)
        if p_cos is not None:
            b_first_cos, b_first_sin = tile.angles(p_cos, p_sin, first_n + tl.zeros([1], tl.int32), HEAD_DIM, BLOCK_D)
            b_key_cos = b_cos * b_first_cos - b_sin * b_first_sin
            b_key_sin = b_sin * b_first_cos + b_cos * b_first_sin
            b_k = tile.turn(b_k, b_key_cos, b_key_sin)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MASKED:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_p, b_max, b_rescale = tile.soften(b_s, b_max, None, scale, MASKED)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        if key is not None:
            b_p = tl.where(tile.keep(key, x, y, first_m, first_n, drop, BLOCK_M, BLOCK_N), b_p, zero)
        b_v = tile.load(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, False)
        if TURN_V:
            b_v = tile.turn(b_v, b_key_cos, b_key_sin)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_rescale[:, None], input_precision="ieee")
    return b_o, b_max, b_sum


@triton.jit(do_not_specialize=VARYING)
def _attention_forward_kernel(
    p_q, p_k, p_v, p_mask, p_ends, p_cos, p_sin, p_seed, p_o, p_lse, p_q_used, p_k_used, p_v_used,
    batch, length, total, heads, stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh,
    stride_vb, stride_v, stride_vh, stride_mb, stride_mask, scale, drop, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURN_V: tl.constexpr, HALVES: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """o, and where wanted the log-sum-exp of each row (base 2) and q, k, v as they were multiplied."""
    if EARLY:
        tile.after_the_launch_before()
    i_head = tl.program_id(0) % heads
    i_batch, start, length, first_m = tile.locate(tl.program_id(0) // heads, p_ends, batch, length, BLOCK_M)
    if first_m >= length:
        return
    p_q, stride_q = tile.head(p_q, i_batch, start, i_head, stride_qb, stride_q, stride_qh, ALIGN)
    p_k, stride_k = tile.head(p_k, i_batch, start, i_head, stride_kb, stride_k, stride_kh, ALIGN)
    p_v, stride_v = tile.head(p_v, i_batch, start, i_head, stride_vb, stride_v, stride_vh, ALIGN)
    row = (start if p_ends is not None else i_batch * length) + first_m
    rest = length - first_m
    o_head = (tl.cast(row - first_m, tl.int64) * heads + i_head) * HEAD_DIM
    stride = heads * HEAD_DIM
    o_m = first_m + tile.rows(BLOCK_M)
    m_m = o_m < length
    # [BLOCK_M, BLOCK_D]
    b_q = tile.load(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, HALVES)
    m_real = m_m
    if p_mask is not None:
        p_mask += tl.cast(i_batch, tl.int64) * stride_mb
        m_real = tile.real(p_mask, o_m, stride_mask, length)
        b_q = tl.where(m_real[:, None] | (tl.abs(b_q.to(tl.float32)) < float("inf")), b_q, 0)
    b_cos, b_sin = None, None
    if p_cos is not None:
        b_cos, b_sin = tile.angles(p_cos, p_sin, tl.minimum(o_m, length - 1), HEAD_DIM, BLOCK_D)
        b_q = tile.turn(b_q, b_cos, b_sin)
    if p_q_used is not None:
        tile.store(p_q_used + o_head, b_q, o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
    if p_k_used is not None:
        b_k = tile.load(p_k, o_m, m_real, stride_k, HEAD_DIM, BLOCK_D, HALVES)
        tile.store(p_k_used + o_head, tile.turn(b_k, b_cos, b_sin), o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
    if p_v_used is not None:
        b_v = tile.load(p_v, o_m, m_real, stride_v, HEAD_DIM, BLOCK_D, False)
        tile.store(p_v_used + o_head, tile.turn(b_v, b_cos, b_sin), o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
    if p_cos is not None:
        b_cos, b_sin = tile.angles(p_cos, p_sin, tl.arange(0, BLOCK_N), HEAD_DIM, BLOCK_D)
    key, x, y = None, None, None
    if p_seed is not None:
        key, x, y = tile.stream(p_seed, i_batch, i_head)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    full = 0
    if p_mask is None:
        full = length // BLOCK_N * BLOCK_N
        b_o, b_max, b_sum = _attend(
            b_o, b_max, b_sum, b_q, 0, full, p_k, p_v, p_mask, p_cos, p_sin, b_cos, b_sin, key, x, y,
            length, stride_k, stride_v, stride_mask, scale, drop, first_m,
            HEAD_DIM, BLOCK_D, TURN_V, HALVES, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    b_o, b_max, b_sum = _attend(
        b_o, b_max, b_sum, b_q, full, length, p_k, p_v, p_mask, p_cos, p_sin, b_cos, b_sin, key, x, y,
        length, stride_k, stride_v, stride_mask, scale, drop, first_m,
        HEAD_DIM, BLOCK_D, TURN_V, HALVES, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    b_sum, b_lse = tile.log_sum_exp(b_max, b_sum)
    # Rows counted anew, from the tile: those from the start would stay in registers through the loops, and spill
    o_m = tile.rows(BLOCK_M)
    m_m = o_m < rest
    b_o *= (factor / b_sum)[:, None]
    p_o += (tl.cast(row, tl.int64) * heads + i_head) * HEAD_DIM
    tile.store(p_o, b_o, o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
    if p_lse is not None:
        tl.store(p_lse + tl.cast(i_head, tl.int64) * total + row + o_m, b_lse, mask=m_m)


@triton.jit
def _differentiate(
    b_dq, b_q, b_do, b_lse, b_delta, low, high, p_k, p_v, p_mask, key, x, y,
    length, stride_k, stride_v, stride_mask, scale, drop, first_m,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq's loop over keys `low` to `high`; MASKED where some of them may not be real."""
    zero = scale * 0.0
    for first_n in tl.range(low, high, BLOCK_N):
        o_n = first_n + tl.arange(0, BLOCK_N)
        m_n = tile.real(p_mask, o_n, stride_mask, length) if MASKED else None
        b_k = tile.load(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, False)
        b_v = tile.load(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, False)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_p = tile.probabilities(b_s * scale - b_lse[:, None], p_mask)
        if MASKED:
            b_p = tl.where(m_n[None, :], b_p, zero)
        if key is not None:
            b_dp = tl.where(tile.keep(key, x, y, first_m, first_n, drop, BLOCK_M, BLOCK_N), b_dp, zero)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=VARYING)
def _attention_backward_q_kernel(
    p_q, p_k, p_v, p_mask, p_ends, p_cos, p_sin, p_seed, p_do, p_o, p_lse, p_delta, p_dq, p_q_given,
    batch, length, total, heads, stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh,
    stride_vb, stride_v, stride_vh, stride_dob, stride_do, stride_doh, stride_gb, stride_g, stride_gh,
    stride_mb, stride_mask, scale, drop, factor, factor_dq,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURN_V: tl.constexpr, HALVES: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and delta_i = do_i.o_i / factor. q, k, v: as the forward multiplied them. p_q_given: q as it came, if there
    is a mask."""
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
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1) / factor
    o_lse = tl.cast(i_head, tl.int64) * total + row - first_m + o_m
    tl.store(p_delta + o_lse, b_delta, mask=m_m)
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=float("inf"))
    key, x, y = None, None, None
    if p_seed is not None:
        key, x, y = tile.stream(p_seed, i_batch, i_head)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = 0
    if p_mask is None:
        full = length // BLOCK_N * BLOCK_N
        b_dq = _differentiate(
            b_dq, b_q, b_do, b_lse, b_delta, 0, full, p_k, p_v, p_mask, key, x, y,
            length, stride_k, stride_v, stride_mask, scale, drop, first_m,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    else:
        p_mask += tl.cast(i_batch, tl.int64) * stride_mb
    b_dq = _differentiate(
        b_dq, b_q, b_do, b_lse, b_delta, full, length, p_k, p_v, p_mask, key, x, y,
        length, stride_k, stride_v, stride_mask, scale, drop, first_m,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    o_m = tile.rows(BLOCK_M)
    m_m = o_m < rest
    if p_cos is not None:
        b_cos, b_sin = tile.angles(p_cos, p_sin, first_m + tl.minimum(o_m, rest - 1), HEAD_DIM, BLOCK_D)
        b_dq = tile.turn(b_dq, b_cos, -b_sin)
    if p_mask is not None:
        p_given, stride_g = tile.head(p_q_given, i_batch, start, i_head, stride_gb, stride_g, stride_gh, ALIGN)
        b_given = tile.load(p_given + first_m * stride_g, o_m, m_m, stride_g, HEAD_DIM, BLOCK_D, HALVES).to(tl.float32)
        m_real = tile.real(p_mask + first_m * stride_mask, o_m, stride_mask, rest)
        b_dq = tl.where(m_real[:, None] | (tl.abs(b_given) < float("inf")), b_dq, 0)
    p_dq += (tl.cast(row, tl.int64) * heads + i_head) * HEAD_DIM
    tile.store(p_dq, b_dq * factor_dq, o_m, m_m, stride, HEAD_DIM, BLOCK_D, HALVES)


@triton.jit(do_not_specialize=VARYING)
def _attention_backward_kv_kernel(
    p_q, p_k, p_v, p_mask, p_ends, p_cos, p_sin, p_seed, p_do, p_lse, p_delta, p_dk, p_dv,
    batch, length, total, heads, stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh,
    stride_vb, stride_v, stride_vh, stride_dob, stride_do, stride_doh, stride_mb, stride_mask,
    scale, drop, factor, factor_dk,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURN_V: tl.constexpr, HALVES: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv, from delta as _attention_backward_q_kernel leaves it. q, k, v: as the forward multiplied them."""
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
    p_lse += tl.cast(i_head, tl.int64) * total + row - first_n
    p_delta += tl.cast(i_head, tl.int64) * total + row - first_n
    o_n = first_n + tl.arange(0, BLOCK_N)
    if p_mask is not None:
        p_mask += tl.cast(i_batch, tl.int64) * stride_mb
    m_real = tile.real(p_mask, o_n, stride_mask, length)
    # [BLOCK_N, BLOCK_D]
    b_k = tile.load(p_k, o_n, m_real, stride_k, HEAD_DIM, BLOCK_D, False)
    b_v = tile.load(p_v, o_n, m_real, stride_v, HEAD_DIM, BLOCK_D, False)
    key, x, y = None, None, None
    if p_seed is not None:
        key, x, y = tile.stream(p_seed, i_batch, i_head)
    zero = scale * 0.0
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first_m in tl.range(0, length, BLOCK_M):
        o_m = first_m + tile.rows(BLOCK_M)
        m_m = o_m < length
        b_q = tile.load(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, False)
        b_do = tile.load(p_do, o_m, m_m, stride_do, HEAD_DIM, BLOCK_D, False)
        b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + o_m, mask=m_m, other=0)
        # [BLOCK_N, BLOCK_M]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_p = tile.probabilities(b_s * scale - b_lse[None, :], p_mask)
        b_dropped = b_p
        if key is not None:
            b_keep = tl.trans(tile.keep(key, x, y, first_m, first_n, drop, BLOCK_M, BLOCK_N))
            b_dropped = tl.where(b_keep, b_p, zero)
            b_dp = tl.where(b_keep, b_dp, zero)
        b_dv = tl.dot(b_dropped.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < rest
    if p_cos is not None:
        b_cos, b_sin = tile.angles(p_cos, p_sin, first_n + tl.minimum(o_n, rest - 1), HEAD_DIM, BLOCK_D)
        b_dk = tile.turn(b_dk, b_cos, -b_sin)
        if TURN_V:
            b_dv = tile.turn(b_dv, b_cos, -b_sin)
    if p_mask is not None:
        m_real = tile.real(p_mask + first_n * stride_mask, o_n, stride_mask, rest)
        b_dk = tl.where(m_real[:, None], b_dk, 0)
        b_dv = tl.where(m_real[:, None], b_dv, 0)
    o_head = (tl.cast(row, tl.int64) * heads + i_head) * HEAD_DIM
    stride = heads * HEAD_DIM
    tile.store(p_dk + o_head, b_dk * factor_dk, o_n, m_n, stride, HEAD_DIM, BLOCK_D, HALVES)
    tile.store(p_dv + o_head, b_dv * factor, o_n, m_n, stride, HEAD_DIM, BLOCK_D, False)


# (BLOCK_M, BLOCK_N, warps, stages) for head dims up to 64 and up to 128, by major compute capability (8: all others),
# kernel and, where it matters, trait. Not timed on a GPU yet: chosen by what the compiler says (benchmarks/LAB.md).
_CONFIGS = {
    9: {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 2)),
        "forward mask": ((128, 64, 8, 3), (128, 64, 8, 2)),
        "forward rotary": ((256, 64, 8, 3), (128, 64, 8, 2)),
        "backward_q": ((128, 64, 8, 3), (128, 64, 8, 2)),
        "backward_q dropout": ((128, 32, 4, 3), (128, 64, 8, 2)),
        "backward_kv": ((64, 128, 8, 2), (32, 128, 8, 2)),
    },
    10: {
        "forward": ((128, 128, 8, 2), (128, 64, 8, 2)),
        "forward dropout": ((128, 64, 8, 2), (128, 64, 8, 2)),
        "backward_q": ((128, 64, 8, 2), (128, 64, 8, 2)),
        "backward_kv": ((64, 128, 8, 2), (32, 128, 8, 1)),
    },
    8: {
        "forward": ((128, 32, 4, 3), (128, 32, 8, 2)),
        "backward_q": ((128, 64, 8, 2), (128, 32, 8, 2)),
        "backward_q dropout": ((64, 32, 4, 2), (64, 32, 4, 1)),
        "backward_kv": ((64, 128, 8, 2), (32, 32, 4, 1)),
        "backward_kv dropout": ((32, 128, 8, 2), (32, 32, 4, 1)),
        "backward_kv mask": ((32, 128, 8, 2), (32, 32, 4, 1)),
    },
    # float32: IEEE products, on the FMA units everywhere. Of 64 rows or more, Triton 3.7 makes TF32 ones for sm_100.
    32: {
        "forward": ((32, 32, 8, 1), (32, 32, 8, 1)),
        "backward_q": ((32, 32, 8, 1), (32, 32, 8, 1)),
        "backward_kv": ((32, 32, 4, 1), (32, 32, 8, 1)),
    },
}


def launch_config(kernel: str, q: Tensor, traits: Set[str], length: int) -> dict[str, int]:
    """Tile, warps and pipeline stages of "forward", "backward_q" or "backward_kv", with traits of "rotary", "values"
    (are turned too), "dropout" and "mask"."""
    block_m, block_n, warps, stages = chosen(_CONFIGS, kernel, q, traits)
    if block_m == 256 and (length <= 128 or "values" in traits):
        block_m = 128
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sequences: Sequences,
    rotation: Rotation | None,
    dropout: Dropout | None,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(o, lse, q, k, v): the output, contiguous in q's shape, and if `save` what attention_bwd wants besides.

    lse: float32 [H, T], the log-sum-exp of every row to base 2. The last three are operands as they were multiplied,
    where they were turned, and q also where there is a mask; else None.
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = _, _, total, heads = sequences.arguments(q)
    lse = torch.empty(heads, total, dtype=torch.float32, device=q.device) if save else None
    turned = rotation is not None
    changed = turned or sequences.mask is not None, turned, turned and rotation.values
    used = [torch.empty_like(o) if save and new else None for new in changed]
    q, k, v = (sequences.operand(t) for t in (q, k, v))
    strides = [stride for t in (q, k, v) for stride in sequences.strides(t)]
    tables, drop_and_factor = _tables_and_dropout(rotation, dropout)
    config = _compile_time("forward", q, sequences, rotation, dropout, strides)
    with torch.cuda.device_of(q):
        _attention_forward_kernel[sequences.grid(q, config["BLOCK_M"])](
            *(q, k, v, sequences.mask, sequences.ends, *tables, o, lse, *used),
            *(*shape, *strides, *sequences.mask_strides, scale * LOG2_E, *drop_and_factor),
            **config,
            **early(q, wanted=not save),
        )
    return o, lse, *used


def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    sequences: Sequences,
    rotation: Rotation | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous. q, k, v: as attention_fwd returned them, or as it got them where it returned None.
    given: with a mask, q as attention_fwd got it. o, lse: what it returned; the rest: what it got."""
    dq, dk, dv = (torch.empty_like(o) for _ in "qkv")
    delta = torch.empty_like(lse)
    given = None if sequences.mask is None else sequences.operand(given)
    do, q, k, v = (sequences.operand(t) for t in (do, q, k, v))
    shape, strides = sequences.arguments(q), [s for t in (q, k, v, do) for s in sequences.strides(t)]
    of_given = (0, 0, 0) if given is None else sequences.strides(given)
    tables, (drop, factor) = _tables_and_dropout(rotation, dropout)
    operands = q, k, v, sequences.mask, sequences.ends, *tables, do
    scales = *sequences.mask_strides, scale * LOG2_E, drop, factor, scale * factor
    with torch.cuda.device_of(q):
        config = _compile_time("backward_q", q, sequences, rotation, dropout, [*strides, *of_given])
        _attention_backward_q_kernel[sequences.grid(q, config["BLOCK_M"])](
            *(*operands, o, lse, delta, dq, given, *shape, *strides, *of_given, *scales), **config
        )
        config = _compile_time("backward_kv", q, sequences, rotation, dropout, strides)
        _attention_backward_kv_kernel[sequences.grid(q, config["BLOCK_N"])](
            *(*operands, lse, delta, dk, dv, *shape, *strides, *scales), **config
        )
    return dq, dk, dv


def _compile_time(
    kernel: str,
    q: Tensor,
    sequences: Sequences,
    rotation: Rotation | None,
    dropout: Dropout | None,
    strides: list[int],
) -> dict:
    values = rotation is not None and rotation.values
    facts = {"rotary": rotation, "values": values or None, "dropout": dropout, "mask": sequences.mask}
    traits = {trait for trait, fact in facts.items() if fact is not None}
    return launch_config(kernel, q, traits, sequences.max_length) | {
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "TURN_V": values,
        "HALVES": rotation is not None and not rotation.interleaved,
        "ALIGN": alignment(strides),
    }


def _tables_and_dropout(rotation: Rotation | None, dropout: Dropout | None) -> tuple:
    """(cosines, sines, seed), (drop, what kept elements are multiplied by)."""
    cos, sin = (None, None) if rotation is None else rotation.table
    seed, *drop_and_factor = seed_drop_factor(dropout)
    return (cos, sin, seed), drop_and_factor
