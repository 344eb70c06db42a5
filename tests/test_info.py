"""`fastbert info`: what it says is what is so, and it says it where things are broken too."""

import json
import subprocess

import pytest
import torch

import fastbert
from fastbert import backend, cli, extension, info, ops

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = [name for name in ops.__all__ if not isinstance(getattr(ops, name), type)]


def told(capsys, *options):
    assert cli.main(["info", *options]) == 0
    return capsys.readouterr().out


def test_it_names_versions_devices_and_the_backend_of_every_op(capsys):
    text, found = told(capsys), json.loads(told(capsys, "--json"))
    assert text.strip() == info.as_text(found), "both say the same"
    assert set(found["ops"]) == set(OPS)
    assert found["versions"]["fastbert"].startswith(fastbert.__version__)
    assert found["versions"]["torch"].startswith(torch.__version__)
    assert found["extension"] == {"built": str(extension.where()), "loads": "yes"}
    for name, choice in found["ops"].items():
        assert "error" not in choice and choice["backend"] not in choice["reasons"], name
    if DEVICE.type == "cpu":
        assert found["devices"] == ["cpu; PyTorch finds no GPU"]
    assert {choice["backend"] for choice in found["ops"].values()} <= set(backend.NAMES)


def test_the_backend_is_the_one_that_a_call_takes(monkeypatch):
    asked = info._tiny_calls(DEVICE)
    for name, choice in info.collect()["ops"].items():
        monkeypatch.setenv("FASTBERT_BACKEND", choice["backend"])
        asked[name]()


def test_a_backend_that_cannot_serve_is_told_of(capsys, monkeypatch):
    monkeypatch.setenv("FASTBERT_BACKEND", "cuda")
    found = json.loads(told(capsys, "--json"))
    assert found["environment"]["FASTBERT_BACKEND"] == "cuda"
    choice = found["ops"]["bias_gelu"]
    assert choice["backend"] is None
    assert choice["error"] == "BackendError: backend 'cuda' cannot serve bias_gelu: bias_gelu has no such backend"
    text = told(capsys)
    assert "  bias_gelu                none fails" in text and "    BackendError: backend 'cuda'" in text


def test_a_broken_extension_is_told_of(capsys, monkeypatch):
    monkeypatch.setattr(extension, "where", lambda: None)
    monkeypatch.setattr(extension, "obstacle", lambda: "there is no C++ compiler")
    assert "  not built: there is no C++ compiler" in told(capsys)
    monkeypatch.setattr(extension, "where", lambda: "/somewhere/_C.so")
    monkeypatch.setattr(extension, "load", lambda: "the extension is not built: undefined symbol")
    assert "  loads: the extension is not built: undefined symbol" in told(capsys)


@pytest.mark.parametrize("part", ["_versions", "_system", "_devices", "_extension", "_environment", "_ops"])
def test_what_cannot_be_found_out_is_said(capsys, monkeypatch, part):
    def fail():
        raise OSError("no such thing")

    monkeypatch.setattr(info, part, fail)
    assert f"{part[1:]}:\n  cannot be determined: OSError: no such thing" in told(capsys)
    json.loads(told(capsys, "--json"))


def test_secrets_are_not_shown(capsys, monkeypatch):
    monkeypatch.setenv("FASTBERT_TOKEN", "hunter2")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("HOME_ADDRESS", "elsewhere")
    text = told(capsys)
    assert "  FASTBERT_TOKEN: (set)" in text and "  TRITON_INTERPRET: 1" in text
    assert "hunter2" not in text and "HOME_ADDRESS" not in text


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(info, "_PACKAGES", ["numpy", "no-such-package"])
    found = info.collect()["versions"]
    assert found["no-such-package"] == "not installed" and found["numpy"][0].isdigit()


def test_programs_that_hang_or_are_not_there(monkeypatch):
    assert info._said("no-such-program") == ""

    def hang(*_args, **_options):
        raise subprocess.TimeoutExpired("x", 10)

    monkeypatch.setattr(subprocess, "run", hang)
    assert info._said("anything") == ""
