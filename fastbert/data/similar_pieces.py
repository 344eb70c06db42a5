"""A table of similar words as one tokenizer sees it: runs of pieces and what may stand in their place.

All of it is numpy on the words of a whole batch, given as runs of its ids. A word here is its run of pieces: words that
the tokenizer gives the same pieces are one.
"""

import hashlib
import re
from itertools import chain, product
from numbers import Integral

import numpy as np
from tqdm import tqdm

from fastbert.data.arrays import expand, first_of
from fastbert.data.checks import check
from fastbert.data.draws import draw as draw_at
from fastbert.data.draws import mix
from fastbert.data.similar_words import SimilarWords
from fastbert.data.text import CJK
from fastbert.data.tokenizer import Tokenizer
from fastbert.errors import DataError

_BUCKETS = 2  # of the hash table, at least, for each key
_FULL = (1 << 64) - 1
_BEFORE = "。"  # a word to stand before others
_CJK = re.compile(f"[{CJK}]")


class SimilarPieces:
    """Similar words and random words by pieces, for a batch at a time. Picklable.

    Only similar words of as many pieces count, so that each piece keeps its place and its label; a word with an unknown
    piece is neither looked up nor put in. among: a word is replaced by one of its `among` best, each with the same
    probability. Which similar word MacBERT takes is not published; this rule is ours. Always the best one would be a
    second spelling of the word, which a model learns to read back, and far ones are less and less similar. Where
    several words of the table have the same pieces, the similar words of the first of them rank first. Where the
    tokenizer has other pieces for a word with a space before it ("bpe", "unigram"), a word in either form is replaced
    in that form; random words have the space unless they hold a CJK character.

    len(similar) is how many words have a replacement. fingerprint: sha256 of all that decides what is put in place of
    what. ConfigError: an argument that makes no sense. DataError: the table has no word whose pieces the tokenizer
    knows.
    """

    def __init__(self, table: SimilarWords, tokenizer: Tokenizer, *, among: int = 5, progress: bool = True):
        check("table", table, SimilarWords, "a SimilarWords")
        check("tokenizer", tokenizer, Tokenizer, "a Tokenizer")
        check("among", among, Integral, "an integer of at least 1", lambda x: x >= 1)
        forms = ("", " ") if tokenizer.level in ("bpe", "unigram") else ("",)
        run_of, self._pieces, size, usual = _runs(table, tokenizer, forms)
        self._first = first_of(size)
        self._ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
        # Usual runs of size s: count_of_size[s] of them, from first_of_size[s] on in by_size.
        usual = np.flatnonzero(usual)
        self._by_size = usual[np.argsort(size[usual], kind="stable")]
        self._count_of_size = np.bincount(size[usual])
        self._first_of_size = first_of(self._count_of_size)
        keys, counts, choices = _choices(table, run_of, size.tolist(), forms, among, progress)
        self.fingerprint = _sha256(self._pieces, size, self._ordinary, keys, counts, choices)
        # Numbers of 32 bits from here on: a look-up is as slow as its way to memory. choices: where the pieces of each
        # begin; the last one is for no key.
        self._choices = np.append(self._first[choices], 0).astype(np.int32)
        self._pieces = self._pieces.astype(np.int32)
        entries = np.stack([self._first[keys], size[keys], first_of(counts), counts], 1)
        self._build_index(entries, tokenizer.vocab_size)

    def __len__(self) -> int:
        return len(self._entries) - 1

    def replacements(
        self, ids: np.ndarray, first: np.ndarray, size: np.ndarray, draw: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is put in place of each of the words ids[first[i] : first[i] + size[i]]: whether it has a similar word
        (bool [W]), and the pieces of all words, end to end (int64 [sum(size)]): those of a similar word if there is
        one, and otherwise its own.

        ids: int64 [T]. first, size (at least 1): int64 [W]. draw: uint64 [W], random numbers by which nothing else was
        decided; the high 32 bits choose.
        """
        word, place = _layout(size)
        pieces = ids[first[word] + place]
        begin, length, choice, count = self._entries[self._candidate(self._hash(pieces, size, place))].T
        found = length == size
        found[word[self._pieces.take(begin[word] + place, mode="clip") != pieces]] = False
        similar = self._choices[choice + _pick(draw, count)]
        return found, np.where(found[word], self._pieces.take(similar[word] + place, mode="clip"), pieces)

    def random_words(self, size: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """The pieces, end to end (int64 [sum(size)]), of a random word of each size (at least 1): uniform over the
        words of the table with so many pieces, similar words among them; where it has none, pieces uniform over all
        ids that are not special.

        size: int64 [W]. draw: uint64 [W], as in `replacements`.
        """
        word, place = _layout(size)
        kind = np.minimum(size, len(self._count_of_size) - 1)
        count = np.where(kind == size, self._count_of_size[kind], 0)
        run = self._by_size.take(self._first_of_size[kind] + _pick(draw, count), mode="clip")
        pieces = self._pieces.take(self._first[run][word] + place, mode="clip").astype(np.int64)
        alone = np.flatnonzero((count == 0)[word])
        lots = draw_at(draw[word[alone]], place[alone])
        pieces[alone] = self._ordinary[_pick(lots, len(self._ordinary))]
        return pieces

    def _build_index(self, entries: np.ndarray, vocab_size: int) -> None:
        """The hash table of the keys. An entry (int64 [keys, 4]): where the pieces of the key begin and how many they
        are, where its choices begin and how many they are. Entries stand in the order of their hashes, whose high bits
        say in which bucket one lies, and so where to begin to look. An entry of no piece ends the table."""
        begin, size = entries[:, 0], entries[:, 1]
        word, place = _layout(size)
        pieces = self._pieces[begin[word] + place]
        numbers = np.arange(1, vocab_size + max(1, size.max(initial=0)) + 1, dtype=np.uint64)
        distinct = False
        while not distinct:
            mix(numbers)
            self._piece_hash, self._place_hash = numbers[:vocab_size], numbers[vocab_size:] | np.uint64(1)
            hashes = self._hash(pieces, size, place)
            distinct = len(np.unique(hashes)) == len(hashes)
        order = np.argsort(hashes)
        bits = 1 + (_BUCKETS * len(entries)).bit_length()
        self._shift = np.uint64(64 - bits)
        buckets = np.bincount((hashes >> self._shift).astype(np.int64), minlength=1 << bits)
        self._bucket, self._steps = first_of(buckets).astype(np.int32), int(buckets.max()) - 1
        self._hashes = np.append(hashes[order], np.uint64(_FULL))
        self._entries = np.append(entries[order], [[0, 0, len(self._choices) - 1, 0]], 0).astype(np.int32)

    def _hash(self, pieces: np.ndarray, size: np.ndarray, place: np.ndarray) -> np.ndarray:
        """A uint64 for each run: the sum of products of one random number for each piece and one for its place."""
        return np.add.reduceat(self._piece_hash[pieces] * self._place_hash.take(place, mode="clip"), first_of(size))

    def _candidate(self, hashes: np.ndarray) -> np.ndarray:
        """The entry of each hash if it has one, and otherwise any."""
        entry = self._bucket[(hashes >> self._shift).astype(np.int64)]
        for _ in range(self._steps):
            entry = entry + (self._hashes[entry] < hashes)
        return entry


def _layout(size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each piece of runs laid end to end: of which run it is, and at which place of it (int64)."""
    word = np.repeat(np.arange(len(size)), size)
    return word, np.arange(len(word)) - first_of(size)[word]


def _pick(lots: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """A number below `count` (less than 2^32; 0 below 0) for each random uint64 (int64)."""
    return ((lots >> np.uint64(32)) * np.asarray(count).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def _runs(
    table: SimilarWords, tokenizer: Tokenizer, forms: tuple[str, ...]
) -> tuple[dict[str, int], np.ndarray, np.ndarray, np.ndarray]:
    """The number of the run of each word that has one, in each of its forms, which is what stands before it; the pieces
    of the runs, end to end, and their sizes (int64); and which are those of a form that is usual (bool)."""
    distinct = dict.fromkeys(chain(table, *table.values()))
    words = [form + word for form in forms for word in distinct]
    rows = tokenizer.encode_rows([[_BEFORE, word] for word in words])
    before = tokenizer.encode_rows([[_BEFORE]]).lengths  # a row begins with a space for some
    own = rows.lengths - before
    usable = own > 0
    ids = rows.ids[expand(first_of(rows.lengths) + before, own)].astype(np.int64)
    usable[np.repeat(np.arange(len(words)), own)[np.isin(ids, tokenizer.special_ids)]] = False
    first, run_of, runs, usual = first_of(own), {}, {}, set()
    for i in np.flatnonzero(usable).tolist():
        run = ids[first[i] : first[i] + own[i]]
        run_of[words[i]] = number = runs.setdefault(run.tobytes(), len(runs))
        if len(forms) == 1 or words[i].startswith(" ") != bool(_CJK.search(words[i])):
            usual.add(number)
    if not runs:
        raise DataError(f"{table!r} has no word whose pieces {tokenizer!r} knows, expected at least one")
    pieces = np.frombuffer(b"".join(runs), np.int64)
    size = np.fromiter(map(len, runs), np.int64, len(runs)) // pieces.itemsize
    return run_of, pieces, size, np.isin(np.arange(len(runs)), list(usual))


def _choices(
    table: SimilarWords, run_of: dict[str, int], size: list[int], forms: tuple[str, ...], among: int, progress: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs that have a choice of replacements, how many, and these end to end (all int64)."""
    similar: dict[int, dict[int, None]] = {}
    bar = tqdm(total=len(forms) * len(table), desc="compiling similar words", delay=2, disable=not progress)
    for form, (word, others) in product(forms, table.items()):
        bar.update()
        if (key := run_of.get(form + word)) is not None:
            runs = (run_of[form + other] for other in others if form + other in run_of)
            fits = dict.fromkeys(run for run in runs if run != key and size[run] == size[key])
            similar.setdefault(key, {}).update(fits)
    best = {key: list(runs)[:among] for key, runs in similar.items() if runs}
    counts = np.fromiter(map(len, best.values()), np.int64, len(best))
    choices = np.fromiter(chain.from_iterable(best.values()), np.int64, counts.sum())
    return np.fromiter(best, np.int64, len(best)), counts, choices


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
    return digest.hexdigest()
