"""`make gpu`: rehearsed without a GPU, in a checkout and an environment of its own; what a slice does with failures."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from benchmarks import cli, rows, slices

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler here"
)
COPIED = "pyproject.toml setup.py MANIFEST.in README.md LICENSE Makefile fastbert kernels benchmarks csrc tests".split()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A fresh checkout, and an interpreter that has this one's packages, but not fastbert's extension."""
    folder = tmp_path_factory.mktemp("machine")
    checkout, environment = folder / "checkout", folder / "environment"
    checkout.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.jsonl")
            shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, checkout)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    (Path(packages) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return checkout, environment / "bin" / "python"


def make_gpu(machine, out, **variables):
    checkout, python = machine
    settings = {"PYTHON": python, "OUT": out, "DEVICE": "cpu", **variables}
    command = ["make", "gpu", *(f"{name}={value}" for name, value in settings.items())]
    # pip says which index it would use, and needs none
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "TRITON_INTERPRET"))}
    return subprocess.run(command, cwd=checkout, env=inherited, capture_output=True, text=True, timeout=600)


@needs_compiler
def test_make_gpu_installs_offline_and_rehearses_two_measuring_slices(machine, tmp_path):
    ours = "--providers fastbert eager --modes fwd step"
    done = make_gpu(machine, tmp_path, SLICE="layer lamb", ARGS=ours)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all steps ended well" in done.stdout and (machine[0] / "fastbert" / "_C.abi3.so").exists()
    found = list(rows.read(tmp_path))
    assert {row["device"].endswith("(Triton interpreted)") for row in found} == {True}
    measured = {(row["op"], row["provider"]) for row in found if row["status"] == "measured"}
    layer_ops = [words.split()[0] for words in slices.MEASURING["layer"]]
    assert measured >= {
        ("bias_gelu", "fastbert-triton"),
        ("dropout_add_layer_norm", "fastbert-triton"),
        ("embedding_layer_norm", "fastbert-triton"),
        ("lamb", "fastbert-cuda"),
        *((op, "eager") for op in layer_ops),
    }


@needs_compiler
def test_make_gpu_runs_the_tests_that_need_a_gpu(machine, tmp_path):
    """Of three files, for each is a process; of the last, -k chooses none."""
    kept = [f"test_{name}.py" for name in ("bias_gelu", "extension", "device")]
    for path in (machine[0] / "tests").glob("test_*.py"):
        if path.name not in kept:
            path.unlink()
    done = make_gpu(machine, tmp_path, SLICE="correctness", ARGS="-k test_views")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"\n--- tests/{name}\n" in done.stdout for name in kept)
    passed = {}
    for row in rows.read(tmp_path):
        assert (row["op"], row["provider"], row["status"]) == ("tests", "pytest", "measured")
        assert row["failed"] == 0 and row["seconds"] > 0
        passed[row["shape"]["file"]] = row["passed"]
    # torch, reference and Triton's interpreter; dtypes
    assert passed == {"tests/test_bias_gelu.py": 3, "tests/test_extension.py": 3}


