"""What the benchmarks share: interleaved timing, percentiles, rows of JSON that say where and when."""

import datetime
import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
FLUSH = 256 * 2**20  # bytes; five times the L2 cache of an H100


def time_interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each step by name, once a round.

    The order rotates from round to round: what disturbs the machine for a while disturbs all of them. On a GPU the time
    is that between two events on the stream; a write of FLUSH bytes goes before each step, which empties the L2 cache
    and lets the host run ahead of the device.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    timed = _time_on_gpu(device) if device.startswith("cuda") else _time_on_cpu
    gc.collect()
    gc.disable()
    try:
        for i in range(-warmup, rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                elapsed = timed(steps[name])
                if i >= 0:
                    times[name].append(elapsed)
    finally:
        gc.enable()
    return times


def _time_on_cpu(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _time_on_gpu(device: str) -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)

    def timed(step: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return timed


def percentiles(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    found = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), found.tolist(), strict=True))


def environment(device: str = "cpu") -> dict[str, object]:
    """The columns that every row ends with: device, threads or driver, versions, commit, date."""
    if device.startswith("cuda"):
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        machine = {"device": torch.cuda.get_device_name(device), "driver": driver, "triton": _version("triton")}
    else:
        machine = {"device": _cpu_name(), "threads": torch.get_num_threads(), "transformers": _version("transformers")}
    return machine | {
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write_rows(rows: list[dict], file_name: str) -> Path:
    """Append rows to a JSON-lines file in benchmarks/results."""
    path = RESULTS / file_name
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
