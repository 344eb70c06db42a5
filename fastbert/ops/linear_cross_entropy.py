"""The masked language model's loss over a large vocabulary, without the logits of all tokens in memory."""

import torch
from torch import Tensor

from fastbert import portable, reference
from fastbert.backend import pick, serves
from fastbert.errors import DtypeError
from fastbert.ops import checks

_BACKENDS = {"torch": serves, "reference": serves}


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
    row has a label. Differentiable once, in hidden, weight and bias. Backend "torch" spends nothing on rows without a
    label and keeps nothing of size [tokens, V]: it takes the gradients in the forward, from 64 MiB of logits at a time.

    Raises ShapeError, DtypeError, ConfigError (ignore_index, reduction), BackendError, and DataError for a label
    outside the vocabulary: on the CPU only, for on a GPU the check would have to wait for the device.
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
    name = pick("linear_cross_entropy", _BACKENDS, backend)
    twin = portable if name == "torch" else reference
    return twin.linear_cross_entropy(hidden, weight, bias, labels, ignore_index=ignore_index, reduction=reduction)
