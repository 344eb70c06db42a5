"""The masked language model's loss over a large vocabulary, without the logits of all tokens in memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import portable, reference
from fastbert.backend import pick, serves, triton_cannot_run
from fastbert.errors import DtypeError
from fastbert.ops import checks


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of hidden @ weight.T + bias against labels, over the rows that have one: see fastbert.reference.

    hidden: [..., C]; weight: [V, C]; bias: [V] or None; all of one floating dtype, except under autocast, whose dtype
    the matrix products then have on CUDA. labels: int64 [...], ignore_index where there is none. reduction: "mean" over
    the labels, or "sum". Returns a scalar in float32 (float64 for float64 input), which is 0 with zero gradients if no
    row has a label. Differentiable once, in hidden, weight and bias. Nothing of size [tokens, V] is kept: "triton" and
    "torch" take the gradients in the forward, from a bounded block of logits at a time.

    Backend "triton" (float16, bfloat16 and float32 on CUDA; on the CPU in Triton's interpreter only, if asked for)
    computes every row that it is given, also those without a label, because how many there are is known on the device
    only; so it waits for nothing, and can be captured in a CUDA graph. Backend "torch" spends nothing on rows without a
    label, but has to wait for their number.

    Raises ShapeError, DtypeError, ConfigError (ignore_index, reduction), BackendError, and DataError for a label
    outside the vocabulary: on the CPU only, for on a GPU the check would have to wait for the device. There "triton"
    makes loss and gradients NaN.
    Source: Devlin et al., BERT (2018), arXiv 1810.04805, section 3.1.
    """
    checks.tensors("bias", hidden=hidden, weight=weight, bias=bias, labels=labels)
    checks.same_device(hidden=hidden, weight=weight, bias=bias, labels=labels)
    checks.floating(hidden=hidden, weight=weight, bias=bias)
    if not torch.is_autocast_enabled(hidden.device.type):
        checks.same_dtype(hidden=hidden, weight=weight, bias=bias)
    if labels.dtype != torch.int64:
        raise DtypeError(f"labels: got {labels.dtype}, expected torch.int64")
    checks.rows(hidden=hidden)
    checks.matrices(weight=weight)
    vocabulary = len(weight)
    checks.shape("weight", weight, (vocabulary, hidden.shape[-1]), "[V, C] with the last dimension of hidden")
    if bias is not None:
        checks.shape("bias", bias, (vocabulary,), "the rows of weight")
    checks.shape("labels", labels, hidden.shape[:-1], "hidden without its last dimension")
    checks.number("ignore_index", ignore_index, lambda x: -(2**63) <= x < 2**63, "an int64", whole=True)
    checks.option("reduction", reduction, ("mean", "sum"))
    checks.indices("labels", labels, vocabulary, "rows of weight", besides=ignore_index)
    name = pick("linear_cross_entropy", _ON_CUDA if hidden.is_cuda else _ELSEWHERE, backend, hidden, weight, bias)
    return _TWINS[name](hidden, weight, bias, labels, ignore_index=ignore_index, reduction=reduction)


def _triton_serves(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    for name, t in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{name} is {t.dtype}, not float16, bfloat16 or float32"
    return triton_cannot_run(hidden.device)


def _triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int, reduction: str
) -> Tensor:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    arguments = (
        *(hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.flatten(), ignore_index, reduction == "mean"),
        *(dtype, [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]),
    )
    if torch.compiler.is_compiling():
        return _forward_op(*arguments)[0]
    return _CrossEntropy.apply(*arguments)[0] if any(arguments[-1]) else _forward(*arguments)[0]


