"""What a run tells: a JSONL log always, a progress bar or plain lines, TensorBoard on request."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from fastbert.errors import CheckpointError, MissingDependencyError, StorageError
from fastbert.files import read_bytes

LOG = "log.jsonl"
_SECONDS_BETWEEN_LINES = 10


class Journal:
    """The log of the run in `folder`; a journal without folder (every process but the first) is silent.

    begin(steps, done) opens the progress display; record(event, ...) adds one line to the log; say(text) is for people.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        title: str = "pretraining",
        tensorboard: bool = False,
        resume_from: int | None = None,
    ):
        self._title = title
        self._file = self._bar = self._board = None
        self._silent = folder is None
        self._last_line = self._begin = time.monotonic()
        self._steps = self._done = 0
        if folder is None:
            return
        if tensorboard:
            self._board = _board(folder / "tensorboard", resume_from)
        if resume_from is not None:
            _forget_after(folder / LOG, resume_from)
        self._file = open(folder / LOG, "w" if resume_from is None else "a", encoding="utf-8")

    def begin(self, steps: int, done: int) -> None:
        self._begin, self._steps, self._done = time.monotonic(), steps, done
        if not self._silent and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=done, desc=self._title, unit="step", dynamic_ncols=True)

    def record(self, event: str, **values) -> None:
        """One line of the log, and its numbers on TensorBoard."""
        if self._silent:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None  # JSON has no infinity: the norm of the gradients of an update that overflowed
        try:
            self._file.write(json.dumps({"event": event, **values}, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{self._file.name} cannot be written: {error}") from error
        if self._board is not None and event in ("train", "validation"):
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"{event}/{name}", value, values["step"])

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if not self._silent:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def progress(self, step: int, loss: float, lr: float, tokens_per_second: float) -> None:
        """Shows how it goes: in the bar, or where there is none as a line every few seconds."""
        figures = f"loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
            return
        now = time.monotonic()
        if step == self._steps or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            left = (now - self._begin) / max(1, step - self._done) * (self._steps - step)
            self.say(f"step {step}/{self._steps}: {figures}, {tqdm.format_interval(left)} left")
            self._last_line = now

    def sync(self) -> None:
        """Has what was recorded written to disk, so that a checkpoint is never ahead of the log."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise StorageError(f"{self._file.name} cannot be written: {error}") from error

    def close(self) -> None:
        for thing in (self._bar, self._file, self._board):
            if thing is not None:
                with contextlib.suppress(OSError):  # of a full disk record() has told
                    thing.close()


def read_log(folder: str | os.PathLike, event: str) -> list[dict]:
    """The records of one kind in the log of a run; none if there is no log."""
    path = Path(folder) / LOG
    lines = read_bytes(path, CheckpointError).splitlines() if path.exists() else []
    return [record for record in map(_record, lines) if record is not None and record.get("event") == event]


def _record(line: bytes) -> dict | None:
    """What a line says; None if it was not written whole."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _forget_after(path: Path, step: int) -> None:
    """Drops the records of steps that will be taken again, and lines that were not written whole."""
    lines = read_bytes(path, CheckpointError).splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and _is_before(_record(line), step)]
    temporary = path.with_suffix(".new")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


def _is_before(record: dict | None, step: int) -> bool:
    at = 0 if record is None else record.get("step", 0)
    return record is not None and isinstance(at, int) and at <= step


def _board(folder: Path, resume_from: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependencyError(
            "tensorboard=True needs the package tensorboard: pip install fastbert-kernels[tensorboard]"
        ) from None
    return SummaryWriter(folder, purge_step=None if resume_from is None else resume_from + 1)
