"""The layers of an encoder for a few rows and without gradients, as reference.encoder_layers.

A layer is five launches: the projection to q, k and v, attention (kernels of its own), its output projection, and the
two halves of the feed-forward. What stands between them is part of them: a product adds its bias, its activation, its
residual. LayerNorm is deferred. A product that ends in one writes the sum as it is, and for each row and each tile of
columns (mean, sum of squared differences from it). Who reads such rows, as operand or as residual, first combines these
few numbers (Chan et al.: no cancellation) and normalizes what it loads. So no launch waits for whole rows, and there is
none for the norm itself but at the end.

Where the tiles of a product are too few for the GPU, SPLIT programs share a tile, each a part of the sum. They write
their parts, and the one that arrives last adds them up, in the order of the parts: the same bits on every run.

On sm_90 and later each launch may begin before the one before it has ended (programmatic dependent launch): it asks L2
for its weights, and what it reads of others it reads behind tile.after_the_launch_before.

Floors, ALBERT-base, one sequence of 128 tokens, H100: 22.4 GFLOP are 28 us at 790 TFLOP/s. But each layer moves the
tiles of its products from L2, 66 MB with the tiles that launch_config chooses, which at 5.5 TB/s are 12 us, or 145 us
for all: the cache binds, not the matrix unit. BERT-base streams 170 MB of weights from memory besides, 51 us.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import tile
from fastbert.kernels.gelu import weight_and_slope
from fastbert.kernels.launch import early

_PLAIN = tl.constexpr(1)
_DEFERRED = tl.constexpr(2)


@triton.jit
def _statistics(p_stats, o_m, m_m, eps, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """(mean, 1 / standard deviation) of rows, from those of their tiles, [rows, tiles, 2]."""
    TILES: tl.constexpr = (COLUMNS + TILE - 1) // TILE
    BLOCK: tl.constexpr = triton.next_power_of_2(TILES)
    o_t = tl.arange(0, BLOCK)
    m_t = m_m[:, None] & (o_t < TILES)[None, :]
    b_count = tl.minimum(COLUMNS - o_t * TILE, TILE).to(tl.float32)[None, :]
    p_t = p_stats + (o_m[:, None] * TILES + o_t[None, :]) * 2
    # [BLOCK_M, BLOCK]
    b_mean = tl.load(p_t, mask=m_t, other=0)
    b_square = tl.load(p_t + 1, mask=m_t, other=0)
    b_all = tl.sum(b_mean * b_count, 1) / COLUMNS
    b_apart = b_mean - b_all[:, None]
    b_square = tl.sum(tl.where(m_t, b_square + b_count * b_apart * b_apart, 0), 1)
    return b_all, 1 / tl.sqrt(b_square / COLUMNS + eps)


@triton.jit
def _normalized(b_x, b_mean, b_scale, p_weight, p_bias, o_n, m_n):
    """LN of a block in float32."""
    b_weight = tl.load(p_weight + o_n, mask=m_n, other=0).to(tl.float32)
    b_bias = tl.load(p_bias + o_n, mask=m_n, other=0).to(tl.float32)
    return (b_x.to(tl.float32) - b_mean[:, None]) * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]


@triton.jit
def _activated(b_z, ACT: tl.constexpr):
    if ACT == "none" or ACT == "tanh":  # gelu, by the name of its approximation
        b_w, _ = weight_and_slope(b_z, ACT == "tanh")
        b_z *= b_w
    elif ACT == "relu":
        b_z = tl.where(b_z < 0, 0, b_z)
    elif ACT == "silu":
        b_z *= tl.sigmoid(b_z)
    return b_z


@triton.jit
def _prefetch(p_w, o_n, low, DEPTH: tl.constexpr, PART: tl.constexpr):
    """Asks L2 for columns low to low + PART of rows o_n of a matrix, in lines of 128 bytes."""
    LINE: tl.constexpr = 1024 // p_w.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2((PART + LINE - 1) // LINE)
    o_k = tl.minimum(low + tl.arange(0, LINES) * LINE, DEPTH - 1)
    p_line = (p_w + (o_n[:, None] * DEPTH + o_k[None, :])).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p_line], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _linear_kernel(
    p_x, p_w, p_bias, p_y, p_residual, p_stats, p_norm_weight, p_norm_bias, p_y_stats, p_parts, p_count,
    rows, depth, eps,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, X: tl.constexpr, RESIDUAL: tl.constexpr, TILE: tl.constexpr,
    ACT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y = act(x W' + b) + residual, rows [rows, COLUMNS] from [rows, DEPTH]; x or the residual may be rows whose norm
    is deferred, with statistics of TILE columns each. p_y_stats: where y's own go, if its norm is deferred."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    i_tile = tl.program_id(0)
    i_n = i_tile // tiles_m
    i_m = i_tile - i_n * tiles_m
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < rows, o_n < COLUMNS
    PART: tl.constexpr = (DEPTH + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    low = tl.program_id(1) * PART
    if EARLY:
        _prefetch(p_w, tl.minimum(o_n, COLUMNS - 1), low, DEPTH, PART)  # the one thing that depends on nobody
        tile.after_the_launch_before()
    b_mean, b_scale = None, None
    if X == _DEFERRED:
        b_mean, b_scale = _statistics(p_stats, o_m, m_m, eps, DEPTH, TILE)
    if RESIDUAL == _DEFERRED:
        b_mean, b_scale = _statistics(p_stats, o_m, m_m, eps, COLUMNS, TILE)
    high = tl.minimum(low + PART, depth)  # not DEPTH: the loop would be unrolled, and spill
    tl.assume(low < high)
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(low, high, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        m_k = o_k < DEPTH
        # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
        if DEPTH % BLOCK_K == 0:
            b_x = tl.load(p_x + o_m[:, None] * DEPTH + o_k[None, :], mask=m_m[:, None], other=0)
        else:
            b_x = tl.load(p_x + o_m[:, None] * DEPTH + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0)
        if X == _DEFERRED:
            b_x = _normalized(b_x, b_mean, b_scale, p_norm_weight, p_norm_bias, o_k, m_k).to(b_x.dtype)
        if DEPTH % BLOCK_K == 0 and COLUMNS % BLOCK_N == 0:
            b_w = tl.load(p_w + o_n[:, None] * DEPTH + o_k[None, :])
        else:
            b_w = tl.load(p_w + o_n[:, None] * DEPTH + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee")
    if SPLIT > 1:
        o_part = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        p_parts += i_tile * (SPLIT * BLOCK_M * BLOCK_N)
        tl.store(p_parts + tl.program_id(1) * (BLOCK_M * BLOCK_N) + o_part, b_y)
        tl.debug_barrier()  # the count says that all threads have written
        if tl.atomic_add(p_count + i_tile, 1, sem="acq_rel") != SPLIT - 1:
            return
        tl.store(p_count + i_tile, 0)  # for the next launch
        b_y = tl.load(p_parts + o_part, cache_modifier=".cg")
        for part in tl.static_range(1, SPLIT):
            b_y += tl.load(p_parts + part * (BLOCK_M * BLOCK_N) + o_part, cache_modifier=".cg")
    b_y += tl.load(p_bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    b_y = _activated(b_y, ACT)
    o_y = o_m[:, None] * COLUMNS + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if RESIDUAL > 0:
        b_residual = tl.load(p_residual + o_y, mask=m_y, other=0).to(tl.float32)
        if RESIDUAL == _DEFERRED:
            b_residual = _normalized(b_residual, b_mean, b_scale, p_norm_weight, p_norm_bias, o_n, m_n)
        b_y += b_residual
    b_y = b_y.to(p_y.dtype.element_ty)
    tl.store(p_y + o_y, b_y, mask=m_y)
    if p_y_stats is not None:
        b_y = tl.where(m_n[None, :], b_y.to(tl.float32), 0)
        count = tl.minimum(COLUMNS - i_n * BLOCK_N, BLOCK_N).to(tl.float32)
        b_mean = tl.sum(b_y, 1) / count
        b_apart = tl.where(m_n[None, :], b_y - b_mean[:, None], 0)
        p_y_stats += (o_m * ((COLUMNS + BLOCK_N - 1) // BLOCK_N) + i_n) * 2
        tl.store(p_y_stats, b_mean, mask=m_m)
        tl.store(p_y_stats + 1, tl.sum(b_apart * b_apart, 1), mask=m_m)


@triton.jit
def _norm_kernel(
    p_x, p_stats, p_weight, p_bias, p_y, rows, eps,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The norm of rows for which it was deferred."""
    if EARLY:
        tile.after_the_launch_before()
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < rows, o_n < COLUMNS
    b_mean, b_scale = _statistics(p_stats, o_m, m_m, eps, COLUMNS, TILE)
    o_x = o_m[:, None] * COLUMNS + o_n[None, :]
    m_x = m_m[:, None] & m_n[None, :]
    b_y = _normalized(tl.load(p_x + o_x, mask=m_x, other=0), b_mean, b_scale, p_weight, p_bias, o_n, m_n)
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_x)


