"""The extension compiled at first use: once, kept whole, loaded without a compiler, and never more than a warning."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

from fastbert import extension

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")

# As in an environment without fastbert._C, though the one that runs the tests may have it.
PROBE = """
import json, sys, warnings
sys.modules["fastbert._C"] = None
import torch
from fastbert import extension
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    where = str(extension.where())
    reasons = [extension.load(), extension.load()]
print(json.dumps({
    "package": extension.__file__,
    "before": where,
    "after": str(extension.where()),
    "reasons": reasons,
    "registered": hasattr(torch.ops.fastbert, "lamb_"),
    "warnings": [str(w.message) for w in warned if "fastbert" in str(w.message)],
}))
"""
INFO = 'import sys; sys.modules["fastbert._C"] = None; from fastbert.cli import main; sys.exit(main(["info"]))'


def copy_to(folder):
    """The package as `pip install .` would install it, without its compiled part."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("fastbert", "kernels", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    return folder


def start(package, cache, code=PROBE, **environment):
    hidden = {"FASTBERT_BUILD", "FASTBERT_BACKEND", "TORCH_CUDA_ARCH_LIST"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | environment
    environment |= {"PYTHONPATH": str(package), "FASTBERT_CACHE": str(cache)}
    options = {"cwd": package, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **options)


def finish(process, package):
    """What a probe found, and what it printed to stderr."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    found = SimpleNamespace(**json.loads(out.splitlines()[-1]), stderr=err)
    assert found.package == str(package / "fastbert" / "extension.py")
    return found


def probe(package, cache, **environment):
    return finish(start(package, cache, **environment), package)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The package, the cache and what the process printed that compiled the extension: the only real compilation."""
    package, cache = copy_to(tmp_path_factory.mktemp("package")), tmp_path_factory.mktemp("cache") / "new"
    return SimpleNamespace(package=package, cache=cache, found=probe(package, cache))


@pytest.fixture
def quick(first, tmp_path):
    """What passes for a compiler and has compiled before: a copy of the finished library is all that it makes."""
    script = tmp_path / "c++"
    script.write_text(f"""#!/bin/sh
case "$*" in *" -o "*) ;; *) exec {shlex.quote(COMPILER)} "$@" ;; esac
while [ "$1" != -o ]; do shift; done
exec cp {shlex.quote(first.found.after)} "$2"
""")
    script.chmod(0o755)
    return str(script)


def test_first_use_compiles_with_a_line_of_progress(first):
    found = first.found
    assert found.before == "None" and found.reasons == [None, None] and found.registered and not found.warnings
    [library] = first.cache.rglob("*.so")
    assert found.after == str(library) and library.parent.parent == first.cache
    assert [path.name for path in library.parent.iterdir()] == ["_C.so"]
    begun, done = [line for line in found.stderr.splitlines() if line.startswith("fastbert: ")]
    assert begun.startswith(f"fastbert: compiling its extension for {extension.decide()[0]}, once")
    assert begun.endswith(f"kept in {library.parent} ...") and done.startswith("fastbert: compiled in ")


def test_second_use_is_silent_and_needs_no_compiler(first, tmp_path):
    found = probe(first.package, first.cache, PATH=str(tmp_path), CXX="no-such-compiler", FASTBERT_BUILD="0")
    assert found.before == found.after == first.found.after
    assert found.reasons == [None, None] and found.registered and "fastbert" not in found.stderr


def test_may_be_forbidden(first, tmp_path):
    found = probe(first.package, tmp_path / "cache", FASTBERT_BUILD="0")
    assert found.reasons == ["the extension is not built: FASTBERT_BUILD=0 forbids compiling it"] * 2
    assert not found.registered and not found.warnings and not (tmp_path / "cache").exists()


def test_no_compiler_is_a_reason(first, tmp_path):
    found = probe(first.package, tmp_path / "cache", CXX="no-such-compiler", CUDA_HOME=str(tmp_path))
    assert "no C++ compiler (no-such-compiler)" in found.reasons[0] and not found.registered
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_a_reason(first, tmp_path):
    (tmp_path / "file").touch()
    found = probe(first.package, tmp_path / "file" / "cache")
    assert "set FASTBERT_CACHE" in found.reasons[0] and not found.registered


def test_broken_sources_are_one_warning_and_a_reason_with_a_log(tmp_path):
    package = copy_to(tmp_path / "package")
    for path in (package / "csrc").glob("*.c*"):
        path.write_text("#error broken on purpose\n")
    found = probe(package, tmp_path / "cache")
    [log] = (tmp_path / "cache").rglob("*.*")
    assert found.reasons[0] == found.reasons[1] and not found.registered
    assert str(log) in found.reasons[0] and "error: #error broken on purpose" in found.reasons[0]
    assert log.read_text().count("broken on purpose") >= 2
    [warning] = found.warnings
    assert str(log) in warning and "PyTorch" in warning
    assert found.stderr.count("fastbert: compiling") == 1


@pytest.mark.parametrize("size", [0, 20_000], ids=["empty", "half"])
def test_a_damaged_library_is_compiled_again(first, quick, tmp_path, size):
    library = tmp_path / "cache" / Path(first.found.after).relative_to(first.cache)
    library.parent.mkdir(parents=True)
    library.write_bytes(Path(first.found.after).read_bytes()[:size])
    found = probe(first.package, tmp_path / "cache", CXX=quick)
    assert found.before == "None" and found.after == str(library)
    assert found.registered and found.stderr.count("fastbert: compiling") == 1
    assert probe(first.package, tmp_path / "cache").stderr.count("fastbert: compiling") == 0


def test_processes_that_start_together_do_not_disturb_each_other(first, quick, tmp_path):
    together = [start(first.package, tmp_path / "cache", CXX=quick) for _ in range(2)]
    for process in together:
        found = finish(process, first.package)
        assert found.reasons == [None, None] and found.registered
    [library] = (tmp_path / "cache").rglob("*.*")
    assert library.name == "_C.so"


def test_info_tells_of_it_and_compiles_nothing(first, tmp_path):
    process = start(first.package, tmp_path / "cache", INFO)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert "  not built: it is compiled at first use (FASTBERT_BUILD=0 forbids it)" in out
    assert "fastbert: compiling" not in err and not (tmp_path / "cache").exists()


# -- what decides, in this process -----------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """A torch for CUDA 12.8, two kinds of GPU, and an nvcc that says it is of another CUDA."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.1\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 6), (9, 0)][index])
    monkeypatch.setattr(extension, "_failures", {})
    for name in ("TORCH_CUDA_ARCH_LIST", "FASTBERT_BUILD"):
        monkeypatch.delenv(name, raising=False)
    return nvcc


def test_nvcc_must_be_of_the_cuda_of_torch(cuda, monkeypatch):
    assert f"{cuda} is of CUDA 13.0, expected that of torch, 12.8" in extension.obstacle()
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert extension.obstacle() is None


def test_ninja_is_asked_for(cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(extension.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pip install ninja" in extension.obstacle()


def test_compiles_for_the_gpus_that_are_there(cuda, monkeypatch):
    assert extension._architectures() == "8.6;9.0"
    here = extension._library("cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert extension._architectures() == "8.0"
    assert extension._library("cuda") != here
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extension._architectures() == extension.CUDA_ARCHITECTURES


def test_the_place_in_the_cache_depends_on_all_that_is_compiled(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(extension, "FOLDER", tmp_path / "csrc")
    places = [extension._library("cpu")]
    for name, change in {
        "source": lambda: (tmp_path / "csrc" / "lamb.h").write_text("//\n"),
        "flags": lambda: monkeypatch.setattr(extension, "CXX_FLAGS", ["-O2"]),
        "torch": lambda: monkeypatch.setattr(torch, "__version__", "2.99.0"),
    }.items():
        change()
        places.append(extension._library("cpu"))
        assert places[-1] not in places[:-1], name
    assert extension._library("cuda") not in places


def test_the_folder_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTBERT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert extension._library("cpu").parent.parent == tmp_path / ".cache" / "fastbert"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert extension._library("cpu").parent.parent == tmp_path / "xdg" / "fastbert"
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "own"))
    assert extension._library("cpu").parent.parent == tmp_path / "own"


def test_a_library_without_cuda_serves_only_where_none_with_it_can_be_compiled(cuda, monkeypatch, tmp_path):
    assert list(extension._candidates()) == [extension._library("cuda")]
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert list(extension._candidates()) == [extension._library("cuda"), extension._library("cpu")]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert list(extension._candidates()) == [extension._library("cpu")]
