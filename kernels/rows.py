"""What kernels over whole rows are made of: rows in and out, dropout, the statistics and the gradient of LayerNorm, and
sums over rows. Blocks are [BLOCK_M, BLOCK_N]; BLOCK_N is a power of two, at least 16, that holds all COLUMNS."""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

# Programs of a backward that sums over rows, at most, whatever the device: so that no sum depends on it
_PROGRAMS = 512


@triton.jit
def load(p_x, o_row, m_row, stride, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows o_row, int64 [BLOCK_M], in float32: zeros where m_row is False and from COLUMNS on."""
    o_column = tl.arange(0, BLOCK_N)
    mask = m_row[:, None] & (o_column < COLUMNS)[None, :]
    return tl.load(p_x + o_row[:, None] * stride + o_column[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def store(p_x, b_x, o_row, m_row, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """b_x as rows o_row of a contiguous tensor, where m_row is True."""
    o_column = tl.arange(0, BLOCK_N)
    mask = m_row[:, None] & (o_column < COLUMNS)[None, :]
    tl.store(p_x + o_row[:, None] * COLUMNS + o_column[None, :], b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(p_v, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """One number per column in float32, [BLOCK_N]: zeros from COLUMNS on."""
    o_column = tl.arange(0, BLOCK_N)
    return tl.load(p_v + o_column, mask=o_column < COLUMNS, other=0).to(tl.float32)


@triton.jit
def store_vector(p_v, b_v, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    o_column = tl.arange(0, BLOCK_N)
    tl.store(p_v + o_column, b_v.to(p_v.dtype.element_ty), mask=o_column < COLUMNS)


@triton.jit
def factors(seed, o_row, drop, scale, BLOCK_N: tl.constexpr):
    """What dropout multiplies rows o_row, int64 [BLOCK_M], with, [BLOCK_M, BLOCK_N]: scale where philox.row_keep keeps
    an element, else 0. seed: int64; drop: philox.threshold."""
    BLOCK_M: tl.constexpr = o_row.shape[0]
    # A call of Philox gives the bytes of 16 columns
    o_call = tl.arange(0, BLOCK_N // 16)
    low = (o_row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (o_row >> 32).to(tl.uint32)[:, None]
    c0, low = tl.broadcast(o_call.to(tl.uint32)[None, :], low)
    c0, high = tl.broadcast(c0, high)
    w0, w1, w2, w3 = tl.philox(seed, c0, low, high, c0 * 0, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, [BLOCK_M, BLOCK_N // 4, 1])
    left = (24 - 8 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]
    # A byte is compared at the top of a word, where those below it decide nothing
    keep = (words << left) >= tl.cast(drop, tl.uint32) << 24
    return tl.reshape(tl.where(keep, scale, 0.0), [BLOCK_M, BLOCK_N])


@triton.jit
def statistics(b_z, eps, COLUMNS: tl.constexpr):
    """(mean, 1 / sqrt(variance + eps)), [BLOCK_M] each, of rows that are zero from COLUMNS on."""
    m_column = tl.arange(0, b_z.shape[1]) < COLUMNS
    b_mean = tl.sum(b_z, 1) / COLUMNS
    b_apart = tl.where(m_column[None, :], b_z - b_mean[:, None], 0)
    return b_mean, 1 / tl.sqrt(tl.sum(b_apart * b_apart, 1) / COLUMNS + eps)


@triton.jit
def norm_gradient(b_dy, b_normal, b_weight, b_scale, COLUMNS: tl.constexpr):
    """dz of y = weight normal + bias, normal = (z - mean) scale, where mean and scale are the statistics of z. dy is
    zero from COLUMNS on; dz is not."""
    b_g = b_dy * b_weight[None, :]
    b_mean = tl.sum(b_g, 1) / COLUMNS
    b_slope = tl.sum(b_g * b_normal, 1) / COLUMNS
    return (b_g - b_mean[:, None] - b_normal * b_slope[:, None]) * b_scale[:, None]


@triton.jit(do_not_specialize=["rows"])
def _column_sum_kernel(
    p_sums, p_a, p_b, p_c, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The column sums of table number `program_id(1)` of p_sums [tables, rows, columns], to p_a, p_b or p_c."""
    i_table = tl.program_id(1)
    o_column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    p_sums += i_table.to(tl.int64) * rows * columns
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, rows, BLOCK_M):
        o_row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (o_row < rows)[:, None] & m_column[None, :]
        b_sum += tl.load(p_sums + o_row[:, None] * columns + o_column[None, :], mask=mask, other=0)
    b_sum = tl.sum(b_sum, axis=0)
    if i_table == 0:
        tl.store(p_a + o_column, b_sum.to(p_a.dtype.element_ty), mask=m_column)
    elif i_table == 1:
        if p_b is not None:
            tl.store(p_b + o_column, b_sum.to(p_b.dtype.element_ty), mask=m_column)
    elif p_c is not None:
        tl.store(p_c + o_column, b_sum.to(p_c.dtype.element_ty), mask=m_column)


def column_sums(tables: Tensor, sums: Sequence[Tensor]) -> None:
    """Sums the rows of tables [N, rows, columns], float32, into N contiguous tensors of any dtype, N from 1 to 3."""
    _, rows, columns = tables.shape
    padded = *sums, *(None for _ in range(3 - len(sums)))
    grid = (triton.cdiv(columns, 32), len(sums))
    _column_sum_kernel[grid](tables, *padded, rows, columns, BLOCK_M=128, BLOCK_N=32, num_warps=8)


def chunk(rows: int, block_m: int) -> int:
    """Rows, a multiple of block_m, that one program of a backward sums, if what it sums gets one row per program of a
    table for column_sums."""
    return block_m * max(1, triton.cdiv(rows, block_m * _PROGRAMS))


def block_n(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))


def as_rows(t: Tensor) -> Tensor:
    """t as [rows, columns], elements of a row side by side: a view where the strides allow."""
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()
