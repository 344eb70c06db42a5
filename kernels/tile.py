"""What the attention kernels are made of: where a tile lies, rows in and out, rotation, dropout; and early launches."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_FAN = tl.constexpr(128)


@triton.jit
def after_the_launch_before():
    """For a launch that may begin early (see launch.early): what others wrote may be read behind this, and the next
    launch may begin."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def locate(i_tile, p_ends, batch, length, BLOCK: tl.constexpr):
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
def head(p, i_batch, start, i_head, stride_b, stride, stride_h, ALIGN: tl.constexpr):
    """A head's first row, and the stride from row to row, both seen to be multiples of ALIGN elements. The offset may
    need 64 bits; those within a sequence do not (see launch.Sequences)."""
    if ALIGN > 1:
        stride_b, stride, stride_h = stride_b // ALIGN * ALIGN, stride // ALIGN * ALIGN, stride_h // ALIGN * ALIGN
    p += tl.cast(i_batch, tl.int64) * stride_b + tl.cast(start, tl.int64) * stride
    return p + tl.cast(i_head, tl.int64) * stride_h, stride


@triton.jit
def load(p, o_row, m_row, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """Rows [N, BLOCK_D]: zeros where m_row (None: nowhere) is False and from HEAD_DIM on. HALVES: elements (k, k + D/2)
    are brought side by side."""
    N: tl.constexpr = o_row.shape[0]
    if HALVES:
        o_k = tl.arange(0, BLOCK_D // 2)
        m_k = (o_k < HEAD_DIM // 2)[None, :]
        p_first = p + (o_row[:, None] * stride + o_k[None, :])
        m_both = m_k if m_row is None else m_row[:, None] & m_k
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
def store(p, b_x, o_row, m_row, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """What load reads, written where m_row is True."""
    o_d = tl.arange(0, BLOCK_D)
    o_x = o_d % 2 * (HEAD_DIM // 2) + o_d // 2 if HALVES else o_d
    p_x = p + (o_row[:, None] * stride + o_x[None, :])
    m_x = m_row[:, None] if BLOCK_D == HEAD_DIM else m_row[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_x, b_x.to(p.dtype.element_ty), mask=m_x)


@triton.jit
def angles(p_cos, p_sin, o_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines and sines at positions o_row, [N, BLOCK_D / 2] each."""
    o_k = tl.arange(0, BLOCK_D // 2)
    o_x = o_row[:, None] * (HEAD_DIM // 2) + o_k[None, :]
    if BLOCK_D == HEAD_DIM:
        return tl.load(p_cos + o_x), tl.load(p_sin + o_x)
    else:
        m_k = (o_k < HEAD_DIM // 2)[None, :]
        return tl.load(p_cos + o_x, mask=m_k, other=0), tl.load(p_sin + o_x, mask=m_k, other=0)


@triton.jit
def turn(b_x, b_cos, b_sin):
    """Pairs (2k, 2k + 1) of [N, BLOCK_D] turned, in float32. The other way round with -b_sin."""
    N: tl.constexpr = b_x.shape[0]
    HALF: tl.constexpr = b_x.shape[1] // 2
    b_a, b_b = tl.split(tl.reshape(b_x.to(tl.float32), [N, HALF, 2]))
    b_pair = tl.join(b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin)
    return tl.reshape(b_pair, [N, 2 * HALF]).to(b_x.dtype)


@triton.jit
def rows(BLOCK: tl.constexpr):
    """The rows of a tile of queries: bit 4 of the row leads the others, so that a thread of the matrix unit has both of
    its values if the tile has 32 rows for every warp, and of a tile of keys by queries always (see keep)."""
    tl.static_assert(BLOCK % 32 == 0, "tiles of queries have a multiple of 32 rows")
    o = tl.arange(0, BLOCK)
    return o % 16 + o % (BLOCK // 2) // 16 * 32 + o // (BLOCK // 2) * 16


@triton.jit
def stream(p_seed, i_batch, i_head):
    """(key, x, y) of philox.attention_keep."""
    zero = i_batch * 0
    key, x, y, _ = tl.philox(tl.load(p_seed), i_head, i_batch, zero, zero + 1, 7)
    return key, x, y


@triton.jit
def keep(key, x, y, first_m, first_n, drop, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps, [BLOCK_M, BLOCK_N]: of queries first_m + rows and keys from first_n on."""
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
    # A byte is compared at the top of a word, where those below it decide nothing.
    return tl.reshape((words << left.to(tl.uint32)) >= tl.cast(drop, tl.uint32) << 24, [BLOCK_M, BLOCK_N])


@triton.jit
def real(p_mask, o_n, stride_mask, length):
    """Which keys are real."""
    m_n = o_n < length
    if p_mask is not None:
        m_n = tl.load(p_mask + o_n * stride_mask, mask=m_n, other=0) != 0
    return m_n


@triton.jit
def pivot(b_max):
    """What to subtract from scores: the maximum, or zero where there is none yet."""
    return tl.where(b_max == float("-inf"), 0, b_max)


@triton.jit
def soften(b_s, b_max, b_shift, scale, MASKED: tl.constexpr):
    """A step of the online softmax, to base 2: (2^(scale (s + shift) - max), the new maximum, what sums to the old one
    are to be multiplied by) of a tile of scores s, a number per row to add to them, and the old maximum. MASKED: there
    may be rows whose scores are all -inf."""
    b_shift = 0 if b_shift is None else b_shift * scale
    b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * scale + b_shift)
    b_pivot = pivot(b_max_new) if MASKED else b_max_new
    return tl.exp2(b_s * scale - (b_pivot - b_shift)[:, None]), b_max_new, tl.exp2(b_max - b_pivot)


@triton.jit
def log_sum_exp(b_max, b_sum):
    """(the sums, log-sum-exp to base 2) of rows. Without a real key: 1 and inf, for zeros, and for probabilities of
    zero in the backward."""
    m_empty = b_sum == 0
    b_sum = tl.where(m_empty, 1, b_sum)
    return b_sum, tl.where(m_empty, float("inf"), b_max + tl.log2(b_sum))


@triton.jit
def probabilities(b_exponent, p_mask):
    """At most 1, also of a padded query so large that another order of summation moves its scores by powers of two: its
    gradient of zero must win."""
    return tl.exp2(b_exponent if p_mask is None else tl.minimum(b_exponent, 0))
