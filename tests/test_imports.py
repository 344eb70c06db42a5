"""The shape of the code: who imports whom, what `import fastbert` costs, what is never done, how long it is."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
LINKED = ("kernels", "benchmarks")  # fastbert/ has links to them
PACKAGE = sorted(
    path for path in (ROOT / "fastbert").rglob("*.py") if not set(LINKED) & set(path.relative_to(ROOT).parts)
)
LAYERED = [*PACKAGE, *KERNELS, *BENCHMARKS]
EVERYTHING = [*LAYERED, ROOT / "setup.py"]

# Layer -> the layers it may import, besides itself and errors. Nothing below imports train, cli, hf or testing; what is
# measured of train is its step and its feed.
BELOW_TRAIN = "files ops nn config packing models checkpoint weights ports hub tensorflow_checkpoint optim data backend"
LAYERS = {
    "errors": "",
    "files": "",
    "philox": "",
    "reference": "philox",
    "portable": "philox tiled",
    "portable_lamb": "",
    "tiled": "philox",
    "kernels": "",
    "backend": "",
    "extension": "",
    "ops": "backend extension reference portable portable_lamb kernels philox",
    "config": "files",
    "packing": "",
    "wire": "",
    "crc32c": "",
    "tensorflow_checkpoint": "crc32c wire files",
    "weights": "files",
    "ports": "",
    "hub": "",
    "checkpoint": "config weights ports files",
    "nn": "ops config packing",
    "models": "nn ops config packing checkpoint hub",
    "inference": "nn ops",
    "latency": "inference models nn ops packing",
    "optim": "ops",
    "data": "hub wire files",
    "info": "__init__ backend extension ops",
    "train": f"{BELOW_TRAIN} __init__",
    "finetune": f"{BELOW_TRAIN} __init__ train",
    "hf": f"{BELOW_TRAIN} __init__",
    "benchmarks": f"{BELOW_TRAIN} __init__ train hf reference kernels _C testing",
    "cli": f"{BELOW_TRAIN} __init__ train finetune hf benchmarks info",
    "__main__": "cli",
    "testing": "",
    "__init__": f"{BELOW_TRAIN} latency reference portable",
}
# Layer -> the packages outside the standard library that it may import.
OUTSIDE = {
    "kernels": "torch triton",
    "crc32c": "numpy",
    "tensorflow_checkpoint": "torch numpy",
    "weights": "torch safetensors",
    "checkpoint": "torch safetensors",
    "hub": "huggingface_hub",
    "latency": "torch tqdm",
    "data": "torch numpy tokenizers pyarrow tqdm matplotlib rjieba jieba ltp snownlp gensim",
    "train": "torch numpy safetensors tqdm yaml tensorboard matplotlib",
    "finetune": "torch numpy tqdm matplotlib",
    "hf": "torch transformers",
    "benchmarks": "torch numpy triton tqdm transformers matplotlib",
    "cli": "torch numpy tqdm yaml",
}


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def layer(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in LINKED else parts[1]


def imported(path):
    """What the file imports anywhere, as absolute names: `from fastbert import ops` is fastbert.ops."""
    package = ["fastbert", *path.relative_to(ROOT).parts[(0 if layer(path) in LINKED else 1) : -1]]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*(package[: len(package) - node.level + 1] if node.level else []), *(node.module or "").split(".")]
            base = [part for part in base if part]
            yield from (".".join([*base, alias.name]) for alias in node.names)


@pytest.mark.parametrize("path", LAYERED, ids=names(LAYERED))
def test_layers_import_only_what_lies_below_them(path):
    own = layer(path)
    assert own in LAYERS, f"{path} belongs to no layer: add it to LAYERS with what it may import"
    inside = {own, "errors", *LAYERS[own].split()}
    outside = set(OUTSIDE.get(own, "torch").split()) | set(sys.stdlib_module_names)
    for module in imported(path):
        top, _, rest = module.partition(".")
        if top == "fastbert":
            target = rest.split(".")[0]
            target = target if target in LAYERS or target == "_C" else "__init__"  # a public name
            assert target in inside, f"{own} may not import {module}"
        else:
            assert top in outside, f"{own} may not import {module}"


def test_kernels_benchmarks_and_csrc_are_linked_folders():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "`import kernels` must never shadow a package of that name"
    for name in (*LINKED, "csrc"):
        assert os.readlink(ROOT / "fastbert" / name) == f"../{name}"


@pytest.mark.parametrize("path", LAYERED, ids=names(LAYERED))
def test_nothing_unsafe_and_no_validation_by_assert(path):
    forbidden = {"pickle", "cPickle", "dill", "marshal", "shelve"}
    assert not forbidden & {module.split(".")[0] for module in imported(path)}
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise an error of fastbert.errors instead"
        if not isinstance(node, ast.Call):
            continue
        assert ast.unparse(node.func) not in {"eval", "exec", "os.system", "os.popen"}, f"line {node.lineno}"
        if ast.unparse(node.func) == "torch.load":
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            assert safe, f"line {node.lineno}: torch.load without weights_only=True runs code from the file"


@pytest.mark.parametrize("path", EVERYTHING, ids=names(EVERYTHING))
def test_files_and_functions_stay_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 500
    if path in KERNELS:
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
            first = node.body[1 if has_docstring else 0].lineno  # documentation may be as long as it needs
            assert node.end_lineno - first < 60, f"{node.name} has more than 60 lines"


PROBE = """
import json, sys, time
import torch
events = []
def watch(event, args):
    if event.split(".")[0] in ("subprocess", "socket") or event == "os.system":
        events.append(event)
sys.addaudithook(watch)
before, start = set(sys.modules), time.process_time()
import fastbert
seconds = time.process_time() - start
modules = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"seconds": seconds, "modules": modules, "events": events}))
"""


def test_import_is_light_and_silent():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    heavy = {"triton", "transformers", "tokenizers", "pyarrow", "matplotlib", "tensorboard", "rjieba", "snownlp"}
    assert not heavy & set(runs[0]["modules"])
    assert runs[0]["events"] == []
    seconds = sorted(run["seconds"] for run in runs)
    print(f"import fastbert: {seconds[1]:.3f} s of processor time beyond torch (median of {len(runs)})")
    assert seconds[0] < 0.3
