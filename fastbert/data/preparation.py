"""Raw text to token shards: the work behind `fastbert prepare`."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from numbers import Integral, Real
from os import PathLike
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastbert.data import encoding, segmenters
from fastbert.data.checks import check
from fastbert.data.encoding import Job, UnitTask
from fastbert.data.histogram import Lengths, bars, draw
from fastbert.data.shards import MANIFEST, PICTURE, VERSION, read_manifest, shard_name, write_manifest
from fastbert.data.text import Scan, Tally, Unit, as_paths, check_errors, cut_units, merge_scans, spread_documents
from fastbert.data.tokenizer import Tokenizer
from fastbert.data.workers import Run, workers
from fastbert.data.workfolder import WorkFolder, locked, say, sync_tree
from fastbert.errors import DataError

_MOST_PIECES = 5  # of a word on average, in any language
_MOST_SHARD_TOKENS = 1 << 30  # well below what the 32-bit offsets of a shard can count
_NOTHING_HELD = "no validation split: there are no two different documents (a blank line or the end of a file ends one)"


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` made. splits: per split its documents, rows, tokens, words and unknown tokens; segmentation: who
    cut the words ("words"), and the version of the package it is from ("versions"); lengths: summaries of the lengths
    of "rows" and "documents" in tokens (see Lengths.summary); dropped and repaired: by reason the count and the first
    places (file:line). notes: what came out otherwise than was asked. characters: those of the text, without white
    space; speed: those per second that this run read, the finished work of an interrupted one aside."""

    folder: Path
    splits: dict[str, dict[str, int]]
    characters: int
    seconds: float
    speed: float
    segmentation: dict
    lengths: dict[str, dict]
    dropped: dict[str, dict]
    repaired: dict[str, dict]
    notes: list[str]

    @property
    def tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.splits.values())

    @property
    def unknown_percent(self) -> float:
        """Share of the tokens that are [UNK], in per cent."""
        return 100 * sum(counts["unknown_tokens"] for counts in self.splits.values()) / self.tokens

    @property
    def characters_per_token(self) -> float:
        return self.characters / self.tokens

    def __str__(self) -> str:
        versions = "".join(f" ({package} {version})" for package, version in self.segmentation["versions"].items())
        lines = [
            f"{self.folder}: {self.characters:,} characters in {self.seconds:.1f} s ({self.speed:,.0f} per second)",
            f"  words: {self.segmentation['words']}{versions}",
            f"  {self.characters_per_token:.3f} characters per token, {self.unknown_percent:.3f} % unknown tokens",
        ]
        for split, counts in self.splits.items():
            figures = (f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
            lines.append(f"  {split}: {', '.join(figures)}")
        for name, summary in self.lengths.items():
            lines += [f"  {line}" for line in bars(f"tokens per {name[:-1]}", summary)]
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
    words: segmenters.Words = "none",
    tag_separator: str | None = None,
    segmenter_model: str | PathLike | None = None,
    validation_fraction: float = 0.0,
    errors: str = "strict",
    shard_tokens: int = 1 << 25,
    unit_bytes: int = 1 << 26,
    processes: int | None = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Turn text files into a corpus folder (see fastbert.data.shards), whole or not at all.

    One line is one row, a blank line ends a document. words: where word borders come from, "none", "segmented" (with
    `tag_separator`), "rjieba", "jieba", "ltp" (with the model in the folder `segmenter_model`), a plug-in
    "package.module:function" or a function, see `segmenters.segmenter`. errors: "strict" or "replace", see `read_rows`.
    validation_fraction: share of the documents held out as the split "validation", chosen by a hash of their text, so
    that a document is never in both, equal documents stay together, and the choice outlives a new order of the files;
    at least one document if there are two different ones; if not, none, and the report notes it. shard_tokens: a shard
    is closed once it holds that many tokens. overwrite: replace `out` if it is a corpus folder.

    The text is cut into units of about `unit_bytes`, at document ends, or at line ends where documents are longer than
    that; each is the work of one of `processes` (None: as many as cores that this process may use) and has shards of
    its own. The corpus is the same, byte for byte, whatever their number; memory is that of a unit for each, and eight
    bytes per document. More than one are spawned: see fastbert.data.workers. The text is read twice: all of it is
    checked before any work is done.

    The work is done in a hidden folder .<name>.work beside `out`. If that is cut short, be it by Ctrl-C or by SIGKILL,
    calling `prepare` again goes on from the units that were finished, provided that the text (size and time of change),
    the tokenizer, the settings and the versions are the same; if not, it begins anew. Either is said. `out` appears
    when all is done; what it replaces is there until then.

    Raises DataError (bad text, no text, a file given twice, words that do not spell the text, `out` exists or is being
    prepared), MissingFileError, ConfigError (an argument that makes no sense), MissingDependencyError (a segmenter is
    not installed), and FastBertError if a worker process was killed or a disk fails.
    """
    begin = time.perf_counter()
    check("tokenizer", tokenizer, Tokenizer, "a Tokenizer")
    check("out", out, str | PathLike, "the path of a folder")
    check("validation_fraction", validation_fraction, Real, "a number from 0 to less than 1", lambda x: 0 <= x < 1)
    expected = f"an integer from 1 to {_MOST_SHARD_TOKENS}"
    check("shard_tokens", shard_tokens, Integral, expected, lambda x: 1 <= x <= _MOST_SHARD_TOKENS)
    check("unit_bytes", unit_bytes, Integral, "an integer of at least 1", lambda x: x >= 1)
    processes = len(os.sched_getaffinity(0)) if processes is None else processes
    check("processes", processes, Integral, "None or an integer of at least 1", lambda x: x >= 1)
    check_errors(errors)
    if processes > 1:
        segmenters.check_module_level(words)
    out, paths = check_request(files, out, words, tag_separator, segmenter_model, overwrite)
    job = Job(tokenizer, words, tag_separator, segmenter_model, errors, int(shard_tokens))
    with locked(out) as work:
        _check_target(out, overwrite)  # it may have been put back just now
        build = _Build(work, job, paths, float(validation_fraction), int(unit_bytes))
        work.begin(build.plan())
        try:
            if not work.is_complete():
                build.run(int(processes), progress)
            work.publish()
        except DataError:
            work.clear()  # another text or another setting is needed, and either makes another plan
            raise
        except BaseException:
            if work.finished():
                say(f"{out}: stopped; the same call goes on from {work.finished()} finished units in {work.path}")
            else:
                work.clear()
            raise
    manifest = read_manifest(out)
    seconds = time.perf_counter() - begin
    return PrepareReport(
        folder=out,
        splits={
            split: {name: count for name, count in entry.items() if name != "shards"}
            for split, entry in manifest["splits"].items()
        },
        seconds=seconds,
        speed=build.characters_read / seconds,
        **{name: manifest[name] for name in "characters segmentation lengths dropped repaired notes".split()},
    )


def check_request(
    files: str | PathLike | Sequence[str | PathLike],
    out: str | PathLike,
    words: segmenters.Words,
    tag_separator: str | None,
    segmenter_model: str | PathLike | None,
    overwrite: bool,
) -> tuple[Path, list[Path]]:
    """What can be found wrong with a call of `prepare` before any text is read; `out` and the files as paths."""
    segmenters.segmenter(words, tag_separator=tag_separator, model=segmenter_model)
    out = Path(out).resolve()
    _check_target(out, overwrite)
    return out, as_paths(files)


def hold_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out (bool): those whose hash (uint64) is below the fraction, but at least one if there
    are two different ones, and never all."""
    held = hashes < fraction * 2.0**64
    if fraction and not held.any():
        held = hashes == hashes.min()
    return hashes != hashes.max() if held.all() else held


class _Build:
    """One corpus in the making."""

    def __init__(self, work: WorkFolder, job: Job, paths: list[Path], fraction: float, unit_bytes: int):
        self._work, self._job, self._paths = work, job, paths
        self._fraction, self._unit_bytes = fraction, unit_bytes
        self._sources = self._look()
        self.characters_read = 0

    def plan(self) -> dict:
        """All that decides the bytes of the corpus, and of the units on the way to it, in terms of JSON."""
        return {
            "settings": self._settings() | {"unit_bytes": self._unit_bytes},
            "files": self._sources,
            "tokenizer": self._job.tokenizer.fingerprint,
            "segmenter": segmenters.fingerprint_of(self._segmenter(), self._job.segmenter_model),
            "versions": {name: metadata.version(name) for name in ("numpy", "pyarrow", "tokenizers")}
            | {"corpus": VERSION},
        }

    def run(self, processes: int, progress: bool) -> None:
        """Scan the text, encode it and put the corpus together."""
        units = cut_units(self._paths, self._unit_bytes)
        with workers(max(1, min(processes, len(units))), self._job) as run:
            found = self._work.scan()
            if found is None:
                found = self._scan(run, units, progress)
                self._work.keep_scan(found)
            held = hold_out(found.hashes, self._fraction)
            records = self._encode(run, self._tasks(units, found, held), progress)
        if self._look() != self._sources:
            raise DataError(f"the text changed while it was read: {', '.join(map(str, self._paths))}")
        notes = [] if held.any() or not self._fraction else [_NOTHING_HELD]
        self._put_together(records, found, held, notes)

    def _look(self) -> list:
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self._paths]

    def _segmenter(self) -> segmenters.Words:
        """What finds the words: a word-level tokenizer does by itself what no segmenter was asked for."""
        own = self._job.words == "none" and self._job.tokenizer.level == "word"
        return "rjieba" if own else self._job.words

    def _settings(self) -> dict:
        return {
            "words": segmenters.name_of(self._job.words),
            "tag_separator": self._job.tag_separator,
            "segmenter_model": None if self._job.segmenter_model is None else str(self._job.segmenter_model),
            "errors": self._job.errors,
            "validation_fraction": self._fraction,
            "shard_tokens": self._job.shard_tokens,
        }

    def _scan(self, run: Run, units: list[Unit], progress: bool) -> Scan:
        with _bar("checking text", units, progress) as bar:
            scans = list(run(encoding.scan_unit, [(unit,) for unit in units], bar))
        found = merge_scans(self._paths, units, scans)
        if not len(found.hashes):
            raise DataError(f"the corpus is empty: no line of text in {', '.join(map(str, self._paths))}")
        spread = list(spread_documents(found))
        tasks = [
            (units[first:end], found.documents[first][1] - found.documents[first][0] - 1) for _, first, end in spread
        ]
        with _bar("checking long documents", chain.from_iterable(part for part, _ in tasks), progress) as bar:
            for (document, _, _), value in zip(spread, run(encoding.hash_document, tasks, bar), strict=True):
                found.hashes[document] = value
        return found

    def _tasks(self, units: list[Unit], found: Scan, held: np.ndarray) -> list[UnitTask]:
        splits = ("train", "validation") if held.any() else ("train",)
        return [
            UnitTask(unit, lines, first, held[first:end], tuple(joined), splits, self._work.unit(number))
            for number, (unit, lines, (first, end), joined) in enumerate(
                zip(units, found.lines, found.documents, found.joined, strict=True)
            )
        ]

    def _encode(self, run: Run, tasks: list[UnitTask], progress: bool) -> list[dict]:
        """The records of all units, in their order."""
        records = [self._work.record(number) for number in range(len(tasks))]
        missing = [number for number, record in enumerate(records) if record is None]
        with _bar("preparing", [tasks[number].unit for number in missing], progress) as bar:
            done = run(encoding.encode_unit, [(tasks[number],) for number in missing], bar)
            for number, record in zip(missing, done, strict=True):
                records[number] = record
                self.characters_read += record["characters"]
        return records

    def _put_together(self, records: list[dict], found: Scan, held: np.ndarray, notes: list[str]) -> None:
        """The finished corpus, from shards that only change their names; its manifest comes last."""
        folder, tokenizer = self._work.corpus, self._job.tokenizer
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tokenizer.save_pretrained(folder / "tokenizer")
        merged = _merge(records, held)
        if find_spec("matplotlib"):
            draw(folder / PICTURE, merged["lengths"])
        else:
            notes = [*notes, f"no {PICTURE}, which needs matplotlib: pip install fastbert-kernels[plot]"]
        notes = [*notes, *_few_words(merged["splits"]["train"], self._segmenter())]
        for split, entry in merged["splits"].items():
            moved = [
                (self._work.unit(number), shard)
                for number, record in enumerate(records)
                for shard in record["splits"][split]["shards"]
            ]
            entry["shards"] = [shard | {"file": shard_name(split, i)} for i, (_, shard) in enumerate(moved)]
            for (unit, old), new in zip(moved, entry["shards"], strict=True):
                (unit / old["file"]).rename(folder / new["file"])
        sync_tree(folder)
        versions = segmenters.versions_of(self._segmenter())
        write_manifest(
            folder,
            {
                "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
                "settings": self._settings() | versions,
                "segmentation": {"words": segmenters.name_of(self._segmenter()), "versions": versions},
                "sources": found.sources,
                **merged,
                "notes": notes,
            },
        )


