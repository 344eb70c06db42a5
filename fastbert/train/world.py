"""The processes that train together, the device of this one, and what is known of the others when one of them fails.

PyTorch's launcher, torchrun, starts the processes and ends them; its store is where they leave a note of what they do,
so that those that wait in vain can say for whom.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fastbert.errors import ConfigError, FastBertError, ProcessError

TIMEOUT = 1800.0  # seconds that processes wait for each other
_BEAT = 1.0  # seconds between notes
_SILENCE = 10.0  # seconds without a note after which a process on another machine is taken for dead


@dataclass(frozen=True)
class World:
    """rank of size processes; rank 0 alone writes. Counts and flags are reduced on the CPU, so that no GPU is waited
    for. Where processes wait in vain for others, ProcessError says for which.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    notes: "Notes | None" = None

    @classmethod
    @contextmanager
    def join(cls, device: str, timeout: float = TIMEOUT) -> Iterator["World"]:
        """The world that torchrun describes in the environment, or the process group that exists already, or one
        process alone. timeout: seconds that processes wait for each other.
        """
        resolved = resolve_device(device)
        if dist.is_initialized():
            yield cls(resolved, dist.get_rank(), dist.get_world_size(), _notes.get())
            return
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls(resolved)
            return
        backend = "cpu:gloo,cuda:nccl" if resolved.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        # torchrun keeps one store over its restarts, with the addresses of processes that are gone (seen in 2.13)
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"fastbert {restarts} {size}", store)
        notes = Notes(store, rank, size)
        token = _notes.set(notes)
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            yield cls(resolved, rank, size, notes)
        except Exception as error:
            notes.fail(error)
            raise
        finally:
            _notes.reset(token)
            notes.close()
            if dist.is_initialized():
                dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def note(self, doing: str) -> None:
        """What this process is doing now, for the others to tell."""
        if self.notes is not None:
            self.notes.doing(doing)

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes, in double precision."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """Largest values over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Returns once every process is here."""
        self.sum(0.0)

    def wait_for_main(self, what: str) -> None:
        """Returns once the first process is here too, however long that takes; what: what it does meanwhile."""
        if self.notes is None:
            self.barrier()
        else:
            self.notes.wait_for_main(what)

    def add(self, tensor: torch.Tensor) -> None:
        """Puts the sum over all processes in place of a tensor on the device."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor)

    def begin_adding(self, tensor: torch.Tensor) -> dist.Work:
        """As `add`, but returns at once; `finish` waits."""
        with self._together():
            return dist.all_reduce(tensor, async_op=True)

    def finish(self, work: dist.Work) -> None:
        """Waits for what `begin_adding` has begun."""
        with self._together():
            work.wait()

    def align(self, tensors: Iterable[torch.Tensor]) -> None:
        """Puts the first process's values into tensors on the device: other processors may have drawn others."""
        if self.size > 1:
            with self._together():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), 0)

    def gather(self, content: list) -> list:
        """The JSON lists of all processes, one after another, in each of them."""
        if self.size == 1:
            return content
        own = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        sizes = self._reduce([len(own) if rank == self.rank else 0 for rank in range(self.size)], dist.ReduceOp.SUM)
        sizes = [int(size) for size in sizes]
        rows = torch.zeros(self.size, max(sizes), dtype=torch.uint8)
        rows[self.rank, : len(own)] = own
        with self._together():
            dist.all_reduce(rows)
        return [part for row, size in zip(rows, sizes, strict=True) for part in json.loads(bytes(row[:size].tolist()))]

    def _reduce(self, values, operation) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        with self._together():
            dist.all_reduce(tensor, operation)
        return tensor.tolist()

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, FastBertError) or not _is_of_others(error):
                raise
            others = "" if self.notes is None else self.notes.of_others()
            raise ProcessError(
                f"process {self.rank} of {self.size} waited in vain for the others: {others or str(error)}"
            ) from error


