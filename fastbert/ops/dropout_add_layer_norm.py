"""LN(residual + dropout(x)), the end of both halves of a post-LN layer."""

from torch import Tensor

from fastbert import portable, reference
from fastbert.backend import pick, serves
from fastbert.ops import checks

_BACKENDS = {"torch": serves, "reference": serves}


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """LN(residual + dropout(x)) over the last dimension, with eps inside the root: see fastbert.reference.

    x, residual: [..., C], any floating dtypes (under autocast x may be 16-bit and residual float32). weight, bias: [C].
    dropout_p: 0 <= dropout_p < 1. seed: None takes PyTorch's generator; an int gives the same mask in every backend.
    Returns [..., C] in residual's dtype. Statistics are float32 at least. Differentiable in all four tensors.

    Raises ShapeError, DtypeError, ConfigError (eps, dropout_p, seed), BackendError.
    Source: Vaswani et al. (2017), arXiv 1706.03762, section 5.4; Ba et al. (2016), arXiv 1607.06450.
    """
    checks.tensors(x=x, residual=residual, weight=weight, bias=bias)
    checks.floating(x=x, residual=residual, weight=weight, bias=bias)
    checks.same_device(x=x, residual=residual, weight=weight, bias=bias)
    checks.rows(x=x)
    checks.shape("residual", residual, x.shape, "as x")
    checks.shape("weight", weight, x.shape[-1:], "the last dimension of x")
    checks.shape("bias", bias, x.shape[-1:], "the last dimension of x")
    checks.epsilon(eps)
    checks.dropout(dropout_p, seed)
    name = pick("dropout_add_layer_norm", _BACKENDS, backend)
    twin = portable if name == "torch" else reference
    return twin.dropout_add_layer_norm(x, residual, weight, bias, eps=eps, dropout_p=dropout_p, seed=seed)