class Deferred(NamedTuple):
    """LN(rows), not computed yet. stats: float32 [T, tiles, 2], of `tile` columns each."""

    rows: Tensor
    stats: Tensor
    tile: int
    weight: Tensor
    bias: Tensor


# A model of an H100, not measured, after which tiles are chosen: multiprocessors; bytes per microsecond that L2 gives
# all of them, and one; operations per microsecond of one, with less than 64 rows and with more; microseconds until the
# last part of a sum has heard of the others.
_PROCESSORS = 132
_L2, _PORT = 5.5e6, 90e3
_MATRIX_UNIT, _MATRIX_UNIT_64 = 3.5e6, 5e6
_ARRIVAL = 1.0
# What the stages of a loop may take of a multiprocessor's shared memory; a little more is for the weights of a norm.
_STAGES = {(8, 0): 144 << 10, (8, 7): 144 << 10, (9, 0): 192 << 10, (10, 0): 192 << 10, (10, 3): 192 << 10}
_OTHER_STAGES = 88 << 10


@cache
def launch_config(rows: int, columns: int, depth: int, itemsize: int, capability: tuple[int, int]) -> dict:
    """The tiles, and the parts of a sum, that the model above gives the least time."""
    block_k = 64 if itemsize == 2 else 32
    if depth % block_k:
        block_k = min(block_k, max(16, triton.next_power_of_2(depth)))
    high = max(16, triton.next_power_of_2(rows))
    sides = (16, 32) if itemsize == 4 else (16, 32, 64, 128)  # float32 takes four times the registers
    tiles = itertools.product([side for side in sides if side <= high], (32, 64, 128)[: len(sides) - 1], (1, 2, 4, 8))

    def microseconds(choice: tuple[int, int, int]) -> float:
        block_m, block_n, split = choice
        programs = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) * split
        rate = min(_PORT, _L2 / min(programs, _PROCESSORS))
        moved = depth / split * (block_m + block_n) * itemsize / rate
        multiplied = 2 * depth / split * block_m * block_n / (_MATRIX_UNIT_64 if block_m >= 64 else _MATRIX_UNIT)
        added = 0 if split == 1 else _ARRIVAL + split * block_m * block_n * 4 / rate
        return triton.cdiv(programs, _PROCESSORS) * max(moved, multiplied) + added

    def fits(choice: tuple[int, int, int]) -> bool:
        block_m, block_n, split = choice
        if split == 1:
            return True
        programs = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) * split
        return depth >= 128 * split and _parts(depth, split, block_k) == split and programs <= 2 * _PROCESSORS

    block_m, block_n, split = min(filter(fits, tiles), key=microseconds)
    stages = _STAGES.get(capability, _OTHER_STAGES) // ((block_m + block_n) * block_k * itemsize)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLIT": split,
        "num_warps": 8 if block_m * block_n > 64 * 64 else 4,
        "num_stages": min(4, stages),
    }


