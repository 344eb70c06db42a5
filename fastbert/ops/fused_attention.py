"""Attention and rotary attention on the Triton kernels of kernels/attention.py: when they serve, autograd, and the
registered operators that torch.compile sees."""

import torch
from torch import Tensor

from fastbert.backend import lacks, serves, triton_cannot_run
from fastbert.philox import threshold

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128


def _serves(q: Tensor, scale: float | None) -> str | None:
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, not float16, bfloat16 or float32"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the head dim is {q.shape[-1]}, more than {MAX_HEAD_DIM}"
    if scale is not None and scale <= 0:
        return f"scale is {scale}, not positive"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "q is bfloat16, whose products Triton's interpreter gets wrong"
    return triton_cannot_run(q.device)


_NO_CUDA = lacks("there is no CUDA kernel for it yet")
ON_CUDA = {"triton": _serves, "cuda": _NO_CUDA, "torch": serves, "reference": serves}
ELSEWHERE = {"torch": serves, "reference": serves, "triton": _serves, "cuda": _NO_CUDA}


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
    longest = q.shape[1] if cu_seqlens is None else q.shape[0] if max_seqlen is None else max_seqlen
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seeds, drop = None, 0
    if dropout_p > 0:
        seeds, drop = _seeds(seed, q.device), threshold(dropout_p)
    # The kernels turn values in interleaved pairs only. Nobody has published weights of the other kind.
    by_halves = rotate_value and not interleaved
    if by_halves:
        v = v.unflatten(-1, (2, -1)).mT.flatten(-2)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    arguments = (
        *(q, k, v, key_padding_mask, cu_seqlens, seeds, longest, float(scale), drop),
        *(None if theta is None else float(theta), rotate_value, interleaved, save),
    )
    # A compiler, and tensors that are not plain (fake ones), see a registered operator. It costs microseconds more.
    plain = not torch.compiler.is_compiling() and type(q) in (Tensor, torch.nn.Parameter)
    o = (_Attention.apply if plain else _forward_op)(*arguments)[0]
    return o.unflatten(-1, (-1, 2)).mT.flatten(-2) if by_halves else o


def rotary_attention(q: Tensor, k: Tensor, v: Tensor, *, theta: float = 10000.0, **arguments) -> Tensor:
    """See reference.rotary_attention."""
    return attention(q, k, v, theta=theta, **arguments)


def _seeds(seed: int | None, device: torch.device) -> Tensor:
    """int64 [1], on the device: a captured graph draws anew at every replay, and nothing waits for it."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def _table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines, float32 [2, positions, D/2], of angles in float64, for at least `length` positions."""
    # Powers of two, so that a run over many lengths keeps few; the kernels want 256 rows.
    key = max(256, 1 << (length - 1).bit_length()), head_dim, theta, device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and key not in _tables:
        return _build_table(*key)  # part of the graph, and of its memory
    if key not in _tables:
        with torch.inference_mode(False):
            _tables[key] = _build_table(*key)
    return _tables[key]


# Never emptied: captured graphs may hold the addresses.
_tables: dict[tuple[int, int, float, torch.device], Tensor] = {}


def _build_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequencies)
    return torch.stack((angle.cos(), angle.sin())).float()


def _parts(q: Tensor, mask, ends, seeds, longest: int, drop: int, theta, rotate_value: bool, interleaved: bool):
    """The (sequences, rotation, dropout) of the kernels."""
    from fastbert.kernels.launch import Dropout, Rotation, Sequences

    rotation = None
    if theta is not None:
        rotation = Rotation(_table(longest, q.shape[-1], theta, q.device), rotate_value, interleaved)
    dropout = Dropout(seeds, drop) if drop else None
    return Sequences(longest, mask, ends), rotation, dropout


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ends: Tensor | None,
    seeds: Tensor | None,
    longest: int,
    scale: float,
    drop: int,
    theta: float | None,
    rotate_value: bool,
    interleaved: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """attention_fwd, with empty tensors for None."""
    from fastbert.kernels import attention as kernels

    parts = _parts(q, mask, ends, seeds, longest, drop, theta, rotate_value, interleaved)
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
    longest: int,
    scale: float,
    drop: int,
    theta: float | None,
    rotate_value: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastbert.kernels import attention as kernels

    parts = _parts(q, mask, ends, seeds, longest, drop, theta, rotate_value, interleaved)
    return kernels.attention_bwd(do, q, k, v, given, o, lse, scale, *parts)


def _save(ctx, inputs, output):
    q, k, v, mask, ends, seeds, *ctx.options, save = inputs
    o, lse, *used = output
    if save:
        operands = [new if new.numel() else old for new, old in zip(used, (q, k, v), strict=True)]
        ctx.save_for_backward(*operands, None if mask is None else q, o, lse, mask, ends, seeds)


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
def _(q, k, v, mask, ends, seeds, longest, scale, drop, theta, rotate_value, interleaved, save):
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    changed = save and (theta is not None or mask is not None)
    used = [torch.empty_like(o) if changed else q.new_empty(0) for _ in "qk"]
    used.append(torch.empty_like(o) if changed and rotate_value else q.new_empty(0))
    rows = q.shape[:-2].numel()
    lse = torch.empty(q.shape[-2], rows, dtype=torch.float32, device=q.device) if save else q.new_empty(0)
    return o, lse, *used


@_backward_op.register_fake
def _(do, q, k, v, given, o, lse, *_):
    return torch.empty_like(o), torch.empty_like(o), torch.empty_like(o)


_forward_op.register_autograd(lambda ctx, do, *_: _gradients(_backward_op, ctx, do), setup_context=_save)
