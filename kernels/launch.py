"""What the launchers of attention kernels are told besides q, k and v."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
from torch import Tensor


class Sequences(NamedTuple):
    """How rows make sequences, and which keys are real: [B, L, ...] with a mask bool [B, L] or None, or [T, ...] with
    cu_seqlens int32 [B + 1]. No sequence is longer than max_length."""

    max_length: int
    mask: Tensor | None = None
    ends: Tensor | None = None

    def grid(self, q: Tensor, block: int) -> tuple[int]:
        if self.ends is None:
            tiles = q.shape[0] * triton.cdiv(q.shape[1], block)
        else:
            tiles = q.shape[0] // block + self.ends.numel() - 1
        return (tiles * q.shape[-2],)

    def arguments(self, q: Tensor) -> tuple[int, int, int, int]:
        """batch, length, total, heads."""
        batch, length = q.shape[:2] if self.ends is None else (self.ends.numel() - 1, 0)
        return batch, length, math.prod(q.shape[:-2]), q.shape[-2]

    def operand(self, t: Tensor) -> Tensor:
        """t, or a copy where a kernel could not read it: elements of a head side by side, and offsets within a sequence
        that fit 32 bits."""
        fits = t.stride(-1) == 1 and (self.max_length + 256) * t.stride(-3) < 2**31
        return t if fits else t.contiguous()

    def strides(self, t: Tensor) -> tuple[int, int, int]:
        """From sequence to sequence (dense), row to row, head to head."""
        return (t.stride(0) if self.ends is None else 0, t.stride(-3), t.stride(-2))

    @property
    def mask_strides(self) -> tuple[int, int]:
        return (0, 0) if self.mask is None else self.mask.stride()


class Rotation(NamedTuple):
    """table: float32 [2, positions, D/2], cosines and sines, a row for each position below 256 and below max_length.
    values: v is turned like q and k, in pairs (2k, 2k + 1). interleaved: those are the pairs of q and k, else
    (k, k + D/2)."""

    table: Tensor
    values: bool
    interleaved: bool


class Dropout(NamedTuple):
    """seed: int64 [1]. drop: philox.py drops an element for so many bytes of 256."""

    seed: Tensor
    drop: int


def alignment(strides: Sequence[int]) -> int:
    """The largest power of two below 16 that divides all of them; 1 also if 16 does, which Triton sees by itself."""
    common = math.gcd(*strides)
    power = common & -common
    return power if 0 < power < 16 else 1
