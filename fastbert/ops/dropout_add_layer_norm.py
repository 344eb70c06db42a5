"""LN(residual + dropout(x + x_bias)), the end of both halves of a post-LN layer."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastbert import portable, reference
from fastbert.backend import pick, serves, triton_cannot_run
from fastbert.ops import checks
from fastbert.philox import seed_tensor, threshold

_MAX_COLUMNS = 4096  # beyond, rows no longer fit the registers


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
    backend: str | None = None,
) -> Tensor:
    """LN(residual + dropout(x + x_bias)) over the last dimension, with eps inside the root: see fastbert.reference.

    x, residual: [..., C], any floating dtypes (under autocast x may be 16-bit and residual float32), any strides.
    weight, bias: [C]. x_bias: [C] or None, the bias of the linear layer that gives x, if it is left to be added here,
    where its gradient costs no pass of its own. dropout_p: 0 <= dropout_p < 1. seed: None takes PyTorch's generator; an
    int gives the same mask in every backend. Returns [..., C] in residual's dtype. Statistics are float32 at least.
    Differentiable in all five tensors. Backend "triton": float16, bfloat16 and float32, C up to 4096, on CUDA; on the
    CPU in Triton's interpreter only, if asked for.

    Raises ShapeError, DtypeError, ConfigError (eps, dropout_p, seed), BackendError.
    Source: Vaswani et al. (2017), arXiv 1706.03762, section 5.4; Ba et al. (2016), arXiv 1607.06450.
    """
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias, "x_bias": x_bias}
    checks.tensors("x_bias", **tensors)
    checks.floating(**tensors)
    checks.same_device(**tensors)
    checks.rows(x=x)
    checks.shape("residual", residual, x.shape, "as x")
    for name in ("weight", "bias", "x_bias"):
        if tensors[name] is not None:
            checks.shape(name, tensors[name], x.shape[-1:], "the last dimension of x")
    checks.epsilon(eps)
    checks.dropout(dropout_p, seed)
    name = pick("dropout_add_layer_norm", _ON_CUDA if x.is_cuda else _ELSEWHERE, backend, *tensors.values())
    options = {"x_bias": x_bias, "eps": eps, "dropout_p": dropout_p, "seed": seed}
    return _TWINS[name](x, residual, weight, bias, **options)


def _triton_serves(*tensors: Tensor | None) -> str | None:
    for t in tensors:
        if t is not None and t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"a tensor is {t.dtype}, not float16, bfloat16 or float32"
    if tensors[0].shape[-1] > _MAX_COLUMNS:
        return f"the rows have {tensors[0].shape[-1]} columns, more than {_MAX_COLUMNS}"
    return triton_cannot_run(tensors[0].device)


def _triton(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int | None,
) -> Tensor:
    seeds, drop = (seed_tensor(seed, x.device), threshold(dropout_p)) if dropout_p > 0 else (None, 0)
    tensors = (x, residual, weight, bias, x_bias)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    op = _forward_op if torch.compiler.is_compiling() else _DropoutAddLayerNorm.apply
    return op(*tensors, seeds, float(eps), drop, save)[0]


def _forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seeds: Tensor | None,
    eps: float,
    drop: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(y, statistics), those empty unless `save`."""
    from fastbert.kernels import launch, layer_norm

    dropout = launch.Dropout(seeds, drop) if drop else None
    y, stats = layer_norm.dropout_add_layer_norm_fwd(x, residual, weight, bias, x_bias, eps, dropout, save)
    return y, x.new_empty(0, dtype=torch.float32) if stats is None else stats


def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seeds: Tensor | None,
    stats: Tensor,
    drop: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual, weight, bias and x_bias, those not wanted empty."""
    from fastbert.kernels import launch, layer_norm

    dropout = launch.Dropout(seeds, drop) if drop else None
    operands = (x, residual, weight, bias, x_bias)
    grads = layer_norm.dropout_add_layer_norm_bwd(dy, *operands, stats, dropout, wanted)
    return tuple(x.new_empty(0) if t is None else t for t in grads)


def _save(ctx, inputs, output):
    *tensors, _, ctx.drop, save = inputs
    ctx.set_materialize_grads(False)  # there is none of the statistics
    if save:
        ctx.save_for_backward(*tensors, output[1])


def _gradients(backward: Callable, ctx, dy: Tensor | None):
    if dy is None:
        return (None,) * 9
    wanted = list(ctx.needs_input_grad[:5])
    x, residual, *rest = ctx.saved_tensors  # once: checkpointing makes them anew
    one = ctx.drop == 0 and x.dtype == residual.dtype  # then dx is dresidual
    asked = [False, wanted[0] or wanted[1], *wanted[2:]] if one else wanted
    dx, dresidual, *others = backward(dy, x, residual, *rest, ctx.drop, asked)
    grads = (dresidual if one else dx, dresidual, *others)
    return *(t if want else None for t, want in zip(grads, wanted, strict=True)), None, None, None, None


class _DropoutAddLayerNorm(torch.autograd.Function):
    """Eager: the registered operators below would add microseconds to every call."""

    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        _save(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        return _gradients(_backward, ctx, dy)


_forward_op = torch.library.custom_op("fastbert::dropout_add_layer_norm", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fastbert::dropout_add_layer_norm_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x, residual, weight, bias, x_bias, seeds, eps, drop, save):
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    shape = (2, math.prod(x.shape[:-1])) if save else (0,)
    return y, x.new_empty(shape, dtype=torch.float32)


@_backward_op.register_fake
def _(dy, x, residual, weight, bias, x_bias, seeds, stats, drop, wanted):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else x.new_empty(0)
        for t, want in zip((x, residual, weight, bias, x_bias), wanted, strict=True)
    )


_forward_op.register_autograd(lambda ctx, dy, _: _gradients(_backward_op, ctx, dy), setup_context=_save)

_ON_CUDA = {"triton": _triton_serves, "torch": serves, "reference": serves}
_ELSEWHERE = {"torch": serves, "reference": serves, "triton": _triton_serves}
_TWINS = {
    "triton": _triton,
    "torch": portable.dropout_add_layer_norm,
    "reference": reference.dropout_add_layer_norm,
}
