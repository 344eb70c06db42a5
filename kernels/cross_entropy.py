"""Between the matrix products of linear_cross_entropy: from logits to losses, and to the gradient by the logits.

Floors of the kernel: logits in float32 in, gradient in 16 bits out. R = 2458 rows (15 % of 16384 tokens), V = 21128:
208 + 104 MB, which are 93 us at the 3.35 TB/s of an H100, 65 us at the 4.8 TB/s of an H200; V = 30522: 300 + 150 MB,
134 and 94 us. The products around it, 3 x 2 R V C with C = 768: 239 and 346 GFLOP, 303 and 438 us at 790 TFLOP/s.

A program has one row and sweeps over it twice, first for the log-sum-exp, then for the gradient. The second sweep
finds the row, 85 to 122 KB, in L1 or L2: two programs fit an SM at a time, so that of 132 there are 22 to 32 MB.
The gradient of 16 bits is not written over the logits. That would move as many bytes, save a third of the buffers, and
need a barrier in every tile, for elements would lie where other threads have yet to read.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 2)
# What gradients are multiplied by, exactly: the smallest that float16 can hold becomes 4e-12 instead of 6e-8, and most
# probabilities of a large vocabulary lie between the two.
SCALE = 2.0**14
_SCALE = tl.constexpr(SCALE)


@triton.jit
def _logits(p_z, p_bias, o, m_row, columns, stride, POLICY: tl.constexpr):
    """z + bias in columns o of a row, -inf from `columns` on, where there may be anything. Only the stride is known to
    be a multiple of 16, so that a mask by it leaves the loads whole."""
    m = (o < stride) & m_row
    b_z = tl.load(p_z + o, mask=m, other=0, eviction_policy=POLICY)
    if p_bias is not None:
        b_z += tl.load(p_bias + o, mask=m, other=0, eviction_policy="evict_last")
    return tl.where(o < columns, b_z, float("-inf"))


# Whatever it is that is ignored, and wherever a chunk of rows begins: the same code
@triton.jit(do_not_specialize=["ignore_index"], do_not_specialize_on_alignment=["p_labels", "p_loss"])
def _cross_entropy_kernel(
    p_z, p_bias, p_labels, p_loss, p_g, columns, stride, ignore_index,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p_g may be p_z in float32: a thread writes the elements that it has read."""
    i_row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + i_row)
    m_row = label != ignore_index
    p_z += i_row * stride
    # Before anything is written. A label outside of the vocabulary makes NaN.
    m_label = m_row & (label >= 0) & (label < columns)
    picked = tl.load(p_z + label, mask=m_label, other=float("nan"))
    if p_bias is not None:
        picked += tl.load(p_bias + label, mask=m_label, other=0)
    # Four neighbours, which one load brings to one thread, have a maximum and a sum of their own: no thread waits for
    # another within the sweep. [BLOCK / 4]
    b_max = tl.full([BLOCK // 4], _LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK // 4], dtype=tl.float32)
    o_four = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    for start in range(0, tl.where(m_row, stride, 0), BLOCK):
        b_z = _logits(p_z, p_bias, start + o_four, m_row, columns, stride, "")
        b_new = tl.maximum(b_max, tl.max(b_z, axis=1))
        b_sum *= tl.exp2((b_max - b_new) * _LOG2_E)
        b_sum += tl.sum(tl.exp2((b_z - b_new[:, None]) * _LOG2_E), axis=1)
        b_max = b_new
    top = tl.max(b_max, axis=0)
    total = tl.sum(b_sum * tl.exp2((b_max - top) * _LOG2_E), axis=0)
    total = tl.where(m_row, total, 1)
    loss = tl.where(m_row, top - picked + tl.log(total), 0)
    tl.store(p_loss + i_row, loss)
    if GRADIENT:
        p_g += i_row * stride
        # A label outside of the vocabulary makes NaN here, too, so that a loss scale skips the step
        factor = tl.where(m_label, _SCALE / total, tl.where(m_row, float("nan"), 0))
        top = tl.where(m_row, top, 0)
        o_tile = tl.arange(0, BLOCK)
        for start in range(0, stride, BLOCK):
            o = start + o_tile
            b_z = _logits(p_z, p_bias, o, m_row, columns, stride, "evict_first")
            b_g = tl.exp2((b_z - top) * _LOG2_E) * factor
            tl.store(p_g + o, b_g.to(p_g.dtype.element_ty), mask=o < stride)
        # The label's element once more, behind the others
        tl.debug_barrier()
        tl.store(p_g + label, ((tl.exp(-loss) - 1) * _SCALE).to(p_g.dtype.element_ty), mask=m_label)


def launch_config(dtype: torch.dtype) -> dict[str, int]:
    """Columns of a tile, and warps. Not timed on a GPU yet: chosen by what the compiler says for sm_80 and sm_90."""
    return {"BLOCK": 8192, "num_warps": 16}


def row_stride(columns: int) -> int:
    """Elements from row to row of logits and gradients: aligned operands of a product whatever the vocabulary."""
    return triton.cdiv(columns, 64) * 64


def cross_entropy(
    z: Tensor, bias: Tensor | None, labels: Tensor, columns: int, ignore_index: int, losses: Tensor, g: Tensor | None
) -> None:
    """Writes to losses, float32 [R], those of logits z + bias: z float32 [R, row_stride(columns)] and bias float32
    [row_stride(columns)] or None hold anything from `columns` on; labels int64 [R], side by side. And to g, [R,
    row_stride(columns)] in any dtype or None, SCALE (softmax - one-hot), zeros from `columns` on; g may be z.

    Rows with ignore_index have loss and gradient zero, those with a label outside of the vocabulary NaN for both.
    """
    if len(z) == 0:
        return
    config = launch_config(z.dtype if g is None else g.dtype)
    with torch.cuda.device_of(z):
        _cross_entropy_kernel[(len(z),)](
            z, bias, labels, losses, g, columns, row_stride(columns), ignore_index, GRADIENT=g is not None, **config
        )
