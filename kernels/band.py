"""What NEZHA's clipped distances add to a tile of queries by keys: see relative_attention.py.

The band are the pairs |j - i| < R, its edges the tables' rows T[0] (to its left) and T[2R] (to its right).
"""

import triton
import triton.language as tl

from fastbert.kernels import tile


@triton.jit
def near(first, length, radius, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """(low, high), multiples of STEP: the tiles of STEP rows from low to high touch the band of the BLOCK rows from
    `first` on, and no others do."""
    tl.static_assert(BLOCK + STEP <= 512, "launch.Relative has sinusoids for two tiles of 256 rows at most")
    low = tl.maximum(first - radius + 1, 0) // STEP * STEP
    high = tl.minimum(tl.cdiv(first + BLOCK - 1 + radius, STEP), tl.cdiv(length, STEP)) * STEP
    return low, high


@triton.jit
def far(i, low, high):
    """The tile with number i among those outside of `near`, numbers and tiles counted in rows."""
    return tl.where(i < low, i, i - low + high)


@triton.jit
def place(first_m, first_n, radius, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(whether an edge of the band crosses a tile, the side where it has pairs that lie outside: 1 for the right, else
    -1)."""
    left, right = first_n - first_m - BLOCK_M + 1 < -radius, first_n + BLOCK_N - 1 - first_m > radius
    return left | right, tl.where(right, 1, -1)


@triton.jit
def sinusoids(p_waves, o_n, first, BLOCK_D: tl.constexpr):
    """s_j of the keys o_n, with angles counted from `first` on: [BLOCK_N, BLOCK_D]."""
    return tile.load(p_waves, o_n - first, None, BLOCK_D, BLOCK_D, BLOCK_D, False)


@triton.jit
def edge_terms(b_x, p_edges, BLOCK_D: tl.constexpr):
    """(x.T[0], x.T[2R]) of rows x: by a product, which leaves them where the loops want them."""
    o_e = tl.arange(0, 16)
    b_edges = tile.load(p_edges, o_e, None, BLOCK_D, BLOCK_D, BLOCK_D, False)
    b_terms = tl.dot(b_x, tl.trans(b_edges), input_precision="ieee")
    return tl.sum(tl.where((o_e == 0)[None, :], b_terms, 0), 1), tl.sum(tl.where((o_e == 1)[None, :], b_terms, 0), 1)


@triton.jit
def mix_edges(b_left, b_right, p_edges, BLOCK_D: tl.constexpr):
    """left T[0] + right T[2R] of two numbers per row: [rows, BLOCK_D]."""
    p_first = p_edges + tl.arange(0, BLOCK_D)
    b_first, b_last = tl.load(p_first).to(tl.float32), tl.load(p_first + BLOCK_D).to(tl.float32)
    return b_left[:, None] * b_first[None, :] + b_right[:, None] * b_last[None, :]


@triton.jit
def clip(b_x, b_left, b_right, o_m, o_n, side, radius, BOTH: tl.constexpr):
    """b_x, but outside of the band what its edges give; all with two dimensions. BOTH: both edges may cross a tile."""
    if BOTH:
        return tl.where(o_n > o_m - radius, tl.where(o_n < o_m + radius, b_x, b_right), b_left)
    else:
        return tl.where(o_n * side < o_m * side + radius, b_x, tl.where(side > 0, b_right, b_left))


@triton.jit
def part(b_x, b_sum, o_m, o_n, side, radius, zero, BOTH: tl.constexpr):
    """(b_x, but zero outside of the band, what rows sum to on its left, on its right); b_sum: what they sum to."""
    if BOTH:
        b_right = tl.sum(tl.where(o_n >= o_m + radius, b_x, zero), 1)
        b_inside = tl.where((o_n > o_m - radius) & (o_n < o_m + radius), b_x, zero)
        return b_inside, b_sum - tl.sum(b_inside, 1) - b_right, b_right
    else:
        # Said unlike clip says it: the compiler then compares again, which is less than to keep a bit of each element.
        b_inside = tl.where(o_n * side <= o_m * side + (radius - 1), b_x, zero)
        b_outside = b_sum - tl.sum(b_inside, 1)
        return b_inside, tl.where(side > 0, 0, b_outside), tl.where(side > 0, b_outside, 0)
