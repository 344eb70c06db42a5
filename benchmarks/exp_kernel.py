"""A kernel that does nothing but exp2, to measure how many a GPU can do. For ceilings.py, which imports it on a GPU."""

import triton
import triton.language as tl


@triton.jit
def exp2_kernel(p_out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """2^-x ROUNDS times over, from different x on, 16 independent chains a thread; the fixed point is 0.64."""
    o_out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = o_out.to(tl.float32) * 1e-6
    for _ in range(ROUNDS):
        b_x = tl.exp2(-b_x)
    tl.store(p_out + o_out, b_x)
