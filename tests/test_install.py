"""How the package is built: pure without torch, with its compiled part where it can, complete, and never a failure."""

import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
LINKED = ("fastbert/kernels", "fastbert/benchmarks")
PYTHON_FILES = {
    str(path.relative_to(ROOT)) for folder in ("fastbert", *LINKED) for path in (ROOT / folder).rglob("*.py")
}
SOURCES = {f"fastbert/csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
RECIPES = {f"fastbert/recipes/{path.name}" for path in (ROOT / "fastbert" / "recipes").glob("*.yaml")}
PURE = PYTHON_FILES | SOURCES | RECIPES
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler here"
)


@pytest.fixture
def source(tmp_path):
    """A copy of what a build reads, because building writes beside the sources."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("fastbert", "kernels", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture
def no_torch(tmp_path):
    """An environment in which torch cannot be imported."""
    (tmp_path / "shadow" / "torch").mkdir(parents=True)
    (tmp_path / "shadow" / "torch" / "__init__.py").write_text("raise ImportError('hidden by a test')")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "shadow")}


def build(kind, source, env):
    """Build a "wheel" or an "sdist" as pip does without isolation; return the archive and what was printed."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist" / done.stdout.splitlines()[-1], done.stdout + done.stderr


def contents(wheel):
    """What the wheel installs into site-packages. One that was meant for a platform keeps pure files in a folder."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name.rpartition(".data/purelib/")[2] for name in names if ".dist-info/" not in name}


def test_wheel_without_torch_is_pure_python_and_complete(source, no_torch):
    wheel, printed = build("wheel", source, no_torch)
    assert wheel.name == "fastbert_kernels-0.1.0-py3-none-any.whl"
    assert contents(wheel) == PURE and {"fastbert/csrc/lamb.cu", "fastbert/recipes/macbert-base.yaml"} <= PURE
    assert all(any(name.startswith(folder) for name in PYTHON_FILES) for folder in LINKED)
    assert "not built: torch cannot be imported" in printed
    metadata = {name.split("/", 1)[1]: name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in metadata
    assert b"fastbert = fastbert.cli:main" in zipfile.ZipFile(wheel).read(metadata["entry_points.txt"])


def test_sdist_has_all_sources_and_builds_the_same_wheel(source, no_torch, tmp_path):
    sdist, _ = build("sdist", source, no_torch)
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        archive.extractall(tmp_path, filter="data")
    assert names >= PURE | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    wheel, _ = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), no_torch)
    assert contents(wheel) == PURE


@needs_compiler
def test_wheel_with_torch_holds_the_compiled_part(source):
    wheel, printed = build("wheel", source, {**os.environ, "PYTHONPATH": ""})
    assert contents(wheel) == PURE | {"fastbert/_C.abi3.so"}, printed
    assert "-cp310-abi3-" in wheel.name


@needs_compiler
def test_a_failed_compilation_is_reported_and_does_not_stop_the_install(source):
    (source / "csrc" / "lamb.h").write_text("#error broken on purpose\n")
    wheel, printed = build("wheel", source, {**os.environ, "PYTHONPATH": ""})
    assert contents(wheel) == PURE
    assert "fastbert._C: NOT BUILT" in printed


def test_decides_for_nothing_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils", None)
    part, reason = SETUP["decide"]()
    assert part is None and "torch cannot be imported" in reason


def test_decides_for_cuda_where_nvcc_is_and_asks_no_gpu(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: pytest.fail("setup.py asked for the GPUs"))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: pytest.fail("setup.py asked for a GPU"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert SETUP["decide"]() == ("cuda", f"nvcc is in {tmp_path}")
    [module] = SETUP["extension"]("cuda")["ext_modules"]
    assert "fastbert/csrc/lamb.cu" in module.sources and ("FASTBERT_CUDA", "1") in module.define_macros
    assert cpp_extension._get_cuda_arch_flags([]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_90,code=sm_90",
    ]


def test_keeps_the_architectures_that_the_user_asks_for(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    SETUP["extension"]("cuda")
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.6"


@needs_compiler
def test_decides_for_the_cpu_part_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    assert SETUP["decide"]()[0] == "cpu"
    [module] = SETUP["extension"]("cpu")["ext_modules"]
    assert module.sources == ["fastbert/csrc/bindings.cpp", "fastbert/csrc/lamb_cpu.cpp"]


def test_decides_for_nothing_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    part, reason = SETUP["decide"]()
    assert part is None and "no-such-compiler" in reason


# -- what continuous integration installs ----------------------------------------------------------------------------


def locked(path):
    """{name==version and marker: its hashes} of a lock."""
    entries, last = {}, None
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.removesuffix("\\").strip()
        if line.startswith("--hash="):
            entries[last].append(line.removeprefix("--hash="))
        elif not line.startswith("#"):
            last = line
            entries[last] = []
    return entries


def test_every_pinned_version_is_locked_by_hash():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.replace("_", "-").replace("python-version", "python_version") for line in lines if "==" in line}
    every, tools = locked(ROOT / ".ci" / "all.lock"), locked(ROOT / ".ci" / "tools.lock")
    assert {line.replace("_", "-").replace("python-version", "python_version") for line in every} == pinned
    assert len(every) > 80 and set(tools) == {line for line in every if line.startswith(("setuptools==", "wheel=="))}
    for line, hashes in (every | tools).items():
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), line
        assert line not in tools or tools[line] == every[line]


def test_another_file_than_the_locked_one_is_refused(tmp_path):
    """As `make locked` installs."""
    with zipfile.ZipFile(tmp_path / "thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing.py", "")
        about = {"METADATA": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"}
        about |= {"WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "RECORD": ""}
        for name, text in about.items():
            wheel.writestr(f"thing-1.0.dist-info/{name}", text)
    digest = hashlib.sha256((tmp_path / "thing-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlocked:")[2].partition("\n\n")[0]
    assert recipe.count("--require-hashes --no-deps") == recipe.count("install") == recipe.count(".lock") == 2
    for given, code in ((digest, 0), ("0" * 64, 1)):
        lock = tmp_path / "lock"
        lock.write_text(f"thing==1.0 --hash=sha256:{given}\n")
        command = [sys.executable, "-m", "pip", "install", "--require-hashes", "--no-deps", "--no-index", "--dry-run"]
        where = ["--find-links", str(tmp_path), "--target", str(tmp_path / f"to{code}"), "-r", str(lock)]
        done = subprocess.run([*command, *where], capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
