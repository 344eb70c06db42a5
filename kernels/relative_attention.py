"""Attention with clipped sinusoids of the distance in keys and values (NEZHA), as reference.relative_attention, which
derives what is used here; the backward is in relative_attention_bwd.py.

Inside of the band |j - i| < R, with sinusoids s_j counted from the tile's first query (`waves`), and q~ for q turned by
the angles that remain (`phases`):

    q_i.T = q~_i.s_j; to the left of the band q_i.T[0], to the right q_i.T[2R]
    sum_j P_ij T = (sum_inside P_ij s_j) turned back + (sum_left P_ij) T[0] + (sum_right P_ij) T[2R]

The angles are those within the band and a tile, at any length. Tiles of queries by keys are of three kinds, and each
pays for itself alone. Those that touch the band come first, in a loop of their own:

    outside of the band     plain attention, but for two numbers per row
    inside                  one more product for the scores, one for the values
    crossed by an edge      the same, and twice a comparison and a choice for every element

Floors, B 32, H 12, L 512, D 64, R 64 on an H100: those of attention.py, and 14 of the 32 tiles of 128 x 64 touch the
band. They have twice the products forward and 8/5 backward: 37 to 47 us and 82 to 104 us. Two kernels backward, which
both compute the scores, have 12/5 of them there, and 7/5 elsewhere.
"""

import math
from collections.abc import Set

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import band, tile
from fastbert.kernels.launch import LOG2_E, VARYING, Dropout, Relative, Sequences, alignment, chosen, seed_drop_factor

RELATIVE_VARYING = [*VARYING, "radius"]


