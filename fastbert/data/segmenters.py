"""Rows as words: who says where a word ends.

Whatever cuts, the words of a row keep one form, which every kind of tokenizer reads: a word with a space before it in
the text begins with exactly one space (" word"), no other space is kept, and the spaces around a row are no text.
WordPiece drops that space; byte-level BPE and unigram models need it.
"""

import inspect
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from hashlib import sha256
from importlib import import_module, metadata
from itertools import chain, islice, pairwise
from os.path import commonprefix
from pathlib import Path
from reprlib import repr as shorten
from typing import Protocol

import numpy as np
from tokenizers import normalizers, pre_tokenizers

from fastbert.data.checks import check
from fastbert.data.text import CJK, SPACES, Row
from fastbert.errors import ConfigError, DataError, MissingDependencyError, MissingFileError, shown

WORDS = ("none", "segmented", "rjieba", "jieba", "ltp")
_PACKAGES = {"rjieba": "pip install fastbert-kernels[zh]", "jieba": "pip install jieba", "ltp": "pip install ltp"}


class Cuts(Protocol):
    """A tokenizer, as far as it cuts text where no segmenter does."""

    def cut(self, text: str) -> list[str]: ...


Words = str | Callable[[str], list[str]]
Segmenter = Callable[[Sequence[Row]], list[list[str]]]

_SPACES = re.compile(f"[{SPACES}]+")
# Letters and digits, CJK aside, on both sides of a space make it text: the rule of Tokenizer.decode.
_GAP = re.compile(rf"[^\W_{CJK}] [^\W_{CJK}]")
# What a character is to BERT's pre-tokenizer. LETTER: all that is neither set apart nor a space, so that a run of it is
# one token. BLANK: what it removes, but Python takes for a space, as some segmenters do.
_APART, _LETTER, _SPACE, _BLANK = 0, 1, 2, 3
_ROWS = 1024
_LTP_BATCH, _LTP_LONGEST = 32, 500  # LTP reads 512 pieces, [CLS] and [SEP] included, and drops the rest
_LTP_PARTS = re.compile(rf".{{1,{_LTP_LONGEST - 1}}}[。！？；!?;]|.{{1,{_LTP_LONGEST}}}", re.DOTALL)


def segmented(rows: Iterable[Row], cut: Segmenter) -> Iterator[list[str]]:
    """The words of one row after the other, cut some rows at a time."""
    rows = iter(rows)
    while batch := list(islice(rows, _ROWS)):
        yield from cut(batch)


def check_words(words: Words) -> None:
    """ConfigError unless `words` is one of WORDS, "package.module:function" or a function."""
    if not callable(words) and not (isinstance(words, str) and (words in WORDS or _is_plug_in(words))):
        names = ", ".join(map(repr, WORDS))
        raise ConfigError(f"words is {shown(words)}, expected one of {names}, 'package.module:function' or a function")


def segmenter(
    words: Words, tokenizer: Cuts | None = None, *, tag_separator: str | None = None, model: str | Path | None = None
) -> Segmenter:
    """The function that cuts rows into words.

    "segmented": words stand between spaces, each followed by `tag_separator` and a tag if that is given (`word/tag`); a
    word without it is a DataError. These words are never changed; a space is text where letters or digits that are not
    CJK stand on both sides. "none": the runs that `tokenizer.cut` gives, which the others do not need; which pieces of
    them are words, the tokenizer decides.

    The others cut by themselves. "rjieba" and "jieba": without the hidden Markov model, which costs accuracy on news
    text (F1 0.829 without, 0.807 with it, against the People's Daily). "ltp": LTP 4.2 with the model in the folder
    `model`, as HFL's whole-word masking has it. "package.module:function" or a function: cuts a str into a list of str,
    which must spell the text, white space aside; else it is a DataError. Where they cut inside of what BERT's
    pre-tokenizer takes for one token (a run of letters, digits and marks without CJK characters and punctuation), the
    parts are joined again: a row then has the same ids as if it was encoded in one.

    ConfigError: an argument that makes no sense, or a plug-in that is not there. MissingDependencyError: the package is
    not installed. MissingFileError: no folder `model`.
    """
    check_words(words)
    if tag_separator is not None:
        expected = f"None with words={words!r}; words='segmented' takes a string that is not empty"
        check("tag_separator", tag_separator, str, expected, lambda separator: separator and words == "segmented")
    if model is not None and words != "ltp":
        raise ConfigError(f"segmenter_model is {str(model)!r}, expected None with words={words!r}")
    if words == "none":
        return lambda rows: [tokenizer.cut(row.text) for row in rows]
    if words == "segmented":
        split = (lambda row: row.text.split()) if tag_separator is None else (lambda row: untag(row, tag_separator))
        return lambda rows: [_mark_spaces(split(row)) for row in rows]
    if words == "ltp":
        cut = _ltp(model)
    else:
        cut = _each(_BUILT_IN[words]() if words in _BUILT_IN else _load(words), name_of(words))
    return lambda rows: _aligned(rows, cut, name_of(words))


