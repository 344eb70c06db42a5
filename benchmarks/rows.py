"""Rows: how a measurement is written down, and on what it was taken. One JSON object a line, one file per device.

Columns, in this order:

    op, provider          what ran: a name of fastbert.ops, or a model; and whose implementation
    package               name and version of the package that the provider comes from, if it is not PyTorch or fastbert
    shape, dtype, mode    sizes by name (legend: fastbert/reference.py); fp16, bf16, fp32; fwd, bwd, fwd+bwd or step
    status, reason        measured; missing (not installed, not built, cannot express it); failed; wrong (did not agree
                          with float64); and why. Only "measured" has numbers
    checked               what agreed before anything was timed
    comparable            false: it computes something else or less, so that its time is nobody's rival
    timer, rounds         graph: replays of a CUDA graph; events: launches from Python; clock: the CPU's
    no_graph              why a step that was to be a graph is none
    p20_us, p50_us, p80_us
    tflops, gb_per_s      useful operations and needed bytes per second, at the median
    floor_us, floor_by    the shortest time that the ceilings of the same run allow, and which of them sets it
    percent_of_floor      100 floor / median
    peak_mib              memory that a step allocates: of an op beyond its inputs (bwd: and beyond what the forward
                          saved), of a model beyond parameters and optimizer state; null on a CPU
    ratio                 median of the fastest rival / own median: above 1 is faster. A rival is comparable, was timed
                          the same way and, for fastbert's providers, is not fastbert's
    tokens_per_s          of models: real tokens, without padding
    chars_per_s           of prepare: characters of text, without spaces
    mfu                   of train, in 16 bits on a GPU whose data sheet train.py knows: model FLOP utilisation in per
                          cent; its formula is in train.py
    breakdown             of train, fastbert's: name, us, calls and floor_us of each part of a step (breakdown.py)
    ceilings              what moving memory, matrix products and exp2 reached on the device at the start of the run
    run                   the same for all that took turns with each other
    device, driver, threads, python, torch, triton, cuda, transformers, commit, date

`commit` ends with + if there were changes that were not committed. For a copy of a checkout that has no git history of
its own FASTBERT_COMMIT says it; an installed fastbert says its version instead.
"""

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastbert
from fastbert.errors import DataError
from fastbert.files import parse_json, read_text

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
MEASURED, MISSING, FAILED, WRONG = "measured", "missing", "failed", "wrong"


def environment(device: str) -> dict[str, object]:
    """The columns that every row ends with. A CPU that interprets Triton's kernels is not the CPU it is."""
    cuda = device.startswith("cuda")
    interpreted = "" if cuda or os.environ.get("TRITON_INTERPRET") != "1" else " (Triton interpreted)"
    driver = _driver() if cuda else None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name() + interpreted,
        "driver": driver,
        "threads": None if cuda else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda if cuda else None,
        "transformers": package_version("transformers"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def file_name(device: str) -> str:
    """The file of a device's rows: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3.jsonl."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".jsonl"


def write(folder: Path, rows: Iterable[dict]) -> None:
    """Append rows to the files of their devices, one write per row, so that what was measured survives a crash."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        with (folder / file_name(row["device"])).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read(folder: Path) -> Iterator[dict]:
    """All rows of all devices, oldest first in each file. Raises DataError for a line that is none."""
    for path in sorted(folder.glob("*.jsonl")):
        yield from read_file(path)


def read_file(path: Path) -> Iterator[dict]:
    """The rows of a file. Raises DataError for a line that is none."""
    for number, line in enumerate(read_text(path, DataError).splitlines(), 1):
        row = parse_json(line, f"{path}, line {number}", DataError)
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a JSON {type(row).__name__}, expected an object")
        if missing := {"op", "provider", "status", "device", "commit", "date"} - set(row):
            raise DataError(f"{path}, line {number}: no {', '.join(sorted(missing))}")
        yield row


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    if found:
        return found
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    version = re.search(r"\d+\.\d+(\.\d+)?", text)
    return version and version[0]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    root = FOLDER.parent
    if not (root / "pyproject.toml").exists():
        return os.environ.get("FASTBERT_COMMIT") or f"release {fastbert.__version__}"
    top = _output("git", "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:  # no repository, or somebody else's around this copy
        return os.environ.get("FASTBERT_COMMIT")
    commit = _output("git", "rev-parse", "--short", "HEAD")
    return f"{commit}+" if commit and _output("git", "status", "--porcelain", "--untracked-files=no") else commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
