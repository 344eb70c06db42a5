"""The same functions as reference.py, composed of PyTorch's own fast operations: any device, torch.compile welcome."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.philox import keep_scale, random_keep, row_keep
from fastbert.tiled import angles, attendable, kept_table, tiled_attention

# ---------------------------------------------------------------- attention
#
# Two ways to compute, by measurement (B=2 H=6 L=512 D=64, forward and backward, one core of an EPYC 9004):
# scaled_dot_product_attention (38 ms) wherever it can, and tiled.py where it cannot (relative positions, 50 ms; a seed)
# or is slow (dropout on a CPU: 67 ms, tiled 48).


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
) -> Tensor:
    """See reference.attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if dropout_p > 0.0 and (seed is not None or q.device.type == "cpu"):
        core = partial(tiled_attention, scale=scale, dropout_p=dropout_p, seed=seed)
    else:
        core = partial(_sdpa, scale=scale, dropout_p=dropout_p)
    return _as_batches(core, q, k, v, key_padding_mask, cu_seqlens, max_seqlen)


def rotary_attention(
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
    theta: float = 10000.0,
    rotate_value: bool = False,
    interleaved: bool = True,
) -> Tensor:
    """See reference.rotary_attention."""
    if cu_seqlens is not None and max_seqlen is None:
        max_seqlen = _longest(cu_seqlens)
    table = _rotations(q, cu_seqlens, max_seqlen, theta)
    q, k = _rotate(q, table, interleaved), _rotate(k, table, interleaved)
    v = _rotate(v, table, interleaved) if rotate_value else v
    layout = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    return attention(q, k, v, **layout, scale=scale, dropout_p=dropout_p, seed=seed)


