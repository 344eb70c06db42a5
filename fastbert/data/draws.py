"""Random numbers as a pure function of (seed, epoch, sample index, purpose, position).

Every number is a hash, so that a sample looks the same in whatever batch, process or order it is drawn, and a resumed
run needs no state of any generator. All of it is numpy on whole batches.
"""

import numpy as np

from fastbert.data.arrays import first_of

MOST_SAMPLES = 1 << 16  # in one batch; a sample holds fewer than 2^16 pieces
_GOLDEN = 0x9E3779B97F4A7C15
_FULL = (1 << 64) - 1
_ALL = np.uint64(1 << 32)
# What random numbers are drawn for; new purposes go at the end, so that old runs resume with the numbers they had.
ORDER, ACTION, REPLACEMENT, SHUFFLE, SPAN, COUNT, CHOICE, SPLIT, SECOND, PLACE, LENGTH = range(11)


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


def below(numbers: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
    """A uniform integer from 0 to limit - 1 (int64) for each uniform uint64; limits below 2^32."""
    scaled = (numbers >> np.uint64(32)) * np.asarray(limits, np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)


def unit(numbers: np.ndarray) -> np.ndarray:
    """A number in [0, 1) (float64) for each uniform uint64."""
    return (numbers >> np.uint64(11)) * 2.0**-53


def shuffled(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Item numbers 0 .. sum(counts)-1, sample by sample, those of each sample in its own random order (int64)."""
    return Shuffle(keys, counts).until(np.full(len(counts), np.inf))[0]


class Shuffle:
    """A random order of the items of each sample, of which one part after the other is made: mostly, few are needed.

    keys uint64 [B], counts int64 [B]. An item's place is that of a random number of 32 bits; one sort of a packed word
    serves the whole batch: sample number (16 bits), random number (32), item within the sample (16).
    """

    def __init__(self, keys: np.ndarray, counts: np.ndarray):
        self._counts, self._first = counts, first_of(counts)
        self._sample = np.repeat(np.arange(len(counts)), counts)
        item = np.arange(len(self._sample), dtype=np.int64) - self._first[self._sample]
        self._lots = draw(stream(keys, ORDER)[self._sample], item) >> np.uint64(32)
        self._done = np.zeros(len(counts), np.uint64)

    @property
    def unfinished(self) -> np.ndarray:
        """Of which samples there is more (bool [B])."""
        return self._done < _ALL

    def until(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next items of each sample, in its order: about so many that `wanted` (float [B]) have come in all, or all
        there are; and the sample of each (int64). Nothing of a sample of which 0 are wanted."""
        share = np.minimum(wanted / np.maximum(self._counts, 1), 1)
        limit = np.maximum((share * float(_ALL)).astype(np.uint64), self._done)
        items = np.flatnonzero((self._lots >= self._done[self._sample]) & (self._lots < limit[self._sample]))
        self._done = limit
        sample = self._sample[items]
        order = self._lots[items]
        order <<= np.uint64(16)
        order |= sample.astype(np.uint64) << np.uint64(48)
        order |= (items - self._first[sample]).astype(np.uint64)
        order.sort()
        order &= np.uint64(0xFFFF)
        return order.astype(np.int64) + self._first[sample], sample


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of sample indices 0 .. count-1 in an epoch (int64), a pure function of its arguments."""
    return np.argsort(stream(sample_keys(seed, epoch, np.arange(count)), SHUFFLE), kind="stable")
