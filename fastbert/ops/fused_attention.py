"""Attention, rotary attention and relative attention on the Triton kernels of kernels/: when they serve, autograd, and
the registered operators that torch.compile sees."""

import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import portable
from fastbert.backend import Predicate, lacks, serves, triton_cannot_run
from fastbert.philox import seed_tensor, threshold

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128
MIN_SCALE = 1e-30
# The tables of a larger radius reach no further than the sequences
LONG = 4096


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
    max_relative_position: int = 0,
) -> Tensor:
    """See reference.attention; with theta, reference.rotary_attention; with max_relative_position,
    reference.relative_attention."""
    if q.numel() == 0:
        return q + k + v  # as empty as the answer, and differentiable in all three
    longest = q.shape[-3] if cu_seqlens is None or max_seqlen is None else min(max_seqlen, q.shape[-3])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seeds, drop = None, 0
    if dropout_p > 0:
        seeds, drop = seed_tensor(seed, q.device), threshold(dropout_p)
    # The kernels turn values in interleaved pairs only. Nobody has published weights of the other kind.
    by_halves = rotate_value and not interleaved
    if by_halves:
        v = v.unflatten(-1, (2, -1)).mT.flatten(-2)
    # A compiler, and tensors that are not plain (fake ones), see a registered operator. It costs microseconds more.
    plain = not torch.compiler.is_compiling() and type(q) in (Tensor, torch.nn.Parameter)
    plain = plain and type(torch.empty(0, device="cpu")) is Tensor
    radius, tables = max_relative_position, (None, None, None)
    if theta is not None:
        tables = _tables(plain, _angles, longest, q.shape[-1], float(theta), q.device), None, None
    elif radius:
        tables = _tables(plain, _waves, longest if radius > LONG else None, radius, q.shape[-1], q.dtype, q.device)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    o = (_Attention.apply if plain else _forward_op)(
        *(q, k, v, key_padding_mask, ends, seeds, *tables, longest, float(scale), drop, rotate_value, interleaved),
        *(radius, save),
    )[0]
    return o.unflatten(-1, (-1, 2)).mT.flatten(-2) if by_halves else o


def rotary_attention(q: Tensor, k: Tensor, v: Tensor, *, theta: float = 10000.0, **arguments) -> Tensor:
    """See reference.rotary_attention."""
    return attention(q, k, v, theta=theta, **arguments)


def relative_attention(q: Tensor, k: Tensor, v: Tensor, *, max_relative_position: int = 64, **arguments) -> Tensor:
    """See reference.relative_attention."""
    return attention(q, k, v, max_relative_position=max_relative_position, **arguments)


def _tables(keep: bool, build: Callable, length: int | None, *key) -> Tensor | tuple[Tensor, ...]:
    """build(length, *key), the last of which is the device. keep: for the next call."""
    if not keep:
        return build(length, *key)
    if length is not None:  # powers of two, so that a run over many lengths keeps few
        length = 1 << max(length - 1, 0).bit_length()
    key, device = (build, length, *key), key[-1]
    if key not in _kept:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return build(*key[1:])  # part of the graph, and of its memory
        with torch.inference_mode(False):
            _kept[key] = build(*key[1:])
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams will read it
    return _kept[key]


# Never emptied: captured graphs may hold the addresses.
_kept: dict[tuple, Tensor | tuple[Tensor, ...]] = {}


