"""Text files as units of work, documents and rows.

A file is UTF-8. One line is one row (a sentence or a paragraph); it ends with LF, CR LF or CR. A blank line ends a
document, and so does the end of a file. NUL characters are removed. Files are read in blocks, so that the longest line
decides how much memory that takes, not the file.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastbert.errors import ConfigError, DataError, FastBertError, MissingFileError

# What BERT's normaliser sets apart as single characters, and what it takes for a space: insides of a character class.
CJK = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f"
)
SPACES = " \t\n\r\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_EXAMPLES = 5
_BLOCK = 1 << 20  # bytes
# A CR at the end of what has been read may yet turn out to be half of CR LF.
_LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")
_DOCUMENT_END = re.compile(rb"(?:\r\n|\n|\r(?=[^\n]))[ \t]*(?:\r\n|\n|\r(?=[^\n]))")
_OVERLAP = 64


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

    def merge(self, reasons: dict[str, dict]) -> None:
        """Add what another tally has counted further on in the text."""
        for reason, other in reasons.items():
            entry = self.reasons.setdefault(reason, {"count": 0, "examples": []})
            entry["count"] += other["count"]
            entry["examples"] = (entry["examples"] + other["examples"])[:_EXAMPLES]


class Span(NamedTuple):
    """Bytes start:end of a file, from the begin of a line to the end of one."""

    path: Path
    start: int
    end: int


Unit = tuple[Span, ...]  # what one worker does at a time: only its last span may stop before the end of a file


@dataclass
class UnitScan:
    """What reading a unit once has found: per span its rows and lines, per document a hash of its text (uint64);
    opens: the first line is a row, and not the first of its file; goes_on: the last line is a row."""

    rows: list[int]
    lines: list[int]
    hashes: np.ndarray
    opens: bool
    goes_on: bool


@dataclass
class Scan:
    """What the first pass over the text found: per file its path, bytes and rows, and per document a hash of its text
    (uint64). Per unit the number of lines before each of its spans, the numbers of the documents (first, end) that it
    holds some of, and whether the first began in an earlier unit and the last goes on in a later one."""

    sources: list[dict]
    hashes: np.ndarray
    lines: list[list[int]]
    documents: list[tuple[int, int]]
    joined: list[tuple[bool, bool]]


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
        if not path.is_file():
            raise DataError(f"{path} is a pipe or a device, expected a text file: it is read more than once")
        try:
            open(path, "rb").close()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        if (first := seen.setdefault(path.resolve(), path)) is not path:
            raise DataError(f"{path} is given twice (first as {first}), expected each file once")
    return paths


def read_rows(paths: Sequence[Path], errors: str = "strict", repaired: Tally | None = None) -> Iterator[Row]:
    """Every line that is not blank, in order, numbered from 1, with its document numbered from 0 through all files.

    errors="strict": invalid UTF-8 is a DataError that names file, line and byte offset; "replace": each bad sequence
    becomes U+FFFD and the line is counted in `repaired`, as are the NUL characters that are removed. DataError: a file
    that begins as UTF-16 does, or in which more than a quarter of some megabyte is NUL characters.
    """
    check_errors(errors)
    unit = tuple(Span(path, 0, path.stat().st_size) for path in paths)
    for rows in read_unit(unit, [0] * len(unit), 0, errors, repaired):
        yield from rows


def check_errors(errors: str) -> None:
    if errors not in ("strict", "replace"):
        raise ConfigError(f"errors is {errors!r}, expected 'strict' or 'replace'")


def cut_units(paths: Sequence[Path], size: int) -> list[Unit]:
    """The text in units of about `size` bytes: cut at the end of a document, or at the end of a line where a unit would
    become more than twice as long; short files share a unit."""
    units, spans, room = [], [], size
    for path in paths:
        start, length = 0, path.stat().st_size
        while start < length:
            end = length if length - start <= room else _find_cut(path, start + room, size, length)
            spans.append(Span(path, start, end))
            room -= end - start
            if room <= 0:
                units.append(tuple(spans))
                spans, room = [], size
            start = end
    return units + [tuple(spans)] * bool(spans)


def read_unit(
    unit: Unit,
    lines: Sequence[int],
    document: int,
    errors: str,
    repaired: Tally | None,
    advance: Callable[[int], object] = lambda size: None,
) -> Iterator[list[Row]]:
    """The rows of a unit, a block at a time. lines: how many come before each span; document: the number of the first
    one; advance: is told the bytes of each block."""
    for span, before in zip(unit, lines, strict=True):
        inside = False
        for first, texts in _blocks(span, before + 1, errors, repaired, advance):
            rows = []
            for line, text in enumerate(texts, first):
                if text and not text.isspace():
                    inside = True
                    rows.append(Row(document, span.path, line, text))
                elif inside:
                    inside = False
                    document += 1
            yield rows
        document += inside


def scan_unit(unit: Unit, errors: str, advance: Callable[[int], object]) -> UnitScan:
    """Read a unit once: check the encoding, count lines and rows, hash documents."""
    found = UnitScan([], [], np.zeros(0, np.uint64), False, False)
    hashes = bytearray()
    for span in unit:
        digest, rows, lines = None, 0, 0
        for _, texts in _blocks(span, 1, errors, None, advance):
            for text in texts:
                if text and not text.isspace():
                    if digest is None:
                        digest = hashlib.blake2b(digest_size=8)
                        found.opens |= bool(span.start) and not lines and not rows
                    digest.update(text.encode() + b"\n")
                    rows += 1
                elif digest is not None:
                    hashes += digest.digest()
                    digest = None
                lines += 1
        if digest is not None:
            hashes += digest.digest()
        found.goes_on = digest is not None
        found.rows.append(rows)
        found.lines.append(lines)
    found.hashes = np.frombuffer(bytes(hashes), "<u8")
    return found


def hash_document(units: Sequence[Unit], document: int, errors: str, advance: Callable[[int], object]) -> int:
    """The hash of a document that begins in the first of the units, as number `document` of that, and ends in the last
    of them."""
    digest = hashlib.blake2b(digest_size=8)
    for unit in units:
        for rows in read_unit(unit, [0] * len(unit), 0, errors, None, advance):
            for row in rows:
                if row.document == document:
                    digest.update(row.text.encode() + b"\n")
        document = 0
    return int.from_bytes(digest.digest(), "little")


def merge_scans(paths: Sequence[Path], units: Sequence[Unit], scans: Sequence[UnitScan]) -> Scan:
    """One Scan of all units, in which the hashes of documents that reach over several units are those of their
    beginnings: see `spread_documents`."""
    joins = [a.goes_on and b.opens for a, b in pairwise(scans)]
    joined = list(zip([False, *joins], [*joins, False], strict=True))[: len(scans)]
    hashes, documents, end = [np.zeros(0, "<u8")], [], 0
    for found, (before, _) in zip(scans, joined, strict=True):
        hashes.append(found.hashes[before:])
        first, end = end - before, end + len(hashes[-1])
        documents.append((first, end))
    rows, lines, sizes, starts = Counter(), Counter(), Counter(), []
    for unit, found in zip(units, scans, strict=True):
        starts.append([lines[span.path] for span in unit])
        for span, row_count, line_count in zip(unit, found.rows, found.lines, strict=True):
            rows[span.path] += row_count
            lines[span.path] += line_count
            sizes[span.path] = span.end
    sources = [{"path": str(path), "bytes": sizes[path], "rows": rows[path]} for path in paths]
    return Scan(sources, np.concatenate(hashes), starts, documents, joined)


def spread_documents(found: Scan) -> Iterator[tuple[int, int, int]]:
    """(document, first unit, end) of every document that reaches over several units."""
    first = None
    for number, ((_, after), (begin, end)) in enumerate(zip(found.joined, found.documents, strict=True)):
        if first is not None and not (after and end - begin == 1):
            yield begin, first, number + 1
            first = None
        if after and first is None:
            first = number


def _find_cut(path: Path, target: int, size: int, length: int) -> int:
    """Where to end a unit: the first document end after `target`, if it comes within `size` bytes; else the first line
    end after it; the end of the file if there is none."""
    line_end, tail, offset = None, b"", target
    with open(path, "rb") as file:
        file.seek(target)
        while (line_end is None or offset < target + size) and (chunk := file.read(_BLOCK)):
            window, begin = tail + chunk, offset - len(tail)
            if (found := _DOCUMENT_END.search(window)) and begin + found.end() <= target + size:
                return begin + found.end()
            if line_end is None and (found := _LINE_END.search(window)):
                line_end = begin + found.end()
            tail, offset = window[-_OVERLAP:], offset + len(chunk)
    return length if line_end is None else line_end


def _blocks(
    span: Span, first: int, errors: str, repaired: Tally | None, advance: Callable[[int], object]
) -> Iterator[tuple[int, list[str]]]:
    """The lines of a span without their ends, some at a time, with the number of the first of them."""
    for offset, raw in _raw_blocks(span):
        text = _decode(raw, span.path, first, offset, errors, repaired)
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if offset == 0:
            text = text.removeprefix("\ufeff")  # a byte order mark is no text
        lines = text.split("\n")
        if not lines[-1]:
            lines.pop()
        if "\0" in text:
            lines = _remove_nul(lines, span.path, first, repaired)
        yield first, lines
        first += len(lines)
        advance(len(raw))


def _raw_blocks(span: Span) -> Iterator[tuple[int, bytes]]:
    """The bytes of a span, about _BLOCK at a time but whole lines, with the offset of each block in the file."""
    offset, parts = span.start, []
    try:
        with open(span.path, "rb") as file:
            file.seek(offset)
            position = offset
            while position < span.end:
                chunk = file.read(min(_BLOCK, span.end - position))
                if not chunk:
                    raise DataError(f"{span.path} changed while it was read: it ends at byte {position}")
                _check_utf8_likely(chunk, span.path, position)
                position += len(chunk)
                cut = chunk.rfind(b"\n") + 1 or chunk.rfind(b"\r", 0, -1) + 1
                if cut:
                    block = b"".join([*parts, chunk[:cut]])
                    yield offset, block
                    offset, parts = offset + len(block), []
                parts.append(chunk[cut:])
    except OSError as error:
        raise FastBertError(f"{span.path} cannot be read: {error.strerror}") from error
    if block := b"".join(parts):
        yield offset, block


def _check_utf8_likely(chunk: bytes, path: Path, offset: int) -> None:
    advice = "expected UTF-8; if it is UTF-16: iconv -f UTF-16 -t UTF-8"
    if offset == 0 and chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} begins with the byte order mark of UTF-16 or UTF-32, {advice}")
    nul = chunk.count(0)
    if 4 * nul > len(chunk):
        where = f"the {len(chunk):,} bytes from offset {offset:,}"
        raise DataError(f"{path} is no text: {nul / len(chunk):.0%} of {where} are NUL characters, {advice}")


def _decode(raw: bytes, path: Path, first: int, offset: int, errors: str, repaired: Tally | None) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if errors == "strict":
            at = offset + error.start
            where = f"{path}: invalid UTF-8 at byte offset {at} (line {_line_number(path, at)})"
            raise DataError(f"{where}: {raw[error.start : error.end].hex(' ')}; errors='replace' reads on") from error
    if repaired is not None:
        for line, text in enumerate(re.split(rb"\r\n|\n|\r", raw), first):
            try:
                text.decode()
            except UnicodeDecodeError:
                repaired.add("line with invalid UTF-8, replaced by U+FFFD", f"{path}:{line}")
    return raw.decode(errors="replace")


def _line_number(path: Path, offset: int) -> int:
    """The line that holds the byte at `offset`."""
    count, last = 1, b""
    with open(path, "rb") as file:
        while offset and (chunk := file.read(min(_BLOCK, offset))):
            offset -= len(chunk)
            count += chunk.count(b"\n") + chunk.count(b"\r") - (last + chunk).count(b"\r\n")
            last = chunk[-1:]
    return count


def _remove_nul(lines: list[str], path: Path, first: int, repaired: Tally | None) -> list[str]:
    for line, text in enumerate(lines, first):
        if repaired is not None and (count := text.count("\0")):
            repaired.add("NUL character, removed", f"{path}:{line}", count)
    return [text.replace("\0", "") for text in lines]
