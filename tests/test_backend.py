"""Which backend runs: what wins over what, and what is said when none can."""

import threading

import pytest
import torch

from fastbert import backend, ops, use_backend
from fastbert.backend import lacks, pick, serves
from fastbert.errors import BackendError

FAST = {"triton": lacks("no GPU"), "torch": serves, "reference": serves}


def test_default_is_the_first_that_serves():
    assert pick("op", FAST, None) == "torch"
    assert pick("op", {**FAST, "triton": serves}, None) == "triton"


def test_predicates_see_the_arguments():
    small = {"triton": lambda size: None if size < 8 else f"size {size} is over 8", "torch": serves}
    assert pick("op", small, None, 7) == "triton"
    assert pick("op", small, None, 9) == "torch"
    with pytest.raises(BackendError, match="'triton' cannot serve op: size 9 is over 8"):
        pick("op", small, "triton", 9)


def test_call_over_context_over_environment_over_default(monkeypatch):
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    assert pick("op", FAST, None) == "reference"
    with use_backend("torch"):
        assert pick("op", FAST, None) == "torch"
        with use_backend("reference"):
            assert pick("op", FAST, None) == "reference"
            assert pick("op", FAST, "torch") == "torch"
        assert pick("op", FAST, None) == "torch"
    assert pick("op", FAST, None) == "reference"
    monkeypatch.setenv("FASTBERT_BACKEND", "")
    assert pick("op", FAST, None) == "torch"


def test_the_context_is_left_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert pick("op", FAST, None) == "torch"


def test_the_context_is_of_one_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(pick("op", FAST, None)))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_unknown_names_are_errors_that_list_the_known(monkeypatch):
    known = "expected one of 'triton', 'cuda', 'torch', 'reference'"
    with pytest.raises(BackendError, match=f"backend: got 'cudnn', {known}"):
        pick("op", FAST, "cudnn")
    with pytest.raises(BackendError, match=f"use_backend: got 'cudnn', {known}"), use_backend("cudnn"):
        pass
    monkeypatch.setenv("FASTBERT_BACKEND", "cudnn")
    with pytest.raises(BackendError, match=f"FASTBERT_BACKEND: got 'cudnn', {known}"):
        pick("op", FAST, None)


def test_no_silent_fallback():
    with pytest.raises(BackendError, match="backend 'triton' cannot serve op: no GPU"):
        pick("op", FAST, "triton")
    with use_backend("triton"), pytest.raises(BackendError, match="no GPU"):
        pick("op", FAST, None)
    with pytest.raises(BackendError, match="backend 'cuda' cannot serve op: op has no such backend"):
        pick("op", FAST, "cuda")
    with pytest.raises(BackendError, match="no backend can serve op: triton: no GPU; cuda: no nvcc"):
        pick("op", {"triton": lacks("no GPU"), "cuda": lacks("no nvcc")}, None)


@pytest.mark.parametrize("name", ["attention", "rotary_attention", "relative_attention"])
def test_attention_ops_say_what_is_missing(name):
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(BackendError, match=f"'cuda' cannot serve {name}: there is no CUDA kernel for it yet"):
        getattr(ops, name)(x, x, x, backend="cuda")


def test_triton_says_where_it_cannot_run(monkeypatch):
    on_cuda, on_cpu = torch.device("cuda", 1), torch.device("cpu")
    monkeypatch.setattr(backend, "_TRITON_IS_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    assert backend.triton_cannot_run(on_cuda) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.triton_cannot_run(on_cuda) == "cuda:1 has compute capability (7, 5), and Triton needs (8, 0)"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.triton_cannot_run(on_cpu) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1 is not set" in backend.triton_cannot_run(on_cpu)
    monkeypatch.setattr(backend, "_TRITON_IS_INSTALLED", False)
    assert backend.triton_cannot_run(on_cuda) == "triton is not installed"