def relative_attention(
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
    max_relative_position: int = 64,
) -> Tensor:
    """See reference.relative_attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    relative = {"max_relative_position": max_relative_position}
    core = partial(tiled_attention, scale=scale, dropout_p=dropout_p, seed=seed, **relative)
    return _as_batches(core, q, k, v, key_padding_mask, cu_seqlens, max_seqlen)


def _as_batches(
    core: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    """core(q, k, v, mask, first) over dense batches [B, L, H, D], the first sequence of which is number `first`.

    Packed sequences are one batch by a view if they are equally long; else each is a batch of its own on a CPU, and
    all are padded to one batch on a GPU and where it is compiled.
    """
    if cu_seqlens is None:
        if mask is not None:
            q, k, v = _hide_padding(q, k, v, mask)
        return core(q, k, v, mask, 0)
    longest = min(q.shape[0], _longest(cu_seqlens) if max_seqlen is None else max_seqlen)
    batch = cu_seqlens.numel() - 1
    if q.shape[0] == batch * longest:
        dense = (t.unflatten(0, (batch, longest)) for t in (q, k, v))
        return core(*dense, None, 0).flatten(0, 1)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # the lengths are not for a compiler to know
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(t[None].split(lengths, dim=1) for t in (q, k, v)), strict=True)
        return torch.cat([core(*part, None, number) for number, part in enumerate(parts)], dim=1)[0]
    return _padded(core, q, k, v, cu_seqlens, longest)


def _padded(
    core: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """core over the packed sequences as one padded batch, without a host synchronisation."""
    tokens = q.shape[0]
    column = torch.arange(max_seqlen, device=q.device)
    real = column < cu_seqlens.diff()[:, None]
    token = (cu_seqlens[:-1, None] + column).clamp(max=tokens - 1)
    q, k, v = (t[token].where(real[:, :, None, None], 0) for t in (q, k, v))
    return core(q, k, v, real, 0)[_coordinates(cu_seqlens, tokens)]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: int, *, scale: float, dropout_p: float
) -> Tensor:
    allowed = None if mask is None else attendable(mask)[:, None, None, :]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout_p, scale=scale)
    return output.transpose(1, 2)


def _hide_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero for masked keys and values, and for what is not finite in the queries there: a weight of zero does not hide
    a NaN. A sequence without a real key then has zeros for an answer, whatever its weights."""
    real = mask[:, :, None, None]
    return q.where(real | q.isfinite(), 0), k.where(real, 0), v.where(real, 0)


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def _coordinates(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Of every packed token its sequence and its position there, int64 [T] each, without a host synchronisation."""
    sequences = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    sequence = sequences.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    return sequence, torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens[sequence]


def _rotations(q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, theta: float) -> Tensor:
    """(cos, sin) of the angles at q's positions, [L or T, 1, D/2, 2], float32, or float64 for float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    length = q.shape[1] if cu_seqlens is None else max_seqlen
    # Tables have powers of two as lengths, so that a run over many lengths keeps few.
    table = _rotation_table(1 << max(length - 1, 0).bit_length(), q.shape[-1], theta, dtype, q.device)
    rows = table[:length] if cu_seqlens is None else table[_coordinates(cu_seqlens, q.shape[0])[1]]
    return rows[:, None]


@kept_table
def _rotation_table(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    angle = angles(length, head_dim, theta)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(device, dtype)


def _rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """See reference.rotate. Interleaved pairs are complex numbers: their product takes 0.1 ms where real arithmetic
    takes 0.6 to 1.2 (B=2 H=6 L=512 D=64, one core). A compiler wants the real form."""
    wide = x.to(table.dtype)
    if interleaved and not torch.compiler.is_compiling():
        turned = _as_complex(wide.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    cos, sin = table.unbind(-1)
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    return (torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)).to(x.dtype)


def _as_complex(pairs: Tensor) -> Tensor:
    """[..., 2] as complex: a view if the strides allow one."""
    if pairs.stride(-1) != 1 or pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(pairs)


# ---------------------------------------------------------------- around the layer


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """See reference.dropout_add_layer_norm."""
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    return _layer_norm(_dropout(x, dropout_p, seed, residual), weight, bias, eps).to(residual.dtype)


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    """See reference.bias_gelu."""
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


def embedding_layer_norm(
    input_ids: Tensor,
    word_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    token_type_ids: Tensor | None = None,
    token_type_embeddings: Tensor | None = None,
    position_ids: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """See reference.embedding_layer_norm."""
    x = F.embedding(input_ids, word_embeddings)
    if token_type_embeddings is not None:
        one_type = token_type_ids is None
        x = x + (token_type_embeddings[0] if one_type else F.embedding(token_type_ids, token_type_embeddings))
    if position_embeddings is not None:
        in_order = position_ids is None
        length = input_ids.shape[-1]
        x = x + (position_embeddings[:length] if in_order else F.embedding(position_ids, position_embeddings))
    return _dropout(_layer_norm(x, weight, bias, eps).to(x.dtype), dropout_p, seed)


def encoder_layers(
    x: Tensor,
    layers: Sequence,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    heads: int,
    act: str,
    eps: float,
    every: bool = False,
) -> list[Tensor]:
    """See reference.encoder_layers."""
    results = []
    for w in layers:
        qkv = F.linear(x, w.qkv, w.qkv_bias.to(x.dtype)).unflatten(-1, (3, heads, -1))
        o = F.linear(attend(*qkv.unbind(-3)).flatten(-2), w.output, w.output_bias.to(x.dtype))
        y = dropout_add_layer_norm(o, x, w.attention_norm, w.attention_norm_bias, eps=eps)
        h = F.linear(y, w.up, w.up_bias.to(x.dtype))
        h = F.gelu(h, approximate=act) if act in ("none", "tanh") else getattr(F, act)(h)
        h = F.linear(h, w.down, w.down_bias.to(x.dtype))
        x = dropout_add_layer_norm(h, y, w.output_norm, w.output_norm_bias, eps=eps)
        results.append(x)
    return results if every else results[-1:]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """See reference.linear_cross_entropy. Only rows with a label are computed, in chunks: no [T, V] tensor."""
    arguments = (
        *(hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.flatten()),
        *(ignore_index, reduction == "mean", _product_dtype(hidden)),
        [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)],
    )
    if torch.compiler.is_compiling():
        return _cross_entropy_op(*arguments)[0]
    return _CrossEntropy.apply(*arguments) if any(arguments[-1]) else _cross_entropy(*arguments)[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:4])
        ctx.options = arguments[4:]
        loss, *ctx.gradients = _cross_entropy(*arguments)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        # The first backward gives the gradients away rather than copy them; a second one, through a retained graph, has
        # to compute them again.
        operands = ctx.saved_tensors
        gradients = ctx.gradients
        ctx.gradients = None
        if gradients is None:
            gradients = _cross_entropy(*operands, *ctx.options)[1:]
        # On the CPU a pass over the gradient of a vocabulary costs 4 % of the op; elsewhere looking would synchronise.
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            torch._foreach_mul_([t for t in gradients if t is not None], grad_loss)
        cast = (None if t is None else t.to(like.dtype) for t, like in zip(gradients, operands, strict=False))
        return *cast, None, None, None, None, None


# What the logits of one chunk of rows may take. At C = 384 and V = 21128 on a CPU, 32 to 128 MiB are equally fast.
_LOGIT_BYTES = 64 << 20


def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    mean: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss of hidden [T, C] and labels [T], and its gradients by hidden, weight and bias, each if `wanted`.

    Matrix products take operands in `dtype`; they are accumulated, and everything is returned, in float32 at least.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    h, w, labels = hidden.index_select(0, rows).to(dtype), weight.to(dtype), labels.index_select(0, rows)[:, None]
    scale = 1 / max(len(h), 1) if mean else 1.0
    loss = hidden.new_zeros((), dtype=wide)
    grad_h, grad_w, grad_b = (
        torch.zeros_like(t, dtype=wide) if want else None for t, want in zip((h, weight, bias), wanted, strict=True)
    )
    chunks = -(-len(h) * len(w) * wide.itemsize // _LOGIT_BYTES)
    size = -(-len(h) // max(chunks, 1))
    logits = torch.empty(size, len(w), dtype=wide, device=h.device)
    with torch.autocast(h.device.type, enabled=False):
        for first in range(0, len(h), max(size, 1)):
            chunk = slice(first, first + size)
            z = logits[: len(h) - first]
            z.zero_() if bias is None else z.copy_(bias)
            add_product(z, h[chunk], w.T)
            torch.log_softmax(z, -1, out=z)
            picked = z.gather(1, labels[chunk])
            loss.sub_(picked.sum(), alpha=scale)
            if any(wanted):
                g = z.exp_().scatter_(1, labels[chunk], picked.expm1())
                if grad_b is not None:
                    grad_b.add_(g.sum(0), alpha=scale)
                g = g.to(dtype)
                if grad_h is not None:
                    add_product(grad_h[chunk], g, w, scale)
                if grad_w is not None:
                    add_product(grad_w, g.T, h[chunk], scale)
    if grad_h is not None:
        grad_h = torch.zeros_like(hidden, dtype=wide).index_copy_(0, rows, grad_h)
    return loss, grad_h, grad_w, grad_b


@torch.library.custom_op("fastbert::linear_cross_entropy", mutates_args=())
def _cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    mean: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_cross_entropy for torch.compile, which cannot trace the number of labels; a gradient not wanted is empty."""
    loss, *gradients = _cross_entropy(hidden, weight, bias, labels, ignore_index, mean, dtype, wanted)
    return loss, *(hidden.new_empty(0) if t is None else t for t in gradients)


@_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, ignore_index, mean, dtype, wanted):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    gradients = (
        torch.empty_like(t, dtype=wide) if want else hidden.new_empty(0)
        for t, want in zip((hidden, weight, bias), wanted, strict=True)
    )
    return hidden.new_empty((), dtype=wide), *gradients


def _save_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [t.dtype if want else None for t, want in zip(inputs[:3], inputs[-1], strict=True)]


def _scale_gradients(ctx, grad_loss, *_):
    pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *(None if dtype is None else (t * grad_loss).to(dtype) for t, dtype in pairs), None, None, None, None, None


_cross_entropy_op.register_autograd(_scale_gradients, setup_context=_save_gradients)


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, keep: float = 1.0) -> None:
    """total = keep total + scale a @ b; with keep = 0 whatever total held. A product of 16-bit operands is not rounded
    before it is added to a float32 total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=keep, alpha=scale)
    elif a.is_cuda and total.dtype == torch.float32 and a.itemsize == 2:
        # Summed in float32 in the matrix unit, and straight on in memory
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=keep, alpha=scale, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=keep, alpha=scale)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """On CUDA hidden's dtype, or what autocast says; elsewhere float32 at least, for 16-bit products return 16 bits."""
    if not hidden.is_cuda:
        return torch.promote_types(hidden.dtype, torch.float32)
    autocast = torch.is_autocast_enabled("cuda") and hidden.dtype != torch.float64
    return torch.get_autocast_dtype("cuda") if autocast else hidden.dtype


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """In the widest of the dtypes, for F.layer_norm takes a mixture on some devices only; on the CPU in float32 at
    least, for there it sums the gradients of weight and bias in 16 bits (10 times the error at 500 rows)."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    if not x.is_cuda:
        wide = torch.promote_types(wide, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)


def _dropout(x: Tensor, p: float, seed: int | None, residual: Tensor | None = None) -> Tensor:
    """dropout(x), added to the residual if there is one."""
    if p == 0.0:
        return x if residual is None else residual + x
    if seed is not None:
        kept = row_keep(seed, p, math.prod(x.shape[:-1]), x.shape[-1], device=x.device).view(x.shape)
        scale = keep_scale(p)
    elif x.device.type == "cpu" and not torch.compiler.is_compiling():
        kept, scale = random_keep(x.shape, p, device=x.device)
    else:
        x = F.dropout(x, p)
        return x if residual is None else residual + x
    return torch.addcmul(x.new_zeros(()) if residual is None else residual, x, kept.to(x.dtype), value=scale)
