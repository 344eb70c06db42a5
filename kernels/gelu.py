"""y = gelu(x + bias), exact and tanh form, as reference.bias_gelu; the backward gives dx and dbias from dy, x and bias.

Floors: forward x in, y out; backward dy and x in, dx out. T = 16384 tokens, I = 3072 columns, 16 bits: 201 MB and 302
MB, which are 60 and 90 us at the 3.35 TB/s of an H100, 42 and 63 us at the 4.8 TB/s of an H200. The bias gradient adds
two passes over 1/64 of dx in float32, or 2 %.

dbias is the sum of dx over the rows before dx is rounded: each program sums its rows and writes them as one row of a
float32 table, whose columns a second kernel sums. No atomics, and no split that depends on the device: the same bits on
every run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.rows import as_rows, column_sums

_LOG2_E = tl.constexpr(math.log2(math.e))
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_TWO_SQRT_2_OVER_PI = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(0.044715)
# Phi(-a) = exp(-a^2 / 2) r P(r) for a >= 0 and r = 1 / (1 + 0.275 a), where P is the polynomial with the smallest
# largest error of gelu: 1.1e-8 before rounding, and in float32 less than 0.5 z (1 + erf) has. sm_90, 16 bits, forward:
# 23 instructions per element instead of 38 with erf. At more than 35 (H100) or 25 (H200) instruction issue binds
# instead of memory.
_SCALE = tl.constexpr(0.275)
_P0 = tl.constexpr(0.11757353546943383)
_P1 = tl.constexpr(0.043596705404876174)
_P2 = tl.constexpr(0.3302193629893903)
_P3 = tl.constexpr(-0.3263885266217537)
_P4 = tl.constexpr(0.44916447759247985)
_P5 = tl.constexpr(-0.11416554416372389)


@triton.jit
def weight_and_slope(z, TANH: tl.constexpr):
    """w = gelu(z) / z, and its derivative by z. Both forms take the tail at -|z|, which neither cancels nor overflows,
    and mirror it."""
    if TANH:
        # w = (1 + tanh(u / 2)) / 2 = 1 / (1 + exp(-u))
        u = z * (1 + z * z * _CUBIC) * _TWO_SQRT_2_OVER_PI
        e = tl.exp2(tl.abs(u) * -_LOG2_E)
        r = _reciprocal(1 + e)
        tail = e * r
        slope = tail * r * (1 + z * z * (3 * _CUBIC)) * _TWO_SQRT_2_OVER_PI
    else:
        # w = Phi(z)
        e = tl.exp2(z * z * (-0.5 * _LOG2_E))
        r = _reciprocal(1 + tl.abs(z) * _SCALE)
        tail = e * r * (((((r * _P5 + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _P0)
        slope = e * _INV_SQRT_2PI
    return tl.where(z > 0, 1 - tail, tail), slope


@triton.jit
def _reciprocal(y):
    """1 / y for y >= 1. A division brings six instructions for denormal y."""
    r = tl.rsqrt(y)
    return r * r


@triton.jit
def _bias_gelu_forward_kernel(
    p_x, p_bias, p_y, rows, columns, stride_x,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    mask = (o_row < rows)[:, None] & m_column[None, :]
    # [BLOCK_N]
    b_bias = tl.load(p_bias + o_column, mask=m_column, other=0).to(tl.float32)
    # [BLOCK_M, BLOCK_N]
    b_x = tl.load(p_x + o_row[:, None] * stride_x + o_column[None, :], mask=mask, other=0).to(tl.float32)
    b_z = b_x + b_bias[None, :]
    b_w, _ = weight_and_slope(b_z, TANH)
    tl.store(p_y + o_row[:, None] * columns + o_column[None, :], (b_z * b_w).to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_backward_kernel(
    p_dy, p_x, p_bias, p_dx, p_sums, rows, columns, stride_dy, stride_x,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of ROWS rows, and their sum as row `program_id(0)` of p_sums [programs, columns]."""
    i_chunk = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    b_bias = tl.load(p_bias + o_column, mask=m_column, other=0).to(tl.float32)
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, tl.minimum(ROWS, rows - i_chunk * ROWS).to(tl.int32), BLOCK_M):
        o_row = i_chunk * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (o_row < rows)[:, None] & m_column[None, :]
        # [BLOCK_M, BLOCK_N]; dy is zero outside, and so are dx and what the sum gets
        b_dy = tl.load(p_dy + o_row[:, None] * stride_dy + o_column[None, :], mask=mask, other=0).to(tl.float32)
        b_x = tl.load(p_x + o_row[:, None] * stride_x + o_column[None, :], mask=mask, other=0).to(tl.float32)
        b_z = b_x + b_bias[None, :]
        b_w, b_slope = weight_and_slope(b_z, TANH)
        b_dx = b_dy * (b_w + b_z * b_slope)
        tl.store(p_dx + o_row[:, None] * columns + o_column[None, :], b_dx.to(p_dx.dtype.element_ty), mask=mask)
        b_sum += tl.sum(b_dx, axis=0)
    tl.store(p_sums + i_chunk * columns + o_column, b_sum, mask=m_column)


def launch_config(dtype: torch.dtype) -> dict[str, int]:
    """Rows and columns of a tile, and warps. Not timed on a GPU yet: chosen by what the compiler says for sm_80 and
    sm_90 (benchmarks/results/static.txt: registers, width of the loads)."""
    # One row of the tile is one 16-byte load per thread, so a thread owns its columns and the sum over rows needs no
    # shuffle. 512 divides the intermediate size of every published model from BERT-small up.
    return {"BLOCK_M": 4, "BLOCK_N": 512, "num_warps": 2 if dtype.itemsize == 2 else 4}


# Rows that one program of the backward sums, whatever the device, so that dbias does not depend on it.
_ROWS = 64


def bias_gelu_fwd(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """gelu(x + bias) for x [..., I], bias [I]: contiguous, in x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        x, bias, config = as_rows(x), bias.contiguous(), launch_config(x.dtype)
        grid = (triton.cdiv(x.shape[0], config["BLOCK_M"]), triton.cdiv(x.shape[1], config["BLOCK_N"]))
        with torch.cuda.device_of(x):
            _bias_gelu_forward_kernel[grid](x, bias, y, *x.shape, x.stride(0), TANH=approximate == "tanh", **config)
    return y


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """(dx, dbias) in the dtypes of x and bias, contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, torch.zeros_like(bias)
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    dy, x, bias, config = as_rows(dy), as_rows(x), bias.contiguous(), launch_config(x.dtype)
    rows, columns = x.shape
    chunks = triton.cdiv(rows, _ROWS)
    sums = torch.empty(1, chunks, columns, dtype=torch.float32, device=x.device)
    grid = (chunks, triton.cdiv(columns, config["BLOCK_N"]))
    tanh = approximate == "tanh"
    with torch.cuda.device_of(x):
        _bias_gelu_backward_kernel[grid](
            dy, x, bias, dx, sums, rows, columns, dy.stride(0), x.stride(0), TANH=tanh, ROWS=_ROWS, **config
        )
        column_sums(sums, [dbias])
    return dx, dbias
