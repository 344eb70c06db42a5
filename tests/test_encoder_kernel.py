"""csrc/encoder_layers.cu, run where there is no GPU: the CUDA source thread by thread on the CPU, beside plain
implementations; and under the thread sanitizer, which sees whether blocks wait for what they read."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="there is no C++ compiler here")


def compiled(tmp_path, source, *flags):
    """The program of this source, with headers of CUDA that hold nothing."""
    for name in ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h"):
        (tmp_path / name).touch()
    include = [f"-I{folder}" for folder in (tmp_path, ROOT / "csrc", ROOT / "tests" / "csrc")]
    command = [CXX, "-std=c++17", "-O1", "-Wno-psabi", "-ffp-contract=off", "-pthread", *flags, *include]
    program = tmp_path / "program"
    done = subprocess.run([*command, source, "-o", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def test_the_cuda_source_does_what_a_plain_encoder_does(tmp_path):
    """All tiles, both dtypes, ragged rows, masks with holes and without any key, one block and several, few slots and
    many: within twice the error of the plain one, and the same bits everywhere."""
    program = compiled(tmp_path, "tests/csrc/encoder_cuda_on_cpu.cpp")
    done = subprocess.run([program], capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "0 failed", done.stdout + done.stderr
    assert len(lines) == 15 and all(line.endswith("right") for line in lines[:-1])


def test_blocks_wait_for_what_they_read(tmp_path):
    """And the result does not depend on how many there are."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    linked = subprocess.run([CXX, "-fsanitize=thread", probe, "-o", tmp_path / "probe"], capture_output=True)
    if linked.returncode or subprocess.run([tmp_path / "probe"]).returncode:
        pytest.skip("the compiler has no thread sanitizer that runs here")
    program = compiled(tmp_path, "tests/csrc/encoder_races.cpp", "-g", "-fsanitize=thread")
    results = set()
    for blocks in ("1", "3"):
        done = subprocess.run([program, blocks], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[:4000]
        results.add(done.stdout)
    assert len(results) == 1