@triton.jit
def _attend(
    b_o, b_a, b_max, b_sum, b_before, b_after, b_q, b_turned, b_left, b_right, low, high, near_low, near_high,
    p_k, p_v, p_mask, p_waves, key, x, y, length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOTH: tl.constexpr, NEAR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The forward's loop over keys `low` to `high`, of those that are NEAR, touch the band, or by their numbers among
    the others; MASKED where some may not be real. b_a: sum_inside P_ij s_j. b_before, b_after: sum_left P_ij and
    sum_right P_ij."""
    zero = scale * 0.0
    for first_n in tl.range(low, high, BLOCK_N):
        if not NEAR:
            first_n = band.far(first_n, near_low, near_high)
        crossed, side = band.place(first_m, first_n, radius, BLOCK_M, BLOCK_N)
        o_n = first_n + tl.arange(0, BLOCK_N)
        m_n = tile.real(p_mask, o_n, stride_mask, length) if MASKED else None
        b_k = tile.load(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, False)
        # [BLOCK_M, BLOCK_N]
        if NEAR:
            b_sin = band.sinusoids(p_waves, o_n, first_m, BLOCK_D)
            b_s = tl.dot(b_turned, tl.trans(b_sin), input_precision="ieee")
            if crossed:
                o_m = (first_m + tile.rows(BLOCK_M))[:, None]
                b_s = band.clip(b_s, b_left[:, None], b_right[:, None], o_m, o_n[None, :], side, radius, BOTH)
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
            b_shift = None
        else:
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_shift = tl.where(side > 0, b_right, b_left)
        if MASKED:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_p, b_max, b_rescale = tile.soften(b_s, b_max, b_shift, scale, MASKED)
        b_total = tl.sum(b_p, 1)
        b_sum = b_sum * b_rescale + b_total
        if key is not None:
            b_p = tl.where(tile.keep(key, x, y, first_m, first_n, drop, BLOCK_M, BLOCK_N), b_p, zero)
            b_total = tl.sum(b_p, 1)
        b_v = tile.load(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, False)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_rescale[:, None], input_precision="ieee")
        if NEAR:
            b_to_left, b_to_right = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
            if crossed:
                o_m = (first_m + tile.rows(BLOCK_M))[:, None]
                b_p, b_to_left, b_to_right = band.part(b_p, b_total, o_m, o_n[None, :], side, radius, zero, BOTH)
            b_a = tl.dot(b_p.to(b_v.dtype), b_sin, b_a * b_rescale[:, None], input_precision="ieee")
        else:
            b_to_left, b_to_right = tl.where(side > 0, 0, b_total), tl.where(side > 0, b_total, 0)
        b_before = b_before * b_rescale + b_to_left
        b_after = b_after * b_rescale + b_to_right
    return b_o, b_a, b_max, b_sum, b_before, b_after


@triton.jit(do_not_specialize=RELATIVE_VARYING)
def _relative_attention_forward_kernel(
    p_q, p_k, p_v, p_mask, p_ends, p_cos, p_sin, p_waves, p_edges, p_seed, p_o, p_lse, p_q_used,
    batch, length, total, heads, stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh,
    stride_vb, stride_v, stride_vh, stride_mb, stride_mask, scale, drop, factor, radius,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOTH: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o, and where wanted the log-sum-exp of each row (base 2) and q as it was multiplied."""
    i_head = tl.program_id(0) % heads
    i_batch, start, length, first_m = tile.locate(tl.program_id(0) // heads, p_ends, batch, length, BLOCK_M)
    if first_m >= length:
        return
    p_q, stride_q = tile.head(p_q, i_batch, start, i_head, stride_qb, stride_q, stride_qh, ALIGN)
    p_k, stride_k = tile.head(p_k, i_batch, start, i_head, stride_kb, stride_k, stride_kh, ALIGN)
    p_v, stride_v = tile.head(p_v, i_batch, start, i_head, stride_vb, stride_v, stride_vh, ALIGN)
    row = (start if p_ends is not None else i_batch * length) + first_m
    rest = length - first_m
    stride = heads * HEAD_DIM
    o_m = first_m + tile.rows(BLOCK_M)
    m_m = o_m < length
    # [BLOCK_M, BLOCK_D]
    b_q = tile.load(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, False)
    if p_mask is not None:
        p_mask += tl.cast(i_batch, tl.int64) * stride_mb
        m_real = tile.real(p_mask, o_m, stride_mask, length)
        b_q = tl.where(m_real[:, None] | (tl.abs(b_q.to(tl.float32)) < float("inf")), b_q, 0)
    if p_q_used is not None:
        o_head = (tl.cast(row - first_m, tl.int64) * heads + i_head) * HEAD_DIM
        tile.store(p_q_used + o_head, b_q, o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
    b_cos, b_sin = tile.angles(p_cos, p_sin, tile.rows(BLOCK_M), BLOCK_D, BLOCK_D)
    b_turned = tile.turn(b_q, b_cos, b_sin)
    b_left, b_right = band.edge_terms(b_q, p_edges, BLOCK_D)
    key, x, y = None, None, None
    if p_seed is not None:
        key, x, y = tile.stream(p_seed, i_batch, i_head)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_a = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_before = tl.zeros([BLOCK_M], tl.float32)
    b_after = tl.zeros([BLOCK_M], tl.float32)
    near_low, near_high = band.near(first_m, length, radius, BLOCK_M, BLOCK_N)
    tl.assume(near_low < near_high)  # products in flight at the end of a loop that may be skipped: C7515, serialized
    first_near, first_far = near_low, 0
    if p_mask is None:
        full = length // BLOCK_N * BLOCK_N
        first_near, first_far = tl.minimum(near_high, full), near_low + tl.maximum(full - near_high, 0)
        b_o, b_a, b_max, b_sum, b_before, b_after = _attend(
            b_o, b_a, b_max, b_sum, b_before, b_after, b_q, b_turned, b_left, b_right,
            near_low, first_near, near_low, near_high, p_k, p_v, p_mask, p_waves, key, x, y,
            length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, True, False,
        )  # fmt: skip
    b_o, b_a, b_max, b_sum, b_before, b_after = _attend(
        b_o, b_a, b_max, b_sum, b_before, b_after, b_q, b_turned, b_left, b_right,
        first_near, near_high, near_low, near_high, p_k, p_v, p_mask, p_waves, key, x, y,
        length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, True, True,
    )  # fmt: skip
    b_cos, b_sin = tile.angles(p_cos, p_sin, tile.rows(BLOCK_M), BLOCK_D, BLOCK_D)
    b_o += tile.turn(b_a, b_cos, -b_sin)
    if p_mask is None:
        b_o, b_a, b_max, b_sum, b_before, b_after = _attend(
            b_o, b_a, b_max, b_sum, b_before, b_after, b_q, b_turned, b_left, b_right,
            0, first_far, near_low, near_high, p_k, p_v, p_mask, p_waves, key, x, y,
            length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, False, False,
        )  # fmt: skip
    b_o, b_a, b_max, b_sum, b_before, b_after = _attend(
        b_o, b_a, b_max, b_sum, b_before, b_after, b_q, b_turned, b_left, b_right,
        first_far, near_low + length - near_high, near_low, near_high, p_k, p_v, p_mask, p_waves, key, x, y,
        length, stride_k, stride_v, stride_mask, scale, drop, radius, first_m,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BOTH, False, True,
    )  # fmt: skip
    # Rows counted anew, from the tile: those from the start would stay in registers through the loops, and spill
    o_m = tile.rows(BLOCK_M)
    m_m = o_m < rest
    b_o += band.mix_edges(b_before, b_after, p_edges, BLOCK_D)
    b_sum, b_lse = tile.log_sum_exp(b_max, b_sum)
    b_o *= (factor / b_sum)[:, None]
    p_o += (tl.cast(row, tl.int64) * heads + i_head) * HEAD_DIM
    tile.store(p_o, b_o, o_m, m_m, stride, HEAD_DIM, BLOCK_D, False)
    if p_lse is not None:
        tl.store(p_lse + tl.cast(i_head, tl.int64) * total + row + o_m, b_lse, mask=m_m)


# As in attention.py. Steps are small where registers hold all operands of mma.sync besides two sums.
_CONFIGS = {
    9: {
        "forward": ((128, 64, 8, 3), (64, 32, 8, 2)),
        "backward_q": ((128, 64, 8, 2), (64, 16, 8, 2)),
        "backward_q dropout": ((128, 32, 8, 3), (64, 16, 8, 2)),
        "backward_q narrow": ((128, 32, 8, 3), (64, 16, 8, 2)),
        "backward_kv": ((64, 128, 8, 3), (32, 128, 8, 1)),
    },
    10: {
        "forward": ((128, 32, 8, 2), (64, 64, 8, 2)),
        "backward_q": ((64, 32, 4, 2), (64, 32, 8, 2)),
        "backward_kv": ((32, 128, 8, 2), (32, 128, 8, 1)),
    },
    12: {
        "forward": ((128, 16, 8, 2), (32, 32, 8, 1)),
        "backward_q": ((128, 16, 8, 2), (32, 16, 8, 1)),
        "backward_q narrow": ((64, 16, 4, 1), (32, 16, 8, 1)),
        "backward_kv": ((32, 32, 4, 2), (32, 32, 8, 1)),
    },
    8: {
        "forward": ((64, 32, 4, 2), (32, 32, 8, 1)),
        "forward dropout": ((128, 16, 8, 2), (32, 32, 8, 1)),
        "forward mask": ((128, 16, 8, 2), (32, 32, 8, 1)),
        "forward narrow": ((128, 16, 8, 2), (32, 32, 8, 1)),
        "backward_q": ((128, 16, 8, 2), (32, 32, 8, 2)),
        "backward_kv": ((32, 128, 8, 2), (32, 32, 8, 1)),
        "backward_kv dropout": ((32, 32, 4, 2), (32, 32, 8, 1)),
        "backward_kv mask": ((32, 32, 4, 2), (32, 32, 8, 1)),
        "backward_kv narrow": ((32, 32, 4, 2), (32, 32, 8, 1)),
    },
    32: {
        "forward": ((32, 32, 8, 1), (32, 32, 8, 1)),
        "backward_q": ((32, 32, 8, 1), (32, 32, 8, 1)),
        "backward_kv": ((32, 16, 16, 1), (32, 16, 16, 1)),
    },
}


def launch_config(kernel: str, q: Tensor, traits: Set[str]) -> dict[str, int]:
    """Tile, warps and pipeline stages of "forward", "backward_q" or "backward_kv", with traits of "dropout", "mask" and
    "narrow" (the band, R < 64)."""
    block_m, block_n, warps, stages = chosen(_CONFIGS, kernel, q, traits)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def relative_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sequences: Sequences,
    relative: Relative,
    dropout: Dropout | None,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(o, lse, q): the output, contiguous in q's shape, and if `save` what relative_attention_bwd wants besides.

    lse: float32 [H, T], the log-sum-exp of every row to base 2. The last is q as it was multiplied, if there is a mask.
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = _, _, total, heads = sequences.arguments(q)
    lse = torch.empty(heads, total, dtype=torch.float32, device=q.device) if save else None
    used = torch.empty_like(o) if save and sequences.mask is not None else None
    q, k, v = (sequences.operand(t) for t in (q, k, v))
    strides = [stride for t in (q, k, v) for stride in sequences.strides(t)]
    tables, drop_and_factor = tables_and_dropout(relative, dropout)
    config = settings("forward", q, sequences, relative, dropout, strides)
    with torch.cuda.device_of(q):
        _relative_attention_forward_kernel[sequences.grid(q, config["BLOCK_M"])](
            *(q, k, v, sequences.mask, sequences.ends, *tables, o, lse, used, *shape, *strides),
            *(*sequences.mask_strides, scale * LOG2_E, *drop_and_factor, relative.radius),
            **config,
        )
    return o, lse, used


def settings(
    kernel: str, q: Tensor, sequences: Sequences, relative: Relative, dropout: Dropout | None, strides: list[int]
) -> dict:
    """What the kernel is compiled for."""
    facts = {"dropout": dropout is not None, "mask": sequences.mask is not None, "narrow": relative.radius < 64}
    config = launch_config(kernel, q, {trait for trait, fact in facts.items() if fact})
    return config | {
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": relative.edges.shape[-1],
        "BOTH": crossed_twice(relative.radius, config["BLOCK_M"], config["BLOCK_N"]),
        "ALIGN": alignment(strides),
    }


def crossed_twice(radius: int, block_m: int, block_n: int) -> bool:
    """Whether both edges of the band |j - i| < radius may cross one tile, the first indices of which are multiples of
    its sizes."""
    step = math.gcd(block_m, block_n)
    # j - i of a tile's first pair, for both: more than radius - block_n + 1, less than block_m - 1 - radius
    return (block_m - 2 - radius) // step * step > radius - block_n + 1


def tables_and_dropout(relative: Relative, dropout: Dropout | None) -> tuple:
    """(cosines, sines, waves, all from their middles on, edges, seed), (drop, what kept elements are multiplied by)."""
    middle = relative.waves.shape[0] // 2
    seed, *drop_and_factor = seed_drop_factor(dropout)
    return (*relative.phases[:, middle:], relative.waves[middle:], relative.edges, seed), drop_and_factor
