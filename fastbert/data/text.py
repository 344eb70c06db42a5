"""Text files as rows and documents, and rows as words.

A file is UTF-8. One line is one row (a sentence or a paragraph); it ends with LF, CR LF or CR. A blank line ends a
document, and so does the end of a file.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastbert.data.checks import check
from fastbert.errors import ConfigError, DataError, MissingDependencyError, MissingFileError

WORDS = ("none", "segmented", "rjieba")
# What BERT's normaliser sets apart as single characters, and what it takes for a space: insides of a character class.
CJK = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f"
)
SPACES = " \t\n\r\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_RUNS = re.compile(f"[{CJK}]|[^{CJK}{SPACES}]+")
_EXAMPLES = 5


class Row(NamedTuple):
    """One line of text: the running number of its document, where it stands, and what it says."""

    document: int
    path: Path
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


class Tally:
    """Counts what was left out or repaired, by reason, with the first few places."""

    def __init__(self):
        self.reasons: dict[str, dict] = {}

    def add(self, reason: str, place: str, count: int = 1) -> None:
        entry = self.reasons.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append(place)


@dataclass
class Scan:
    """What the first pass over the text found: per file its path, bytes and rows; per document a hash of its text."""

    sources: list[dict]
    hashes: np.ndarray
    rows: int


def as_paths(files: str | PathLike | Sequence[str | PathLike]) -> list[Path]:
    """One path or several as a list of paths that all name readable files, each file once; a MissingFileError or
    DataError names the first that does not. ConfigError: `files` are no paths."""
    try:
        paths = [Path(file) for file in ([files] if isinstance(files, str | PathLike) else files)]
    except TypeError as error:
        raise ConfigError(f"files is {files!r}, expected a path or several paths") from error
    seen: dict[Path, Path] = {}
    if not paths:
        raise DataError("no input file was given, expected at least one text file")
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path} is a folder, expected a text file")
        if not path.exists():
            raise MissingFileError(f"{path} does not exist, expected a text file")
        if (first := seen.setdefault(path.resolve(), path)) is not path:
            raise DataError(f"{path} is given twice (first as {first}), expected each file once")
    return paths


def read_rows(paths: Sequence[Path], errors: str = "strict", repaired: Tally | None = None) -> Iterator[Row]:
    """Every line that is not blank, in order, numbered from 1, with its document numbered from 0 through all files.

    errors="strict": invalid UTF-8 is a DataError that names file, line and byte offset; "replace": each bad sequence
    becomes U+FFFD and the line is counted in `repaired`.
    """
    if errors not in ("strict", "replace"):
        raise ConfigError(f"errors is {errors!r}, expected 'strict' or 'replace'")
    document = 0
    for path in paths:
        inside, offset = False, 0
        # Latin-1 gives each byte back as it was: Python finds the line ends, and the rest sees bytes.
        with open(path, encoding="latin-1", newline="") as file:
            for line, raw in enumerate((line.encode("latin-1") for line in file), 1):
                row = Row(document, path, line, _decode(raw, path, line, offset, errors, repaired).rstrip("\r\n"))
                offset += len(raw)
                if row.text.strip():
                    inside = True
                    yield row
                elif inside:
                    inside = False
                    document += 1
        document += inside


def scan(paths: Sequence[Path], errors: str = "strict", progress: bool = True) -> Scan:
    """Read everything once: check the encoding before any work is done, count rows and hash documents. DataError if no
    row is found."""
    rows, hashes, document, digest = Counter(), bytearray(), -1, None
    sizes = {path: path.stat().st_size for path in paths}
    bar = tqdm(
        total=sum(sizes.values()), desc="checking text", unit="B", unit_scale=True, delay=2, disable=not progress
    )
    with bar:
        for row in read_rows(paths, errors):
            if row.document != document:
                hashes += digest.digest() if digest else b""
                document, digest = row.document, hashlib.blake2b(digest_size=8)
            line = row.text.encode() + b"\n"
            digest.update(line)
            rows[row.path] += 1
            bar.update(len(line))
    if not rows:
        raise DataError(f"the corpus is empty: no line of text in {', '.join(map(str, paths))}")
    sources = [{"path": str(path), "bytes": size, "rows": rows[path]} for path, size in sizes.items()]
    return Scan(sources, np.frombuffer(hashes + digest.digest(), "<u8"), rows.total())


def segmenter(words: str, tag_separator: str | None = None) -> Callable[[Row], list[str]]:
    """The function that cuts a row into words.

    "segmented": words stand between spaces, each followed by `tag_separator` and a tag if that is given (`word/tag`);
    a word without it is a DataError. "rjieba": words by rjieba without its hidden Markov model, which costs accuracy
    on news text (F1 0.829 without, 0.807 with it, against the People's Daily). "none": each CJK character, and each
    run of other characters between spaces; which pieces of such a run are words, the tokenizer decides.
    """
    if words not in WORDS:
        raise ConfigError(f"words is {words!r}, expected one of {', '.join(map(repr, WORDS))}")
    if tag_separator is not None:
        expected = f"None with words={words!r}; words='segmented' takes a string that is not empty"
        check("tag_separator", tag_separator, str, expected, lambda separator: separator and words == "segmented")
    if words == "none":
        return lambda row: _RUNS.findall(row.text)
    if words == "segmented":
        return (lambda row: row.text.split()) if tag_separator is None else (lambda row: _untag(row, tag_separator))
    try:
        from rjieba import cut
    except ImportError as error:
        raise MissingDependencyError(
            "words='rjieba' needs the package rjieba: pip install fastbert-kernels[zh]"
        ) from error
    return lambda row: [word for word in cut(row.text, False) if not word.isspace()]


def _untag(row: Row, separator: str) -> list[str]:
    words = []
    for tagged in row.text.split():
        word, found, _ = tagged.rpartition(separator)
        if not found:
            raise DataError(f"{row.place}: {tagged!r} has no tag, expected word{separator}tag")
        words.append(word)
    return words


def _decode(raw: bytes, path: Path, line: int, offset: int, errors: str, repaired: Tally | None) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        if errors == "strict":
            where = f"{path}: invalid UTF-8 at byte offset {offset + error.start} (line {line})"
            raise DataError(f"{where}: {raw[error.start : error.end].hex(' ')}; errors='replace' reads on") from error
        if repaired is not None:
            repaired.add("line with invalid UTF-8, replaced by U+FFFD", f"{path}:{line}")
        text = raw.decode(errors="replace")
    return text.removeprefix("\ufeff") if line == 1 else text  # a byte order mark is no text
