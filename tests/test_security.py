"""What the package never does, found in its syntax trees, and what a run never does, found by what Python audits. What
is promised stands in SECURITY.md.
"""

import ast
import contextlib
import os
import pickle
import socket
import sys
from pathlib import Path

import offline
import pytest
import yaml
from processes import forkserver
from test_train import TINY, command_line, data  # noqa: F401

from fastbert.cli import main
from fastbert.errors import ConfigError
from fastbert.train import yaml_text

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "setup.py"] + [
    path for folder in ("fastbert", "kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "xmlrpc"}
NETWORK |= {"telnetlib", "webbrowser", "socketserver", "huggingface_hub"}
CALLS = {
    "code from text": {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"},
    "shell": {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"},
    "pickle": {"torch.save", "torch.jit.load", "torch.jit.save", "torch.hub.load", "torch.package.PackageImporter"}
    | {f"dist.{name}_object" for name in ("all_gather", "gather")}
    | {f"dist.{name}_object_list" for name in ("broadcast", "scatter", "send", "recv")},
    "unsafe YAML": {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"},
    "guessable file": {"tempfile.mktemp"},
    "network": {"torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file"},
}
FLAGS = {"shell": "shell", "trust_remote_code": "code from text", "allow_pickle": "pickle"}

# The only places where it may be, and why.
ALLOWED = {
    ("fastbert/weights.py", "torch.load"): "pytorch_model.bin of others, with weights_only",
    ("fastbert/train/yaml_text.py", "unsafe YAML"): "with a loader that is the safe one and refuses more",
    ("fastbert/hub.py", "network"): "a model that the user names, and that is no folder; offline from the cache",
}


def findings(source):
    """[(line, rule)] of a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for top in (name.partition(".")[0] for name in names):
                found += [(node.lineno, "pickle")] * (top in PICKLES) + [(node.lineno, "network")] * (top in NETWORK)
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            found += [(node.lineno, rule) for rule, names in CALLS.items() if name in names]
            found += [
                (node.lineno, rule) for flag, rule in FLAGS.items() if flag in given and not _is(given[flag], False)
            ]
            if name == "torch.load":
                safe = "weights_only" in given and _is(given["weights_only"], True)
                found.append((node.lineno, "torch.load" if safe else "pickle"))
            if name.endswith(".extractall") and "filter" not in given:
                found.append((node.lineno, "archive"))
    return found


def _is(node, value):
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_does_nothing_that_is_forbidden(path):
    name = path.relative_to(ROOT).as_posix()
    found = [(line, rule) for line, rule in findings(path.read_text(encoding="utf-8")) if (name, rule) not in ALLOWED]
    assert not found, f"{name}: {found}"


def test_what_is_allowed_is_there():
    """An exception that nothing needs any more is none."""
    for (name, rule), _ in ALLOWED.items():
        assert rule in [found for _, found in findings((ROOT / name).read_text(encoding="utf-8"))], (name, rule)
    assert len(SOURCES) > 100


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "pickle"),
        ("def f():\n    import cloudpickle.cloudpickle", "pickle"),
        ("torch.load(path)", "pickle"),
        ("torch.load(path, weights_only=False)", "pickle"),
        ("torch.load(path, weights_only=trusted)", "pickle"),
        ("torch.load(path, weights_only=True)", "torch.load"),
        ("torch.save(state, path)", "pickle"),
        ("np.load(path, allow_pickle=True)", "pickle"),
        ("dist.all_gather_object(out, x)", "pickle"),
        ("eval(text)", "code from text"),
        ("exec(text, {})", "code from text"),
        ("compile(text, 'f', 'exec')", "code from text"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "code from text"),
        ("os.system(command)", "shell"),
        ("subprocess.run(command, shell=True)", "shell"),
        ("yaml.load(text, Loader)", "unsafe YAML"),
        ("tempfile.mktemp()", "guessable file"),
        ("tarfile.open(path).extractall(folder)", "archive"),
        ("import urllib.request", "network"),
        ("from requests import get", "network"),
        ("import socket", "network"),
        ("from huggingface_hub import hf_hub_download", "network"),
    ],
)
def test_the_rules_find(source, rule):
    assert rule in [found for _, found in findings(source)]


@pytest.mark.parametrize(
    "source",
    ["re.compile(x)", "torch.compile(f)", "yaml.safe_load(t)", "np.load(p, allow_pickle=False)", "model.eval()"],
)
def test_the_rules_do_not_find(source):
    assert findings(source) == []


def test_the_loader_of_yaml_is_the_safe_one():
    assert issubclass(yaml_text._Loader, yaml.SafeLoader)
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        yaml_text.parse_yaml("!!python/object/apply:os.system [ls]", "file")


def test_the_compiled_sources_start_nothing():
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text(encoding="utf-8")
        for name in ("system(", "popen(", "exec", "socket", "dlopen"):
            assert name not in text.replace("executed", ""), f"{path.name}: {name}"


# -- what runs do ------------------------------------------------------------------------------------------------------


def watched(argument_lists, said):
    """Runs commands in a process that has imported everything, and ends at the first thing that is forbidden."""
    with open(said, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    forbidden = (
        "pickle.",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "subprocess.",
        "socket.connect",
        "urllib",
    )

    def audit(event, arguments):
        if event.startswith(forbidden):
            os.write(2, f"{event} {arguments!r}\n".encode())
            os._exit(3)

    sys.addaudithook(audit)
    for arguments in argument_lists:
        if code := main(arguments):
            os._exit(code)
    os._exit(0)


def test_a_run_and_its_files_need_no_pickle_and_no_network(data, tmp_path):  # noqa: F811
    out, said = tmp_path / "run", tmp_path / "said.txt"
    options = command_line(
        data=data, out=out, model=TINY, steps=4, checkpoint_every=2, max_length=20, batch_size=4, device="cpu"
    )
    finished = [*options, "--resume", "--steps", "4"]
    process = forkserver().Process(target=watched, args=([options, finished], str(said)), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0, said.read_text(encoding="utf-8")
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".txt"}
    for path in out.rglob("*.json"):
        assert path.read_bytes()[:1] == b"{"


def test_the_watch_sees_a_pickle(tmp_path):
    said = tmp_path / "said.txt"
    process = forkserver().Process(target=_unpickles, args=(str(said),), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 3 and "pickle.find_class" in said.read_text(encoding="utf-8")


def _unpickles(said):
    text = pickle.dumps(Path("x"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_security.main", lambda _: pickle.loads(text) and 0)
        watched([[]], said)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.getaddrinfo("example.org", 443),
        lambda: socket.gethostbyname("example.org"),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9)),
    ],
)
def test_tests_cannot_use_a_network(ask):
    with pytest.raises(offline.NetworkUsed, match="is not this machine"):
        ask()


def test_tests_can_use_this_machine():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        socket.create_connection(server.getsockname()).close()
        socket.create_connection(("localhost", server.getsockname()[1])).close()
