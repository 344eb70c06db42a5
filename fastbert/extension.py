"""The compiled part, fastbert._C: how it is compiled, by setup.py or at first use, and how it is loaded.

setup.py runs this file where neither torch nor fastbert can be imported, so nothing here imports them at the top. What
is compiled at first use is kept in a folder of the cache that is named after all that went into it.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

# PyTorch's stable ABI as of 2.10; with Python's limited API (py_limited_api in setup.py), one build serves every later
# torch and every later Python.
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")
# No fast-math. sqrt sets no errno and nothing traps, which would keep the loops from being vector code; no product is
# fused with a sum, so that CPU and GPU round alike. No word about vectors between functions: all of them are inlined.
CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "--fmad=false"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
FOLDER = Path(__file__).parent / "csrc"
SOURCES = {"cpu": ["bindings.cpp", "lamb_cpu.cpp"]}
SOURCES["cuda"] = [*SOURCES["cpu"], "lamb.cu", "encoder_layers.cu"]
MACROS = {"cpu": [STABLE_ABI], "cuda": [STABLE_ABI, ("USE_CUDA", "1"), ("FASTBERT_CUDA", "1")]}

_lock = threading.Lock()
_failures: dict[bool, str] = {}  # by whether compiling was allowed: why it failed, which is not tried again


def decide() -> tuple[str | None, str]:
    """Return (part, reason): which part of the extension to build, "cuda", "cpu" or None, and why."""
    try:
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        return None, f"torch cannot be imported here ({error})"
    home = cpp_extension.CUDA_HOME  # None where torch itself is built without CUDA
    if home and os.path.exists(os.path.join(home, "bin", "nvcc")):
        return "cuda", f"nvcc is in {home}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler):
        return "cpu", f"the compiler is {compiler}, and there is no nvcc or torch is built without CUDA"
    return None, f"there is no C++ compiler ({compiler})"


def load() -> str | None:
    """None once the operators in torch.ops.fastbert are registered, else why it is not and what to do about it.

    Takes fastbert._C where it is installed, else what the cache keeps, else compiles it. What a compiler, a file or a
    loader does wrong is a reason, not an exception, and is not tried again in this process.
    """
    import torch

    with _lock:
        if hasattr(torch.ops.fastbert, "lamb_"):
            return None
        allowed = os.environ.get("FASTBERT_BUILD") != "0"
        reason = _failures.get(allowed) or _load()
        if reason is None:
            _describe()
        else:
            _failures[allowed] = reason
        return reason and f"the extension is not built: {reason}"


load._dynamo_marked_constant = True  # torch.compile cannot trace a lock; as in fastbert.backend


def where() -> Path | None:
    """The library that load() has loaded or would load without compiling anything, or None."""
    spec = importlib.util.find_spec("fastbert._C")
    return Path(spec.origin) if spec else next(filter(_is_whole, _candidates()), None)


def obstacle() -> str | None:
    """Why load() would compile nothing here, or None."""
    if os.environ.get("FASTBERT_BUILD") == "0":
        return "FASTBERT_BUILD=0 forbids compiling it"
    if True in _failures:
        return _failures[True]
    part, reason = decide()
    if part is None:
        return f"{reason}, which compiling it needs"
    if shutil.which("ninja", path=_search_path()) is None:
        return "there is no ninja, which compiling it needs: pip install ninja"
    return _cuda_mismatch() if part == "cuda" else None


def _search_path() -> str:
    """PATH, and before it the environment's own programs: ninja is there also where nobody activated it."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def _cuda_mismatch() -> str | None:
    """setup.py's build refuses this; at first use it would end in a library that the driver may not run."""
    import torch
    from torch.utils import cpp_extension

    nvcc = os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([0-9.]+)", said)
    if release and release[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {release[1]}, expected that of torch, {torch.version.cuda}: set CUDA_HOME"
    return None


def _architectures() -> str:
    import torch

    if os.environ.get("TORCH_CUDA_ARCH_LIST") or not torch.cuda.is_available():
        return os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def _library(part: str) -> Path:
    """Where the cache keeps this part, compiled from these sources for this torch, processor and GPU."""
    import torch

    flags = [MACROS[part], CXX_FLAGS, *([NVCC_FLAGS, _architectures()] if part == "cuda" else [])]
    identity = hashlib.sha256(repr((str(torch.__version__), os.uname().machine, part, flags)).encode())
    for path in sorted(FOLDER.glob("*.*")):
        identity.update(path.name.encode() + path.read_bytes())
    root = os.environ.get("FASTBERT_CACHE")
    if not root:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if not os.path.isabs(caches):  # in the current folder anybody may have left a library
            raise OSError(f"the cache folder {caches!r} is not an absolute path")
        root = os.path.join(caches, "fastbert")
    return Path(root).absolute() / identity.hexdigest()[:16] / "_C.so"


def _candidates() -> Iterator[Path]:
    """Where the cache may have one, the best first: one without CUDA only where none with it can be compiled."""
    import torch

    if torch.version.cuda:
        yield _library("cuda")
        if decide()[0] == "cuda":
            return
    yield _library("cpu")


def _is_whole(library: Path) -> bool:
    """Whether it ends with the digest of the rest, which _compile appends: loading half of one can kill the process."""
    if not library.is_file():
        return False
    if (about := library.stat()).st_uid not in (0, os.geteuid()) or about.st_mode & stat.S_IWOTH:
        raise OSError(f"{library} belongs to another user or can be written by anybody")
    content = library.read_bytes()
    return content.endswith(hashlib.sha256(content[:-32]).digest())


def _load() -> str | None:
    import torch

    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("fastbert._C")
            return None
        for library in filter(_is_whole, _candidates()):
            with contextlib.suppress(OSError):  # compiled where the system's libraries are newer, for example
                torch.ops.load_library(library)
                return None
        return obstacle() or _compile(decide()[0])
    except OSError as error:
        return f"{error}; set FASTBERT_CACHE if the folder cannot be used"


def _describe() -> None:
    """Tells PyTorch what the operators return, without running them: for torch.compile, export and checks."""
    import torch

    @torch.library.register_fake("fastbert::lamb_")
    def _(params, masters, grads, exp_avgs, exp_avg_sqs, steps, lrs, settings, grad_scale, found_inf, max_norm, totals,
          workspace, phases):  # fmt: skip
        size = torch.library.get_ctx().new_dynamic_size() if workspace is None else 0
        return totals.new_empty((size,), dtype=torch.int32)

    @torch.library.register_fake("fastbert::encoder_layers")
    def _(x, weights, applications, mask, eps, activation):
        return torch.empty_like(x)


def _compile(part: str) -> str | None:
    """Compile and load this part and keep it in the cache: None, or what went wrong, about which it warns."""
    from torch.utils import cpp_extension

    library, start = _library(part), time.monotonic()
    (kept := library.parent).mkdir(mode=0o700, parents=True, exist_ok=True)
    print(
        f"fastbert: compiling its extension for {part}, once, less than a minute; kept in {kept} ...", file=sys.stderr
    )
    sources = [str(FOLDER / name) for name in SOURCES[part]]
    macros = [f"-D{name}={value}" for name, value in MACROS[part]]
    flags = {"extra_cflags": CXX_FLAGS + macros, "extra_cuda_cflags": NVCC_FLAGS + macros}
    environment = {"PATH": _search_path(), "LC_ALL": "C", "TORCH_CUDA_ARCH_LIST": _architectures()}
    # In a folder of its own, not under torch's lock, for which all would wait for ever once its owner were killed.
    with tempfile.TemporaryDirectory(prefix="build-", dir=kept, ignore_cleanup_errors=True) as folder:
        try:
            with _environment(**environment):
                cpp_extension.load("_C", sources, **flags, build_directory=folder, is_python_module=False)
        except Exception as error:  # whatever compiler and loader can do wrong, PyTorch's operations serve instead
            return _report(str(error), kept / "build.log")
        content, whole = next(Path(folder).glob("*.so")).read_bytes(), Path(folder, "whole")
        whole.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(whole, library)  # of several processes that do this at once, the last one's stays
    print(f"fastbert: compiled in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return None


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """These variables set and no others touched, for other threads read them meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _report(output: str, log: Path) -> str:
    log.write_text(output, encoding="utf-8")
    first = re.search(r"^.*(error:|nvcc fatal).*$|\Z", output, re.MULTILINE)[0] or output.partition("\n")[0]
    _failures[True] = f"it does not compile, as {log} tells: {first}"
    warnings.warn(f"fastbert's extension: {_failures[True]}. Slower PyTorch operations serve instead.", stacklevel=4)
    return _failures[True]
