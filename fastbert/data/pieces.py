"""Words and runs of text as pieces: how each level encodes one, where words begin in it, and a table of those met."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from reprlib import repr as shorten

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from fastbert.data.arrays import first_of
from fastbert.data.backends import SPACE, restore
from fastbert.data.text import CJK, SPACES
from fastbert.errors import DataError, MissingDependencyError

# The table of known words starts afresh beyond either, so that its memory is bounded.
MAX_UNITS = 1 << 20
MAX_PIECES = 1 << 23
WHITE = SPACES + "\x0b\x0c\x85"  # Unicode's White_Space
# A piece that does not begin a word where no segmentation says so. GPT-2 writes a space as Ġ and the bytes from which
# a CJK character may begin as the Latin-1 characters of the same number; ALBERT's set of punctuation is its own.
_CONTINUES = {
    "WordPiece": re.compile(f"##[^{CJK}].*", re.DOTALL),
    "BPE": re.compile("[^\u0120\xe3-\xe9\xef\xf0].*", re.DOTALL),
    "Unigram": re.compile(r"[a-zA-Z]|[a-zA-Z!\"#$%&()*+,\-./:;?@\[\\\]^_`{|}~]{2,}"),
}
_CUTS = {
    "char": re.compile(f"[{CJK}]|[^{CJK}{SPACES}]+"),
    "wordpiece": re.compile(f"[^{SPACES}]+"),
    "bpe": re.compile(f"[{WHITE}]*[^{WHITE}]+|[{WHITE}]+"),
}


def begins_word(tokens: Sequence[str], model: str) -> np.ndarray:
    """uint8 [V]: 0 for the tokens that continue a word. model: WordPiece, BPE or Unigram."""
    continues = _CONTINUES[model].fullmatch
    return np.array([not continues(token) for token in tokens], np.uint8)


def cutter(level: str, normalizer: normalizers.Normalizer | None) -> Callable[[str], list[str]]:
    """The function behind Tokenizer.cut. MissingDependencyError: level "word" without rjieba."""
    if level == "word":
        words = _rjieba()
        return lambda text: [word for word in words(normalizer.normalize_str(text)) if not word.isspace()]
    if level != "unigram":
        return _CUTS[level].findall
    white = "".join(char for char in map(chr, range(0x3001)) if re.match(f"[{WHITE}]", char))
    # A space is what stays one: the model may take a control character out and so join what stood beside it.
    spaces = re.escape("".join(char for char in white if normalizer.normalize_str(char).isspace()))
    run = re.compile(f"([{spaces}]*)([^{spaces}]+)")
    return lambda text: [" " + word if space else word for space, word in run.findall(text)]


def _rjieba() -> Callable[[str], list[str]]:
    try:
        from rjieba import cut
    except ImportError as error:
        raise MissingDependencyError(
            "level 'word' needs the package rjieba to find words: pip install fastbert-kernels[zh]"
        ) from error
    return lambda text: cut(text, False)


def unit_encoder(
    backend: tokenizers.Tokenizer, level: str, tokens: Sequence[str], special_ids: Sequence[int]
) -> Callable[[list[str]], list[list[int]]]:
    """The function that encodes words or runs, each alone and as text: the name of a special token is none."""
    normalize = backend.normalizer.normalize_str if level == "word" else None
    backend = restore(backend.to_str())
    backend.encode_special_tokens = True
    if level == "bpe":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif level == "unigram":
        _unprefix(backend, special_ids)
    elif level == "word":
        return _word_encoder(backend, normalize, tokens, special_ids)
    return lambda units: [encoding.ids for encoding in backend.encode_batch(units, add_special_tokens=False)]


def _unprefix(backend: tokenizers.Tokenizer, special_ids: Sequence[int]) -> None:
    """Make a unigram backend begin a word only where a space is, and keep it from finding the names of special tokens,
    which are among its pieces, in a text: behind a space, which no text has when it reaches the model."""
    one_space = [
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Replace(Regex(rf" (?={SPACE})"), ""),
        normalizers.Strip(left=False, right=True),
    ]
    backend.normalizer = normalizers.Sequence([backend.normalizer, *one_space])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never")
    model, special = json.loads(backend.to_str())["model"], set(special_ids)
    pieces = [(" " * (i in special) + piece, score) for i, (piece, score) in enumerate(model["vocab"])]
    backend.model = models.Unigram(pieces, model["unk_id"], False)


def _word_encoder(
    backend: tokenizers.Tokenizer, normalize: Callable[[str], str], tokens: Sequence[str], special_ids: Sequence[int]
) -> Callable[[list[str]], list[list[int]]]:
    special = set(special_ids)
    words = {token: [i] for i, token in enumerate(tokens) if i not in special and not re.match("##.", token)}
    backend.normalizer.handle_chinese_chars = True

    def encode(units: list[str]) -> list[list[int]]:
        found = [words.get(normalize(unit).strip(SPACES)) for unit in units]
        rest = [unit for unit, ids in zip(units, found, strict=True) if ids is None]
        pieces = iter(backend.encode_batch(rest, add_special_tokens=False))
        return [next(pieces).ids if ids is None else ids for ids in found]

    return encode


def check_texts(texts: Sequence[str]) -> None:
    """DataError: one of the texts is no str, or not Unicode (a lone surrogate)."""
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"the text {shorten(text)} is a {type(text).__name__}, expected a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"{text[error.start]!r} at index {error.start}"
            raise DataError(f"the text {shorten(text)} has the lone surrogate {where}, expected Unicode") from error


class PieceTable:
    """The pieces of every word met so far, so that a row of known words costs one look-up per word and the rest is
    array indexing.

    Unit i has the pieces ids[first[i] : first[i] + counts[i]]; unit_start flags the first of them, run_start each that
    begins a word by the rule of the tokenizer's level.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], begins: np.ndarray):
        self._encode, self._begins = encode, begins
        self._clear()

    def lookup(self, units: list[str]) -> np.ndarray:
        """The number of each unit (int64), after the unknown ones are added."""
        missing = [unit for unit in dict.fromkeys(units) if unit not in self._index]
        if missing and (len(self._index) + len(missing) > MAX_UNITS or len(self.ids) > MAX_PIECES):
            self._clear()
            missing = list(dict.fromkeys(units))
        if missing:
            self._add(missing)
        return np.fromiter(map(self._index.__getitem__, units), np.int64, len(units))

    def _clear(self) -> None:
        self._index: dict[str, int] = {}
        self._pieces = 0
        self.first = self.counts = np.zeros(0, np.int64)
        self.ids, self.unit_start, self.run_start = np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.uint8)

    def _add(self, units: list[str]) -> None:
        check_texts(units)
        encoded = self._encode(units)
        self._index.update(zip(units, range(len(self._index), len(self._index) + len(units)), strict=True))
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(chain.from_iterable(encoded), np.int32, counts.sum())
        unit_start, run_start = np.zeros(len(ids), np.uint8), self._begins[ids]
        heads = first_of(counts)[counts > 0]
        unit_start[heads] = run_start[heads] = 1
        units_before, pieces_before = len(self._index) - len(units), self._pieces
        self._pieces += len(ids)
        self.first = _with(self.first, units_before, first_of(counts) + pieces_before)
        self.counts = _with(self.counts, units_before, counts)
        self.ids = _with(self.ids, pieces_before, ids)
        self.unit_start = _with(self.unit_start, pieces_before, unit_start)
        self.run_start = _with(self.run_start, pieces_before, run_start)


def _with(buffer: np.ndarray, used: int, more: np.ndarray) -> np.ndarray:
    """A buffer with `more` behind what is used of it: itself, or one of twice the size where it is full."""
    if used + len(more) > len(buffer):
        buffer = np.concatenate([buffer[:used], np.empty(used + 2 * len(more), buffer.dtype)])  # twice, and more
    buffer[used : used + len(more)] = more
    return buffer
