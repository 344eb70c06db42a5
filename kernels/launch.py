"""What the launchers of attention kernels are told besides q, k and v, and how launches follow each other."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import torch
import triton
from torch import Tensor

LOG2_E = math.log2(math.e)
# Arguments whose divisors are no reason to compile anew
VARYING = ["batch", "length", "total", "stride_mb", "drop"]


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


class Relative(NamedTuple):
    """NEZHA's sinusoids, of angles n theta_k, in rows of BLOCK_D elements, zeros from D on.

    waves: [N, BLOCK_D] in q's dtype, sines and cosines interleaved, for n = -N/2, 1 - N/2, ... phases: float32 [2, N,
    BLOCK_D/2], cosines and sines for n = R + N/2, R + N/2 - 1, ... N/2 is 512, for two tiles of 256 rows at most, more
    than R, or than max_length if that is less. edges: [16, BLOCK_D] in q's dtype, T[0], T[2R] and zeros. radius: R, at
    most 2^30."""

    phases: Tensor
    waves: Tensor
    edges: Tensor
    radius: int


class Dropout(NamedTuple):
    """seed: int64 [1]. drop: philox.py drops an element for so many bytes of 256."""

    seed: Tensor
    drop: int


def seed_drop_factor(dropout: Dropout | None) -> tuple[Tensor | None, int, float]:
    """(seed, drop, what kept elements are multiplied by)."""
    seed, drop = (None, 0) if dropout is None else dropout
    return seed, drop, 256 / (256 - drop)


def alignment(strides: Sequence[int]) -> int:
    """The largest power of two below 16 that divides all of them; 1 also if 16 does, which Triton sees by itself."""
    common = math.gcd(*strides)
    power = common & -common
    return power if 0 < power < 16 else 1


def chosen(
    configs: Mapping[int, Mapping[str, tuple]], kernel: str, q: Tensor, traits: Set[str]
) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) for q's device, dtype and head dim, of a table for major compute capabilities
    (8: all that it lacks; 32: float32) by kernel and, where it matters, trait; for head dims up to 64 and above."""
    if q.dtype == torch.float32:
        table = configs[32]
    else:
        major = 8 if triton.knobs.runtime.interpret else torch.cuda.get_device_capability(q.device)[0]
        table = configs.get(major, configs[8])
    special = (table[name] for trait in sorted(traits) if (name := f"{kernel} {trait}") in table)
    return next(special, table[kernel])[q.shape[-1] > 64]


def early(like: Tensor, wanted: bool = True) -> dict:
    """Options of a launch that may begin before the one before it has ended (programmatic dependent launch), from sm_90
    on: its kernel reads nothing of others before tile.after_the_launch_before()."""
    can = wanted and not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(like.device) >= (9, 0)
    return {"EARLY": can} | ({"launch_pdl": True} if can else {})
