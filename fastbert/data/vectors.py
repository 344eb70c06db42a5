"""Word vectors: read from word2vec files, or trained on segmented text, and which of them lie nearest to each other."""

import gzip
import io
import math
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fastbert.data.text import Tally
from fastbert.errors import DataError, MissingDependencyError, MissingFileError

_HEADER = re.compile(rb"([0-9]{1,15}) ([0-9]{1,5})[ \r]*\n")
_NUMERIC = frozenset(b"0123456789+-.eEnaifty \t\r")  # of numbers as text, inf and nan among them
_LONGEST_WORD = 1 << 16  # bytes
_LONGEST_NUMBER = 64  # bytes of one written as text, with the space before it
_BUFFER = 1 << 18
_SCORES = 1 << 24  # similarities held at once
_LONGEST_ROW = 10_000  # words: gensim cuts a row off there


class WordVectors(NamedTuple):
    """Words, one vector each (float32 [words, dimensions], finite, none all zero), and the share of the words of a text
    that each makes up (float64 [words]; None where no text is known)."""

    words: list[str]
    matrix: np.ndarray
    share: np.ndarray | None = None


def existing_file(path: str | PathLike, expected: str) -> Path:
    """The path if it names a file. MissingFileError or DataError, saying what was `expected`, if it does not."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected {expected}")
    if not path.exists():
        raise MissingFileError(f"{path} does not exist, expected {expected}")
    return path


def read_vectors(
    path: str | PathLike, *, limit: int | None = None, dropped: Tally | None = None, progress: bool = True
) -> WordVectors:
    """Read a file in the format of word2vec (Mikolov et al. 2013), text or binary, either of them gzipped or not; which
    it is, its content decides. limit: only so many words from its beginning, which are the most frequent ones.

    Left out and counted in `dropped`: words in invalid UTF-8 (word2vec itself cuts long words within a character),
    words that were there before, vectors that are not finite or all zero. DataError: no header of word2vec (GloVe's
    files have none), a line with more or fewer numbers than the header says, fewer or more words than it says, a
    damaged gzip file.
    """
    path = existing_file(path, "a file of word vectors")
    dropped = Tally() if dropped is None else dropped
    words: dict[str, None] = {}
    data = bytearray()
    try:
        with _open(path) as file:
            count, dimensions = _read_header(file, path)
            binary = _is_binary(file.read(_LONGEST_WORD), dimensions)
        with _open(path) as file:
            _read_header(file, path)
            records = (_binary_records if binary else _text_records)(file, path, count, dimensions)
            wanted = count if limit is None else min(limit, count)
            bar = tqdm(islice(records, wanted), "reading vectors", wanted, unit=" words", delay=2, disable=not progress)
            for place, raw, values in bar:
                word, fault = _word(raw, values, words)
                if fault:
                    dropped.add(fault, place)
                else:
                    words[word] = None
                    data += values
            if wanted == count and file.read(_LONGEST_WORD).strip():
                raise DataError(f"{path} goes on after the {count} words that its header states")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}") from error
    return WordVectors(list(words), np.frombuffer(data, np.float32).reshape(-1, dimensions))


def train_vectors(
    rows: Iterable[list[str]],
    *,
    min_count: int,
    dimensions: int,
    window: int,
    epochs: int,
    seed: int,
    progress: bool = True,
) -> WordVectors:
    """Train skip-gram vectors with negative sampling (Mikolov et al. 2013) on rows of words, which are gone through
    epochs + 1 times, for words that occur `min_count` times. The most frequent words come first.

    gensim trains in one thread, so that the same rows and seed give the same vectors on one machine. DataError: no word
    is that frequent. MissingDependencyError: gensim is not installed.
    """
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        raise MissingDependencyError(
            "training word vectors needs the package gensim: pip install fastbert-kernels[vectors]"
        ) from error
    passes = _Passes(rows, epochs, progress)
    model = Word2Vec(vector_size=dimensions, window=window, min_count=min_count, sg=1, seed=seed, workers=1)
    model.build_vocab(passes)
    passes.check()
    if not model.wv.index_to_key:
        raise DataError(
            f"no word occurs {min_count} times among the {model.corpus_total_words} of the text, expected min_count to "
            "be lower or the text longer"
        )
    model.train(passes, total_examples=model.corpus_count, epochs=epochs)
    passes.check()
    words = model.wv.index_to_key
    counts = np.array([model.wv.get_vecattr(word, "count") for word in words])
    return WordVectors(words, model.wv.vectors, counts / model.corpus_total_words)


def nearest(matrix: np.ndarray, groups: np.ndarray, *, top: int, least: float, progress: bool = True) -> np.ndarray:
    """For each vector (float32 [n, d], none all zero) the `top` others of its group (int64 [n]) with the highest cosine
    similarity, best first, none below `least`: int64 [n, top], -1 where there are no more.

    Exact up to the rounding of float32: all pairs of a group are compared, in blocks that take some 64 MiB.
    """
    vectors = torch.from_numpy(matrix / np.abs(matrix).max(1, keepdims=True))
    vectors = torch.nn.functional.normalize(vectors)
    found = np.full((len(matrix), top), -1)
    bar = tqdm(total=len(matrix), desc="comparing vectors", unit=" words", delay=2, disable=not progress)
    with bar:
        for member in (np.flatnonzero(groups == group) for group in np.unique(groups)):
            group = vectors[torch.from_numpy(member)]
            step = min(len(member), max(1, _SCORES // len(member)))
            memory = group.new_empty(step, len(member))
            for begin in range(0, len(member), step):
                block = group[begin : begin + step]
                scores = torch.mm(block, group.T, out=memory[: len(block)])
                rows = torch.arange(len(block))
                scores[rows, begin + rows] = -math.inf
                best = scores.topk(min(top, len(member)))
                chosen = np.where(best.values.numpy() >= least, member[best.indices.numpy()], -1)
                found[member[begin : begin + step], : chosen.shape[1]] = chosen
                bar.update(len(block))
    return found


class _Passes:
    """Rows for gensim, with a progress bar for each time that it goes through them.

    It does so in a thread of its own, in which an error would be lost: `check` raises it again.
    """

    def __init__(self, rows: Iterable[list[str]], epochs: int, progress: bool):
        self._rows, self._epochs, self._progress = rows, epochs, progress
        self._done, self._count, self._error = 0, None, None

    def __iter__(self) -> Iterator[list[str]]:
        title = f"training vectors, {self._done} of {self._epochs}" if self._done else "counting words"
        self._done += 1
        count = 0
        try:
            bar = tqdm(self._rows, title, self._count, unit=" rows", delay=2, disable=not self._progress)
            for count, row in enumerate(bar, 1):
                if isinstance(row, str):
                    raise DataError(f"row {count} is the str {row[:40]!r}, expected a list of words")
                for begin in range(0, len(row), _LONGEST_ROW):
                    yield row[begin : begin + _LONGEST_ROW]
        except Exception as error:
            self._error = error
        self._count = count

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return io.BufferedReader(gzip.open(path) if zipped else open(path, "rb", buffering=0), _BUFFER)


def _read_header(file: BinaryIO, path: Path) -> tuple[int, int]:
    line = file.readline(_LONGEST_WORD)
    header = _HEADER.fullmatch(line)
    count, dimensions = map(int, header.groups()) if header else (0, 0)
    if not count or not dimensions:
        shown = line[:40].decode(errors="replace").rstrip("\n")
        raise DataError(f"{path}:1: the first line is {shown!r}, expected '<words> <dimensions>' as word2vec writes it")
    return count, dimensions


def _is_binary(head: bytes, dimensions: int) -> bool:
    """Whether what follows the first word is anything but numbers written as text."""
    values = head.partition(b" ")[2][: 4 * dimensions].partition(b"\n")[0]
    return not _NUMERIC.issuperset(values)


def _text_records(file: BinaryIO, path: Path, count: int, dimensions: int) -> Iterator[tuple[str, bytes, bytes]]:
    """Per word: where it stands, its bytes and those of its float32 values."""
    longest = _LONGEST_WORD + _LONGEST_NUMBER * dimensions
    for number in range(count):
        line, place = file.readline(longest), f"{path}:{number + 2}"
        if not line:
            raise _cut_short(path, number, count)
        if len(line) == longest:
            raise DataError(f"{place}: a line does not end within {longest} bytes, expected a word and numbers")
        word, *fields = line.rstrip(b" \r\n").split(b" ")
        if len(fields) != dimensions:
            raise DataError(f"{place}: {len(fields)} numbers after the word, expected the {dimensions} of the header")
        try:
            values = array("f", map(float, fields))
        except ValueError as error:
            raise DataError(f"{place}: {str(error)[:120]}, expected {dimensions} numbers") from error
        yield place, word, values.tobytes()


def _binary_records(file: BinaryIO, path: Path, count: int, dimensions: int) -> Iterator[tuple[str, bytes, bytes]]:
    for number in range(count):
        place, word = f"{path}: word {number + 1}", bytearray()
        while (byte := file.read(1)) != b" ":
            if not byte:
                raise _cut_short(path, number, count)
            word += byte
            if len(word) > _LONGEST_WORD:
                raise DataError(f"{place} does not end within {_LONGEST_WORD} bytes, expected a space")
        values = file.read(4 * dimensions)
        if len(values) < 4 * dimensions:
            raise _cut_short(path, number, count)
        yield place, bytes(word).lstrip(b"\n"), np.frombuffer(values, "<f4").astype(np.float32).tobytes()


def _cut_short(path: Path, number: int, count: int) -> DataError:
    return DataError(f"{path} is cut short: it ends within word {number + 1} of the {count} that its header states")


def _word(raw: bytes, values: bytes, known: dict[str, None]) -> tuple[str, str | None]:
    """The word, and why it is left out, if it is."""
    try:
        word = raw.decode()
    except UnicodeDecodeError:
        return "", "word in invalid UTF-8"
    if word in known:
        return word, "word that was there before"
    peak = float(np.abs(np.frombuffer(values, np.float32)).max())
    if not math.isfinite(peak):
        return word, "vector that is not finite"
    return word, None if peak else "vector that is all zero"