class Notes:
    """What each process does, in the store that torchrun keeps: a thread of each writes it, every second."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self._store, self._rank, self._size = store, rank, size
        self._doing, self._since = "starting", time.time()
        self._waits, self._stop = 0, threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="notes", daemon=True)
        self._thread.start()

    def doing(self, text: str) -> None:
        """Text that goes with "is", such as "in step 12"."""
        self._doing, self._since = text, time.time()

    def fail(self, error: Exception) -> None:
        """Leaves word of an error; of one that tells of another process none, for that has its own."""
        if isinstance(error, ProcessError):
            return
        try:
            self._store.set(f"failed/{self._rank}", f"{type(error).__name__}: {error}"[:2000])
        except RuntimeError:
            pass  # the store is gone, and with it those who would read it

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for_main(self, what: str) -> None:
        self._waits += 1
        key = f"reached/{self._waits}"
        if self._rank == 0:
            self._store.set(key, "1")
            return
        before = self._doing
        self.doing(f"waiting for process 0, which is {what}")
        while not self._store.check([key]):
            if reason := self._lost(0, 6 * _SILENCE):
                raise ProcessError(f"process {self._rank} of {self._size} waited for process 0, {what}: {reason}")
            time.sleep(0.2)
        self.doing(before)

    def of_others(self) -> str:
        """What has become of the other processes: an error, no sign of life, or what each is doing."""
        until = time.monotonic() + _SILENCE + 2 * _BEAT
        try:
            while time.monotonic() < until:  # for one that is failing to leave word, for a dead one to be silent
                found = [self._lost(rank) for rank in range(self._size) if rank != self._rank]
                if any(found):
                    return "; ".join(filter(None, found))
                time.sleep(0.2)
            return "; ".join(self._told(rank) for rank in range(self._size) if rank != self._rank)
        except RuntimeError as error:
            return f"the store of the launcher does not answer ({str(error).splitlines()[0]})"

    def _lost(self, rank: int, silence: float = _SILENCE) -> str | None:
        if self._store.check([f"failed/{rank}"]):
            return f"process {rank} failed: {self._store.get(f'failed/{rank}').decode()}"
        if not self._store.check([f"note/{rank}"]):
            return None
        note = self._read(rank)
        if note["host"] == platform.node():
            dead = not _is_alive(note["pid"])
        else:
            dead = time.time() - note["time"] > silence
        return f"{_who(rank, note)} has died, last seen {note['doing']}" if dead else None

    def _told(self, rank: int) -> str:
        note = self._read(rank)
        return f"{_who(rank, note)} lives, and has been {note['doing']} for {time.time() - note['since']:.0f} s"

    def _read(self, rank: int) -> dict:
        return json.loads(self._store.get(f"note/{rank}"))

    def _write(self) -> None:
        content = {"doing": self._doing, "since": self._since, "time": time.time()}
        content |= {"pid": os.getpid(), "host": platform.node()}
        self._store.set(f"note/{self._rank}", json.dumps(content))

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            try:
                self._write()
            except RuntimeError:
                return  # the launcher has ended: so will this process


def _who(rank: int, note: dict) -> str:
    return f"process {rank} (pid {note['pid']} on {note['host']})"


_notes: ContextVar[Notes | None] = ContextVar("fastbert_notes", default=None)  # of the process group that was joined


def launch() -> str | None:
    """What torchrun's restarts of the same processes have in common; None if it did not start this one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{platform.node()} {os.getppid()}" if name == "none" else name


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_of_others(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process. gloo has no class of its own for that."""
    told = str(error)
    return isinstance(error, dist.DistError) or any(
        text in told for text in ("Connection closed", "Connection reset", "Timed out", "timed out", "Broken pipe")
    )


def resolve_device(name: str) -> torch.device:
    """ "auto", or a device as torch writes it. Of several GPUs, a process takes the one of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:<number>'") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:<number>'")
    if device.type == "cpu":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r} (GPU {index}), but torch sees {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