def name_of(words: Words) -> str:
    """What a manifest calls a segmenter: a function is "module:function"."""
    if isinstance(words, str):
        return words
    named = words if hasattr(words, "__qualname__") and hasattr(words, "__module__") else type(words)
    return f"{named.__module__}:{named.__qualname__}"


def versions_of(words: Words) -> dict[str, str]:
    """The package that a segmenter comes from and its version; empty if it comes from none."""
    if words in ("none", "segmented"):
        return {}
    package = name_of(words).partition(":")[0].partition(".")[0]
    names = metadata.packages_distributions().get(package, ()) if package not in _PACKAGES else (package,)
    try:
        return {package: metadata.version(names[0])}
    except (IndexError, metadata.PackageNotFoundError):
        return {}


def check_module_level(words: Words) -> None:
    """ConfigError for a function that other processes could not find."""
    if "<" in getattr(words, "__qualname__", ""):
        raise ConfigError(
            f"words is {name_of(words)}, expected a function at the level of its module where there are several "
            "processes"
        )


def fingerprint_of(words: Words, model: str | Path | None) -> dict[str, str]:
    """What decides, besides its name, what a segmenter says: versions, the source of a plug-in, the files of a
    model."""
    decides = versions_of(words)
    if callable(words) or _is_plug_in(words):
        function = inspect.unwrap(_load(words))
        try:
            source = Path(inspect.getfile(function if inspect.isroutine(function) else type(function))).read_bytes()
        except (TypeError, OSError):  # it is not written in Python, or not in a file
            source = b""
        decides["source"] = sha256(source).hexdigest()
        inner = words if callable(words) else function
        state = [getattr(inner, name, None) for name in ("func", "args", "keywords", "__dict__")]
        decides["state"] = sha256(repr(state).encode()).hexdigest()
    if model is not None:
        files = sorted((str(path), path.stat().st_size) for path in Path(model).rglob("*") if path.is_file())
        decides["model"] = sha256(repr(files).encode()).hexdigest()
    return decides


def untag(row: Row, separator: str) -> list[str]:
    """The words of a row of tagged words. DataError: one has no tag."""
    words = []
    for tagged in row.text.split():
        word, found, _ = tagged.rpartition(separator)
        if not found:
            raise DataError(f"{row.place}: {tagged!r} has no tag, expected word{separator}tag")
        words.append(word)
    return words


def _mark_spaces(words: list[str]) -> list[str]:
    if not _GAP.search(" ".join(words)):
        return words
    return words[:1] + [
        f" {word}" if _GAP.fullmatch(f"{before[-1:]} {word[:1]}") else word for before, word in pairwise(words)
    ]


def _aligned(rows: Sequence[Row], cut: Callable, name: str) -> list[list[str]]:
    """The words of rows that are cut automatically. All borders of all rows are found at once, as positions in the
    rows laid end to end."""
    texts = [_SPACES.sub(" ", row.text).strip(" ") for row in rows]
    words = cut(rows, texts)
    exact = [_spells(*given, name) for given in zip(rows, texts, words, strict=True)]
    text, words = "".join(texts), list(chain.from_iterable(words))
    kind = _kinds()[np.frombuffer(text.encode("utf-32-le"), "<u4")]
    visible = kind < _SPACE
    seen = np.concatenate([[0], np.cumsum(visible)])
    if all(exact):
        ends = seen[np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))]
    else:
        ends = np.cumsum(np.fromiter((len("".join(word.split())) for word in words), np.int64, len(words)))
    row_starts = np.cumsum([0, *map(len, texts)])[:-1]
    border = np.zeros(seen[-1] + 1, bool)  # per character that is seen
    border[ends] = border[seen[row_starts]] = True
    border, places = np.flatnonzero(border[:-1]), np.flatnonzero(visible)
    starts, before = places[border], places[border - 1]
    row_of = np.searchsorted(row_starts, starts, side="right") - 1
    leads = np.diff(row_of, prepend=-1) > 0
    last_space = np.maximum.accumulate(np.where(kind == _SPACE, np.arange(len(kind)), -1))[starts]
    after_space = last_space > before
    inside = (kind[starts] == _LETTER) & (kind[before] == _LETTER) & ~after_space & ~leads
    begins = np.where(after_space, last_space, starts)
    begins[leads] = row_starts
    begins, row_of = begins[~inside], row_of[~inside]
    stops = np.append(begins[1:], len(text))
    cut_words = [text[begin:stop] for begin, stop in zip(begins.tolist(), stops.tolist(), strict=True)]
    bounds = np.cumsum(np.concatenate([[0], np.bincount(row_of, minlength=len(rows))])).tolist()
    return [cut_words[begin:stop] for begin, stop in pairwise(bounds)]