def _few_words(counts: dict[str, int], words: segmenters.Words) -> list[str]:
    """A note where words are so long that whole-word masking would find few that fit."""
    pieces = counts["tokens"] / counts["words"]
    if words == "none" or pieces <= _MOST_PIECES:
        return []
    return [f"a word has {pieces:.1f} tokens on average: does words={segmenters.name_of(words)!r} suit this text?"]


def _merge(records: list[dict], held: np.ndarray) -> dict:
    """What the records of all units come to. DataError: a split is empty."""
    dropped, repaired, row_lengths, document_lengths = Tally(), Tally(), Lengths(), Lengths()
    splits, characters = {name: Counter() for name in records[0]["splits"]}, 0
    shared: Counter[int] = Counter()
    for record in records:
        characters += record["characters"]
        dropped.merge(record["dropped"])
        repaired.merge(record["repaired"])
        row_lengths.counts.update(dict(record["row_lengths"]))
        document_lengths.counts.update(dict(record["document_lengths"]))
        shared.update(dict(record["open_documents"]))
        for name, entry in record["splits"].items():
            splits[name].update({key: count for key, count in entry.items() if key != "shards"})
    for document, tokens in shared.items():
        document_lengths.counts[tokens] += 1
        splits["validation" if held[document] else "train"]["documents"] += 1
    for name, counts in splits.items():
        if not counts["rows"]:
            raise DataError(f"nothing is left of the split {name!r}; dropped: {dropped.reasons}")
    return {
        "characters": characters,
        "splits": {name: dict(counts) for name, counts in splits.items()},
        "lengths": {"rows": row_lengths.summary(), "documents": document_lengths.summary()},
        "dropped": dropped.reasons,
        "repaired": repaired.reasons,
    }


def _bar(title: str, units: Iterable[Unit], progress: bool) -> tqdm:
    total = sum(span.end - span.start for unit in units for span in unit)
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, delay=2, disable=not progress)


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out} exists already; overwrite=True replaces it")
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out} exists and is not a corpus folder (it has no {MANIFEST}): it is not replaced")
    if Path.cwd().is_relative_to(out):
        raise DataError(f"{out} holds the current folder: change to another one to replace it")
