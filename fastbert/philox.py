"""Which elements dropout keeps. With a seed: the one definition that every backend follows, so that dropped results can
be compared exactly. Without: PyTorch's generator, read in a way that is fast on a CPU.

Seeded masks come from Philox (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011) with 7
rounds. Its words give bytes in order, each little endian. An element is kept iff its byte >= threshold(p).

Row ops, element (row, col): byte col % 16 of Philox4x32 with the key (seed & 0xffffffff, seed >> 32) at the counter
(col // 16, row & 0xffffffff, row >> 32, 0).

Attention, element (b, h, i, j), i and j within sequence b: the first three words of Philox4x32 with the same key at
(h, b, 0, 1) are key, x and y of the head. Philox2x32 with that key at (i' ^ x, j' ^ y) decides over eight elements,
where i' is i without bits 3 and 4, and j' is j without bit 3: its word number (bit 4 of i), and in it the byte number
(bit 3 of i) + 2 (bit 3 of j). The matrix units of GPUs give one thread all eight, be they in a tile of queries by keys
or of keys by queries.
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


def philox2x32(c0: Tensor, c1: Tensor, key: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Two random words for every counter (c0, c1) and key: as philox4x32."""
    for _ in range(rounds):
        product = c0 * 0xD256D193
        c0, c1 = (product >> 32 & _WORD) ^ c1 ^ key, product & _WORD
        key = key + 0x9E3779B9 & _WORD
    return c0, c1


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
    sequences = torch.arange(first, first + batch, device=device)
    if torch.compiler.is_compiling():
        return _attention_keep_opaque(sequences, heads, length, signed(seed), p)
    return _attention_keep(sequences, heads, length, seed, p)


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


def signed(seed: int) -> int:
    """The same 64 bits as an int64, which operators and tensors take."""
    return seed if seed < 2**63 else seed - 2**64


def seed_tensor(seed: int | None, device: torch.device) -> Tensor:
    """What kernels read a seed from: int64 [1], on the device. None draws one there: a captured graph draws anew at
    every replay, and nothing waits for it."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), signed(seed), dtype=torch.int64, device=device)


def _kept(counter: Words, seed: int, p: float, columns: int) -> Tensor:
    if torch.compiler.is_compiling():
        return _kept_opaque(*counter, signed(seed), p, columns)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, seed)), dim=-1)
    return (_bytes(words) >= threshold(p)).flatten(-3)[..., :columns]


def _bytes(words: Tensor) -> Tensor:
    """[..., n] words as uint8 [..., n, 4], little endian."""
    return words.to(torch.int32).view(torch.uint8).unflatten(-1, (words.shape[-1], 4))


def _attention_keep(sequences: Tensor, heads: int, length: int, seed: int, p: float) -> Tensor:
    device = sequences.device
    h, o, zero = torch.arange(heads, device=device), torch.arange(8, device=device), sequences.new_zeros(())
    stream = torch.broadcast_tensors(*philox4x32((h, sequences[:, None], zero, zero + 1), seed))
    key, x, y, _ = (word[:, :, None, None] for word in stream)
    i, j = ((torch.arange(0, length, step, device=device)[:, None] + o).flatten() for step in (32, 16))
    # [B, H, i, j, 2, 4], where i lacks bits 3 and 4 and j bit 3
    decisions = _bytes(torch.stack(philox2x32(i[:, None] ^ x, j ^ y, key), dim=-1)) >= threshold(p)
    parts = decisions.view(*decisions.shape[:2], -(-length // 32), 8, -(-length // 16), 8, 2, 2, 2)
    keep = parts.permute(0, 1, 2, 6, 8, 3, 4, 7, 5).flatten(2, 5).flatten(3, 5)
    return keep[:, :, :length, :length].contiguous()


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


@torch.library.custom_op("fastbert::philox_attention_keep", mutates_args=())
def _attention_keep_opaque(sequences: Tensor, heads: int, length: int, seed: int, p: float) -> Tensor:
    return _attention_keep(sequences, heads, length, seed, p)


@_attention_keep_opaque.register_fake
def _(sequences, heads, length, seed, p):
    return sequences.new_empty((sequences.shape[0], heads, length, length), dtype=torch.bool)
