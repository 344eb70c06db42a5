"""y = LN(z), z = residual + dropout(x + x_bias), as reference.dropout_add_layer_norm, and the gradients of all five.

Floors: forward x and residual in, y out; backward dy, x and residual in, dresidual and dx out, which are one where
nothing is dropped and the dtypes are equal. T = 16384 rows, 16 bits:

               C      forward   backward   and dx = dresidual
    bytes      768    75 MB     126 MB     101 MB
               1024   101 MB    168 MB     134 MB
    H100       768    23 us     38 us      30 us        at 3.35 TB/s
               1024   30 us     50 us      40 us
    H200       768    16 us     26 us      21 us        at 4.8 TB/s
               1024   21 us     35 us      28 us

The backward computes z again from what the forward read, with the rows' means and scales (1 / standard deviation,
float32). z kept in their place would be one tensor less to read, one more to write, and rounded; y, which has the
normalised rows too, is rounded, and says nothing where the weight is zero.

dweight, dbias and dx_bias are sums over rows in float32, of dx before it is rounded: a program sums its rows into one
row of each of three tables, at most 512 rows of them, whose columns a second kernel sums. At the sizes above that adds
up to 10 % to the backward's bytes (C = 768: 4.7 MB written and read), less for more rows. No atomics, and no split that
depends on the device: the same bits on every run.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import rows as r
from fastbert.kernels.launch import Dropout, seed_drop_factor


@triton.jit
def _factors(p_seed, o_row, drop, factor, BLOCK_N: tl.constexpr):
    """What x is multiplied by; 1 without a seed."""
    if p_seed is None:
        return 1.0
    else:
        return r.factors(tl.load(p_seed), o_row, drop, factor, BLOCK_N)


@triton.jit(do_not_specialize=["rows", "drop"])
def _dropout_add_layer_norm_forward_kernel(
    p_x, p_residual, p_x_bias, p_weight, p_bias, p_seed, drop, factor, p_y, p_stats,
    rows, eps,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    # [BLOCK_M, BLOCK_N]
    b_x = r.load(p_x, o_row, m_row, COLUMNS, COLUMNS, BLOCK_N)
    b_z = r.load(p_residual, o_row, m_row, COLUMNS, COLUMNS, BLOCK_N)
    if p_x_bias is not None:
        b_x += r.load_vector(p_x_bias, COLUMNS, BLOCK_N)[None, :]
    b_z += b_x * _factors(p_seed, o_row, drop, factor, BLOCK_N)
    b_mean, b_scale = r.statistics(b_z, eps, COLUMNS)
    b_y = (b_z - b_mean[:, None]) * b_scale[:, None] * r.load_vector(p_weight, COLUMNS, BLOCK_N)[None, :]
    r.store(p_y, b_y + r.load_vector(p_bias, COLUMNS, BLOCK_N)[None, :], o_row, m_row, COLUMNS, BLOCK_N)
    if p_stats is not None:
        tl.store(p_stats + o_row, b_mean, mask=m_row)
        tl.store(p_stats + rows + o_row, b_scale, mask=m_row)


@triton.jit(do_not_specialize=["rows", "chunk", "drop"])
def _dropout_add_layer_norm_backward_kernel(
    p_dy, p_x, p_residual, p_x_bias, p_weight, p_seed, drop, factor, p_stats, p_dx, p_dresidual, p_dweight, p_dbias,
    p_dx_bias, rows, chunk,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of `chunk` rows, and the sums over these rows as rows `program_id(0)` of p_dweight, p_dbias and
    p_dx_bias, float32 [programs, COLUMNS]. What is None is not wanted."""
    i_chunk = tl.program_id(0).to(tl.int64)
    b_dweight = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_dx_bias = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, tl.minimum(chunk, rows - i_chunk * chunk).to(tl.int32), BLOCK_M):
        o_row = i_chunk * chunk + start + tl.arange(0, BLOCK_M)
        m_row = o_row < rows
        # [BLOCK_M, BLOCK_N]; dy is zero outside, and so is what the sums get
        b_dy = r.load(p_dy, o_row, m_row, COLUMNS, COLUMNS, BLOCK_N)
        b_x = r.load(p_x, o_row, m_row, COLUMNS, COLUMNS, BLOCK_N)
        if p_x_bias is not None:
            b_x += r.load_vector(p_x_bias, COLUMNS, BLOCK_N)[None, :]
        b_z = r.load(p_residual, o_row, m_row, COLUMNS, COLUMNS, BLOCK_N)
        # [BLOCK_M]
        b_mean = tl.load(p_stats + o_row, mask=m_row, other=0)
        b_scale = tl.load(p_stats + rows + o_row, mask=m_row, other=0)
        b_factors = _factors(p_seed, o_row, drop, factor, BLOCK_N)
        b_normal = (b_z + b_x * b_factors - b_mean[:, None]) * b_scale[:, None]
        b_dz = r.norm_gradient(b_dy, b_normal, r.load_vector(p_weight, COLUMNS, BLOCK_N), b_scale, COLUMNS)
        if p_dresidual is not None:
            r.store(p_dresidual, b_dz, o_row, m_row, COLUMNS, BLOCK_N)
        b_dx = b_dz * b_factors
        if p_dx is not None:
            r.store(p_dx, b_dx, o_row, m_row, COLUMNS, BLOCK_N)
        if p_dweight is not None:
            b_dweight += tl.sum(b_dy * b_normal, 0)
        if p_dbias is not None:
            b_dbias += tl.sum(b_dy, 0)
        if p_dx_bias is not None:
            b_dx_bias += tl.sum(b_dx, 0)
    if p_dweight is not None:
        r.store_vector(p_dweight + i_chunk * COLUMNS, b_dweight, COLUMNS, BLOCK_N)
    if p_dbias is not None:
        r.store_vector(p_dbias + i_chunk * COLUMNS, b_dbias, COLUMNS, BLOCK_N)
    if p_dx_bias is not None:
        r.store_vector(p_dx_bias + i_chunk * COLUMNS, b_dx_bias, COLUMNS, BLOCK_N)


