"""The seeded generator against published answers, and its layout over elements against loops over single counters."""

import itertools
import shutil

import pytest
import torch

from fastbert.philox import attention_keep, keep_scale, philox2x32, philox4x32, random_keep, row_keep, threshold

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)  # digits of pi, as in the authors' test vectors
PI_KEY = 0x299F31D0A4093822


def words(counter, seed, rounds=7):
    return tuple(int(word) for word in philox4x32(tuple(torch.tensor(c) for c in counter), seed, rounds))


def byte(counter, seed, column):
    return words(counter, seed)[column % 16 // 4] >> 8 * (column % 4) & 0xFF


@pytest.mark.parametrize(
    ("rounds", "counter", "seed", "expected"),
    [
        (10, (0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (ONES,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (10, PI, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
        (7, (0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (ONES,) * 4, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (7, PI, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ],
)
def test_known_answers(rounds, counter, seed, expected):
    assert words(counter, seed, rounds) == expected


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (7, (0, 0), 0, (0x257A3673, 0xCD26BE2A)),
        (7, (ONES, ONES), ONES, (0xAB302C4D, 0x3DC9D239)),
        (7, PI[:2], PI[2], (0xBEDBBE6B, 0xE4C770B3)),
        (10, (0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
        (10, (ONES, ONES), ONES, (0x2C3F628B, 0xAB4FD7AD)),
        (10, PI[:2], PI[2], (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_known_answers_of_two_words(rounds, counter, key, expected):
    assert tuple(int(w) for w in philox2x32(*map(torch.tensor, (*counter, key)), rounds)) == expected


def test_attention_elements_follow_the_documented_counters():
    seed, p = 0x1234567890ABCDEF, 0.4
    keep = attention_keep(seed, p, batch=2, heads=3, length=67, first=5)
    assert keep.shape == (2, 3, 67, 67)
    for b, h, i, j in itertools.product((0, 1), (0, 2), (0, 7, 8, 16, 31, 45, 66), (0, 3, 8, 15, 16, 66)):
        key, x, y, _ = words((h, b + 5, 0, 1), seed)
        pair = philox2x32(*map(torch.tensor, ((i & ~24) ^ x, (j & ~8) ^ y, key)))
        chosen = int(pair[i >> 4 & 1]) >> 8 * ((i >> 3 & 1) + 2 * (j >> 3 & 1)) & 0xFF
        assert keep[b, h, i, j] == (chosen >= threshold(p))


def test_row_elements_follow_the_documented_counters():
    seed, p = 77, 0.4
    keep = row_keep(seed, p, rows=4, columns=37)
    assert keep.shape == (4, 37)
    for row, column in ((0, 0), (3, 36), (2, 15), (2, 16), (1, 31)):
        assert keep[row, column] == (byte((column // 16, row, 0, 0), seed, column) >= threshold(p))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("length", [8, 40])
def test_compiled_code_draws_the_same(length):
    """Compiled into one loop, the products that wrap would be undefined behaviour."""

    def draw():
        return attention_keep(2**64 - 5, 0.3, 2, 3, length), row_keep(5, 0.3, length, length)

    for compiled, eager in zip(torch.compile(draw, fullgraph=True)(), draw(), strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_sizes_of_nothing(shape):
    assert row_keep(1, 0.5, *shape).shape == shape
    assert attention_keep(1, 0.5, *shape, 3).shape == (*shape, 3, 3)
    assert attention_keep(1, 0.5, 2, 2, shape[0]).shape == (2, 2, shape[0], shape[0])
    assert random_keep(shape, 0.5)[0].shape == shape


@pytest.mark.parametrize(("p", "expected"), [(1e-9, 1), (0.1, 26), (0.5, 128), (0.999999, 255)])
def test_threshold_is_p_in_256ths_and_never_all_or_nothing(p, expected):
    assert threshold(p) == expected
    assert keep_scale(p) == 256 / (256 - expected)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_kept_is_what_the_factor_undoes(p):
    seeded = attention_keep(3, p, 4, 4, 128).double().mean() * keep_scale(p)
    keep, factor = random_keep((512, 512), p)
    assert keep.dtype == torch.uint8 and keep.max() == 1
    assert seeded == pytest.approx(1, abs=0.03)
    assert keep.double().mean() * factor == pytest.approx(1, abs=0.03)
    assert factor == pytest.approx(1 / (1 - p), rel=1e-4)


def test_neighbouring_seeds_heads_and_rows_are_unlike():
    def agreement(a, b):
        return (a == b).double().mean().item()

    keep = attention_keep(3, 0.5, 2, 2, 256)
    assert agreement(keep, attention_keep(4, 0.5, 2, 2, 256)) == pytest.approx(0.5, abs=0.01)
    assert agreement(keep[0], keep[1]) == pytest.approx(0.5, abs=0.01)
    assert agreement(keep[:, 0], keep[:, 1]) == pytest.approx(0.5, abs=0.01)
    assert agreement(keep[:, :, 1:], keep[:, :, :-1]) == pytest.approx(0.5, abs=0.01)


def test_random_keep_follows_the_generator():
    torch.manual_seed(1)
    first = random_keep((7, 9), 0.3)[0]
    second = random_keep((7, 9), 0.3)[0]
    torch.manual_seed(1)
    assert torch.equal(random_keep((7, 9), 0.3)[0], first)
    assert not torch.equal(first, second)
