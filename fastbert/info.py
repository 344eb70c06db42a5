"""What a machine has and which backend serves each op there, for `fastbert info` and whoever reports a problem."""

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch

import fastbert
from fastbert import backend, extension

_PACKAGES = "triton numpy safetensors tokenizers pyarrow transformers huggingface_hub ninja".split()
_PREFIXES = ("FASTBERT_", "TRITON_", "CUDA_", "TORCH", "PYTORCH_", "NCCL_", "GLOO_", "OMP_", "MKL_", "HF_HUB_OFFLINE")
_SECRET = re.compile("token|key|secret|passw", re.IGNORECASE)
_AT_FIRST_USE = "it is compiled at first use (FASTBERT_BUILD=0 forbids it)"


def collect() -> dict:
    """Everything, as JSON holds it. Nothing here fails: what cannot be found out is a text that says why."""
    return {
        "versions": _tried(_versions),
        "system": _tried(_system),
        "devices": _tried(_devices),
        "extension": _tried(_extension),
        "environment": _tried(_environment),
        "ops": _tried(_ops),
    }


def as_text(found: dict) -> str:
    """For people: a section a paragraph, an op a line and the reasons against other backends below it."""
    lines = []
    for section, content in found.items():
        lines.append(f"{section}:")
        if section == "ops" and isinstance(content, dict):
            for name, choice in content.items():
                error = choice.get("error")
                lines.append(f"  {name:<24} {choice['backend'] or 'none'}{' fails' if error else ''}")
                lines += [f"    not {other}: {why}" for other, why in choice["reasons"].items()]
                lines += [f"    {error}"] if error else []
        elif isinstance(content, dict):
            lines += [f"  {name}: {value}" for name, value in content.items()] or ["  none is set"]
        else:
            lines += [f"  {item}" for item in (content if isinstance(content, list) else [content])]
    return "\n".join(lines)


def as_json(found: dict) -> str:
    """For programs."""
    return json.dumps(found, ensure_ascii=False, indent=2)


def _tried(function: Callable):
    try:
        return function()
    except Exception as error:  # of whatever part of a broken installation
        return f"cannot be determined: {type(error).__name__}: {error}"


def _versions() -> dict[str, str]:
    found = {"fastbert": fastbert.__version__ + _commit(), "python": platform.python_version()}
    cuda = torch.version.cuda or torch.version.hip
    found["torch"] = f"{torch.__version__} ({f'CUDA {cuda}' if cuda else 'built without CUDA'})"
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> str:
    """That of the checkout that the package is imported from, if it is one."""
    root = Path(__file__).parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return ""
    said = _said(git, "-C", str(root), "describe", "--always", "--dirty=+")
    return f" ({said})" if said else ""


def _system() -> dict[str, str]:
    processors = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"(?m)^model name\s*: (.*)", processors)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB" if model else ""
    compiler = os.environ.get("CXX", "c++")
    from torch.utils import cpp_extension

    nvcc = cpp_extension.CUDA_HOME and shutil.which("nvcc", path=os.path.join(cpp_extension.CUDA_HOME, "bin"))
    return {
        "platform": platform.platform(),
        "processor": f"{model[1] if model else platform.machine()}, {cores} cores{memory}",
        "torch threads": f"{torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}",
        "C++ compiler": _said(compiler, "--version").partition("\n")[0] or f"none ({compiler})",
        "nvcc": (_said(nvcc, "--version").splitlines() or [""])[-1] if nvcc else "none for this torch",
    }


def _said(*command: str) -> str:
    """What a program prints; nothing if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu; PyTorch finds no GPU"]
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {about.name}, compute capability {about.major}.{about.minor}, "
            f"{about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} SMs"
        )
    driver = torch._C._cuda_getDriverVersion()
    return [*found, f"driver for CUDA up to {driver // 1000}.{driver % 1000 // 10}"]


def _extension() -> dict[str, str]:
    there = extension.where()
    if there is None:
        return {"not built": extension.obstacle() or _AT_FIRST_USE}
    with mock.patch.dict(os.environ, FASTBERT_BUILD="0"):
        reason = extension.load()
    return {"built": str(there), "loads": reason or "yes"}


def _environment() -> dict[str, str]:
    names = sorted(name for name in os.environ if name.startswith(_PREFIXES))
    return {name: "(set)" if _SECRET.search(name) else os.environ[name] for name in names}


def _ops() -> dict[str, dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = os.environ.get("FASTBERT_BUILD") != "0"
    with mock.patch.dict(os.environ, FASTBERT_BUILD="0"):
        found = {name: _choice(name, call) for name, call in _tiny_calls(device).items()}
    for choice in found.values() if allowed else ():  # what was forbidden here only
        reasons = choice["reasons"]
        choice["reasons"] = {other: _AT_FIRST_USE if "FASTBERT_BUILD" in why else why for other, why in reasons.items()}
    return found


def _choice(op: str, call: Callable) -> dict:
    """Which backend a call of an op runs on, and why each that cannot serve cannot: what the op itself asks."""
    found = {"backend": None, "reasons": {}}

    def pick(op, predicates, asked, *arguments):
        reasons = {name: predicate(*arguments) for name, predicate in predicates.items()}
        found["reasons"] = {name: reason for name, reason in reasons.items() if reason}
        found["backend"] = backend.pick(op, predicates, asked, *arguments)
        return found["backend"]

    module = importlib.import_module(f"fastbert.ops.{op}")
    with mock.patch.object(module if hasattr(module, "pick") else module.sequences, "pick", pick):
        try:
            call()
        except Exception as error:  # what is asked for cannot serve, or fails when it runs
            found["error"] = f"{type(error).__name__}: {error}"
    return found


def _tiny_calls(device: torch.device) -> dict[str, Callable]:
    """A call of every op, with the dtype that training uses on the device."""
    from fastbert import ops

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, x, w = (torch.ones(shape, device=device, dtype=dtype) for shape in ((1, 16, 1, 64), (16, 64), (64,)))
    ids = torch.zeros(16, dtype=torch.int64, device=device)
    thrice = torch.ones(192, 64, device=device, dtype=dtype)
    layer = ops.LayerWeights(thrice, thrice[:, 0], thrice[:64], w, w, w, thrice[:64], w, thrice[:64], w, w, w)
    lists = {name: [torch.ones(64, device=device)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    return {
        "attention": lambda: ops.attention(q, q, q),
        "rotary_attention": lambda: ops.rotary_attention(q, q, q),
        "relative_attention": lambda: ops.relative_attention(q, q, q),
        "dropout_add_layer_norm": lambda: ops.dropout_add_layer_norm(x, x, w, w),
        "bias_gelu": lambda: ops.bias_gelu(x, w),
        "embedding_layer_norm": lambda: ops.embedding_layer_norm(ids, x, w, w),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, x, x[:, 0], ids),
        "encoder_layers": lambda: ops.encoder_layers(x[None], [layer], ops.attention, heads=1),
        "lamb": lambda: ops.lamb([ops.LambGroup(**lists, steps=[torch.ones(1, device=device)], lr=0.0)]),
    }
