"""csrc/lamb.cu and the course of csrc/lamb.h, run where there is no GPU: the CUDA source thread by thread on the CPU,
beside the CPU part; and the course with a thread for each block under the thread sanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="there is no C++ compiler here")


def compiled(tmp_path, sources, *flags):
    """The program of these sources, with headers of CUDA that hold nothing."""
    for name in ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h"):
        (tmp_path / name).touch()
    include = [f"-I{folder}" for folder in (tmp_path, ROOT / "csrc", ROOT / "tests" / "csrc")]
    command = [CXX, "-std=c++17", "-O1", "-Wno-psabi", "-ffp-contract=off", "-pthread", *flags, *include]
    program = tmp_path / "program"
    done = subprocess.run([*command, *sources, "-o", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def thread_sanitizer(tmp_path):
    """The flags of the thread sanitizer; skips where it does not run."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    linked = subprocess.run([CXX, "-fsanitize=thread", probe, "-o", tmp_path / "probe"], capture_output=True)
    if linked.returncode or subprocess.run([tmp_path / "probe"]).returncode:
        pytest.skip("the compiler has no thread sanitizer that runs here")
    return "-g", "-fsanitize=thread"


def test_the_cuda_source_does_what_the_cpu_part_does(tmp_path):
    """All dtypes, whole and ragged chunks, few and many slots, one block and several, phases together and apart, turns
    of the threads in either order."""
    program = compiled(tmp_path, ["tests/csrc/lamb_cuda_on_cpu.cpp", "csrc/lamb_cpu.cpp"])
    done = subprocess.run([program], capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "0 failed", done.stdout
    assert len(lines) == 25 and all(line.endswith("right") for line in lines[:-1])


def test_blocks_that_run_at_once_do_not_race(tmp_path):
    """And the result does not depend on how many there are."""
    program = compiled(tmp_path, ["tests/csrc/lamb_races.cpp", "csrc/lamb_cpu.cpp"], *thread_sanitizer(tmp_path))
    results = set()
    for threads in ("1", "2", "3", "5"):
        done = subprocess.run([program, threads], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[:4000]
        results.add(done.stdout)
    assert len(results) == 1 and results.pop().endswith("after step 22\n")
