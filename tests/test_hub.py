"""Names of models on the Hugging Face hub: what is asked of huggingface_hub, and what is not. No test has a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_models import small_config

import fastbert
from fastbert.data import Tokenizer
from fastbert.errors import MissingFileError
from fastbert.hub import local_folder

huggingface_hub = pytest.importorskip("huggingface_hub")
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "国"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    fastbert.BertForMaskedLM(small_config("bert")).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB), encoding="utf-8")
    return tmp_path / "model"


@pytest.fixture
def asked(monkeypatch, tmp_path, folder):
    """The calls of snapshot_download, which finds the folder."""
    calls = []

    def download(name, **options):
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return calls


READERS = [fastbert.from_pretrained, fastbert.BertModel.from_pretrained, fastbert.BertForMaskedLM.from_pretrained]


@pytest.mark.filterwarnings("ignore:model folder")
@pytest.mark.parametrize("name", ["hfl/chinese-roberta-wwm-ext", "bert-base-chinese"])
@pytest.mark.parametrize("read", READERS)
def test_models_are_downloaded_by_name_with_safetensors_alone(asked, read, name):
    model = read(name, revision="v2")
    assert model.config == fastbert.from_pretrained("model").config and not model.training
    (called, options), *more = asked
    assert called == name and options["revision"] == "v2" and not more
    patterns = options["allow_patterns"]
    assert {"config.json", "model*.safetensors*", "vocab.txt", "tokenizer.json"} <= set(patterns)
    assert not any("bin" in pattern or "h5" in pattern or "msgpack" in pattern for pattern in patterns)


def test_a_bin_is_asked_for_only_where_there_are_no_safetensors(asked, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert local_folder("owner/name") == folder
    patterns = [options["allow_patterns"] for _, options in asked]
    assert ["pytorch_model*.bin*" in one for one in patterns] == [False, True]


def test_a_tokenizer_is_downloaded_without_weights(asked):
    assert Tokenizer.from_pretrained("owner/name", revision="abc").vocab_size == len(VOCAB)
    ((name, options),) = asked
    assert (name, options["revision"]) == ("owner/name", "abc")
    assert not any("model*" in pattern for pattern in options["allow_patterns"])
    assert {"vocab.txt", "tokenizer_config.json", "spiece.model"} <= set(options["allow_patterns"])


def test_nothing_is_asked_about_folders_and_paths(asked, folder, tmp_path):
    assert local_folder("model") == Path("model")  # there is such a folder here
    assert type(fastbert.from_pretrained("model")) is fastbert.BertForMaskedLM
    assert fastbert.data.Tokenizer.from_pretrained("model").vocab_size == len(VOCAB)
    for name in ("./nowhere", "/nowhere/at-all", "../nowhere", "a/b/c", Path("owner/name"), "~/x", "a//b", "", "中/文"):
        for read in (fastbert.from_pretrained, fastbert.BertModel.from_pretrained, Tokenizer.from_pretrained):
            with pytest.raises(fastbert.FastBertError):
                read(name)
    assert asked == []


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for read in (*READERS, Tokenizer.from_pretrained):
        with pytest.raises(MissingFileError, match=r"folder owner/name does not exist; .*fastbert-kernels\[hf\]"):
            read("owner/name")


@pytest.mark.parametrize("error", [OSError("no route\nto host"), ValueError("bad name"), RuntimeError("proxy")])
def test_what_the_hub_refuses_is_one_error(monkeypatch, error):
    def download(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        MissingFileError, match=r"owner/name at revision v3 cannot be downloaded .*(route to|bad|proxy)"
    ):
        fastbert.from_pretrained("owner/name", revision="v3")


OFFLINE = """
import json, sys, warnings
import fastbert
warnings.simplefilter("error")
found = []
for name in ("owner/safe", "owner/bin"):
    model, tokenizer = fastbert.from_pretrained(name), fastbert.data.Tokenizer.from_pretrained(name)
    found.append([type(model).__name__, tokenizer.vocab_size])
for name, revision in (("owner/bin", "other"), ("owner/other", None), ("missing", None)):
    try:
        fastbert.from_pretrained(name, revision=revision)
    except fastbert.FastBertError as error:
        found.append(f"{type(error).__name__}: {error}")
print(json.dumps(found))
"""


def cached(cache, name, files):
    """A cache as huggingface_hub lays it out: files are links to blobs, a branch names a commit."""
    commit = "0123456789" * 4
    model = cache / f"models--owner--{name}"
    for part in (model / "refs", model / "blobs", model / "snapshots" / commit):
        part.mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    for number, path in enumerate(files):
        (model / "blobs" / str(number)).write_bytes(path.read_bytes())
        (model / "snapshots" / commit / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))


def test_the_cache_serves_offline(tmp_path, folder):
    cached(tmp_path / "hub", "safe", sorted(folder.iterdir()))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    cached(tmp_path / "hub", "bin", sorted(set(folder.iterdir()) - {folder / "model.safetensors"}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(fastbert.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    safe, bin, *errors = json.loads(done.stdout.splitlines()[-1])
    assert safe == bin == ["BertForMaskedLM", len(VOCAB)]
    assert len(errors) == 3
    for error in errors:
        assert error.startswith("MissingFileError: folder ") and "is not in the cache of huggingface_hub" in error
        assert "HF_HUB_OFFLINE is set" in error
