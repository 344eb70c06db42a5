"""Which pieces a model must guess, and what it sees in their place.

Dynamic masking as a pure function of (seed, epoch, sample index): every random number is a hash of these, the purpose
and the position, so that a sample looks the same in whatever batch, process or order it is drawn. All of it is numpy
on a whole packed batch. Positions here count pieces of text alone: [CLS], [SEP] and padding are never candidates.
"""

from collections.abc import Callable

import numpy as np

from fastbert.data.arrays import expand, first_of

MOST_SAMPLES = 1 << 16  # in one batch; a sample holds fewer than 2^16 pieces
_GOLDEN = 0x9E3779B97F4A7C15
_FULL = (1 << 64) - 1
_ORDER, _ACTION, _REPLACEMENT, _SHUFFLE = range(4)  # what random numbers are drawn for; new purposes go at the end


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on a uint64 array, in place."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def sample_keys(seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """One uint64 key for each sample index, from which all its random numbers follow."""
    head = np.array([int(seed) & _FULL], np.uint64)
    head = mix(mix(head) + np.uint64(int(epoch) * _GOLDEN & _FULL))
    return mix(head + samples.astype(np.uint64) * np.uint64(_GOLDEN))


def stream(keys: np.ndarray, purpose: int) -> np.ndarray:
    """The key of each sample for one purpose (uint64)."""
    return mix(keys + np.uint64((purpose + 1) * _GOLDEN & _FULL))


def draw(streams: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A uniform uint64 for each pair of a stream and a position: the output of splitmix64, seeded with the stream, at
    that position."""
    return mix(streams + positions.astype(np.uint64) * np.uint64(_GOLDEN))


def shuffled(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Item numbers 0 .. sum(counts)-1, sample by sample, those of each sample in its own random order (int64).

    One sort of a packed word serves the whole batch: sample number (16 bits), random number (32), item within the
    sample (16).
    """
    first = np.repeat(first_of(counts), counts)
    item = np.arange(len(first), dtype=np.int64) - first
    order = draw(np.repeat(stream(keys, _ORDER), counts), item)
    order >>= np.uint64(16)
    order &= np.uint64(0x0000_FFFF_FFFF_0000)
    order |= np.repeat(np.arange(len(counts), dtype=np.uint64) << np.uint64(48), counts)
    order |= item.astype(np.uint64)
    order.sort()
    order &= np.uint64(0xFFFF)
    return order.astype(np.int64) + first


def select_tokens(keys: np.ndarray, lengths: np.ndarray, budget: np.ndarray, word_start: np.ndarray) -> np.ndarray:
    """Exactly `budget` pieces of each sample, without replacement."""
    return shuffled(keys, lengths)[expand(first_of(lengths), budget)]


def select_whole_words(keys: np.ndarray, lengths: np.ndarray, budget: np.ndarray, word_start: np.ndarray) -> np.ndarray:
    """Whole words of each sample, in random order, as Google's whole-word masking takes them: a word that would exceed
    the budget is passed over and later, shorter ones are tried, until the budget is used up or no word fits."""
    begins = word_start.astype(bool)
    begins[first_of(lengths)] = True  # what a sample cut leaves of a word is a word
    begin = np.flatnonzero(begins)
    size = np.diff(begin, append=len(begins))
    words = np.add.reduceat(begins, first_of(lengths), dtype=np.int64)
    order = shuffled(keys, words)
    sample = np.repeat(np.arange(len(words)), words)
    left, chosen = budget.copy(), []
    while len(order):
        # Of the words that fit, take those before the first that no longer does; go on after it with what still fits.
        fits = size[order] <= left[sample]
        order, sample = order[fits], sample[fits]
        used = np.cumsum(size[order])
        head = np.flatnonzero(np.diff(sample, prepend=-1))
        used -= np.repeat((used - size[order])[head], np.diff(head, append=len(sample)))
        taken = used <= left[sample]
        chosen.append(order[taken])
        left -= np.bincount(sample[taken], size[order[taken]], len(left)).astype(np.int64)
        order, sample = order[~taken], sample[~taken]
    chosen = np.concatenate(chosen)
    return expand(begin[chosen], size[chosen])


SELECT: dict[str, Callable] = {"token": select_tokens, "whole_word": select_whole_words}


def budgets(lengths: np.ndarray, mask_prob: float) -> np.ndarray:
    """How many pieces of each sample to choose: max(1, round(mask_prob * length)). Google's code counts [CLS] and
    [SEP] in the length; here they are left out, so that the share of chosen pieces is mask_prob."""
    return np.maximum(1, np.rint(mask_prob * lengths)).astype(np.int64)


def corrupt(keys: np.ndarray, positions: np.ndarray, ids: np.ndarray, mask_id: int, ordinary: np.ndarray) -> np.ndarray:
    """What the model sees at chosen pieces, each drawn for itself: [MASK] with probability 0.8, an id uniform over
    `ordinary` (all that are not special) with 0.1, the piece itself with 0.1. keys, positions (within the sample) and
    ids: one of each per chosen piece."""
    action = draw(stream(keys, _ACTION), positions)
    shown = np.where(action < np.uint64(_FULL * 9 // 10), mask_id, ids)
    random = np.flatnonzero((action >= np.uint64(_FULL * 8 // 10)) & (action < np.uint64(_FULL * 9 // 10)))
    lot = draw(stream(keys[random], _REPLACEMENT), positions[random]) >> np.uint64(32)
    shown[random] = ordinary[(lot * np.uint64(len(ordinary))) >> np.uint64(32)]
    return shown


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of sample indices 0 .. count-1 in an epoch (int64), a pure function of its arguments."""
    return np.argsort(stream(sample_keys(seed, epoch, np.arange(count)), _SHUFFLE), kind="stable")
