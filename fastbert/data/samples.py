"""Packing: the rows of a corpus laid into samples of at most max_length pieces, [CLS] and [SEP] included."""

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np

from fastbert.data.arrays import expand
from fastbert.data.checks import check
from fastbert.data.shards import Corpus, Shard
from fastbert.errors import ConfigError

PACKINGS = ("full_sentences", "doc_sentences", "single", "pairs", "two_segments")
SEPARATORS = ("sample", "row")
LONGEST = 1 << 16


class Laid(NamedTuple):
    """What the samples of a batch are made of. runs: pieces as (shard, start, end), in the order of the batch; lengths:
    of the parts that a [SEP] ends each (int64 [P]); parts: how many of them each sample has (int64 [B]); labels: of
    pairs of segments (int64 [B]), or None."""

    runs: list[tuple[int, int, int]]
    lengths: np.ndarray
    parts: np.ndarray
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Samples:
    """Sample i is the run of pieces start[i]:end[i] (int64) of the shard shard[i] (int32). Together the samples hold
    each piece of the corpus once. rows: where a [SEP] ends every row, those of all samples; else None."""

    shard: np.ndarray
    start: np.ndarray
    end: np.ndarray
    max_length: int
    rows: "Rows | None" = None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def fill(self) -> float:
        """Mean share of max_length that a sample fills, [CLS] and [SEP] included."""
        special = 2 * len(self) if self.rows is None else len(self) + len(self.rows.lengths) + self.rows.ends.sum()
        return float(((self.end - self.start).sum() + special) / len(self) / self.max_length)

    def lay(self, indices: np.ndarray, keys: np.ndarray, shards: list[Shard]) -> Laid:
        """The parts of some samples of `shards`. keys: of random numbers, which these samples need none of."""
        start, end = self.start[indices], self.end[indices]
        runs = list(zip(self.shard[indices].tolist(), start.tolist(), end.tolist(), strict=True))
        if self.rows is None:
            return Laid(runs, end - start, np.ones(len(start), np.int64))
        return Laid(runs, *self.rows.parts(indices))


