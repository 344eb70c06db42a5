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

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = math.log2(math.e)
_FAN = tl.constexpr(128)


@triton.jit
def _locate(i_tile, p_ends, batch, length, BLOCK: tl.constexpr):
    """(sequence, its first packed row, its length, row of the sequence at which the tile begins)."""
    if p_ends is None:
        tiles = tl.cdiv(length, BLOCK)
        i_batch = i_tile // tiles
        return i_batch, i_batch * 0, length, (i_tile - i_batch * tiles) * BLOCK
    else:
        # The last sequence whose first tile is not beyond this one, among `span` from i_batch on
        i_batch = 0
        span = batch
        while span > 1:
            step = tl.cdiv(span, _FAN)
            o = i_batch + tl.arange(0, _FAN) * step
            tile = tl.load(p_ends + o, mask=o < batch, other=0) // BLOCK + o
            i_batch += (tl.sum(((o < batch) & (tile <= i_tile)).to(tl.int32)) - 1) * step
            span = step
        start = tl.load(p_ends + i_batch)
        end = tl.load(p_ends + i_batch + 1)
        return i_batch, start, end - start, (i_tile - start // BLOCK - i_batch) * BLOCK


@triton.jit
def _head(p, i_batch, start, i_head, stride_b, stride, stride_h):
    """A head's first row. The offset may need 64 bits; those within a sequence do not (see _rows in the launchers)."""
    return p + tl.cast(i_batch, tl.int64) * stride_b + tl.cast(start, tl.int64) * stride + i_head * stride_h


@triton.jit
def _load(p, o_row, m_row, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """Rows [N, BLOCK_D]: zeros where m_row (None: nowhere) is False and from HEAD_DIM on. HALVES: elements (k, k + D/2)
    are brought side by side."""
    N: tl.constexpr = o_row.shape[0]
    if HALVES:
        o_k = tl.arange(0, BLOCK_D // 2)
        m_k = o_k < HEAD_DIM // 2
        p_first = p + (o_row[:, None] * stride + o_k[None, :])
        m_both = (o_row >= 0)[:, None] & m_k[None, :] if m_row is None else m_row[:, None] & m_k[None, :]
        b_first = tl.load(p_first, mask=m_both, other=0)
        b_second = tl.load(p_first + HEAD_DIM // 2, mask=m_both, other=0)
        return tl.reshape(tl.join(b_first, b_second), [N, BLOCK_D])
    else:
        o_d = tl.arange(0, BLOCK_D)
        p_x = p + (o_row[:, None] * stride + o_d[None, :])
        if m_row is None:
            if BLOCK_D == HEAD_DIM:
                return tl.load(p_x)
            else:
                return tl.load(p_x, mask=(o_d < HEAD_DIM)[None, :], other=0)
        else:
            if BLOCK_D == HEAD_DIM:
                return tl.load(p_x, mask=m_row[:, None], other=0)
            else:
                return tl.load(p_x, mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :], other=0)


@triton.jit
def _store(p, b_x, o_row, m_row, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """What _load reads, written where m_row is True."""
    b_x = b_x.to(p.dtype.element_ty)
    if HALVES:
        o_k = tl.arange(0, BLOCK_D // 2)
        m_both = m_row[:, None] & (o_k < HEAD_DIM // 2)[None, :]
        p_first = p + (o_row[:, None] * stride + o_k[None, :])
        b_first, b_second = tl.split(tl.reshape(b_x, [b_x.shape[0], BLOCK_D // 2, 2]))
        tl.store(p_first, b_first, mask=m_both)
        tl.store(p_first + HEAD_DIM // 2, b_second, mask=m_both)
    else:
        o_d = tl.arange(0, BLOCK_D)
        p_x = p + (o_row[:, None] * stride + o_d[None, :])
        if BLOCK_D == HEAD_DIM:
            tl.store(p_x, b_x, mask=m_row[:, None])
        else:
            tl.store(p_x, b_x, mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit
def _angles(p_cos, p_sin, o_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines and sines at positions o_row, [N, BLOCK_D / 2] each."""
    o_k = tl.arange(0, BLOCK_D // 2)
    o_x = o_row[:, None] * (HEAD_DIM // 2) + o_k[None, :]
    if BLOCK_D == HEAD_DIM:
        return tl.load(p_cos + o_x), tl.load(p_sin + o_x)
    else:
        m_k = (o_k < HEAD_DIM // 2)[None, :]
        return tl.load(p_cos + o_x, mask=m_k, other=0), tl.load(p_sin + o_x, mask=m_k, other=0)


@triton.jit
def _turn(b_x, b_cos, b_sin):
    """Pairs (2k, 2k + 1) of [N, BLOCK_D] turned, in float32. The other way round with -b_sin."""
    N: tl.constexpr = b_x.shape[0]
    HALF: tl.constexpr = b_x.shape[1] // 2
    b_a, b_b = tl.split(tl.reshape(b_x.to(tl.float32), [N, HALF, 2]))
    b_pair = tl.join(b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin)
    return tl.reshape(b_pair, [N, 2 * HALF]).to(b_x.dtype)


@triton.jit
def _tile(BLOCK: tl.constexpr):
    """The rows of a tile of queries: bit 4 of the row leads the others, so that a thread of the matrix unit has both of
    its values if the tile has 32 rows for every warp, and of a tile of keys by queries always (see _keep)."""
    o = tl.arange(0, BLOCK)
    return o % 16 + o % (BLOCK // 2) // 16 * 32 + o // (BLOCK // 2) * 16


@triton.jit
def _head_key(p_seed, i_batch, i_head):
    """(key, x, y) of philox.attention_keep."""
    zero = i_batch * 0
    key, x, y, _ = tl.philox(tl.load(p_seed), i_head, i_batch, zero, zero + 1, 7)
    return key, x, y


@triton.jit
def _keep(key, x, y, first_m, first_n, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps, [BLOCK_M, BLOCK_N]: of queries first_m + _tile and keys from first_n on."""
    # Bits 3 and 4 of the query and bit 3 of the key choose a byte of the eight that a call gives.
    o_i = tl.arange(0, BLOCK_M // 4)
    o_j = tl.arange(0, BLOCK_N // 2)
    c0 = ((first_m + o_i % 8 + o_i // 8 * 32).to(tl.uint32) ^ x)[:, None]
    c1 = ((first_n + o_j % 8 + o_j // 8 * 16).to(tl.uint32) ^ y)[None, :]
    c0, c1 = tl.broadcast(c0, c1)
    for _ in tl.static_range(7):
        product = c0.to(tl.uint64) * 0xD256D193
        c0, c1 = (product >> 32).to(tl.uint32) ^ c1 ^ key, product.to(tl.uint32)
        key += 0x9E3779B9
    words = tl.permute(tl.join(c0, c1), (2, 0, 1))
    words = tl.reshape(words, [BLOCK_M // 16, 1, 8, BLOCK_N // 16, 1, 8])
    bit = tl.arange(0, 2)
    left = 24 - 8 * tl.reshape(bit, [1, 2, 1, 1, 1, 1]) - 16 * tl.reshape(bit, [1, 1, 1, 1, 2, 1])
    return tl.reshape((words << left.to(tl.uint32)) >= threshold, [BLOCK_M, BLOCK_N])


@triton.jit
def _keys(p_mask, o_n, stride_mask, length):
    """Which keys are real."""
    m_n = o_n < length
    if p_mask is not None:
        m_n = tl.load(p_mask + o_n * stride_mask, mask=m_n, other=0) != 0
    return m_n


@triton.jit
def _attend(
    b_o, b_max, b_sum, b_q, low, high, p_k, p_v, p_mask, p_cos, p_sin, b_cos, b_sin, key, x, y,
    length, stride_k, stride_v, stride_mask, scale, threshold, first_m,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURN_V: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The forward's loop over keys `low` to `high`; MASKED where some of them may not be real."""
    zero = scale * 0.0  # not a literal: LLVM would push the choice behind the cast to 16 bits, 1.3 instructions more
    for first_n in tl.range(low, high, BLOCK_N):
        o_n = first_n + tl.arange(0, BLOCK_N)
        m_n = _keys(p_mask, o_n, stride_mask, length) if MASKED else None
        b_k = _load(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, HALVES)
        if p_cos is not None:
            b_first_cos, b_first_sin = _angles(p_cos, p_sin, first_n + tl.zeros([1], tl.int32), HEAD_DIM, BLOCK_D)
            b_key_cos = b_cos * b_first_cos - b_sin * b_first_sin
            b_key_sin = b_sin * b_first_cos + b_cos * b_first_sin
            b_k = _turn(b_k, b_key_cos, b_key_sin)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MASKED:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_shift = tl.where(b_new == float("-inf"), 0, b_new) if MASKED else b_new
        b_p = tl.exp2(b_s * scale - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_max = b_new
        if key is not None:
            b_p = tl.where(_keep(key, x, y, first_m, first_n, threshold, BLOCK_M, BLOCK_N), b_p, zero)
        b_v = _load(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, HALVES and TURN_V)
        if TURN_V:
            b_v = _turn(b_v, b_key_cos, b_key_sin)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_rescale[:, None], input_precision="ieee")
    return b_o, b_max, b_sum


@triton.jit
def _forward_kernel(
    p_q, p_k, p_v, p_mask, p_ends, p_cos, p_sin, p_seed, p_o, p_lse, p_q_used, p_k_used, p_v_used,
    batch, length, total, heads, stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh,
    stride_vb, stride_v, stride_vh, stride_mb, stride_mask, scale, threshold, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURN_V: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o, and where wanted the log-sum-exp of each row (base 2) and q, k, v as they were multiplied."""
    i_head = tl.program_id(0) % heads
    i_batch, start, length, first_m = _locate(tl.program_id(0) // heads, p_ends, batch, length, BLOCK_M)
    if first_m >= length:
        return
    p_q = _head(p_q, i_batch, start, i_head, stride_qb, stride_q, stride_qh)
    p_k = _head(p_k, i_batch, start, i_head, stride_kb, stride_k, stride_kh)
    p_v = _head(p_v, i_batch, start, i_head, stride_vb, stride_v, stride_vh)
    row = (start if p_ends is not None else i_batch * length) + first_m
    rest = length - first_m
    o_head = (tl.cast(row - first_m, tl.int64) * heads + i_head) * HEAD_DIM
    stride = heads * HEAD_DIM
    o_m = first_m + _tile(BLOCK_M)
    m_m = o_m < length
    # [BLOCK_M, BLOCK_D]
    b_q = _load(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, HALVES)
    m_real = m_m
    if p_mask is not None:
        p_mask += tl.cast(i_batch, tl.int64) * stride_mb
        m_real = _keys(p_mask, o_m, stride_mask, length)
        b_q = tl.where(m_real[:, None] | (tl.abs(b_q.to(tl.float32)) < float("inf")), b_q, 0)
    b_cos, b_sin = None, None
    if p_cos is not None:
        b_cos, b_sin = _angles(p_cos, p_sin, tl.minimum(o_m, length - 1), HEAD_DIM, BLOCK_D)
        b_q = _turn(b_q, b_cos, b_sin)
    if p_q_used is not None:
        _store(p_q_used + o_head, b_q, o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
        b_k = _load(p_k, o_m, m_real, stride_k, HEAD_DIM, BLOCK_D, HALVES)
        b_k = _turn(b_k, b_cos, b_sin) if p_cos is not None else b_k
        _store(p_k_used + o_head, b_k, o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
        if TURN_V:
            b_v = _turn(_load(p_v, o_m, m_real, stride_v, HEAD_DIM, BLOCK_D, HALVES), b_cos, b_sin)
            _store(p_v_used + o_head, b_v, o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
    if p_cos is not None:
        b_cos, b_sin = _angles(p_cos, p_sin, tl.arange(0, BLOCK_N), HEAD_DIM, BLOCK_D)
    key, x, y = None, None, None
    if p_seed is not None:
        key, x, y = _head_key(p_seed, i_batch, i_head)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    full = 0
    if p_mask is None:
        full = length // BLOCK_N * BLOCK_N
        b_o, b_max, b_sum = _attend(
            b_o, b_max, b_sum, b_q, 0, full, p_k, p_v, p_mask, p_cos, p_sin, b_cos, b_sin, key, x, y,
            length, stride_k, stride_v, stride_mask, scale, threshold, first_m,
            HEAD_DIM, BLOCK_D, TURN_V, HALVES, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    b_o, b_max, b_sum = _attend(
        b_o, b_max, b_sum, b_q, full, length, p_k, p_v, p_mask, p_cos, p_sin, b_cos, b_sin, key, x, y,
        length, stride_k, stride_v, stride_mask, scale, threshold, first_m,
        HEAD_DIM, BLOCK_D, TURN_V, HALVES, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    b_lse = b_max + tl.log2(b_sum)
    if p_mask is not None:
        # No real key: zeros, and probabilities of zero in the backward
        b_lse = tl.where(b_sum == 0, float("inf"), b_lse)
        b_sum = tl.where(b_sum == 0, 1, b_sum)
    o_m = _tile(BLOCK_M)
    m_m = o_m < rest
    b_o *= (factor / b_sum)[:, None]
    p_o += (tl.cast(row, tl.int64) * heads + i_head) * HEAD_DIM
    _store(p_o, b_o, o_m, m_m, stride, HEAD_DIM, BLOCK_D, HALVES and TURN_V)
    if p_lse is not None:
        tl.store(p_lse + tl.cast(i_head, tl.int64) * total + row + o_m, b_lse, mask=m_m)


@triton.jit
def _differentiate(
    b_dq, b_q, b_do, b_lse, b_delta, low, high, p_k, p_v, p_mask, key, x, y,
    length, stride_k, stride_v, stride_mask, scale, threshold, first_m,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq's loop over keys `low` to `high`; MASKED where some of them may not be real."""
    zero = scale * 0.0
    for first_n in tl.range(low, high, BLOCK_N):
        o_n = first_n + tl.arange(0, BLOCK_N)
        m_n = _keys(p_mask, o_n, stride_mask, length) if MASKED else None
        b_k = _load(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, False)
        b_v = _load(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, False)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        if MASKED:
            b_p = tl.where(m_n[None, :], b_p, zero)
        if key is not None:
            b_dp = tl.where(_keep(key, x, y, first_m, first_n, threshold, BLOCK_M, BLOCK_N), b_dp, zero)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit
def _backward_q_kernel(
    p_q, p_k, p_v, p_mask, p_ends, p_cos, p_sin, p_seed, p_do, p_o, p_lse, p_delta, p_dq, p_q_given,
    batch, length, total, heads, stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh,
    stride_vb, stride_v, stride_vh, stride_dob, stride_do, stride_doh, stride_gb, stride_g, stride_gh,
    stride_mb, stride_mask, scale, threshold, factor, factor_dq,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURN_V: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and delta_i = do_i.o_i / factor. q, k, v: as the forward multiplied them; p_q_given, with a mask: as given."""
    i_head = tl.program_id(0) % heads
    i_batch, start, length, first_m = _locate(tl.program_id(0) // heads, p_ends, batch, length, BLOCK_M)
    if first_m >= length:
        return
    p_q = _head(p_q, i_batch, start, i_head, stride_qb, stride_q, stride_qh)
    p_k = _head(p_k, i_batch, start, i_head, stride_kb, stride_k, stride_kh)
    p_v = _head(p_v, i_batch, start, i_head, stride_vb, stride_v, stride_vh)
    p_do = _head(p_do, i_batch, start, i_head, stride_dob, stride_do, stride_doh)
    first_row = tl.cast(start, tl.int64) if p_ends is not None else tl.cast(i_batch, tl.int64) * length
    o_head = (first_row * heads + i_head) * HEAD_DIM
    stride = heads * HEAD_DIM
    o_m = first_m + _tile(BLOCK_M)
    m_m = o_m < length
    # [BLOCK_M, BLOCK_D]
    b_q = _load(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, False)
    b_do = _load(p_do, o_m, m_m, stride_do, HEAD_DIM, BLOCK_D, HALVES and TURN_V)
    b_o = _load(p_o + o_head, o_m, m_m, stride, HEAD_DIM, BLOCK_D, HALVES and TURN_V)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1) / factor
    o_lse = i_head * total + first_row + o_m
    tl.store(p_delta + o_lse, b_delta, mask=m_m)
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=float("inf"))
    key, x, y = None, None, None
    if p_seed is not None:
        key, x, y = _head_key(p_seed, i_batch, i_head)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = 0
    if p_mask is None:
        full = length // BLOCK_N * BLOCK_N
        b_dq = _differentiate(
            b_dq, b_q, b_do, b_lse, b_delta, 0, full, p_k, p_v, p_mask, key, x, y,
            length, stride_k, stride_v, stride_mask, scale, threshold, first_m,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    else:
        p_mask += tl.cast(i_batch, tl.int64) * stride_mb
    b_dq = _differentiate(
        b_dq, b_q, b_do, b_lse, b_delta, full, length, p_k, p_v, p_mask, key, x, y,
        length, stride_k, stride_v, stride_mask, scale, threshold, first_m,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    if p_cos is not None:
        b_cos, b_sin = _angles(p_cos, p_sin, tl.minimum(o_m, length - 1), HEAD_DIM, BLOCK_D)
        b_dq = _turn(b_dq, b_cos, -b_sin)
    if p_mask is not None:
        p_given = _head(p_q_given, i_batch, start, i_head, stride_gb, stride_g, stride_gh)
        b_given = _load(p_given, o_m, m_m, stride_g, HEAD_DIM, BLOCK_D, HALVES).to(tl.float32)
        m_real = _keys(p_mask, o_m, stride_mask, length)
        b_dq = tl.where(m_real[:, None] | (tl.abs(b_given) < float("inf")), b_dq, 0)
    _store(p_dq + o_head, b_dq * factor_dq, o_m, m_m, stride, HEAD_DIM, BLOCK_D, HALVES)


@triton.jit
def _backward_kv_kernel(
    p_q, p_k, p_v, p_mask, p_ends, p_cos, p_sin, p_seed, p_do, p_lse, p_delta, p_dk, p_dv,
    batch, length, total, heads, stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh,
    stride_vb, stride_v, stride_vh, stride_dob, stride_do, stride_doh, stride_mb, stride_mask,
    scale, threshold, factor, factor_dk,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURN_V: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv, from delta as _backward_q_kernel leaves it. q, k, v: as the forward multiplied them."""
    i_head = tl.program_id(0) % heads
    i_batch, start, length, first_n = _locate(tl.program_id(0) // heads, p_ends, batch, length, BLOCK_N)
    if first_n >= length:
        return
    p_q = _head(p_q, i_batch, start, i_head, stride_qb, stride_q, stride_qh)
    p_k = _head(p_k, i_batch, start, i_head, stride_kb, stride_k, stride_kh)
    p_v = _head(p_v, i_batch, start, i_head, stride_vb, stride_v, stride_vh)
    p_do = _head(p_do, i_batch, start, i_head, stride_dob, stride_do, stride_doh)
    first_row = tl.cast(start, tl.int64) if p_ends is not None else tl.cast(i_batch, tl.int64) * length
    p_lse += i_head * total + first_row
    p_delta += i_head * total + first_row
    o_n = first_n + tl.arange(0, BLOCK_N)
    m_n = o_n < length
    if p_mask is not None:
        p_mask += tl.cast(i_batch, tl.int64) * stride_mb
    m_real = _keys(p_mask, o_n, stride_mask, length)
    # [BLOCK_N, BLOCK_D]
    b_k = _load(p_k, o_n, m_real, stride_k, HEAD_DIM, BLOCK_D, False)
    b_v = _load(p_v, o_n, m_real, stride_v, HEAD_DIM, BLOCK_D, False)
    key, x, y = None, None, None
    if p_seed is not None:
        key, x, y = _head_key(p_seed, i_batch, i_head)
    zero = scale * 0.0
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first_m in tl.range(0, length, BLOCK_M):
        o_m = first_m + _tile(BLOCK_M)
        m_m = o_m < length
        b_q = _load(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, False)
        b_do = _load(p_do, o_m, m_m, stride_do, HEAD_DIM, BLOCK_D, HALVES and TURN_V)
        b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + o_m, mask=m_m, other=0)
        # [BLOCK_N, BLOCK_M]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_p = tl.exp2(b_s * scale - b_lse[None, :])
        b_dropped = b_p
        if key is not None:
            b_keep = tl.trans(_keep(key, x, y, first_m, first_n, threshold, BLOCK_M, BLOCK_N))
            b_dropped = tl.where(b_keep, b_p, zero)
            b_dp = tl.where(b_keep, b_dp, zero)
        b_dv = tl.dot(b_dropped.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    if p_cos is not None:
        b_cos, b_sin = _angles(p_cos, p_sin, tl.minimum(o_n, length - 1), HEAD_DIM, BLOCK_D)
        b_dk = _turn(b_dk, b_cos, -b_sin)
        if TURN_V:
            b_dv = _turn(b_dv, b_cos, -b_sin)
    if p_mask is not None:
        b_dk = tl.where(m_real[:, None], b_dk, 0)
        b_dv = tl.where(m_real[:, None], b_dv, 0)
    o_head = (first_row * heads + i_head) * HEAD_DIM
    stride = heads * HEAD_DIM
    _store(p_dk + o_head, b_dk * factor_dk, o_n, m_n, stride, HEAD_DIM, BLOCK_D, HALVES)
    _store(p_dv + o_head, b_dv * factor, o_n, m_n, stride, HEAD_DIM, BLOCK_D, HALVES and TURN_V)



def launch_config(
    kernel: str, dtype: torch.dtype, head_dim: int, *, rotary: bool, dropout: bool, length: int
) -> dict[str, int]:
    """Tile, warps and pipeline stages of "forward", "backward_q" or "backward_kv"."""
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


class Sequences(NamedTuple):
    """How rows make sequences, and which keys are real: [B, L, ...] with a mask bool [B, L] or None, or [T, ...] with
    cu_seqlens int32 [B + 1]. No sequence is longer than max_length."""

    max_length: int
    mask: Tensor | None = None
    ends: Tensor | None = None

    def grid(self, q: Tensor, block: int) -> tuple[int]:
        if self.ends is None:
            tiles = q.shape[0] * triton.cdiv(q.shape[1], block)
        else:
            tiles = q.shape[0] // block + self.ends.numel() - 1
        return (tiles * q.shape[-2],)

    def arguments(self, q: Tensor) -> tuple[int, int, int, int]:
        """batch, length, total, heads."""
        batch, length = q.shape[:2] if self.ends is None else (self.ends.numel() - 1, 0)
        return batch, length, math.prod(q.shape[:-2]), q.shape[-2]

    def operand(self, t: Tensor) -> Tensor:
        """t, or a copy where a kernel could not read it: elements of a head side by side, and offsets within a sequence
        that fit 32 bits."""
        fits = t.stride(-1) == 1 and (self.max_length + 256) * t.stride(-3) < 2**31
        return t if fits else t.contiguous()

    def strides(self, t: Tensor) -> tuple[int, int, int]:
        """From sequence to sequence (dense), row to row, head to head."""
        return (t.stride(0) if self.ends is None else 0, t.stride(-3), t.stride(-2))

    @property
    def mask_strides(self) -> tuple[int, int]:
        return (0, 0) if self.mask is None else self.mask.stride()


class Rotation(NamedTuple):
    """Which operands are turned besides q and k, and how: table float32 [2, positions, D/2] of cosines and sines, a row
    for each position below 256 and below max_length; pairs (2k, 2k + 1) if interleaved, else (k, k + D/2)."""

    table: Tensor
    values: bool
    interleaved: bool


class Dropout(NamedTuple):
    """seed int64 [1]; of 256 bytes that philox.py may give, `threshold` drop an element."""

    seed: Tensor
    threshold: int


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

    lse: float32 [H, T], the log-sum-exp of every row to base 2. The last three are operands as they were multiplied:
    q and k if they were turned, or there is a mask, and v if it was turned; else None.
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, length, total, heads = sequences.arguments(q)
    lse = torch.empty(heads, total, dtype=torch.float32, device=q.device) if save else None
    changed = save and (rotation is not None or sequences.mask is not None)
    used = [torch.empty_like(o) if changed else None for _ in "qk"]
    used.append(torch.empty_like(o) if changed and rotation is not None and rotation.values else None)
    q, k, v = (sequences.operand(t) for t in (q, k, v))
    config, cos, sin = _common("forward", q, sequences, rotation, dropout)
    with torch.cuda.device_of(q):
        _forward_kernel[sequences.grid(q, config["BLOCK_M"])](
            *(q, k, v, sequences.mask, sequences.ends, cos, sin, dropout and dropout.seed, o, lse, *used),
            *(batch, length, total, heads, *(stride for t in (q, k, v) for stride in sequences.strides(t))),
            *(*sequences.mask_strides, scale * _LOG2_E, *_threshold_and_factor(dropout)),
            **config,
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
    threshold, factor = _threshold_and_factor(dropout)
    scales = (*sequences.mask_strides, scale * _LOG2_E, threshold, factor, scale * factor)
    seed = dropout and dropout.seed
    with torch.cuda.device_of(q):
        config, cos, sin = _common("backward_q", q, sequences, rotation, dropout)
        _backward_q_kernel[sequences.grid(q, config["BLOCK_M"])](
            *(q, k, v, sequences.mask, sequences.ends, cos, sin, seed, do, o, lse, delta, dq, given),
            *(*shape, *strides, *of_given, *scales),
            **config,
        )
        config, cos, sin = _common("backward_kv", q, sequences, rotation, dropout)
        _backward_kv_kernel[sequences.grid(q, config["BLOCK_N"])](
            *(q, k, v, sequences.mask, sequences.ends, cos, sin, seed, do, lse, delta, dk, dv),
            *(*shape, *strides, *scales),
            **config,
        )
    return dq, dk, dv


def _common(
    kernel: str, q: Tensor, sequences: Sequences, rotation: Rotation | None, dropout: Dropout | None
) -> tuple[dict, Tensor | None, Tensor | None]:
    """(compile-time arguments, cosines, sines) of a launch."""
    head_dim = q.shape[-1]
    cos, sin = (None, None) if rotation is None else rotation.table
    config = launch_config(
        kernel,
        q.dtype,
        head_dim,
        rotary=rotation is not None,
        dropout=dropout is not None,
        length=sequences.max_length,
    )
    config |= {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "TURN_V": rotation is not None and rotation.values,
        "HALVES": rotation is not None and not rotation.interleaved,
    }
    return config, cos, sin


def _threshold_and_factor(dropout: Dropout | None) -> tuple[int, float]:
    """What the top byte of a word is compared with, as a word; and what kept elements are multiplied by."""
    return (0, 1.0) if dropout is None else (dropout.threshold << 24, 256 / (256 - dropout.threshold))
