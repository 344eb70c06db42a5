"""Linear layers that are applied more than once in a forward pass, as ALBERT applies those of its one layer.

Left to autograd, a shared weight is cast to 16 bits once (the cache of autocast sees to that), but its gradient is
rounded to 16 bits in each application and summed in 16 bits. Here the weights of a layer are copied, in the dtype they
are multiplied in, once per forward pass, and their gradients are summed in one flat float32 buffer:

    weights, total = share(dtype, [[query, key, value], [output], ...])       # once
    y, total = shared_linear(x, weights[0], total)                            # in each application, in turn

`total` holds no numbers: it is there for its gradient, the sum so far, which goes backward from application to
application and ends as the gradients of the parameters, views of that one buffer. Each application adds its products to
it (beta = 1), with float32 sums in the matrix unit and nothing in between. So autograd, DDP and the optimizer see one
gradient per parameter, there is no buffer per layer, and nothing has to be reset, in whatever order and however often
a graph runs backward.

The other way, one product over the inputs and the output gradients of all applications side by side, adds up as exactly
but must keep the output gradients of all of them until the last is there: for ALBERT-base, 16,384 tokens and 16 bits
2.7 GB more, against 8 bytes per weight and application of traffic to the buffer, 0.2 ms of an H100's 20 ms. On a CPU it
is slower too: `fastbert bench shared_linear` has both ways, and autograd's.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import portable
from fastbert.backend import is_asked_for
from fastbert.errors import ShapeError
from fastbert.ops import checks

_ALIGNMENT = 64  # elements: matrices begin at multiples of 128 bytes or more


class SharedWeight(NamedTuple):
    """One or more linear layers side by side. weight `[N, K]`, bias `[N]` or None, in the dtype of the products: views
    of one buffer. start: where, in elements, the gradient of the weight begins in the flat sum; that of the bias
    follows it."""

    weight: Tensor
    bias: Tensor | None
    start: int


def share(
    dtype: torch.dtype, groups: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]
) -> tuple[list[SharedWeight], Tensor]:
    """Copies of weights for `shared_linear`, and the first `total`.

    groups: for each call of shared_linear to come (weights, biases), parameters `[N_i, K]` that are multiplied side by
    side, and their biases `[N_i]`, one for each or none at all. Floating dtypes, on one device.
    dtype: what they are multiplied in.

    Returns a SharedWeight for each group and `total`, float32 (float64 if a parameter is) `[elements]` without storage
    of its own. Its gradient is the sum of theirs, and reaches each parameter in its grad_dtype.

    Raises ShapeError, DtypeError.
    """
    starts, size = [], 0  # of each group: where its parameters begin in the flat buffers, and their end
    for number, (weights, biases) in enumerate(groups):
        _check_group(f"groups[{number}]", weights, biases)
        ends = list(accumulate((p.numel() for p in (*weights, *biases)), initial=size))
        starts.append(ends[:-1])
        size = ends[-1] + -ends[-1] % _ALIGNMENT
    parameters = [p for weights, biases in groups for p in (*weights, *biases)]
    wide = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
    flat, total = _Share.apply(dtype, wide, size, list(chain.from_iterable(starts)), *parameters)
    found = []
    for places, (weights, biases) in zip(starts, groups, strict=True):
        rows, columns = sum(map(len, weights)), weights[0].shape[1]
        weight = flat.narrow(0, places[0], rows * columns).view(rows, columns)
        bias = flat.narrow(0, places[len(weights)], rows) if biases else None
        found.append(SharedWeight(weight, bias, places[0]))
    return found, total


def _check_group(name: str, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    checks.lists(**{f"{name} weights": weights, f"{name} biases": biases})
    if not weights:
        raise ShapeError(f"{name}: got no weights, expected at least one")
    if biases and len(biases) != len(weights):
        raise ShapeError(f"{name}: got {len(biases)} biases, expected one for each of {len(weights)} weights, or none")
    for i, weight in enumerate(weights):
        checks.floating(**{f"{name} weights[{i}]": weight})
        checks.matrices(**{f"{name} weights[{i}]": weight})
        checks.shape(f"{name} weights[{i}]", weight, (len(weight), weights[0].shape[-1]), "the columns of weights[0]")
    for i, bias in enumerate(biases):
        checks.floating(**{f"{name} biases[{i}]": bias})
        checks.shape(f"{name} biases[{i}]", bias, (len(weights[i]),), "the rows of its weight")


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(dtype, wide, size, starts, *parameters):
        flat = parameters[0].new_empty(size, dtype=dtype)
        for start, parameter in zip(starts, parameters, strict=True):
            flat[start : start + parameter.numel()].view(parameter.shape).copy_(parameter)
        return flat, _stand_in(flat, wide, size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, _, ctx.starts, *parameters = inputs
        ctx.shapes = [parameter.shape for parameter in parameters]
        ctx.mark_non_differentiable(output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, total):
        if total is None:
            return None, None, None, None, *(None for _ in ctx.shapes)
        gradients = (
            total[start : start + shape.numel()].view(shape)
            for start, shape in zip(ctx.starts, ctx.shapes, strict=True)
        )
        return None, None, None, None, *gradients


def shared_linear(x: Tensor, shared: SharedWeight, total: Tensor) -> tuple[Tensor, Tensor]:
    """(x W' + b, the next `total`), for a weight from `share`.

    x: `[..., K]`, floating; it is cast to the weight's dtype. total: from `share`, or from the call before this one.
    Returns `[..., N]` in the weight's dtype. Differentiable once, in x and in the parameters.

    Raises ShapeError, DtypeError.
    """
    y, _, total = shared_branch(x, shared, total, [len(shared.weight)])
    return y, total


def shared_branch(x: Tensor, shared: SharedWeight, total: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """shared_linear whose result is split into views of `sizes`, which add up to N; x again, for whoever reads it next,
    its gradient summed by the products as in branch_linear; and the next `total`. The gradients of the views are taken
    as they come, not side by side in a copy.
    """
    checks.tensors(x=x, total=total)
    checks.floating(x=x, total=total)
    checks.rows(x=x)
    checks.shape("x", x, (*x.shape[:-1], shared.weight.shape[1]), "the columns of the weight")
    operand = x.to(shared.weight.dtype)
    *parts, again, total = _SharedLinear.apply(operand, shared.weight, shared.bias, shared.start, total, sizes)
    return *parts, (again if operand is x else x), total


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, start, total, sizes):
        parts = F.linear(x, weight, bias).split(sizes, dim=-1)
        return *parts, x.view_as(x), _stand_in(total, total.dtype, total.numel())

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.start, total, ctx.sizes = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.size, ctx.dtype = bias is not None, total.numel(), total.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        *dys, dx, total = gradients
        if total is None and any(dy is not None for dy in dys):
            total = x.new_zeros(ctx.size, dtype=ctx.dtype)
        rows, of_input = x.reshape(-1, x.shape[-1]), InputGradient(dx, x, ctx.needs_input_grad[0])
        first, end = 0, ctx.start + weight.numel()
        for dy, size, part in zip(dys, ctx.sizes, weight.split(ctx.sizes), strict=True):
            if dy is not None:
                dy = dy.reshape(-1, size)
                of_input.add(dy, part)
                place = ctx.start + first * weight.shape[1]
                portable.add_product(total[place : place + part.numel()].view(part.shape), dy.t(), rows)
                if ctx.has_bias:
                    total[end + first : end + first + size] += dy.sum(0, dtype=ctx.dtype)
            first += size
        return of_input.result(), None, None, None, total, None


class InputGradient:
    """The gradient of x `[..., K]`, to which products add theirs (beta = 1): `dx` is what came in, or None."""

    def __init__(self, dx: Tensor | None, x: Tensor, wanted: bool):
        self._wanted, self._shape, self._own = wanted, x.shape, False
        self._sum = dx.reshape(-1, x.shape[-1]) if wanted and dx is not None else None

    def add(self, dy: Tensor, weight: Tensor) -> None:
        """Adds dy W, of dy `[rows, N]` and weight `[N, K]`."""
        if not self._wanted:
            return
        if self._sum is None:
            self._sum = dy @ weight
        elif self._own:
            self._sum.addmm_(dy, weight)
        else:  # what came in is not ours to write to
            self._sum = torch.addmm(self._sum, dy, weight)
        self._own = True

    def result(self) -> Tensor | None:
        return None if self._sum is None else self._sum.view(self._shape)


def _stand_in(like: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """`[size]` of one number that nobody reads. A compiler traces with gradients laid out like this, and drops it."""
    if torch.compiler.is_compiling():
        return like.new_empty(size, dtype=dtype)
    return like.new_empty((), dtype=dtype).expand(size)


def widened(parameter: Tensor) -> Tensor:
    """A parameter in float32 at least, so that the gradients of all its uses are summed there, and reach it in its
    grad_dtype: for biases and norms in 16 bits."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter if parameter.dtype == wide else _Widen.apply(parameter, wide)


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(parameter, dtype):
        return parameter.to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def can_share() -> bool:
    """Whether the functions above serve: they can be differentiated once, backward, and not by torch.func's transforms;
    so not under use_backend("reference"), which can be otherwise."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return not (forward_mode or torch._C._are_functorch_transforms_active() or is_asked_for("reference"))


can_share._dynamo_marked_constant = True  # as in fastbert.backend