@dataclass(frozen=True)
class Rows:
    """The rows that samples are made of: lengths int64, and whether a document ends after each, which a [SEP] of its
    own shows (bool). Sample i has the rows first[i]:first[i + 1]."""

    lengths: np.ndarray
    ends: np.ndarray
    first: np.ndarray

    def parts(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the parts of some samples, an empty one for the end of a document, and how many each has."""
        counts = self.first[indices + 1] - self.first[indices]
        rows = expand(self.first[indices], counts)
        copies = 1 + self.ends[rows]
        lengths = np.repeat(self.lengths[rows], copies)
        last = np.cumsum(copies) - 1
        lengths[last[copies == 2]] = 0
        return lengths, np.add.reduceat(copies, np.cumsum(counts) - counts)


def pack(corpus: Corpus, max_length: int, packing: str = "full_sentences", separators: str = "sample") -> Samples:
    """Lay the rows of a split into samples, in their order.

    "full_sentences": whole rows one after the other while they fit, across documents (RoBERTa's FULL-SENTENCES, arXiv
    1907.11692). "doc_sentences": the same, but a document begins a new sample. "single": each row is a sample. Nothing
    is lost: a row longer than what fits is cut at the last word border that does (inside a word only if the word alone
    is too long), and its parts are packed as rows. No sample reaches from one shard into the next. Pairs of segments
    are made by fastbert.data.pairs.

    separators: "sample", one [SEP] at the end of each sample; "row", one after every row, and in "full_sentences" a
    further one where a document ends, as fairseq has it.
    """
    if packing not in PACKINGS[:3]:
        raise ConfigError(f"packing is {packing!r}, expected one of {', '.join(map(repr, PACKINGS[:3]))}")
    if separators not in SEPARATORS:
        raise ConfigError(f"separators is {separators!r}, expected one of {', '.join(map(repr, SEPARATORS))}")
    by_row = separators == "row" and packing != "single"
    least = 4 if by_row else 3
    check_max_length(max_length, least, "[CLS], [SEP] and at least one piece")
    heads = [*(shard.documents[0] for shard in corpus.shards[1:]), None]  # of the shards after each
    laid = [
        _lay_out(shard, max_length, packing, by_row, shard.documents[-1] == head)
        for shard, head in zip(corpus.shards, heads, strict=True)
    ]
    borders, parts, chains, ends = zip(*laid, strict=True)
    rows = None
    if by_row:
        offsets = np.cumsum([0] + [len(part) - 1 for part in parts])
        first = [chain[:-1] + offset for chain, offset in zip(chains, offsets, strict=False)]
        lengths = np.concatenate([np.diff(part) for part in parts])
        rows = Rows(lengths, np.concatenate(ends), np.concatenate([*first, offsets[-1:]]))
    return Samples(
        shard=np.repeat(np.arange(len(borders), dtype=np.int32), [len(border) - 1 for border in borders]),
        start=np.concatenate([border[:-1] for border in borders]),
        end=np.concatenate([border[1:] for border in borders]),
        max_length=max_length,
        rows=rows,
    )


def check_max_length(max_length: int, least: int, what: str) -> None:
    """ConfigError unless max_length has room for the least there can be in a sample."""
    check("max_length", max_length, Integral, f"{least} to {LONGEST}: {what}", lambda n: least <= n <= LONGEST)


def _lay_out(shard: Shard, max_length: int, packing: str, by_row: bool, goes_on: bool) -> tuple[np.ndarray, ...]:
    """Of one shard, whose last document `goes_on` in the next one or not: where the samples begin, and where the last
    one ends; borders of rows; which of these borders begin samples; after which rows a [SEP] stands for the end of a
    document."""
    parts = cut_long_rows(shard, shard.row_offsets.astype(np.int64), max_length - (3 if by_row else 2))
    heads = document_heads(shard, parts)
    ends = np.zeros(len(parts) - 1, bool)
    if packing == "single":
        return parts, parts, np.arange(len(parts)), ends
    weights, room = parts, max_length - 2
    if by_row:
        if packing == "full_sentences":
            ends[heads[1:] - 1] = True
            ends[-1] = not goes_on
        weights = parts + np.concatenate([[0], np.cumsum(1 + ends)])
        room = max_length - 1
    # A sample that begins at part i ends before part following[i].
    following = np.searchsorted(weights, weights[:-1] + room, side="right") - 1
    if packing == "doc_sentences":
        following = np.minimum(following, np.repeat(heads[1:], np.diff(heads)))
    hops = chain(following)
    return parts[hops], parts, hops, ends


def document_heads(shard: Shard, borders: np.ndarray) -> np.ndarray:
    """Index into `borders`, which hold those of rows, of the first piece of each document, and their number less one
    at the end (int64)."""
    heads = np.flatnonzero(np.diff(shard.documents, prepend=-1))
    return np.append(np.searchsorted(borders, shard.row_offsets[heads]), len(borders) - 1)


def chain(following: np.ndarray) -> np.ndarray:
    """0, following[0], following[following[0]], ... up to len(following) (int64)."""
    hops, found = following.tolist(), [0]
    while found[-1] < len(hops):
        found.append(hops[found[-1]])
    return np.array(found)


def cut_long_rows(shard: Shard, borders: np.ndarray, capacity: int) -> np.ndarray:
    """Borders (int64), with further ones between those that are more than `capacity` apart."""
    long = np.flatnonzero(np.diff(borders) > capacity)
    if not len(long):
        return borders
    words, cuts = np.flatnonzero(shard.word_start), []
    start, end = borders[long], borders[long + 1]
    while len(start):
        border = words[np.searchsorted(words, start + capacity, side="right") - 1]
        start = np.where(border > start, border, start + capacity)
        cuts.append(start)
        unfinished = end - start > capacity
        start, end = start[unfinished], end[unfinished]
    return np.sort(np.concatenate([borders, *cuts]))
