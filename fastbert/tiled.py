"""Attention between matrix products: scores, softmax, dropout and the weighted sum for a tile of query rows at a time,
forward and backward written out. What portable.py runs where PyTorch's own attention is slow (dropout on a CPU) or
cannot serve (relative positions, dropout that follows a seed).

Relative positions add two sums over the table T of reference.sinusoids: q_i.T[clip(j - i, -R, R) + R] to the scores and
sum_j P_ij T[clip(j - i, -R, R) + R] to the output. Neither needs a gather, or anything of size [L, L, D]:

- From 2R + 1 tokens on, both are products with all of T, [rows, D] x [D, 2R + 1] and [rows, 2R + 1] x [2R + 1, D].
  Their [rows, 2R + 1] side is the band |j - i| <= R of the scores, which is a strided view (Tile.band); outside of it
  a query has one term for all keys to the left and one for all to the right.
- Below, where such a band would be wider than the scores, both are products per query i, over all heads and sequences,
  with the rows of T for all keys j. If the keys are taken in reverse, these are a window of a table that has a row for
  each offset, L - 1 down to 1 - L; the windows of all queries together are a strided view as well (_windows).
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert.philox import attention_keep, keep_scale, random_keep

# Query rows of a tile: its [heads, rows, L] scores should stay in cache. Between 64 and 512, times differ by 10 %.
TILE_ROWS = 128
# On a CPU, short sequences of equal length share a tile until it has this many scores: each call then does more work.
TILE_SCORES = 2**18
# On a CPU, sequences up to this length keep their probabilities for the backward, which saves 15 % of the time of both
# passes. With dropout, they and its mask are most of what a layer keeps: with 12 heads of 26, 15 of 27 MiB for a
# sequence of 512 tokens and 60 of 83 for one of 1024. Longer sequences, and a GPU, compute them again.
SAVED_LENGTH = 1024


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    first: int,
    *,
    scale: float,
    dropout_p: float,
    seed: int | None,
    max_relative_position: int | None = None,
) -> Tensor:
    """Attention over a dense batch [B, L, H, D]; relative if max_relative_position is given.

    mask: bool [B, L], True for a real key; what k and v hold elsewhere must be finite. first: the number of the first
    sequence, for the seed. 16-bit inputs are computed in float32.
    """
    if q.numel() == 0:
        return q + k + v  # as empty as the answer, and differentiable in all three
    batch, length, heads, head_dim = q.shape
    dtype, on_cpu = torch.promote_types(q.dtype, torch.float32), q.device.type == "cpu"
    table = None
    if max_relative_position is not None:
        table = _sinusoids(max_relative_position, head_dim, dtype, q.device)
        if length < table.shape[0]:
            table = _unclipped(table, length)
    reverse = _is_windowed(table, length)
    if reverse:
        k, v, mask = k.flip(1), v.flip(1), None if mask is None else mask.flip(1)
    group = max(1, TILE_SCORES // (heads * length**2)) if on_cpu else batch
    save = on_cpu and length <= SAVED_LENGTH and torch.is_grad_enabled()
    outputs = []
    for start, *qkv in zip(range(0, batch, group), *(t.split(group) for t in (q, k, v)), strict=True):
        size = qkv[0].shape[0]
        keep, factor = _keep(dropout_p, seed, (size, heads, length, length), first + start, reverse, q.device)
        bias = None if mask is None else _score_bias(mask[start : start + size], heads, dtype)
        folded = (t.to(dtype).transpose(1, 2).flatten(0, 1) for t in qkv)
        output = _TiledAttention.apply(*folded, table, bias, keep, scale, factor, save)
        outputs.append(output.unflatten(0, (size, heads)).transpose(1, 2))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if mask is not None:
        output = output.where(mask.any(dim=1)[:, None, None, None], 0)
    return output.to(q.dtype)


def attendable(mask: Tensor) -> Tensor:
    """The mask, but all True for a sequence without a real key, so that its softmax is defined."""
    return mask | ~mask.any(dim=1, keepdim=True)


class _TiledAttention(torch.autograd.Function):
    """q, k, v [N, L, D], N counting the heads of all sequences. table: see _scores. bias [N, 1, L]: 0 for a real key,
    -inf for a masked one, or None. keep uint8 [N, L, L], or None; what it keeps is multiplied by `factor`.

    The backward needs the same two sums over the table with their roles exchanged, so _scores and _mix serve both ways.
    """

    @staticmethod
    def forward(ctx, q, k, v, table, bias, keep, scale, factor, save):
        output = torch.empty_like(v, memory_format=torch.contiguous_format)
        saved = []
        for rows in _row_tiles(q.shape[1], table):
            p = _probabilities(q[:, rows], k, table, bias, scale, rows.start)
            if save:
                saved.append(p.full)
            if keep is not None:
                p = p._replace(full=p.full.clone())
                p.inner.mul_(keep[:, rows].to(q.dtype))
            output[:, rows] = _mix(p, v, table, factor)
        ctx.save_for_backward(q, k, v, table, bias, keep, output, *saved)
        ctx.factors = scale, factor
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, table, bias, keep, output, *saved = ctx.saved_tensors
        scale, factor = ctx.factors
        dq, dk, dv = torch.empty_like(output), torch.zeros_like(output), torch.zeros_like(output)
        with torch.autocast(q.device.type, enabled=False):
            for number, rows in enumerate(_row_tiles(q.shape[1], table)):
                q_rows, do_rows = q[:, rows], do[:, rows]
                dp = _scores(do_rows, v, table, factor, rows.start, pad=0.0)
                if saved:
                    p = dp._replace(full=saved[number])
                else:
                    p = _probabilities(q_rows, k, table, bias, scale, rows.start)
                dropped = p.inner
                if keep is not None:
                    kept = keep[:, rows].to(q.dtype)
                    dp.inner.mul_(kept)
                    dropped = kept.mul_(p.inner)
                dv.baddbmm_(dropped.mT, do_rows, alpha=factor)
                delta = (do_rows * output[:, rows]).sum(dim=-1, keepdim=True)
                ds = dp._replace(full=dp.full.sub_(delta).mul_(p.full))
                dk.baddbmm_(ds.inner.mT, q_rows, alpha=scale)
                dq[:, rows] = _mix(ds, k, table, scale)
        return dq, dk, dv, None, None, None, None, None, None


class Tile(NamedTuple):
    """A number for each of a tile's query rows and each key, [N, rows, L], amid columns that hold every row's band.

    The band of query i are the keys i - R ... i + R. Where it begins in `full` moves by one column per row, so a view
    whose rows are one element further apart than those of `full` shows it as [N, rows, 2R + 1].
    """

    full: Tensor
    left: int
    length: int
    start: int
    radius: int

    @property
    def inner(self) -> Tensor:
        return self.full[:, :, self.left : self.left + self.length]

    @property
    def band(self) -> Tensor:
        """Valid because `full` is always contiguous and at the start of its storage."""
        count, rows, width = self.full.shape
        size, stride = (count, rows, 2 * self.radius + 1), (rows * width, width + 1, 1)
        return self.full.as_strided(size, stride, self.left + self.start - self.radius)

    @property
    def split(self) -> int:
        """The column that parts what is left of a band from what is right of one: a tile has at most 2R rows, so no
        column is left of one row's band and right of another's."""
        return self.left + self.start + self.radius


def _row_tiles(length: int, table: Tensor | None) -> Iterator[slice]:
    banded = table is not None and not _is_windowed(table, length)
    rows = min(TILE_ROWS, table.shape[0] - 1) if banded else TILE_ROWS
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))


def _probabilities(q: Tensor, k: Tensor, table: Tensor | None, bias: Tensor | None, scale: float, start: int) -> Tile:
    scores = _scores(q, k, table, scale, start, pad=float("-inf"))
    if bias is not None:
        scores.inner.add_(bias)
    return scores._replace(full=scores.full.softmax(dim=-1))


def _scores(a: Tensor, b: Tensor, table: Tensor | None, alpha: float, start: int, *, pad: float) -> Tile:
    """alpha a_i.(b_j + T[clip(j - i) + R]) for the rows a [N, rows, D], the first of which is number `start`, and all
    b [N, L, D]. table: T [2R + 1, D], or what _unclipped makes of it if b is in reverse, or None for no second term.
    Columns of the tile beyond the keys hold `pad`."""
    count, rows, _ = a.shape
    length = b.shape[1]
    if table is None or _is_windowed(table, length):
        tile = Tile(_product(a, b.mT, alpha), 0, length, start, 0)
        if table is not None:
            terms = torch.bmm(a.transpose(0, 1), _windows(table, start, rows, length).mT)
            tile.full.add_(terms.transpose(0, 1), alpha=alpha)
        return tile
    radius = table.shape[0] // 2
    left, right = max(0, radius - start), max(0, start + rows + radius - length)
    tile = Tile(a.new_empty(count, rows, left + length + right), left, length, start, radius)
    terms = _product(a, table.mT.expand(count, -1, -1), alpha)
    tile.full[:, :, : tile.split] = terms[:, :, :1]
    tile.full[:, :, tile.split :] = terms[:, :, -1:]
    tile.band.copy_(terms)
    tile.inner.baddbmm_(a, b.mT, alpha=alpha)
    tile.full[:, :, :left] = pad
    tile.full[:, :, left + length :] = pad
    return tile


def _mix(weights: Tile, b: Tensor, table: Tensor | None, alpha: float) -> Tensor:
    """alpha sum_j weights_ij (b_j + T[clip(j - i) + R]) [N, rows, D]. b and table: as in _scores. Columns of the tile
    beyond the keys must hold zeros."""
    output = _product(weights.inner, b, alpha)
    if table is None:
        return output
    count, rows, length = weights.inner.shape
    if _is_windowed(table, length):
        terms = torch.bmm(weights.full.transpose(0, 1), _windows(table, weights.start, rows, length))
        return output.add_(terms.transpose(0, 1), alpha=alpha)
    terms = weights.band.clone(memory_format=torch.contiguous_format)
    weights.band.zero_()
    left = weights.full[:, :, : weights.split].sum(dim=-1)
    right = weights.full[:, :, weights.split :].sum(dim=-1)
    weights.band.copy_(terms)
    terms[:, :, 0] += left
    terms[:, :, -1] += right
    return output.baddbmm_(terms, table.expand(count, -1, -1), alpha=alpha)


def _unclipped(table: Tensor, length: int) -> Tensor:
    """T's row for each offset j - i there is, in reverse: [2L - 1, D], from offset L - 1 down to 1 - L."""
    radius = table.shape[0] // 2
    offset = torch.arange(length - 1, -length, -1, device=table.device).clamp(-radius, radius)
    return table[offset + radius]


