"""Attention and rotary attention on the Triton kernels of kernels/attention.py: when they serve, autograd, and the
registered operators that torch.compile sees."""

import math
import os

import torch
from torch import Tensor

from fastbert.backend import Predicate, lacks, serves, triton_cannot_run
from fastbert.philox import signed, threshold
from fastbert.portable import angles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128
MIN_SCALE = 1e-30


def _serves(q: Tensor, scale: float | None) -> str | None:
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, not float16, bfloat16 or float32"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the head dim is {q.shape[-1]}, more than {MAX_HEAD_DIM}"
    if scale is not None and scale < MIN_SCALE:
        return f"scale is {scale}, not at least {MIN_SCALE}"
    if (q.shape[-3] + 256) * q.shape[-2] * q.shape[-1] >= 2**31:
        return f"offsets within q of shape {tuple(q.shape)} do not fit 32 bits"
    if q.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "q is bfloat16, whose products Triton's interpreter gets wrong"
    return triton_cannot_run(q.device)


_OTHERS = {"cuda": lacks("there is no CUDA kernel for it yet"), "torch": serves, "reference": serves}
_FIRST, _LAST = {"triton": _serves} | _OTHERS, _OTHERS | {"triton": _serves}


def backends(q: Tensor) -> dict[str, Predicate]:
    """The kernels come first for 16 bits on CUDA. IEEE products of float32 cannot run on the matrix unit, which makes
    them 16 times as long: PyTorch's own attention comes before."""
    return _FIRST if q.is_cuda and q.dtype != torch.float32 else _LAST


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    theta: float | None = None,
    rotate_value: bool = False,
    interleaved: bool = True,
) -> Tensor:
    """See reference.attention; with theta, reference.rotary_attention."""
    if q.numel() == 0:
        return q + k + v  # as empty as the answer, and differentiable in all three
    longest = q.shape[-3] if cu_seqlens is None or max_seqlen is None else min(max_seqlen, q.shape[-3])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seeds, drop = None, 0
    if dropout_p > 0:
        seeds, drop = _seeds(seed, q.device), threshold(dropout_p)
    # The kernels turn values in interleaved pairs only. Nobody has published weights of the other kind.
    by_halves = rotate_value and not interleaved
    if by_halves:
        v = v.unflatten(-1, (2, -1)).mT.flatten(-2)
    # A compiler, and tensors that are not plain (fake ones), see a registered operator. It costs microseconds more.
    plain = not torch.compiler.is_compiling() and type(q) in (Tensor, torch.nn.Parameter)
    table = None
    if theta is not None:
        table = (_table if plain else _build_table)(longest, q.shape[-1], float(theta), q.device)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    o = (_Attention.apply if plain else _forward_op)(
        *(q, k, v, key_padding_mask, ends, seeds, table, longest, float(scale), drop, rotate_value, interleaved, save)
    )[0]
    return o.unflatten(-1, (-1, 2)).mT.flatten(-2) if by_halves else o


def rotary_attention(q: Tensor, k: Tensor, v: Tensor, *, theta: float = 10000.0, **arguments) -> Tensor:
    """See reference.rotary_attention."""
    return attention(q, k, v, theta=theta, **arguments)


def _seeds(seed: int | None, device: torch.device) -> Tensor:
    """int64 [1], on the device: a captured graph draws anew at every replay, and nothing waits for it."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), signed(seed), dtype=torch.int64, device=device)


def _table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """_build_table, kept for the next call."""
    # Powers of two, so that a run over many lengths keeps few
    key = 1 << (length - 1).bit_length(), head_dim, theta, device
    if key not in _tables:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _build_table(*key)  # part of the graph, and of its memory
        with torch.inference_mode(False):
            _tables[key] = _build_table(*key)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams will read it
    return _tables[key]


# Never emptied: captured graphs may hold the addresses.
_tables: dict[tuple[int, int, float, torch.device], Tensor] = {}


def _build_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines, float32 [2, positions, D/2], of angles in float64, for `length` positions and no less than the
    256 that the kernels want."""
    angle = angles(max(length, 256), head_dim, theta, device)
    return torch.stack((angle.cos(), angle.sin())).float()


def _parts(mask, ends, seeds, table, longest: int, drop: int, rotate_value: bool, interleaved: bool):
    """The (sequences, rotation, dropout) of the kernels."""
    from fastbert.kernels.launch import Dropout, Rotation, Sequences

    rotation = None if table is None else Rotation(table, rotate_value, interleaved)
    return Sequences(longest, mask, ends), rotation, Dropout(seeds, drop) if drop else None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ends: Tensor | None,
    seeds: Tensor | None,
    table: Tensor | None,
    longest: int,
    scale: float,
    drop: int,
    rotate_value: bool,
    interleaved: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """attention_fwd, with empty tensors for None."""
    from fastbert.kernels import attention as kernels

    parts = _parts(mask, ends, seeds, table, longest, drop, rotate_value, interleaved)
    outputs = kernels.attention_fwd(q, k, v, scale, *parts, save)
    return tuple(q.new_empty(0) if t is None else t for t in outputs)


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Tensor | None,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    ends: Tensor | None,
    seeds: Tensor | None,
    table: Tensor | None,
    longest: int,
    scale: float,
    drop: int,
    rotate_value: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastbert.kernels import attention as kernels

    parts = _parts(mask, ends, seeds, table, longest, drop, rotate_value, interleaved)
    return kernels.attention_bwd(do, q, k, v, given, o, lse, scale, *parts)


def _save(ctx, inputs, output):
    q, k, v, mask, ends, seeds, table, *ctx.options, save = inputs
    o, lse, *used = output
    if save:
        operands = [new if new.numel() else old for new, old in zip(used, (q, k, v), strict=True)]
        ctx.save_for_backward(*operands, None if mask is None else q, o, lse, mask, ends, seeds, table)


def _gradients(backward, ctx, do):
    return *backward(do, *ctx.saved_tensors, *ctx.options), *(None for _ in range(10))


class _Attention(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, *_):
        return _gradients(_backward, ctx, do)


_forward_op = torch.library.custom_op("fastbert::attention", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fastbert::attention_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(q, k, v, mask, ends, seeds, table, longest, scale, drop, rotate_value, interleaved, save):
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    used = save and (table is not None or mask is not None), save and table is not None, save and rotate_value
    shape = (q.shape[-2], math.prod(q.shape[:-2])) if save else (0,)
    lse = torch.empty(shape, dtype=torch.float32 if save else q.dtype, device=q.device)
    return o, lse, *(torch.empty_like(o) if new else q.new_empty(0) for new in used)


@_backward_op.register_fake
def _(do, q, k, v, given, o, lse, *_):
    return torch.empty_like(o), torch.empty_like(o), torch.empty_like(o)


_forward_op.register_autograd(lambda ctx, do, *_: _gradients(_backward_op, ctx, do), setup_context=_save)
