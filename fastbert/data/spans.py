"""Spans of whole words, chosen in random order within a budget of pieces.

The rule, word by word (Google's whole-word masking for spans of one word, ALBERT's n-gram masking for longer ones): the
words of a sample are taken as starts in random order, each with a random number of words. A span that would exceed the
budget is shortened word by word until it fits, and passed over if not even its first word does; it is passed over, too,
if it touches a word that is taken already. This goes on until the budget is used up or all starts were tried.

Here the rule runs on a whole batch at once. Of the starts of a sample, in their order, a window at a time is looked at.
Were there no budget, a span would be taken if it touches no taken one that comes before it: a few rounds settle this
for all spans of a window, in each of which those are taken that come first wherever they lie. Then the budget says
which is the first that does not fit, and the few that can still follow it are taken one by one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastbert.data.arrays import expand, first_of
from fastbert.data.draws import SPAN, Shuffle, draw, stream, unit

_FEW = 16  # pieces
_MORE = 4  # times as many starts are looked at where the first were not enough


class Chosen(NamedTuple):
    """Chosen words: word i is the run of pieces first[i] : first[i] + size[i], part of the span number span[i] (int64
    each). Words of a span stand together."""

    first: np.ndarray
    size: np.ndarray
    span: np.ndarray

    @property
    def pieces(self) -> np.ndarray:
        """The chosen pieces, word after word (int64)."""
        return expand(self.first, self.size)


def word_runs(lengths: np.ndarray, word_start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each word begins and how many pieces it has, and how many words each sample has (int64 each). What the cut
    of a sample leaves of a word is a word; without word_start every piece is one."""
    if word_start is None:
        total = int(lengths.sum())
        return np.arange(total), np.ones(total, np.int64), lengths
    begins = word_start.astype(bool)
    begins[first_of(lengths)] = True
    begin = np.flatnonzero(begins)
    words = np.add.reduceat(begins, first_of(lengths), dtype=np.int64)
    return begin, np.diff(begin, append=len(begins)), words


def select_spans(
    keys: np.ndarray, lengths: np.ndarray, budget: np.ndarray, word_start: np.ndarray, weights: Sequence[float]
) -> Chosen:
    """Words by the rule above. keys uint64 [B]; lengths int64 [B] in pieces, at least 1; budget int64 [B] in pieces;
    word_start uint8 [sum of lengths]; weights: of spans of 1, 2, ... words."""
    begin, size, words = word_runs(lengths, word_start)
    shuffle = Shuffle(keys, words)
    mean = np.dot(np.arange(1, len(weights) + 1), weights) / np.sum(weights)
    wanted = 1.5 * budget / (mean * size.mean()) + 8  # starts of a sample that are looked at first
    if len(weights) == 1:
        taken = _single_words(shuffle, wanted, size, budget)
        return Chosen(begin[taken], size[taken], np.arange(len(taken)))
    start, count = _Spans(keys, size, words, budget, weights).select(shuffle, wanted)
    taken = expand(start, count)
    return Chosen(begin[taken], size[taken], np.repeat(np.arange(len(start)), count))


