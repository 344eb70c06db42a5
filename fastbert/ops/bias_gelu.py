"""gelu(x + bias), between the two linear layers of the feed-forward block."""

import torch
from torch import Tensor

from fastbert import portable, reference
from fastbert.backend import pick, serves, triton_cannot_run
from fastbert.ops import checks


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """gelu(x + bias): see fastbert.reference.

    x: [..., I], floating, any strides. bias: [I], floating; it is cast to x's dtype (so under autocast a 16-bit x
    decides). approximate: "none" is the exact form with erf, "tanh" the approximation. Returns [..., I] in x's dtype.
    Differentiable in both. Backend "triton": float16, bfloat16 and float32 on CUDA; on the CPU in Triton's interpreter
    only, if asked for.

    Raises ShapeError, DtypeError, ConfigError (approximate), BackendError.
    Source: Hendrycks and Gimpel (2016), arXiv 1606.08415, section 2.
    """
    checks.tensors(x=x, bias=bias)
    checks.floating(x=x, bias=bias)
    checks.same_device(x=x, bias=bias)
    checks.rows(x=x)
    checks.shape("bias", bias, x.shape[-1:], "the last dimension of x")
    checks.option("approximate", approximate, ("none", "tanh"))
    name = pick("bias_gelu", _ON_CUDA if x.is_cuda else _ELSEWHERE, backend, x, bias)
    return _TWINS[name](x, bias, approximate=approximate)


def _triton_serves(x: Tensor, bias: Tensor) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or bias.dtype == torch.float64:
        return f"x is {x.dtype} and bias {bias.dtype}, not float16, bfloat16 or float32"
    return triton_cannot_run(x.device)


def _triton(x: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    if torch.compiler.is_compiling():
        return _forward_op(x, bias, approximate)
    return _BiasGelu.apply(x, bias, approximate)


def _forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    from fastbert.kernels import gelu

    return gelu.bias_gelu_fwd(x, bias, approximate)


def _backward(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    from fastbert.kernels import gelu

    return gelu.bias_gelu_bwd(dy, x, bias, approximate)


def _save(ctx, inputs, output):
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


class _BiasGelu(torch.autograd.Function):
    """Eager: the registered operators below would add microseconds to every call."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return *_backward(dy, *ctx.saved_tensors, ctx.approximate), None


_forward_op = torch.library.custom_op("fastbert::bias_gelu", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fastbert::bias_gelu_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x, bias, approximate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward_op.register_fake
def _(dy, x, bias, approximate):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


_forward_op.register_autograd(
    lambda ctx, dy: (*_backward_op(dy, *ctx.saved_tensors, ctx.approximate), None), setup_context=_save
)

_ON_CUDA = {"triton": _triton_serves, "torch": serves, "reference": serves}
_ELSEWHERE = {"torch": serves, "reference": serves, "triton": _triton_serves}
_TWINS = {"triton": _triton, "torch": portable.bias_gelu, "reference": reference.bias_gelu}
