"""What workers do with a unit of text: check it, and turn it into shards and a record of what became of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from os import PathLike
from pathlib import Path

import numpy as np

from fastbert.data import text
from fastbert.data.histogram import Lengths
from fastbert.data.segmenters import Segmenter, Words, segmenter
from fastbert.data.shards import ShardWriter
from fastbert.data.text import Row, Tally, Unit, UnitScan
from fastbert.data.tokenizer import Tokenizer
from fastbert.data.workfolder import RECORD, write_record, written_whole
from fastbert.errors import DataError

Advance = Callable[[int], object]


@dataclass
class Job:
    """What every worker needs to know. Pickled without the segmenter, which each process makes for itself."""

    tokenizer: Tokenizer
    words: Words
    tag_separator: str | None
    segmenter_model: str | PathLike | None
    errors: str
    shard_tokens: int

    def __reduce__(self):
        return Job, tuple(getattr(self, entry.name) for entry in fields(self))

    @cached_property
    def segment(self) -> Segmenter:
        return segmenter(self.words, self.tokenizer, tag_separator=self.tag_separator, model=self.segmenter_model)


@dataclass(frozen=True)
class UnitTask:
    """A unit to encode. lines: how many come before each span; document: the number of the first one; held: of each
    document whether it is held out; joined: whether the first began in an earlier unit and the last goes on in a later
    one; splits: the names of the splits of the corpus; folder: where the result appears."""

    unit: Unit
    lines: Sequence[int]
    document: int
    held: np.ndarray
    joined: tuple[bool, bool]
    splits: tuple[str, ...]
    folder: Path


def scan_unit(job: Job, unit: Unit, advance: Advance) -> UnitScan:
    return text.scan_unit(unit, job.errors, advance)


def hash_document(job: Job, units: Sequence[Unit], document: int, advance: Advance) -> int:
    return text.hash_document(units, document, job.errors, advance)


def encode_unit(job: Job, task: UnitTask, advance: Advance) -> dict:
    """Write the shards of a unit, and record.json beside them; return what that says.

    splits: per split its counts and shards, without the documents that are in other units too. open_documents: per
    such document its tokens in this unit. row_lengths, document_lengths: how often each length occurs. dropped,
    repaired: see Tally.
    """
    with written_whole(task.folder) as folder:
        encoder = _Encoder(job, task, folder)
        repaired = Tally()
        for rows in text.read_unit(task.unit, task.lines, task.document, job.errors, repaired, advance):
            if rows:
                encoder.add(rows)
        return write_record(folder / RECORD, encoder.finish() | {"repaired": repaired.reasons})


class _Encoder:
    """Encodes rows, deals them out to the splits, and counts what is left out."""

    def __init__(self, job: Job, task: UnitTask, folder: Path):
        self._job, self._task = job, task
        size = job.tokenizer.vocab_size
        self._writers = {name: ShardWriter(folder, name, size, job.shard_tokens) for name in task.splits}
        self._counts = {name: dict.fromkeys(("rows", "tokens", "words", "unknown_tokens"), 0) for name in task.splits}
        self._tokens = np.zeros(len(task.held), np.int64)  # per document
        self._row_lengths, self._dropped, self._characters = Lengths(), Tally(), 0

    def add(self, rows: list[Row]) -> None:
        words = self._job.segment(rows)
        encoded = self._job.tokenizer.encode_rows(words, whole=self._job.words != "none")
        self._note_dropped(rows, encoded.lengths, encoded.vanished)
        self._characters += sum(map(len, "".join(chain.from_iterable(words)).split()))
        documents = np.fromiter((row.document for row in rows), np.int64, len(rows)) - self._task.document
        if documents[-1] >= len(self._tokens):
            raise DataError(f"{rows[-1].path} changed while it was read: it has more documents than at first")
        first = documents[0]
        tokens = np.bincount(documents - first, encoded.lengths).astype(np.int64)
        self._tokens[first : first + len(tokens)] += tokens
        self._row_lengths.add(encoded.lengths[encoded.lengths > 0])
        held = self._task.held[documents]
        for name, writer in self._writers.items():
            keep = (held == (name == "validation")) & (encoded.lengths > 0)
            if not keep.any():
                continue
            pieces = np.repeat(keep, encoded.lengths)
            ids, word_start = encoded.ids[pieces], encoded.word_start[pieces]
            writer.add(documents[keep] + self._task.document, encoded.lengths[keep], ids, word_start)
            counts = self._counts[name]
            counts["rows"] += int(keep.sum())
            counts["tokens"] += len(ids)
            counts["words"] += int(np.count_nonzero(word_start))
            counts["unknown_tokens"] += int(np.count_nonzero(ids == self._job.tokenizer.unk_id))

    def _note_dropped(self, rows: list[Row], lengths: np.ndarray, vanished: np.ndarray) -> None:
        for i in np.flatnonzero(lengths == 0):
            self._dropped.add("row without a character that the tokenizer keeps", rows[i].place)
        for i in np.flatnonzero((lengths > 0) & (vanished > 0)):
            self._dropped.add("word without a character that the tokenizer keeps", rows[i].place, int(vanished[i]))

    def finish(self) -> dict:
        shared = np.zeros(len(self._tokens), bool)
        if len(shared):
            shared[0] |= self._task.joined[0]
            shared[-1] |= self._task.joined[1]
        own = ~shared & (self._tokens > 0)
        lengths, splits = Lengths(), {}
        lengths.add(self._tokens[own])
        for name, writer in self._writers.items():
            writer.flush()
            documents = int(np.count_nonzero(own & (self._task.held == (name == "validation"))))
            splits[name] = {"documents": documents, **self._counts[name], "shards": writer.table()}
        return {
            "characters": self._characters,
            "splits": splits,
            "open_documents": [
                [int(i) + self._task.document, int(self._tokens[i])]
                for i in np.flatnonzero(shared & (self._tokens > 0))
            ],
            "row_lengths": sorted(self._row_lengths.counts.items()),
            "document_lengths": sorted(lengths.counts.items()),
            "dropped": self._dropped.reasons,
        }
