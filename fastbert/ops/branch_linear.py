"""Linear layers whose input goes on besides, as a residual connection or into each other's neighbour.

Left to autograd, the gradients of such an input are written by one product each and then added up, pass by pass. Here
every product adds to what is there (beta = 1). q, k, v and the residual of a layer, T rows of C columns in 16 bits: 6
tensors of 2 T C bytes to and from memory in place of 12; the residual of the feed-forward block: 2 in place of 4. For
BERT-base and 16,384 tokens that is 2.4 GB less, 0.8 ms of an H100's 20 ms.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.backend import is_asked_for
from fastbert.ops.shared_linear import InputGradient, can_share


def branch_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """x W' + b for each weight, and x again, for whoever reads it next.

    x: `[..., K]`; weights: `[N_i, K]`; biases: `[N_i]` or None, one for each. Results `[..., N_i]`, and x's own shape.
    Where the dtypes differ, under autocast, a compiler, torch.func or forward-mode differentiation, and for tensors
    that are more than tensors (quantised, sharded), this is F.linear and x itself.
    """
    same = all(weight.dtype == x.dtype for weight in weights) and not torch.is_autocast_enabled(x.device.type)
    plain = all(type(t) in (Tensor, nn.Parameter) for t in (x, *weights, *biases) if t is not None)
    if plain and same and torch.is_grad_enabled() and can_share() and not torch.compiler.is_compiling():
        return _BranchLinear.apply(x, len(weights), *weights, *biases)
    return *(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)), x


def pays_off(x: Tensor) -> bool:
    """Whether the bias and the gradients of linear layers are better taken out of them, for the ops around to add: on a
    GPU, where that saves memory traffic. A CPU's products add biases for nothing, and what is above costs it more than
    it saves. Where a backend was asked for, its ops are to run.
    """
    return x.is_cuda or is_asked_for()


class _BranchLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, count, *parameters):
        pairs = zip(parameters[:count], parameters[count:], strict=True)
        return *(F.linear(x, weight, bias) for weight, bias in pairs), x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.count, *parameters = inputs
        ctx.save_for_backward(x, *parameters[: ctx.count])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        x, *weights = ctx.saved_tensors
        *dys, dx = gradients
        of_weights, of_biases = ctx.needs_input_grad[2 : 2 + ctx.count], ctx.needs_input_grad[2 + ctx.count :]
        rows, of_input = x.reshape(-1, x.shape[-1]), InputGradient(dx, x, ctx.needs_input_grad[0])
        dweights, dbiases = [None] * ctx.count, [None] * ctx.count
        for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            if dy is not None:
                dy = dy.reshape(-1, dy.shape[-1])
                of_input.add(dy, weight)
                dweights[i] = dy.t() @ rows if of_weights[i] else None
                dbiases[i] = dy.sum(0) if of_biases[i] else None
        return of_input.result(), None, *dweights, *dbiases
