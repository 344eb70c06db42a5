"""Raw text to token shards: the work behind `fastbert prepare`."""

import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from numbers import Integral, Real
from os import PathLike
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastbert.data.checks import check
from fastbert.data.shards import MANIFEST, ShardWriter, write_manifest
from fastbert.data.text import Row, Tally, as_paths, read_rows, scan, segmenter
from fastbert.data.tokenizer import Tokenizer
from fastbert.errors import DataError

_BATCH_CHARACTERS = 1 << 20
_MOST_SHARD_TOKENS = 1 << 30  # well below what the 32-bit offsets of a shard can count
_NOTHING_HELD = "no validation split: there are no two different documents (a blank line or the end of a file ends one)"


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` made. splits: per split its documents, rows, tokens, words and unknown tokens; dropped and
    repaired: by reason the count and the first places (file:line). notes: what came out otherwise than was asked."""

    folder: Path
    splits: dict[str, dict[str, int]]
    characters: int
    seconds: float
    dropped: dict[str, dict]
    repaired: dict[str, dict]
    notes: list[str]

    def __str__(self) -> str:
        speed = self.characters / self.seconds
        lines = [f"{self.folder}: {self.characters:,} characters in {self.seconds:.1f} s ({speed:,.0f} per second)"]
        for split, counts in self.splits.items():
            figures = (f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
            lines.append(f"  {split}: {', '.join(figures)}")
        lines += [f"  note: {note}" for note in self.notes]
        for title, reasons in (("dropped", self.dropped), ("repaired", self.repaired)):
            for reason, entry in reasons.items():
                lines.append(f"  {title}: {entry['count']:,} x {reason}, first at {', '.join(entry['examples'])}")
        return "\n".join(lines + ([] if self.dropped else ["  nothing was dropped"]))


def prepare(
    files: str | PathLike | Sequence[str | PathLike],
    tokenizer: Tokenizer,
    out: str | PathLike,
    *,
    words: str = "none",
    tag_separator: str | None = None,
    validation_fraction: float = 0.0,
    errors: str = "strict",
    shard_tokens: int = 1 << 25,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Turn text files into a corpus folder (see fastbert.data.shards), whole or not at all.

    One line is one row, a blank line ends a document. words: where word borders come from, "none", "segmented" (with
    `tag_separator`) or "rjieba", see `segmenter`. errors: "strict" or "replace", see `read_rows`. validation_fraction:
    share of the documents held out as the split "validation", chosen by a hash of their text, so that a document is
    never in both, equal documents stay together, and the choice outlives a new order of the files; at least one
    document if there are two different ones; if not, none, and the report notes it. shard_tokens: a shard is closed
    once it holds that many tokens. overwrite: replace `out` if it is a corpus folder.

    The text is read twice: all of it is checked before any work is done. Raises DataError (bad text, no text, a file
    given twice, `out` exists), MissingFileError, ConfigError (an argument that makes no sense), MissingDependencyError
    (words="rjieba" without rjieba).

    The work is done in a hidden folder .<name>.new-<mark> beside `out`. A process killed outright (SIGKILL, loss of
    power) leaves it there, and one killed in the instant of a replacement also .<name>.old-<mark>, which is what was
    there before. Nothing reads them: delete them when no `prepare` is at work.
    """
    begin = time.perf_counter()
    check("tokenizer", tokenizer, Tokenizer, "a Tokenizer")
    check("out", out, str | PathLike, "the path of a folder")
    check("validation_fraction", validation_fraction, Real, "a number from 0 to less than 1", lambda x: 0 <= x < 1)
    expected = f"an integer from 1 to {_MOST_SHARD_TOKENS}"
    check("shard_tokens", shard_tokens, Integral, expected, lambda x: 1 <= x <= _MOST_SHARD_TOKENS)
    settings = {
        "words": words,
        "tag_separator": tag_separator,
        "errors": errors,
        "validation_fraction": float(validation_fraction),
        "shard_tokens": int(shard_tokens),
    }
    out, paths, cut = Path(out).resolve(), as_paths(files), segmenter(words, tag_separator)
    _check_target(out, overwrite)
    found = scan(paths, errors, progress)
    held = hold_out(found.hashes, validation_fraction)
    notes = [] if held.any() or not validation_fraction else [_NOTHING_HELD]
    repaired = Tally()
    with _replacing(out) as folder:
        build = _Build(folder, tokenizer, held, shard_tokens)
        rows = read_rows(paths, errors, repaired)
        for batch in _batches(tqdm(rows, "preparing", found.rows, unit=" rows", delay=2, disable=not progress)):
            build.add(batch, [cut(row) for row in batch], whole=words != "none")
        build.finish()
        tokenizer.save_pretrained(folder / "tokenizer")
        content = {
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
            "settings": settings | ({"rjieba": metadata.version("rjieba")} if words == "rjieba" else {}),
            "sources": found.sources,
            "characters": build.characters,
            "splits": {name: split.counts | {"shards": split.writer.table()} for name, split in build.splits.items()},
            "dropped": build.dropped.reasons,
            "repaired": repaired.reasons,
            "notes": notes,
        }
        write_manifest(folder, content)
    return PrepareReport(
        folder=out,
        splits={name: split.counts for name, split in build.splits.items()},
        characters=build.characters,
        seconds=time.perf_counter() - begin,
        dropped=build.dropped.reasons,
        repaired=repaired.reasons,
        notes=notes,
    )


def hold_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out (bool): those whose hash (uint64) is below the fraction, but at least one if there
    are two different ones, and never all."""
    held = hashes < fraction * 2.0**64
    if fraction and not held.any():
        held = hashes == hashes.min()
    return hashes != hashes.max() if held.all() else held


class _Split:
    """The shards of one split and what has been counted of it."""

    def __init__(self, writer: ShardWriter):
        self.writer = writer
        self.counts = {"documents": 0, "rows": 0, "tokens": 0, "words": 0, "unknown_tokens": 0}
        self._last_document = -1

    def add(
        self, documents: np.ndarray, lengths: np.ndarray, ids: np.ndarray, word_start: np.ndarray, unk_id: int
    ) -> None:
        if not len(documents):
            return
        self.writer.add(documents, lengths, ids, word_start)
        new = {
            "documents": np.count_nonzero(np.diff(documents, prepend=self._last_document)),
            "rows": len(documents),
            "tokens": len(ids),
            "words": int(word_start.sum()),
            "unknown_tokens": np.count_nonzero(ids == unk_id),
        }
        self._last_document = documents[-1]
        for name, count in new.items():
            self.counts[name] += int(count)


class _Build:
    """Encodes batches of rows, deals them out to the splits, and counts what is left out."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, held: np.ndarray, shard_tokens: int):
        self._tokenizer, self._held = tokenizer, held
        names = ("train", "validation") if held.any() else ("train",)
        self.splits = {name: _Split(ShardWriter(folder, name, tokenizer.vocab_size, shard_tokens)) for name in names}
        self.dropped, self.characters = Tally(), 0

    def add(self, rows: list[Row], words: list[list[str]], whole: bool) -> None:
        encoded = self._tokenizer.encode_rows(words, whole=whole)
        for i in np.flatnonzero(encoded.lengths == 0):
            self.dropped.add("row without a character that the tokenizer keeps", rows[i].place)
        for i in np.flatnonzero((encoded.lengths > 0) & (encoded.vanished > 0)):
            self.dropped.add(
                "word without a character that the tokenizer keeps", rows[i].place, int(encoded.vanished[i])
            )
        self.characters += sum(map(len, chain.from_iterable(words)))
        documents = np.fromiter((row.document for row in rows), np.int64, len(rows))
        if documents[-1] >= len(self._held):
            raise DataError(f"{rows[-1].path} changed while it was read: it has more documents than at first")
        held = self._held[documents]
        for name, split in self.splits.items():
            keep = (held == (name == "validation")) & (encoded.lengths > 0)
            tokens = np.repeat(keep, encoded.lengths)
            split.add(
                documents[keep],
                encoded.lengths[keep],
                encoded.ids[tokens],
                encoded.word_start[tokens],
                self._tokenizer.unk_id,
            )

    def finish(self) -> None:
        for name, split in self.splits.items():
            if not split.counts["rows"]:
                raise DataError(f"nothing is left of the split {name!r}; dropped: {self.dropped.reasons}")
            split.writer.flush()


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out} exists already; overwrite=True replaces it")
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out} exists and is not a corpus folder (it has no {MANIFEST}): it is not replaced")
    if Path.cwd().is_relative_to(out):
        raise DataError(f"{out} holds the current folder: change to another one to replace it")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place, synced to disk, if the body succeeds, and vanishes if
    not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    folder, old = out.with_name(f".{out.name}.new-{mark}"), out.with_name(f".{out.name}.old-{mark}")
    folder.mkdir()
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        if out.exists():
            out.rename(old)
        folder.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