def _single_words(shuffle: Shuffle, wanted: np.ndarray, size: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """The rule for spans of one word, which never touch one another."""
    left, chosen = budget.copy(), [np.zeros(0, np.int64)]
    while ((left > 0) & shuffle.unfinished).any():
        order, sample = shuffle.until(np.where(left > 0, wanted, 0))
        wanted = _MORE * wanted
        while len(order):
            # Of the words that fit, take those before the first that no longer does; go on after it with what fits.
            fits = size[order] <= left[sample]
            order, sample = order[fits], sample[fits]
            used = np.cumsum(size[order])
            head = np.flatnonzero(np.diff(sample, prepend=-1))
            used -= np.repeat((used - size[order])[head], np.diff(head, append=len(sample)))
            taken = used <= left[sample]
            chosen.append(order[taken])
            left -= np.bincount(sample[taken], size[order[taken]], len(left)).astype(np.int64)
            order, sample = order[~taken], sample[~taken]
    return np.concatenate(chosen)


class _Spans:
    """The state of a choice: `taken` words, and the budget that is `left`."""

    def __init__(self, keys, size, words, budget, weights):
        self.ends = np.concatenate([[0], np.cumsum(size)])  # piece borders of words
        self.first = first_of(words)
        self.last = self.first + words
        self.left, self.taken = budget.copy(), np.zeros(len(size), bool)
        self.streams, self.cumulated = stream(keys, SPAN), np.cumsum(weights, dtype=np.float64)

    def select(self, shuffle: Shuffle, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First word and number of words of each span that is taken."""
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        while ((self.left > 0) & shuffle.unfinished).any():
            start, sample = shuffle.until(np.where(self.left > 0, wanted, 0))
            wanted = _MORE * wanted
            found += self._take(start, self._counts(start, sample), sample)
        start, count = (np.concatenate(part) for part in zip(*found, strict=True))
        return start, count

    def _counts(self, start: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """A random number of words for each start, of as many as there are up to the end of its sample."""
        lot = unit(draw(self.streams[sample], start - self.first[sample]))
        there = np.minimum(self.last[sample] - start, len(self.cumulated))
        lot *= self.cumulated[there - 1]
        return 1 + np.minimum(np.searchsorted(self.cumulated, lot, side="right"), there - 1)

    def _take(self, start: np.ndarray, count: np.ndarray, sample: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Takes spans of a window, in their order within each sample; returns them."""
        found = []
        while len(start):
            # What has no room for its first word, or is taken there, stays out whatever comes before it.
            rest = np.flatnonzero(~self.taken[start] & (self.ends[start + 1] - self.ends[start] <= self.left[sample]))
            start, count, sample = start[rest], count[rest], sample[rest]
            if not len(start):
                break
            over = self._take_until_one_exceeds(start, count, sample, found)
            start, count, sample = start[over], count[over], sample[over]
            if len(start) and self.left[sample].max() <= _FEW:
                self._take_one_by_one(start, count, sample, found)
                break
            if len(start):
                first = np.flatnonzero(np.diff(sample, prepend=-1))
                fresh = self._fitting(start[first], count[first], sample[first])
                self._add(start[first][fresh > 0], fresh[fresh > 0], sample[first][fresh > 0], found)
                later = np.ones(len(start), bool)
                later[first] = False
                start, count, sample = start[later], count[later], sample[later]
        return found

    def _take_until_one_exceeds(self, start, count, sample, found) -> np.ndarray:
        """Takes the spans before the first of each sample that exceeds what is left; which these are and what follows
        them (int64)."""
        accepted = self._without_budget(start, count)
        size = self.ends[start + count] - self.ends[start]
        used = np.cumsum(np.where(accepted, size, 0)) - np.where(accepted, size, 0)
        number, head = np.arange(len(start)), np.flatnonzero(np.diff(sample, prepend=-1))
        group = np.diff(head, append=len(start))
        exceeds = used - np.repeat(used[head], group) + size > self.left[sample]
        stop = np.minimum.reduceat(np.where(exceeds, number, len(start)), head)
        over = number >= np.repeat(stop, group)
        kept = np.flatnonzero(accepted & ~over)
        self._add(start[kept], count[kept], sample[kept], found)
        return np.flatnonzero(over)

    def _take_one_by_one(self, start, count, sample, found) -> None:
        """Takes one span of each sample after the other, which is fast where few can follow."""
        while len(start):
            fresh = self._fitting(start, count, sample)
            good = np.flatnonzero(fresh)
            first = good[np.flatnonzero(np.diff(sample[good], prepend=-1))]
            if not len(first):
                break
            self._add(start[first], fresh[first], sample[first], found)
            turn = np.full(len(self.left), len(start))
            turn[sample[first]] = first
            rest = np.arange(len(start)) > turn[sample]
            start, count, sample = start[rest], count[rest], sample[rest]

    def _add(self, start, count, sample, found) -> None:
        self.taken[expand(start, count)] = True
        size = self.ends[start + count] - self.ends[start]
        self.left -= np.bincount(sample, size, len(self.left)).astype(np.int64)
        found.append((start, count))

    def _fitting(self, start: np.ndarray, count: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """How many words of each span fit; 0 where none does or one is taken already."""
        room = self.ends[start] + self.left[sample]
        fresh = np.minimum(count, np.searchsorted(self.ends, room, side="right") - 1 - start)
        some = np.flatnonzero(fresh)
        if len(some):
            touches = np.logical_or.reduceat(self.taken[expand(start[some], fresh[some])], first_of(fresh[some]))
            fresh[some[touches]] = 0
        return fresh

    def _without_budget(self, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Which spans would be taken, one after the other, if there were no budget (bool)."""
        accepted, taken = np.zeros(len(start), bool), self.taken.copy()
        owner = np.empty(len(taken), np.int64)
        undecided, cells = np.arange(len(start)), expand(start, count)
        while True:
            sizes = count[undecided]
            free = ~np.logical_or.reduceat(taken[cells], first_of(sizes))
            cells, undecided, sizes = cells[np.repeat(free, sizes)], undecided[free], sizes[free]
            if not len(undecided):
                return accepted
            number = np.repeat(undecided, sizes)
            owner[cells[::-1]] = number[::-1]  # of those that touch a word, the first one stays
            wins = np.logical_and.reduceat(owner[cells] == number, first_of(sizes))
            accepted[undecided[wins]] = True
            won = np.repeat(wins, sizes)
            taken[cells[won]] = True
            cells, undecided = cells[~won], undecided[~wins]
            if not len(undecided):
                return accepted
