"""Packing: the rows of a corpus laid into samples of at most max_length pieces, [CLS] and [SEP] included."""

from dataclasses import dataclass
from numbers import Integral

import numpy as np

from fastbert.data.checks import check
from fastbert.data.shards import Corpus, Shard
from fastbert.errors import ConfigError

PACKINGS = ("full_sentences", "doc_sentences", "single")
LONGEST = 1 << 16


@dataclass(frozen=True)
class Samples:
    """Sample i is the run of pieces start[i]:end[i] (int64) of the shard shard[i] (int32). Together the samples hold
    each piece of the corpus once."""

    shard: np.ndarray
    start: np.ndarray
    end: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.start)

    @property
    def fill(self) -> float:
        """Mean share of max_length that a sample fills, [CLS] and [SEP] included."""
        return float((self.end - self.start + 2).mean() / self.max_length)


def pack(corpus: Corpus, max_length: int, packing: str = "full_sentences") -> Samples:
    """Lay the rows of a split into samples, in their order.

    "full_sentences": whole rows one after the other while they fit, across documents (RoBERTa's FULL-SENTENCES, with
    one [SEP] at the end of the sample in place of one per row). "doc_sentences": the same, but a document begins a new
    sample. "single": each row is a sample. Nothing is lost: a row longer than max_length - 2 is cut at the last word
    border that fits (inside a word only if the word alone is too long), and its parts are packed as rows. No sample
    reaches from one shard into the next.
    """
    if packing not in PACKINGS:
        raise ConfigError(f"packing is {packing!r}, expected one of {', '.join(map(repr, PACKINGS))}")
    expected = f"3 to {LONGEST}: [CLS], [SEP] and at least one piece"
    check("max_length", max_length, Integral, expected, lambda length: 3 <= length <= LONGEST)
    borders = [_borders(shard, max_length - 2, packing) for shard in corpus.shards]
    return Samples(
        shard=np.repeat(np.arange(len(borders), dtype=np.int32), [len(border) - 1 for border in borders]),
        start=np.concatenate([border[:-1] for border in borders]),
        end=np.concatenate([border[1:] for border in borders]),
        max_length=max_length,
    )


def _borders(shard: Shard, capacity: int, packing: str) -> np.ndarray:
    """Where the samples of one shard begin, and where the last one ends."""
    parts = _cut_long_rows(shard, capacity)
    if packing == "single":
        return parts
    # A sample that begins at part i ends before part following[i].
    following = np.searchsorted(parts, parts[:-1] + capacity, side="right") - 1
    if packing == "doc_sentences":
        heads = np.flatnonzero(np.diff(shard.documents, prepend=-1))
        ends = np.append(np.searchsorted(parts, shard.row_offsets[heads[1:]]), len(parts) - 1)
        document = np.searchsorted(shard.row_offsets[heads], parts[:-1], side="right") - 1
        following = np.minimum(following, ends[document])
    hops, chain = following.tolist(), [0]
    while chain[-1] < len(hops):
        chain.append(hops[chain[-1]])
    return parts[chain]


def _cut_long_rows(shard: Shard, capacity: int) -> np.ndarray:
    """Row borders (int64), with further ones inside the rows that are longer than `capacity`."""
    offsets = shard.row_offsets.astype(np.int64)
    long = np.flatnonzero(np.diff(offsets) > capacity)
    if not len(long):
        return offsets
    words, cuts = np.flatnonzero(shard.word_start), []
    start, end = offsets[long], offsets[long + 1]
    while len(start):
        border = words[np.searchsorted(words, start + capacity, side="right") - 1]
        start = np.where(border > start, border, start + capacity)
        cuts.append(start)
        unfinished = end - start > capacity
        start, end = start[unfinished], end[unfinished]
    return np.sort(np.concatenate([offsets, *cuts]))