def _is_windowed(table: Tensor | None, length: int) -> bool:
    """Whether the table is of the kind _unclipped makes; T itself serves lengths from 2R + 1 on."""
    return table is not None and table.shape[0] == 2 * length - 1


def _windows(table: Tensor, start: int, rows: int, length: int) -> Tensor:
    """[rows, L, D]: for query i and key j, in reverse, the table's row i + j; a view that overlaps itself."""
    width = table.shape[1]
    return table.as_strided((rows, length, width), (width, width, 1), start * width)


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=alpha)


def _keep(
    p: float, seed: int | None, shape: tuple[int, ...], first: int, reverse: bool, device: torch.device
) -> tuple[Tensor | None, float]:
    """Which of the probabilities [B, H, L, L] dropout keeps, uint8 [B H, L, L], and the factor for those."""
    if p == 0.0:
        return None, 1.0
    if seed is None:
        keep, factor = random_keep(shape, p, device=device)
    else:
        batch, heads, length, _ = shape
        keep, factor = attention_keep(seed, p, batch, heads, length, first=first, device=device), keep_scale(p)
        keep = keep.flip(3) if reverse else keep
    return keep.flatten(0, 1).view(torch.uint8), factor


def _score_bias(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B H, 1, L]: 0 where a key may be attended to, -inf where not."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~attendable(mask), float("-inf"))
    return bias.repeat_interleave(heads, dim=0)[:, None]


def kept_table(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """build(*args), a constant, kept for the next call with these arguments. Autograd may save it even if it was built
    in inference mode. A compiler sees `build` alone, and keeps or recomputes the table as it sees fit. So does a mode
    in which new tensors are not plain (FakeTensorMode): those are of no use outside of it, nor are plain ones inside.
    """

    @lru_cache(maxsize=32)
    def kept(*args):
        with torch.inference_mode(False):
            return build(*args)

    @wraps(build)
    def table(*args):
        plain = not torch.compiler.is_compiling() and type(torch.empty(0, device="cpu")) is Tensor
        return kept(*args) if plain else build(*args)

    return table


@kept_table
def _sinusoids(radius: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    angle = angles(2 * radius + 1, head_dim, 10000.0)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).to(device, dtype)


def angles(positions: int, head_dim: int, theta: float, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
    """float64 [positions, D/2], whatever the default device is: m theta^(-2k/D) for m = first, first + 1, ..."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    return torch.outer(torch.arange(first, first + positions, dtype=torch.float64, device=device), frequencies)