def _parts(depth: int, split: int, block_k: int) -> int:
    """How many parts of a sum are not empty, if it is cut into `split` parts of whole blocks."""
    return triton.cdiv(depth, triton.cdiv(depth, split * block_k) * block_k)


class _Launches:
    """The products of one forward pass over `rows` rows, and what they share."""

    def __init__(self, like: Tensor, rows: int, eps: float):
        self.like, self.rows, self.eps = like, rows, eps
        interpreted = triton.knobs.runtime.interpret
        self.capability = (0, 0) if interpreted else torch.cuda.get_device_capability(like.device)
        # One for each tile whose sum is split, of which launch_config makes fewer; each launch leaves them at zero.
        self.count = torch.zeros(2 * _PROCESSORS, dtype=torch.int32, device=like.device)

    def linear(
        self,
        x: Tensor | Deferred,
        weight: Tensor,
        bias: Tensor,
        *,
        act: str | None = None,
        residual: Tensor | Deferred | None = None,
        norm: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | Deferred:
        """act(x W' + b) + residual, and with `norm` its norm, deferred."""
        columns, depth = weight.shape
        config = launch_config(self.rows, columns, depth, weight.element_size(), self.capability)
        config = config | {"SPLIT": _parts(depth, config["SPLIT"], config["BLOCK_K"])}  # a sweep asks for any
        y = self.like.new_empty(self.rows, columns)
        tiles_n = triton.cdiv(columns, config["BLOCK_N"])
        tiles = triton.cdiv(self.rows, config["BLOCK_M"]) * tiles_n
        if config["SPLIT"] > 1 and tiles > len(self.count):
            self.count = torch.zeros(tiles, dtype=torch.int32, device=self.like.device)
        stats = self.like.new_empty(self.rows, tiles_n, 2, dtype=torch.float32) if norm else None
        size = config["BLOCK_M"] * config["BLOCK_N"] * config["SPLIT"] * tiles
        parts = self.like.new_empty(size, dtype=torch.float32) if config["SPLIT"] > 1 else None
        source = next((t for t in (x, residual) if isinstance(t, Deferred)), None)
        read = (None, None, None) if source is None else (source.stats, source.weight, source.bias)
        with torch.cuda.device_of(self.like):
            _linear_kernel[(tiles, config["SPLIT"])](
                *(_rows(x), weight, bias, y, None if residual is None else _rows(residual), *read),
                *(stats, parts, self.count, self.rows, depth, self.eps),
                COLUMNS=columns, DEPTH=depth, X=_kind(x), RESIDUAL=_kind(residual),
                TILE=0 if source is None else source.tile, ACT=act or "", **config, **early(self.like),
            )  # fmt: skip
        return y if norm is None else Deferred(y, stats, config["BLOCK_N"], *norm)

    def norm(self, x: Tensor | Deferred) -> Tensor:
        """Rows with their norm, if it was deferred."""
        if not isinstance(x, Deferred):
            return x
        y, columns = torch.empty_like(x.rows), x.rows.shape[1]
        block_n = min(1024, triton.next_power_of_2(columns))
        with torch.cuda.device_of(self.like):
            _norm_kernel[(triton.cdiv(self.rows, 4), triton.cdiv(columns, block_n))](
                *(x.rows, x.stats, x.weight, x.bias, y, self.rows, self.eps),
                COLUMNS=columns, TILE=x.tile, BLOCK_M=4, BLOCK_N=block_n, num_warps=4, **early(self.like),
            )  # fmt: skip
        return y


def _rows(x: Tensor | Deferred) -> Tensor:
    return x.rows if isinstance(x, Deferred) else x


def _kind(x: Tensor | Deferred | None) -> int:
    return 0 if x is None else 2 if isinstance(x, Deferred) else 1


def encoder_layers_fwd(
    x: Tensor,
    layers: Sequence,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    heads: int,
    act: str,
    eps: float,
    every: bool,
) -> list[Tensor]:
    """See fastbert.ops.encoder_layers: x [..., C] and what attend returns are contiguous, `act` is as _activated has
    it; the last of the results or with `every` all of them."""
    flat = x.view(-1, x.shape[-1])
    launches = _Launches(flat, len(flat), eps)
    state, results = flat, []
    for w in layers:
        qkv = launches.linear(state, w.qkv, w.qkv_bias).view(*x.shape[:-1], 3, heads, -1)
        o = attend(*qkv.unbind(-3)).view(flat.shape)
        state = launches.linear(
            o, w.output, w.output_bias, residual=state, norm=(w.attention_norm, w.attention_norm_bias)
        )
        h = launches.linear(state, w.up, w.up_bias, act=act)
        state = launches.linear(h, w.down, w.down_bias, residual=state, norm=(w.output_norm, w.output_norm_bias))
        if every:
            results.append(launches.norm(state).view(x.shape))
    return results if every else [launches.norm(state).view(x.shape)]
