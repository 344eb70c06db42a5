"""csrc/encoder_layers.cu, run where there is no GPU: the CUDA source thread by thread on the CPU, beside plain
implementations; and under the thread sanitizer, which sees whether blocks wait for what they read."""

import subprocess

from test_lamb_kernel import compiled, pytestmark, thread_sanitizer  # noqa: F401


def test_the_cuda_source_does_what_a_plain_encoder_does(tmp_path):
    """All tiles, both dtypes, ragged rows, masks with holes and without any key, one block and several, few slots and
    many: within twice the error of the plain one, and the same bits everywhere."""
    program = compiled(tmp_path, ["tests/csrc/encoder_cuda_on_cpu.cpp"])
    done = subprocess.run([program], capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "0 failed", done.stdout + done.stderr
    assert len(lines) == 15 and all(line.endswith("right") for line in lines[:-1])


def test_blocks_wait_for_what_they_read(tmp_path):
    """And the result does not depend on how many there are."""
    program = compiled(tmp_path, ["tests/csrc/encoder_races.cpp"], *thread_sanitizer(tmp_path))
    results = set()
    for blocks in ("1", "3"):
        done = subprocess.run([program, blocks], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[:4000]
        results.add(done.stdout)
    assert len(results) == 1
