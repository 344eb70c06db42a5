"""`make gpu SLICE=NAME`: what a GPU is needed for, in slices that each fit in some minutes.

    python -m benchmarks.slices correctness            every test that needs a GPU
    python -m benchmarks.slices attention relative     measurements; rows go to --out as they are made
    python -m benchmarks.slices --list                 what each slice runs
    python -m benchmarks.slices --device cpu layer     a rehearsal without a GPU: tiny shapes, Triton interpreted

Inside a slice the most valuable comes first. Every step is a process of its own, so that one that breaks the GPU's
context, or runs out of its time, takes no other with it; what it measured until then is written. Words after -- go to
every step: to pytest in the slices correctness and sanitize, to `fastbert bench` in the others. correctness runs the
tests marked gpu, sanitize those marked kernel, which launch kernels of our own.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from . import cli, rows
from .harness import OURS

ROOT = rows.FOLDER.parent
NO_TEST = "exit code 5"  # pytest's, where the words after -- choose none of a file
MARKS = re.compile(r"^pytestmark = (.*)$", re.MULTILINE)
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# What each measuring slice gives to `fastbert bench`, in order.
MEASURING = {
    "attention": [f"{op} --cases {cases}" for cases in (":2", "2:6", "6:") for op in ("rotary_attention", "attention")],
    "relative": ["relative_attention"],
    "lamb": ["lamb"],
    "shared": [
        "shared_linear",
        "train --shape family=albert",
        "train --shape family=bert",
        "models --shape family=albert part=encoder",
        "models --shape family=bert part=encoder",
    ],
    "layer": ["dropout_add_layer_norm", "bias_gelu", "linear_cross_entropy", "embedding_layer_norm"],
    "train": ["train", "feed", "prepare", "models", "accelerate"],
    "latency": ["latency", "encoder_layers"],
    "sweep": [
        *(f"{op}_attention --sweep --cases :2" for op in ("rotary", "relative")),
        *(f"{op} --sweep" for op in ("bias_gelu", "dropout_add_layer_norm", "linear_cross_entropy")),
        "encoder_layers --sweep --cases :4 --dtypes fp16",
    ],
}
NAMES = ("correctness", *(name for name in MEASURING if name != "sweep"), "sanitize", "sweep")
# A rehearsal measures nothing: as little as runs every line.
REHEARSAL = ["--tiny", "--cases", ":1", "--rounds", "2"]
GRACE = 60  # seconds before the end of a slice after which a measurement begins nothing


@dataclass(frozen=True)
class Options:
    """What the command line says, and when time is up by time.monotonic()."""

    device: str
    out: Path
    deadline: float
    more: Sequence[str]

    @property
    def seconds(self) -> float:
        return self.deadline - time.monotonic()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs slices; 0 if every step ended well, 1 if not, 2 if nothing can be run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    more = argv[argv.index("--") + 1 :] if "--" in argv else []
    options = _parser().parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    if options.list:
        _list()
        return 0
    if options.check_extension:
        faults = _extension_fault(options.device)
        print("".join(f"{fault}\n" for fault in faults), end="")
        return 1 if faults else 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} finds no GPU; --device cpu rehearses without one", file=sys.stderr)
        return 2
    if options.device == "cuda" and not rows.environment("cuda")["commit"]:
        print("rows without a commit are no evidence; without git history set FASTBERT_COMMIT", file=sys.stderr)
        return 2
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        if options.out.resolve() == rows.RESULTS:
            print(f"--out: got {options.out}, but a rehearsal measures nothing; choose another folder", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, as by Ctrl-C
    _describe(options.device)
    failed = _extension_fault(options.device)
    spent = options.spent
    for name in options.names or NAMES:
        print(f"\n=== {name} ===", flush=True)
        deadline, spent = time.monotonic() + 60 * options.minutes - spent, 0
        failed += run_slice(name, Options(options.device, options.out, deadline, more))
    print(f"\n{'FAILED: ' + '; '.join(failed) if failed else 'all steps ended well'}; rows are in {options.out}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = f"{', '.join(NAMES)}; default: all, in this order"
    parser.add_argument("names", nargs="*", type=_name, metavar="SLICE", help=names)
    parser.add_argument("--list", action="store_true", help="show what each slice runs, and run nothing")
    parser.add_argument("--check-extension", action="store_true", help="only say whether fastbert._C serves the device")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--minutes", type=float, default=8, help="for each slice; default: 8")
    parser.add_argument("--spent", type=float, default=0, help="seconds of the first slice that are gone; default: 0")
    parser.add_argument("--out", type=Path, default=rows.RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    return parser


def _name(text: str) -> str:
    if text not in NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(NAMES)}")
    return text


def run_slice(name: str, options: Options) -> list[str]:
    """Runs the steps of a slice until its time is up; returns what went wrong, a line each."""
    watched = name == "sanitize" and options.device == "cuda"
    if watched and shutil.which("compute-sanitizer") is None:
        return ["sanitize: compute-sanitizer is not on the PATH"]
    failed, ran = [], False
    for step, command in _steps(name, options):
        if options.seconds <= (GRACE if name in MEASURING else 0):
            failed.append(f"{name}: out of time before {step}")
            break
        print(f"\n--- {step}", flush=True)
        if name in ("correctness", "sanitize"):
            fault = _test(name, step, command, options)
        else:
            fault = _measure(command, options)
        ran = ran or fault != NO_TEST
        failed += [f"{name}: {step}: {fault}"] if fault not in (None, NO_TEST) else []
    return failed if ran else [*failed, f"{name}: no test ran"]


def _steps(name: str, options: Options) -> Iterator[tuple[str, list[str]]]:
    """(what it is called, command) of each step."""
    if name in MEASURING:
        rehearsal = REHEARSAL if options.device == "cpu" else []
        for words in MEASURING[name]:
            command = [sys.executable, "-m", "benchmarks", *words.split(), *rehearsal]
            yield words, [*command, "--device", options.device, "--out", str(options.out), *options.more]
        return
    mark = "gpu" if name == "correctness" else "kernel"
    for file in test_files(mark):
        for tool in SANITIZERS if name == "sanitize" and options.device == "cuda" else (None,):
            watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"] if tool else []
            command = [*watch, sys.executable, "-m", "pytest", "-q", "-m", mark, file, *options.more]
            yield f"{tool} {file}" if tool else file, command


def test_files(mark: str) -> list[str]:
    """The files whose tests bear the mark, those with kernels of our own first."""
    marks = {
        str(path.relative_to(ROOT)): MARKS.findall(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
    }
    marked = [file for file, found in marks.items() if any(f"pytest.mark.{mark}" in each for each in found)]
    return sorted(marked, key=lambda file: not any("pytest.mark.kernel" in each for each in marks[file]))


def _measure(command: list[str], options: Options) -> str | None:
    """Runs `fastbert bench`, and if that spoilt its process what is left, without graphs; returns what went wrong."""

    def run(*more: str) -> str | None:
        return _run([*command, *more, "--minutes", f"{(options.seconds - GRACE) / 60:.2f}"], options.seconds)

    fault = run()
    again = fault == f"exit code {cli.SPOILT}" and options.seconds > GRACE
    return run("--events", "--skip-measured") if again else fault


def _test(name: str, step: str, command: list[str], options: Options) -> str | None:
    """Runs one file of tests and writes a row of how many passed; returns what went wrong."""
    environment = {}
    if name == "sanitize":  # few examples, for everything is slow; a block for each tensor, so that its end is known
        environment = {"HYPOTHESIS_PROFILE": "sanitize", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        half = options.seconds / 2  # so that a file that hangs leaves something for the others
        fault = _run([*command, "--junitxml", str(report)], half, environment)
        counts = _counts(report)
    if fault == NO_TEST:
        return fault
    status = {"status": rows.FAILED, "reason": fault} if fault else {"status": rows.MEASURED}
    about = {"op": "tests", "provider": "pytest" if name == "correctness" else step.split()[0]}
    place = {"shape": {"file": step.split()[-1]}, "words": " ".join(options.more)}
    rows.write(options.out, [about | place | status | counts | rows.environment(options.device)])
    return fault


def _counts(report: Path) -> dict[str, float]:
    """passed, failed, skipped, seconds of a junit report; nothing if there is none."""
    if not report.exists():
        return {}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    passed = total - failed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": float(suite.get("time"))}


def _run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> str | None:
    """Runs a command in the checkout, its output shown as it comes; returns what went wrong."""
    # In a group of its own: what a tool such as compute-sanitizer starts must end with it, or it keeps the GPU.
    environment = {**os.environ, **(environment or {})}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp)
    try:
        code = process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None if code == 0 else f"exit code {code}"


def _extension_fault(device: str) -> list[str]:
    """What is wrong with fastbert._C: without its CUDA part half of the evidence would be skipped in silence."""
    key = "CUDA" if device == "cuda" else "CPU"
    try:
        import fastbert._C  # noqa: F401
    except ImportError as error:
        return [f"fastbert._C is not built: {error}"]
    if torch._C._dispatch_has_kernel_for_dispatch_key("fastbert::lamb_", key):
        return []
    return [f"fastbert._C has no {key} part"]


def _describe(device: str) -> None:
    print(json.dumps(rows.environment(device)), flush=True)


def _list() -> None:
    print(f"correctness\n  pytest -m gpu {' '.join(test_files('gpu'))}")
    for name, steps in MEASURING.items():
        print(name, *(f"  {OURS} bench {words}" for words in steps), sep="\n")
    print(f"sanitize\n  {', '.join(SANITIZERS)}: pytest -m kernel {' '.join(test_files('kernel'))}, few examples each")


if __name__ == "__main__":
    sys.exit(main())