def launch_config(kernel: str, columns: int) -> dict[str, int]:
    """Rows and columns of a block, and warps, of the kernel "forward" or "backward". Not timed on a GPU yet: chosen by
    what the compiler says (benchmarks/results/static.txt)."""
    block_n = r.block_n(columns)
    if kernel == "forward":
        # 32 elements per thread, and rows of up to 1024 columns to a warp each: their sums need no barrier
        return {"BLOCK_M": max(1, 1024 // block_n), "BLOCK_N": block_n, "num_warps": max(1, block_n // 1024)}
    # 16 per thread, of one or two rows, which leaves registers for three sums over rows
    warps = min(max(1, block_n // 256), 16)
    return {"BLOCK_M": max(1, 512 * min(warps, 4) // block_n), "BLOCK_N": block_n, "num_warps": warps}


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    dropout: Dropout | None,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y, contiguous and in residual's dtype; if `save`, the rows' statistics for the backward, float32 [2, rows]) for
    x and residual [..., C] and vectors [C], C at most 4096, for rows lie in registers."""
    y = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    stats = torch.empty(2, rows, dtype=torch.float32, device=x.device) if save else None
    if y.numel() > 0:
        config = launch_config("forward", columns)
        with torch.cuda.device_of(x):
            _dropout_add_layer_norm_forward_kernel[(triton.cdiv(rows, config["BLOCK_M"]),)](
                *_contiguous(x, residual, x_bias, weight, bias),
                *(*seed_drop_factor(dropout), y, stats, rows, eps),
                COLUMNS=columns,
                **config,
            )
    return y, stats


def dropout_add_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    stats: Tensor,
    dropout: Dropout | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, residual, weight, bias and x_bias, contiguous and in their dtypes; None for what is not
    wanted."""
    operands = (x, residual, weight, bias, x_bias)
    grads = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if want else None
        for t, want in zip(operands, wanted, strict=True)
    ]
    vectors = [t for t in grads[2:] if t is not None]
    if x.numel() == 0:
        for t in vectors:
            t.zero_()
        return grads
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    config = launch_config("backward", columns)
    chunk = r.chunk(rows, config["BLOCK_M"])
    chunks = triton.cdiv(rows, chunk)
    tables = torch.empty(len(vectors), chunks, columns, dtype=torch.float32, device=x.device)
    each = iter(tables)
    with torch.cuda.device_of(x):
        _dropout_add_layer_norm_backward_kernel[(chunks,)](
            *_contiguous(dy, x, residual, x_bias, weight),
            *(*seed_drop_factor(dropout), stats, *grads[:2]),
            *(None if t is None else next(each) for t in grads[2:]),
            *(rows, chunk),
            COLUMNS=columns,
            **config,
        )
        if vectors:
            r.column_sums(tables, vectors)
    return grads


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]
