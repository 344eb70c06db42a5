"""What the attention ops share: the checks of their common arguments, and autocast."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastbert.backend import pick
from fastbert.errors import ConfigError, DtypeError, ShapeError
from fastbert.ops import checks, fused_attention


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float | None,
    dropout_p: float,
    seed: int | None,
    *,
    pairs: bool = False,
) -> None:
    """Raise ShapeError, DtypeError or ConfigError for the first argument that is wrong. `pairs`: D must be even."""
    optional = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
    checks.tensors(*optional, q=q, k=k, v=v, **optional)
    rank, layout = (4, "[B, L, H, D]") if cu_seqlens is None else (3, "[T, H, D], as cu_seqlens is given")
    if q.dim() != rank:
        raise ShapeError(f"q: got shape {tuple(q.shape)}, expected {layout}")
    checks.shape("k", k, q.shape, "as q")
    checks.shape("v", v, q.shape, "as q")
    checks.floating(q=q, k=k, v=v)
    if not torch.is_autocast_enabled(q.device.type):
        checks.same_dtype(q=q, k=k, v=v)
    checks.same_device(q=q, k=k, v=v, **optional)
    if q.shape[-1] == 0 or (pairs and q.shape[-1] % 2):
        expected = "an even number of at least 2" if pairs else "at least 1"
        raise ShapeError(f"q: got head dim {q.shape[-1]}, the last of {tuple(q.shape)}, expected {expected}")
    if scale is not None:
        checks.number("scale", scale, lambda x: abs(x) < math.inf, "None or a finite number")
    checks.dropout(dropout_p, seed)
    if cu_seqlens is not None:
        if key_padding_mask is not None:
            raise ShapeError("key_padding_mask: got one besides cu_seqlens, expected None: packed rows have no padding")
        check_packed(cu_seqlens, max_seqlen, q.shape[0])
    elif max_seqlen is not None:
        raise ShapeError(f"max_seqlen: got {max_seqlen} without cu_seqlens, expected None for dense q")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise DtypeError(f"key_padding_mask: got {key_padding_mask.dtype}, expected torch.bool, True for a token")
        checks.shape("key_padding_mask", key_padding_mask, q.shape[:2], "[B, L] of q")


def call(
    op: str,
    twins: Mapping[str, Callable[..., Tensor]],
    asked: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **arguments,
) -> Tensor:
    """The twin that is picked for q, called with q, k, v; under autocast in its dtype (float64 stays), and
    without casts inside."""
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
        checks.same_dtype(q=q, k=k, v=v)
        with torch.autocast(device, enabled=False):
            return call(op, twins, asked, q, k, v, **arguments)
    return twins[pick(op, fused_attention.backends(q), asked, q, arguments["scale"])](q, k, v, **arguments)


def check_packed(cu_seqlens: Tensor, max_seqlen: int | None, tokens: int) -> None:
    """Values are read on the CPU only: on a GPU the answer would have to be waited for."""
    if cu_seqlens.dtype != torch.int32:
        raise DtypeError(f"cu_seqlens: got {cu_seqlens.dtype}, expected torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ShapeError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected [B + 1]")
    if torch.compiler.is_compiling():
        return
    if max_seqlen is not None and (not isinstance(max_seqlen, int) or max_seqlen < 0):
        raise ConfigError(f"max_seqlen: got {max_seqlen!r}, expected the longest sequence's length, an int, or None")
    if cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ShapeError(f"cu_seqlens: got {ends[0]} as its first value, expected 0")
    lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    if min(lengths, default=0) < 0:
        place = next(i for i, length in enumerate(lengths) if length < 0)
        raise ShapeError(f"cu_seqlens[{place + 1}]: got {ends[place + 1]} after {ends[place]}, expected no decrease")
    if ends[-1] != tokens:
        raise ShapeError(f"cu_seqlens: got {ends[-1]} as its last value, expected {tokens}, the packed rows")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ShapeError(f"max_seqlen: got {max_seqlen}, expected at least {max(lengths)}, the longest in cu_seqlens")
