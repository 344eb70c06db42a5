"""Work dealt out to processes: each piece by one of them, the results in the order of the pieces.

With one process the work is done here. More are spawned, so that they inherit neither threads nor locks; a script that
asks for them must therefore guard its own work with `if __name__ == "__main__":`.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from fastbert.errors import FastBertError

_POLL = 0.2  # seconds between looks at how far the workers are
_worker: dict[str, Any] = {}  # what a worker process was begun with

Advance = Callable[[int], object]
Run = Callable[[Callable, Iterable[tuple], tqdm], Iterator]


@contextmanager
def workers(count: int, job: Any) -> Iterator[Run]:
    """Processes for a job (picklable): run(function, tasks, bar) gives function(job, *task, advance) of every task, in
    order. `advance` is to be called now and then with the size of what was done since; it moves the bar.

    An error in a worker is raised here. On leaving, what has not been begun is dropped, and what is at work stops when
    it next calls `advance`; if this process is killed, the workers end as well.
    """
    if count == 1:
        yield lambda function, tasks, bar: (function(job, *task, bar.update) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("Q", 0), context.Event()
    pool = ProcessPoolExecutor(count, context, _begin, (job, done, stop))

    def run(function: Callable, tasks: Iterable[tuple], bar: tqdm) -> Iterator:
        done.value = 0
        futures = deque(pool.submit(_call, function, task) for task in tasks)
        while futures:
            finished = wait([futures[0]], _POLL).done
            bar.update(done.value - bar.n)
            if finished:
                yield _result(futures.popleft())

    try:
        yield run
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _result(future):
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise FastBertError(
            "a worker process ended before its work was done: it was killed, perhaps for want of memory, or could not "
            'start (a script that asks for processes needs `if __name__ == "__main__":`)'
        ) from error


def _begin(job: Any, done: Any, stop: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(job=job, done=done, stop=stop)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function: Callable, task: tuple) -> Any:
    return function(_worker["job"], *task, _advance)


def _advance(size: int) -> None:
    if _worker["stop"].is_set():
        raise SystemExit
    with _worker["done"].get_lock():
        _worker["done"].value += size
