"""The folder in which a corpus comes to be, beside the place that it will take: what is finished survives a kill.

.<name>.work holds plan.json (what is being made, of what), scan.json and hashes.npy (what the first pass over the text
found), one folder unit-<number> for each finished unit of the text, at last the finished corpus and, while that takes
its place, what was there before. Everything is written under another name, synced to disk and then renamed; a JSON file
has a checksum of what it says, and one that is damaged is as if it were not there: its work is done again.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastbert.data.shards import MANIFEST, sha256_of
from fastbert.data.text import Scan
from fastbert.errors import DataError, MissingFileError
from fastbert.files import read_json

_PLAN, _SCAN, _HASHES, RECORD = "plan.json", "scan.json", "hashes.npy", "record.json"


class WorkFolder:
    """The work folder of a corpus folder `out`, locked: see `locked`."""

    def __init__(self, path: Path, out: Path):
        self.path, self.out = path, out
        self.corpus, self._old = path / "corpus", path / "replaced"

    def begin(self, plan: dict) -> None:
        """Keep what was finished with the same plan; remove what belongs to another, and say which it is."""
        for stray in self.path.glob(".*"):
            _remove(stray)
        found = _read(self.path / _PLAN) or {}
        if found == plan:
            done = self.finished()
            say(
                f"{self.out}: going on from {done} finished units" if done else f"{self.out}: begun anew, none was done"
            )
            return
        if found:
            other = ", ".join(key for key in plan if found.get(key) != plan[key])
            say(f"{self.out}: an interrupted run was begun with other {other}; its work is removed and begun anew")
        self.clear()
        self.path.mkdir(exist_ok=True)
        write_record(self.path / _PLAN, plan)

    def clear(self) -> None:
        for path in self.path.iterdir():
            _remove(path)

    def finished(self) -> int:
        return len(list(self.path.glob("unit-*")))

    def scan(self) -> Scan | None:
        """What the first pass found, if it is finished and undamaged."""
        content, path = _read(self.path / _SCAN), self.path / _HASHES
        if content is None or not path.is_file() or content.pop(_HASHES) != sha256_of(path):
            return None
        return Scan(hashes=np.load(path), **content)

    def keep_scan(self, scan: Scan) -> None:
        content = asdict(scan)
        temporary = self.path / f".{_HASHES}"
        np.save(temporary, content.pop("hashes"))
        sync(temporary)
        temporary.rename(self.path / _HASHES)
        write_record(self.path / _SCAN, content | {_HASHES: sha256_of(self.path / _HASHES)})

    def unit(self, number: int) -> Path:
        return self.path / f"unit-{number:05d}"

    def record(self, number: int) -> dict | None:
        """What was recorded of a unit, if all its shards are there as they were written; a damaged one is removed."""
        folder = self.unit(number)
        if not folder.is_dir():
            return None
        record = _read(folder / RECORD)
        if record is not None:
            shards = [shard for split in record["splits"].values() for shard in split["shards"]]
            if all((folder / s["file"]).is_file() and sha256_of(folder / s["file"]) == s["sha256"] for s in shards):
                return record
        shutil.rmtree(folder)
        return None

    def is_complete(self) -> bool:
        """Whether the finished corpus only has to take its place."""
        return (self.corpus / MANIFEST).is_file()

    def restore(self) -> None:
        """Put back what a killed replacement had taken away, or end one that was as good as done."""
        if self._old.exists() and self.out.exists():
            self.clear()
        elif self._old.exists():
            self._old.rename(self.out)

    def publish(self) -> None:
        """The finished corpus takes the place of what was there; the work folder vanishes."""
        if self.out.exists():
            self.out.rename(self._old)
        self.corpus.rename(self.out)
        sync(self.out.parent)
        self.clear()


@contextmanager
def locked(out: Path) -> Iterator[WorkFolder]:
    """The work folder of `out`, made if need be, and removed if it is left empty. DataError: another process has it."""
    path = out.with_name(f".{out.name}.work")
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            raise BlockingIOError  # it was removed in the meantime by the one that had it
    except BlockingIOError as error:
        os.close(handle)
        raise DataError(f"{out} is being prepared by another process, which has locked {path}") from error
    try:
        folder = WorkFolder(path, out)
        folder.restore()
        yield folder
    finally:
        if not any(path.iterdir()):
            path.rmdir()
        os.close(handle)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder that appears under its name, synced to disk, if the body succeeds, and not at all if not."""
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        temporary.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_record(path: Path, content: dict) -> dict:
    """Write a JSON file whole, with a checksum of its content; return that as it is when it is read again."""
    content = json.loads(json.dumps(content))
    temporary = path.with_name(f".{path.name}")
    text = json.dumps({"sha256": _checksum(content), "content": content}, ensure_ascii=False)
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    if path.is_dir():
        shutil.rmtree(path)
    temporary.rename(path)
    return content


def _read(path: Path) -> dict | None:
    """The content of a file that write_record wrote; None if there is none or it is damaged."""
    try:
        record = read_json(path, DataError)
    except (DataError, MissingFileError):
        return None
    content = record.get("content")
    return content if isinstance(content, dict) and record.get("sha256") == _checksum(content) else None


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
