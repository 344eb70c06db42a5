"""Which elements dropout keeps. With a seed: the one definition that every backend follows, so that dropped results can
be compared exactly. Without: PyTorch's generator, read in a way that is fast on a CPU.

Seeded masks come from Philox4x32 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011)
with 7 rounds and the key (seed & 0xffffffff, seed >> 32). One call gives 16 bytes: its four words in order, each little
endian. An element is kept iff its byte >= threshold(p).

    attention, element (b, h, i, j):  counter (j // 16, i, h, b), byte j % 16; i and j count within sequence b
    row ops, element (row, col):      counter (col // 16, row & 0xffffffff, row >> 32, 0), byte col % 16
"""

import math

import torch
from torch import Tensor

ROUNDS = 7
BYTES = 16
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, seed: int, rounds: int = ROUNDS) -> Words:
    """Four random words for every counter: int64 tensors with values below 2**32. The four counter words broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(rounds):
        # int64 products wrap, which keeps their low 64 bits right; the mask undoes the sign that >> drags in.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """Bytes below this are dropped: 256 p, rounded, and never 0 or 256. For 0 < p < 1."""
    return min(max(round(256 * p), 1), 255)


def keep_scale(p: float) -> float:
    """What a kept value is multiplied by: the inverse of the exact probability of being kept."""
    return 256 / (256 - threshold(p))


def attention_keep(
    seed: int, p: float, batch: int, heads: int, length: int, *, first: int = 0, device: torch.device | None = None
) -> Tensor:
    """bool [batch, heads, length, length], True where a probability is kept, for sequences first, first + 1, ..."""
    b, h, i = (torch.arange(n, device=device) for n in (batch, heads, length))
    j = torch.arange(-(-length // BYTES), device=device)
    return _kept((j, i[:, None], h[:, None, None], b[:, None, None, None] + first), seed, p, length)


def row_keep(seed: int, p: float, rows: int, columns: int, *, device: torch.device | None = None) -> Tensor:
    """bool [rows, columns], True where an element is kept."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(-(-columns // BYTES), device=device)
    return _kept((column, row & _WORD, row >> 32, torch.zeros_like(row)), seed, p, columns)


def random_keep(shape: tuple[int, ...], p: float, *, device: torch.device | None = None) -> tuple[Tensor, float]:
    """A mask from PyTorch's generator, uint8, 1 where an element is kept, and the factor for what is kept.

    p is rounded to a multiple of 2^-16, because four elements share one random int64: on a CPU this takes 1 ns per
    element, bernoulli_ 6 and F.dropout 10. uint8, because bool is slower to compare into and to convert from.
    """
    drop = min(round(65536 * p), 65535)
    count = math.prod(shape)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 4),), dtype=torch.int64, device=device)
    bits = words.view(torch.int16)[:count].view(shape)
    return torch.ge(bits, drop - 32768, out=torch.empty_like(bits, dtype=torch.uint8)), 65536 / (65536 - drop)


def _kept(counter: Words, seed: int, p: float, columns: int) -> Tensor:
    if torch.compiler.is_compiling():
        return _kept_opaque(*counter, seed if seed < 2**63 else seed - 2**64, p, columns)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, seed)), dim=-1)
    return (words.to(torch.int32).view(torch.uint8).flatten(-2) >= threshold(p))[..., :columns]


# Compilers must not look inside: fused, the products that wrap are overflows, which C++ takes for impossible (the masks
# came out wrong), and Inductor's symbolic arithmetic on counters grows exponentially with the rounds.
@torch.library.custom_op("fastbert::philox_kept", mutates_args=())
def _kept_opaque(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int, p: float, columns: int) -> Tensor:
    return _kept((c0, c1, c2, c3), seed, p, columns).contiguous()


@_kept_opaque.register_fake
def _(c0, c1, c2, c3, seed, p, columns):
    return c0.new_empty(
        (*torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)[:-1], columns), dtype=torch.bool
    )