# What the logits of one chunk of rows may take: one chunk is enough for the labels of 32 x 512 tokens and a vocabulary
# of 30522. Every further chunk reads and writes the float32 gradient of weight once more: 188 MB.
_LOGIT_BYTES = 384 << 20


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    mean: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, unit, gradients by hidden, weight and bias) of hidden [T, C] and labels [T], in float32. The gradients are
    to be multiplied by the scalar `unit`, and are empty if not `wanted`. Matrix products take operands in `dtype`.

    All is float32, for gradients that are rounded to float16 before they are multiplied by the scale of the loss lose
    what the scale is for. The bias's sums the rounded elements that the products take too: over 2458 rows at most half
    of the error that compare() allows. To sum before rounding is to read all logits again, twice the bytes.
    """
    from fastbert.kernels.cross_entropy import SCALE, cross_entropy, row_stride

    rows, columns, stride = len(hidden), len(weight), row_stride(len(weight))
    labels = labels.contiguous()
    labelled = labels != ignore_index
    scale = labelled.sum().clamp(min=1).float().reciprocal() if mean else hidden.new_ones((), dtype=torch.float32)
    # A gradient of zero does not hide a NaN from a product
    h, w = hidden.where(labelled[:, None], 0).to(dtype), weight.to(dtype)
    b = None if bias is None else F.pad(bias.float(), (0, stride - columns))
    make = torch.empty if rows > 0 else torch.zeros
    shapes = (t.shape if want else 0 for t, want in zip((hidden, weight, bias), wanted, strict=True))
    grad_h, grad_w, grad_b = (make(shape, dtype=torch.float32, device=hidden.device) for shape in shapes)
    losses = hidden.new_empty(rows, dtype=torch.float32)
    chunks = -(-rows * stride * 4 // _LOGIT_BYTES)
    size = -(-rows // max(chunks, 1))
    logits = hidden.new_empty(size, stride, dtype=torch.float32)
    if not any(wanted):
        gradient = None
    else:
        gradient = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for first in range(0, rows, max(size, 1)):
            chunk, keep = slice(first, first + size), float(first > 0)
            z, g = (None if t is None else t[: rows - first] for t in (logits, gradient))
            portable.add_product(z[:, :columns], h[chunk], w.T, keep=0)
            cross_entropy(z, b, labels[chunk], columns, ignore_index, losses[chunk], g)
            if wanted[0]:
                portable.add_product(grad_h[chunk], g[:, :columns], w, keep=0)
            if wanted[1]:
                portable.add_product(grad_w, g[:, :columns].T, h[chunk], keep=keep)
            if wanted[2]:
                total = g[:, :columns].sum(0, dtype=torch.float32)
                grad_b = grad_b + total if first > 0 else total
    return losses.sum() * scale, scale / SCALE, grad_h, grad_w, grad_b


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [t.dtype if want else None for t, want in zip(inputs[:3], inputs[-1], strict=True)]


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 8
    unit, *gradients = ctx.saved_tensors
    factor = unit * grad_loss
    return *(
        None if dtype is None else torch.mul(t, factor, out=torch.empty_like(t, dtype=dtype))
        for t, dtype in zip(gradients, ctx.dtypes, strict=True)
    ), *(None,) * 5


class _CrossEntropy(torch.autograd.Function):
    """Eager: the registered operator below would add microseconds to every call."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(torch.autograd.function.once_differentiable(_backward))


_forward_op = torch.library.custom_op("fastbert::linear_cross_entropy_triton", _forward, mutates_args=())


@_forward_op.register_fake
def _(hidden, weight, bias, labels, ignore_index, mean, dtype, wanted):
    make = lambda *shape: hidden.new_empty(shape, dtype=torch.float32)  # noqa: E731
    gradients = (make(*(t.shape if want else (0,))) for t, want in zip((hidden, weight, bias), wanted, strict=True))
    return make(), make(), *gradients


_forward_op.register_autograd(_backward, setup_context=_save)

_ON_CUDA = {"triton": _triton_serves, "torch": serves, "reference": serves}
_ELSEWHERE = {"torch": serves, "reference": serves, "triton": _triton_serves}
_TWINS = {
    "triton": _triton,
    "torch": portable.linear_cross_entropy,
    "reference": reference.linear_cross_entropy,
}
