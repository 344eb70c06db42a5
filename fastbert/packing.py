"""Padded <-> packed. Inside the models a batch is the T real tokens of all sequences, one after another, and
`cu_seqlens` that says where each begins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.errors import DtypeError, ShapeError


@dataclass(frozen=True)
class Layout:
    """How the rows inside a model relate to the caller's batch.

    Packed (the rule): rows are tokens `[T, ...]`; `cu_seqlens` int32 `[B + 1]`, `max_seqlen`; `indices` int64 `[T]` are
    the places of the rows in the flattened `[B * L]` of the caller, None where they are the same or the caller packed.
    Dense (the exception: a mask with holes, where packing would move tokens closer together than a family with relative
    positions may see): rows are `[B, L, ...]` and `key_padding_mask` bool `[B, L]` is set.
    """

    padded_shape: tuple[int, int] | None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    indices: Tensor | None = None
    key_padding_mask: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of sequences, and the length of the longest (that of all, where they are padded)."""
        return self.padded_shape or (len(self.cu_seqlens) - 1, self.max_seqlen)

    @property
    def attention(self) -> dict:
        """The keyword arguments by which an attention op knows the sequences."""
        if self.key_padding_mask is not None:
            return {"key_padding_mask": self.key_padding_mask}
        return {"cu_seqlens": self.cu_seqlens, "max_seqlen": self.max_seqlen}

    def pack(self, x: Tensor) -> Tensor:
        """The caller's `[B, L, ...]` (or packed `[T, ...]`) as rows."""
        if self.padded_shape is None or self.key_padding_mask is not None:
            return x
        x = x.flatten(0, 1)
        return x if self.indices is None else x[self.indices]

    def unpack(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """Rows as the caller's `[B, L, ...]` (or packed `[T, ...]`), `fill` at padded positions."""
        if self.key_padding_mask is not None:
            return rows.masked_fill(~self.key_padding_mask.reshape(self.padded_shape + (1,) * (rows.dim() - 2)), fill)
        if self.padded_shape is None:
            return rows
        if self.indices is not None:
            padded = rows.new_full((self.padded_shape[0] * self.padded_shape[1], *rows.shape[1:]), fill)
            rows = padded.index_put((self.indices,), rows)
        return rows.unflatten(0, self.padded_shape)

    def first(self, rows: Tensor) -> Tensor:
        """The row of each sequence's first real token, `[B, ...]`; zeros for a sequence without one."""
        if self.key_padding_mask is not None:
            real = self.key_padding_mask.any(dim=1)
            picked = rows[torch.arange(rows.shape[0], device=rows.device), self.key_padding_mask.int().argmax(dim=1)]
            return _only(picked, real)
        if rows.shape[0] == 0:
            return rows.new_zeros((self.sizes[0], *rows.shape[1:]))
        return self.of_real(rows[self.starts(rows.shape[0])])

    def last(self, rows: Tensor) -> Tensor:
        """The row of each sequence's last real token, `[B, ...]`; zeros for a sequence without one."""
        if self.key_padding_mask is not None:
            mask = self.key_padding_mask
            places = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
            return _only(rows[torch.arange(rows.shape[0], device=rows.device), places], mask.any(dim=1))
        if rows.shape[0] == 0:
            return rows.new_zeros((self.sizes[0], *rows.shape[1:]))
        return self.of_real(rows[(self.cu_seqlens[1:].long() - 1).clamp(min=0)])

    def starts(self, tokens: int) -> Tensor:
        """The place of each sequence's first row among `tokens` packed ones, int64 `[B]`; for a sequence without one
        any place that there is."""
        return self.cu_seqlens[:-1].long().clamp(max=tokens - 1)

    def of_real(self, picked: Tensor) -> Tensor:
        """What was picked for each packed sequence, `[B, ...]`; zeros for one without a token."""
        return _only(picked, self.cu_seqlens[1:] > self.cu_seqlens[:-1])


def _only(picked: Tensor, real: Tensor) -> Tensor:
    return picked.masked_fill(~real.reshape(-1, *(1,) * (picked.dim() - 1)), 0)


def padded_layout(shape: tuple[int, int], attention_mask: Tensor | None, device, *, keep_distances: bool) -> Layout:
    """The layout of a padded batch `[B, L]`.

    attention_mask: bool or integer `[B, L]`, non-zero where a token is real; None: all are.
    keep_distances: the family reads relative positions, so a row whose real tokens are not one run from its first
      column on must stay where it is.

    `ShapeError` or `DtypeError` for a mask that does not fit.
    """
    batch, length = shape
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch, length):
            raise ShapeError(
                f"attention_mask has shape {list(attention_mask.shape)}; expected {[batch, length]}, the shape of "
                "input_ids"
            )
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise DtypeError(
                f"attention_mask is {attention_mask.dtype}; expected bool or an integer type, non-zero where a "
                "token is real"
            )
        mask = attention_mask.bool()
        if not bool(mask.all()):
            return _ragged(mask, keep_distances)
    cu_seqlens = torch.arange(0, batch * length + 1, max(length, 1), dtype=torch.int32, device=device)
    if length == 0:
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    return Layout(shape, cu_seqlens, length)


def _ragged(mask: Tensor, keep_distances: bool) -> Layout:
    shape = tuple(mask.shape)
    lengths = mask.sum(dim=1, dtype=torch.int32)
    if keep_distances:
        prefix = torch.arange(shape[1], device=mask.device) < lengths[:, None]
        if not torch.equal(prefix, mask):
            return Layout(shape, key_padding_mask=mask)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Layout(shape, cu_seqlens, int(lengths.max()), mask.flatten().nonzero().squeeze(1))


def packed_layout(cu_seqlens: Tensor, max_seqlen: int | None) -> Layout:
    """The layout of a batch that the caller packed; max_seqlen is computed where it is not given."""
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
    return Layout(None, cu_seqlens, max_seqlen)


def positions_in_sequence(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The index of each packed token in its own sequence, int64 `[T]`."""
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=tokens)
    return torch.arange(tokens, device=cu_seqlens.device) - starts