def _spells(row: Row, text: str, words: list[str], name: str) -> bool:
    """Whether the words are the text to the last space; DataError unless they are but for white space."""
    try:
        spelt = None if isinstance(words, str) else "".join(words)
    except TypeError:
        spelt = None
    if spelt is None:
        raise DataError(f"{row.place}: the segmenter {name} gave {shorten(words)}, expected a list of str")
    if spelt == text:
        return True
    expected, found = "".join(text.split()), "".join(spelt.split())
    if expected != found:
        at = len(commonprefix([expected, found]))
        there, here = (part[max(at - 10, 0) : at + 10] for part in (expected, found))
        raise DataError(
            f"{row.place}: the words of the segmenter {name} do not spell the text: from character {at + 1} on, white "
            f"space aside, they have {here!r} where the text has {there!r}"
        )
    return False


@cache
def _kinds() -> np.ndarray:
    """What every character is to BERT's pre-tokenizer: uint8 [0x110000]."""
    kinds = np.full(0x110000, _LETTER, np.uint8)
    everything = "".join(map(chr, range(len(kinds))))
    for found in re.finditer(f"[{CJK}]+", everything):
        kinds[found.start() : found.end()] = _APART
    # No punctuation stands beyond the first two planes. Unicode tables differ by version, so BERT's own are asked.
    marks = [c for c in everything[:0x20000] if unicodedata.category(c)[0] == "P" or c in string.punctuation]
    normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    pieces = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normalizer.normalize_str("a".join(marks)))
    kinds[[ord(piece) for piece in {piece for piece, _ in pieces} & set(marks)]] = _APART
    kinds[[i for i in range(0x20000) if everything[i].isspace()]] = _BLANK
    for found in _SPACES.finditer(everything):
        kinds[found.start() : found.end()] = _SPACE
    return kinds


def _is_plug_in(words: str) -> bool:
    module, colon, function = words.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *function.split(".")])


def _load(name: Words) -> Callable[[str], list[str]]:
    if callable(name):
        return name
    module, _, path = name.partition(":")
    try:
        function = import_module(module)
        for part in path.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"words is {name!r}, which cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"words is {name!r}, a {type(function).__name__}, expected a function: str -> list of str")
    return function


def _each(one: Callable[[str], list[str]], name: str) -> Callable[[Sequence[Row], list[str]], list[list[str]]]:
    def cut(rows: Sequence[Row], texts: list[str]) -> list[list[str]]:
        try:
            return list(map(one, texts))
        except Exception:  # a plug-in may raise anything: find the row
            for row, text in zip(rows, texts, strict=True):
                try:
                    one(text)
                except Exception as error:
                    what = f"{type(error).__name__}: {error}"
                    raise DataError(f"{row.place}: the segmenter {name} failed with {what}") from error
            raise

    return cut


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(f"words={package!r} needs the package {package}: {_PACKAGES[package]}")


def _rjieba() -> Callable[[str], list[str]]:
    try:
        from rjieba import cut
    except ImportError as error:
        raise _missing("rjieba") from error
    return lambda text: cut(text, False)


def _jieba() -> Callable[[str], list[str]]:
    try:
        import jieba
    except ImportError as error:
        raise _missing("jieba") from error
    jieba.setLogLevel("WARNING")
    return lambda text: jieba.lcut(text, HMM=False)


_BUILT_IN = {"rjieba": _rjieba, "jieba": _jieba}


def _ltp(model: str | Path | None) -> Callable[[Sequence[Row], list[str]], list[list[str]]]:
    if model is None:
        raise ConfigError("segmenter_model is None, expected the folder of an LTP model with words='ltp'")
    if not Path(model).is_dir():
        raise MissingFileError(f"segmenter_model {model} is not a folder, expected that of an LTP model")
    try:
        from ltp import LTP
    except ImportError as error:
        raise _missing("ltp") from error

    @cache
    def loaded() -> LTP:
        """The model, in the processes that cut text and not in one that only checks what was asked."""
        import torch

        ltp = LTP(str(model))
        if torch.cuda.is_available():
            ltp.to("cuda")
        return ltp

    def cut(rows: Sequence[Row], texts: list[str]) -> list[list[str]]:
        parts = [[text] if len(text) <= _LTP_LONGEST else _LTP_PARTS.findall(text) for text in texts]
        flat, ltp = list(chain.from_iterable(parts)), loaded()
        words = []
        for begin in range(0, len(flat), _LTP_BATCH):
            words += ltp.pipeline(flat[begin : begin + _LTP_BATCH], tasks=["cws"]).cws
        words = iter([_with_head(part, found) for part, found in zip(flat, words, strict=True)])
        return [list(chain.from_iterable(next(words) for _ in part)) for part in parts]

    return cut


def _with_head(text: str, words: list[str]) -> list[str]:
    """LTP leaves out characters that its tokenizer removes from the begin of a text."""
    spelt = "".join(words)
    return [text.removesuffix(spelt), *words] if text != spelt and text.endswith(spelt) else words