def _angles(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines, float32 [2, positions, D/2], of angles in float64, for `length` positions and no less than the
    256 that the kernels want."""
    angle = portable.angles(max(length, 256), head_dim, theta, device)
    return torch.stack((angle.cos(), angle.sin())).float()


def _waves(
    length: int | None, radius: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(phases, waves, edges) of launch.Relative, of angles in float64, for sequences of `length` tokens or any."""
    reach = 512 + (radius if length is None else min(radius, length))
    width = max(16, 1 << (head_dim - 1).bit_length())

    def pairs(n: int, first: int) -> Tensor:
        angle = portable.angles(n, head_dim, 10000.0, device, first)
        return F.pad(torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2), (0, width - head_dim))

    phases = pairs(2 * reach, radius - reach + 1).flip(0).unflatten(1, (-1, 2))
    edges = torch.cat((pairs(1, 0), pairs(1, 2 * radius), pairs(14, 0) * 0))
    return torch.stack((phases[..., 1], phases[..., 0])).float(), pairs(2 * reach, -reach).to(dtype), edges.to(dtype)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ends: Tensor | None,
    seeds: Tensor | None,
    angles: Tensor | None,
    waves: Tensor | None,
    edges: Tensor | None,
    longest: int,
    scale: float,
    drop: int,
    rotate_value: bool,
    interleaved: bool,
    radius: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """attention_fwd or relative_attention_fwd, with empty tensors for None."""
    from fastbert.kernels.attention import attention_fwd
    from fastbert.kernels.relative_attention import relative_attention_fwd

    parts = _parts(mask, ends, seeds, angles, waves, edges, longest, drop, rotate_value, interleaved, radius)
    if radius:
        outputs = *relative_attention_fwd(q, k, v, scale, *parts, save), None, None
    else:
        outputs = attention_fwd(q, k, v, scale, *parts, save)
    return tuple(q.new_empty(0) if t is None else t for t in outputs)


def _parts(
    mask: Tensor | None,
    ends: Tensor | None,
    seeds: Tensor | None,
    angles: Tensor | None,
    waves: Tensor | None,
    edges: Tensor | None,
    longest: int,
    drop: int,
    rotate_value: bool,
    interleaved: bool,
    radius: int,
):
    """The kernels' (sequences, rotation or relative or neither, dropout)."""
    from fastbert.kernels.launch import Dropout, Relative, Rotation, Sequences

    positions = None
    if radius:
        positions = Relative(angles, waves, edges, radius)
    elif angles is not None:
        positions = Rotation(angles, rotate_value, interleaved)
    return Sequences(longest, mask, ends), positions, Dropout(seeds, drop) if drop else None


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
    angles: Tensor | None,
    waves: Tensor | None,
    edges: Tensor | None,
    longest: int,
    scale: float,
    drop: int,
    rotate_value: bool,
    interleaved: bool,
    radius: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastbert.kernels.attention import attention_bwd
    from fastbert.kernels.relative_attention_bwd import relative_attention_bwd

    parts = _parts(mask, ends, seeds, angles, waves, edges, longest, drop, rotate_value, interleaved, radius)
    return (relative_attention_bwd if radius else attention_bwd)(do, q, k, v, given, o, lse, scale, *parts)


def _save(ctx, inputs, output):
    q, k, v, mask, ends, seeds, angles, waves, edges, *ctx.options, save = inputs
    o, lse, *used = output
    ctx.set_materialize_grads(False)  # of lse and of the operands as they were multiplied there are none
    if save:
        operands = [new if new.numel() else old for new, old in zip(used, (q, k, v), strict=True)]
        given = None if mask is None else q
        ctx.save_for_backward(*operands, given, o, lse, mask, ends, seeds, angles, waves, edges)


def _gradients(backward, ctx, do):
    return *backward(do, *ctx.saved_tensors, *ctx.options), *(None for _ in range(13))


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
def _(q, k, v, mask, ends, seeds, angles, waves, edges, longest, scale, drop, rotate_value, interleaved, radius, save):
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    turned = angles is not None and not radius
    used = save and (turned or mask is not None), save and turned, save and rotate_value
    shape = (q.shape[-2], math.prod(q.shape[:-2])) if save else (0,)
    lse = torch.empty(shape, dtype=torch.float32 if save else q.dtype, device=q.device)
    return o, lse, *(torch.empty_like(o) if new else q.new_empty(0) for new in used)


@_backward_op.register_fake
def _(do, q, k, v, given, o, lse, *_):
    return torch.empty_like(o), torch.empty_like(o), torch.empty_like(o)


_forward_op.register_autograd(lambda ctx, do, *_: _gradients(_backward_op, ctx, do), setup_context=_save)