def test_make_gpu_needs_an_interpreter_with_torch(machine, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    done = make_gpu((machine[0], bare / "bin" / "python"), tmp_path, SLICE="lamb")
    assert done.returncode == 2 and "cannot import torch: set PYTHON to the interpreter that has it" in done.stderr


def options(tmp_path, **changes):
    return slices.Options(**{"device": "cpu", "out": tmp_path, "deadline": float("inf"), "more": [], **changes})


def test_every_test_that_knows_of_gpus_is_marked():
    """A file that asks for the GPU would otherwise be left out of the correctness slice in silence."""
    asks = [path for path in (ROOT / "tests").glob("test_*.py") if "cuda.is_available()" in path.read_text()]
    assert len(asks) >= 8 and {f"tests/{path.name}" for path in asks} - {"tests/test_slices.py"} == set(
        slices.test_files("gpu")
    )


def test_kernels_of_our_own_are_tested_first():
    kernels = slices.test_files("kernel")
    names = (
        *("bias_gelu", "dropout_add_layer_norm", "embedding_layer_norm", "encoder_layers", "extension"),
        *("fused_attention", "fused_relative_attention", "lamb", "linear_cross_entropy", "op_contracts"),
        "rows",
    )
    assert kernels == [f"tests/test_{name}.py" for name in names]
    assert slices.test_files("gpu")[: len(names)] == kernels


def test_every_step_is_a_command_that_bench_knows():
    for steps in slices.MEASURING.values():
        for words in steps:
            parsed = cli._parser("fastbert bench").parse_args(words.split())
            assert all(cli.load(name) for name in parsed.names)


def test_a_failed_test_is_a_row_and_the_exit_code(tmp_path, monkeypatch):
    """The rows say how many failed; later files run all the same."""
    for name, body in {"a": "assert False", "b": "pass"}.items():
        (tmp_path / f"test_{name}.py").write_text(
            f"import pytest\n\n@pytest.mark.gpu\n@pytest.mark.kernel\ndef test_it():\n    {body}\n"
        )
    files = [str(tmp_path / f"test_{name}.py") for name in "ab"]
    monkeypatch.setattr(slices, "test_files", lambda mark: files)
    failed = slices.run_slice("correctness", options(tmp_path / "out"))
    assert failed == [f"correctness: {files[0]}: exit code 1"]
    first, second = rows.read(tmp_path / "out")
    assert (first["status"], first["passed"], first["failed"]) == ("failed", 0, 1)
    assert (second["status"], second["passed"], second["failed"]) == ("measured", 1, 0)
    monkeypatch.setattr(slices, "test_files", lambda mark: [])
    assert slices.run_slice("correctness", options(tmp_path / "out")) == ["correctness: no test ran"]


def test_a_step_that_hangs_or_breaks_takes_no_other_with_it(tmp_path, monkeypatch):
    steps = {"hang": "while True: pass", "break": "import os; os.abort()", "end": "print('well')"}
    monkeypatch.setattr(slices, "MEASURING", {"layer": list(steps)})
    commands = [(name, [sys.executable, "-c", code]) for name, code in steps.items()]
    monkeypatch.setattr(slices, "_steps", lambda name, options: commands)
    given = []
    run = slices._run
    monkeypatch.setattr(slices, "_run", lambda command, seconds: given.append(command) or run(command[:3], 1))
    failed = slices.run_slice("layer", options(tmp_path, deadline=float("inf")))
    assert failed == ["layer: hang: out of time", "layer: break: exit code -6"] and len(given) == 3
    assert given[0][3] == "--minutes"
    assert slices.run_slice("layer", options(tmp_path, deadline=0)) == [
        "layer: out of time before hang",
        "layer: no test ran",
    ]


def test_the_sanitizer_wraps_the_tests(tmp_path, monkeypatch):
    """compute-sanitizer itself needs a GPU: here is one of straw, which runs what it is given."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        '#!/bin/sh\necho "$2 $HYPOTHESIS_PROFILE $PYTORCH_NO_CUDA_MEMORY_CACHING" >>"$LOG"\nshift 4\n"$@"\n'
    )
    fake.chmod(0o755)
    (tmp_path / "test_a.py").write_text(
        "import pytest\n\n@pytest.mark.gpu\n@pytest.mark.kernel\ndef test_it():\n    pass\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(slices, "test_files", lambda mark: [str(tmp_path / "test_a.py")])
    monkeypatch.setattr(rows, "environment", lambda device: {"device": "GPU", "commit": "c", "date": "d"})
    assert slices.run_slice("sanitize", options(tmp_path / "out", device="cuda")) == []
    assert (tmp_path / "log").read_text() == "".join(f"{tool} sanitize 1\n" for tool in slices.SANITIZERS)
    assert [row["provider"] for row in rows.read(tmp_path / "out")] == list(slices.SANITIZERS)
    monkeypatch.setenv("PATH", "/nowhere")
    faults = slices.run_slice("sanitize", options(tmp_path, device="cuda"))
    assert faults == ["sanitize: compute-sanitizer is not on the PATH"]


def test_a_rehearsal_never_writes_among_the_results(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert slices.main(["lamb", "--device", "cpu"]) == 2
    assert "a rehearsal measures nothing" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(slices.torch.cuda, "is_available", lambda: False)
    assert slices.main(["lamb"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_a_missing_extension_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastbert._C", None)
    [fault] = slices._extension_fault("cuda")
    assert fault.startswith("fastbert._C is not built")


def test_the_list_names_every_slice(capsys):
    assert slices.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{out}" for name in slices.NAMES) and "tests/test_bias_gelu.py" in out
