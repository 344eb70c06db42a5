"""Every file that the package reads, mutated: the result of a reader is valid, or the error is one of ours and names
file and field, in time that nobody notices and memory of the file's size. tests/mutations.py has the mutations.

FASTBERT_FUZZ=N draws N new mutations for each reader; FASTBERT_FUZZ=N:SEED draws these again.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
import struct
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mutations import mutate
from safetensors.torch import load_file, save_file
from test_fairseq import roberta, write, write_vocabulary
from test_models import small_config
from test_similar_words import CILIN, vector_bytes
from test_tensorflow import VOCAB as TENSORFLOW_VOCAB
from test_tensorflow import copy as tensorflow_copy
from test_tokenizer_levels import PIECES, _field, charsmap, spiece
from test_train import write_text

import fastbert
from benchmarks import rows
from fastbert.cli import _settings
from fastbert.crc32c import crc32c
from fastbert.data import Corpus, SimilarWords, Tokenizer, prepare
from fastbert.data.text import Scan, as_paths, read_rows
from fastbert.data.vectors import read_vectors
from fastbert.data.workfolder import WorkFolder, write_record
from fastbert.errors import FastBertError
from fastbert.finetune.examples import read_examples
from fastbert.finetune.options import DemoOptions, FinetuneConfig
from fastbert.finetune.predict import read_task
from fastbert.tensorflow_checkpoint import TensorflowCheckpoint, _masked
from fastbert.train import resume, state
from fastbert.train.config import PretrainConfig, RecipeOptions
from fastbert.train.from_fairseq import from_fairseq
from fastbert.train.from_tensorflow import from_tensorflow
from fastbert.train.journal import _forget_after, read_log
from fastbert.train.recipes import Recipe
from fastbert.train.words import _listed
from fastbert.weights import read_bin, read_safetensors

COUNT, _, FIRST = os.environ.get("FASTBERT_FUZZ", "").partition(":")
DEFAULT = 18  # mutations of each file in a usual run
SECONDS = 1.0
# Memory besides twice the file's size: of what Python and numpy allocate, and of the process. Each value of YAML takes
# PyYAML some kilobytes, so that files of it may have 64 KiB at most.
SPARE, SPARE_OF_YAML, SPARE_OF_PROCESS = 1 << 20, 4 << 20, 12 << 20
pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = "我 爱 北京 天安门 the end\n中国 人民\n\nhello world 3.14\n"


@dataclass(frozen=True)
class Reader:
    """make(folder) writes valid files, of which `file` is mutated; read(folder) reads them and uses what it got, or is
    False if it got less than there was.

    seal(folder, whole): makes checksums anew, so that what is behind them is reached. least: the share of the mutations
    that must be errors; 0 where what is damaged is passed over or made again, by intent. named: what an error says of
    where it is, if that is not the file's name. alone: a wrong value is wrong by itself, not only beside other files.
    """

    name: str
    file: str
    kind: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    seal: Callable[[Path, bytes], None] | None = None
    least: float = 0.25
    named: str | None = None
    alone: bool = True


def put(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict | list):
        content = json.dumps(content, ensure_ascii=False)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


# -- models ------------------------------------------------------------------------------------------------------------


def model(folder):
    torch.manual_seed(0)
    config = small_config("bert", num_hidden_layers=1, id2label={0: "no", 1: "yes"})
    fastbert.BertForMaskedLM(config).save_pretrained(folder)


def sharded(folder):
    model(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "one.safetensors")
    put(folder, INDEX, {"metadata": {"n": 1}, "weight_map": dict.fromkeys(tensors, "one.safetensors")})


def pickled(**options):
    def make(folder):
        model(folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
        (folder / "model.safetensors").unlink()

    return make


def large(save, name):
    def make(folder):
        folder.mkdir(exist_ok=True)
        save({f"part.{i}": torch.randn(256, 1024) for i in range(4)}, folder / name)

    return make


def header(folder):
    """The JSON in front of the tensors, by itself: `seal` puts it there."""
    model(folder)
    whole = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    (folder / "data").write_bytes(whole[8 + size :])
    (folder / "model.safetensors").write_bytes(whole[8 : 8 + size].rstrip())


def with_data(folder, whole):
    path = folder / "model.safetensors"
    text = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (folder / "data").read_bytes())


def load_model(folder):
    found = fastbert.from_pretrained(folder)
    assert all(parameter.isfinite().all() for parameter in found.parameters())


# -- tokenizers --------------------------------------------------------------------------------------------------------


TOKENS = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *"我爱中国北京abehldnorw", "##e", "the", "##n"]
TOKENIZER_CONFIG = {
    "tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True,
    "unk_token": "[UNK]", "mask_token": {"content": "[MASK]", "lstrip": False},
    "added_tokens_decoder": {"0": {"content": "[PAD]"}, "4": {"content": "[MASK]"}},
}  # fmt: skip


def vocabulary(folder):
    put(folder, "vocab.txt", "".join(f"{token}\n" for token in TOKENS))
    put(folder, "tokenizer_config.json", TOKENIZER_CONFIG)
    put(folder, "added_tokens.json", {"[MASK]": 4, "[PAD]": 0})


def tokenizer(level):
    def make(folder):
        folder.mkdir(exist_ok=True)
        if level == "unigram":
            put(folder, "spiece.model", spiece(PIECES, normalizer=_field(2, charsmap())))
            Tokenizer.from_pretrained(folder).save_pretrained(folder)
        else:
            put(folder, "text.txt", TEXT * 3)
            size = 300 if level == "bpe" else 60
            Tokenizer.train(folder / "text.txt", size, level, progress=False).save_pretrained(folder)

    return make


def only(make, *names):
    """The files of `make` without those of these names, so that others are read in their place."""

    def fewer(folder):
        make(folder)
        for name in names:
            (folder / name).unlink()

    return fewer


def load_tokenizer(folder):
    found = Tokenizer.from_pretrained(folder)
    rows = found.encode_rows([["我爱", " the", " e\u0301n９"]], whole=False)
    ids = rows.ids.tolist() + found.encode("中国 the [MASK] end")
    assert all(0 <= index < found.vocab_size for index in ids)
    found.decode(ids)


# -- corpora -----------------------------------------------------------------------------------------------------------


def corpus(documents):
    def make(folder):
        folder.mkdir(exist_ok=True)
        text = write_text(folder / "text.txt", documents)
        made = Tokenizer.train(text, 60, progress=False)
        prepare(text, made, folder / "corpus", words="segmented", validation_fraction=0.2, progress=False)

    return make


def open_corpus(folder):
    found = Corpus.open(folder / "corpus", verify=False, progress=False)
    for shard in found.shards:
        assert len(shard.word_start) == len(shard.input_ids) and len(shard.row_offsets) == len(shard.documents) + 1
        assert shard.row_offsets[-1] == len(shard.input_ids)
        int(shard.input_ids.sum(dtype=np.int64) + shard.documents.sum())


def stated_size(folder, whole):
    """The manifest says how large the mutated shard is, as if it had been written so."""
    path, shard = folder / "corpus/manifest.json", folder / "corpus/train-00000.arrow"
    manifest = json.loads(path.read_bytes())
    manifest["splits"]["train"]["shards"][0]["bytes"] = shard.stat().st_size
    path.write_text(json.dumps(manifest))


PLAN = {"files": [["a.txt", 20, 3]], "settings": {"errors": "strict"}}
SCAN = Scan([{"path": "a.txt", "bytes": 20, "rows": 3}], np.arange(4, dtype="<u8"), [[0]], [[0, 4]], [[False, False]])
SHARD_OF_UNIT = {"file": "a.arrow", "rows": 1, "tokens": 1, "bytes": 4, "sha256": hashlib.sha256(b"rows").hexdigest()}
RECORD = {"characters": 9, "row_lengths": [[3, 3]], "splits": {"train": {"rows": 1, "shards": [SHARD_OF_UNIT]}}}


def work_folder(folder):
    path = folder / ".corpus.work"
    path.mkdir(parents=True)
    work = WorkFolder(path, folder / "corpus")
    work.begin(PLAN)
    work.keep_scan(SCAN)
    put(work.unit(0), "a.arrow", b"rows")
    write_record(work.unit(0) / "record.json", RECORD)


def go_on(folder):
    """What is damaged is as if it were not there: never is it something else."""
    work = WorkFolder(folder / ".corpus.work", folder / "corpus")
    shutil.copytree(work.path, folder / "kept")
    try:
        with redirect_stderr(StringIO()):
            work.begin(PLAN)
        scan = work.scan()
        if scan is not None:
            assert np.array_equal(scan.hashes, SCAN.hashes) and replace(scan, hashes=None) == replace(SCAN, hashes=None)
        record = work.record(0)
        assert record in (None, RECORD)
        return scan is not None and record is not None
    finally:
        shutil.rmtree(work.path)
        (folder / "kept").rename(work.path)


# -- words -------------------------------------------------------------------------------------------------------------


def vectors(binary, count=200, dimensions=12):
    def make(folder):
        folder.mkdir(exist_ok=True)
        drawn = np.random.default_rng(0).standard_normal((count, dimensions), dtype=np.float32)
        put(folder, "vectors.bin", vector_bytes([f"词{i}" for i in range(count)], drawn, binary))

    return make


def zipped(folder):
    vectors(False, 100, 100)(folder)
    path = folder / "vectors.bin"
    path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def table(folder):
    put(folder, "similar.txt", "# fastbert similar words, version 1: a test\n中国\t祖国\t国家\n人民\t群众\n北京\n")


# -- checkpoints of training -------------------------------------------------------------------------------------------

STATE = {
    "step": 5, "update": 6, "loss": 2.5, "validation_loss": None, "data": "0123", "global_batch": 8,
    "window": {"losses": [1.5], "counts": {"label": 3, "sample": 2, "token": 40}},
    "loss_scale": {"scale": 2.0, "good": 1}, "spikes": {"recent": [[0.0] * 128] * 2, "count": 4},
    "config": {"steps": 10, "seed": 1, "out": "run"}, "versions": {"torch": "2"}, "best": [2.5, "step-00000005"],
}  # fmt: skip


def trained():
    torch.manual_seed(0)
    found = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(found.parameters())
    found(torch.ones(2, 24)).sum().backward()
    optimizer.step()
    return found, optimizer


def training(folder):
    state.save(folder, 5, lambda target: put(target, "config.json", "{}"), state.optimizer_tensors(*trained()), STATE)


def load_moments(folder):
    state.load_optimizer(*trained(), folder / CHECKPOINT)


CHECKPOINT = state.name_of(5)
LOG = [
    {"event": "begin", "step": 0, "config": {"steps": 10, "out": "run"}, "launch": None},
    *({"event": "train", "step": step, "loss": 2.5, "lr": 1e-3} for step in (1, 2, 3)),
    {"event": "end", "step": 3},
]


def log(folder):
    put(folder, "log.jsonl", "".join(json.dumps(record) + "\n" for record in LOG))


def read_journal(folder):
    begun = read_log(folder, "begin")
    resume.begun_config(folder)
    _forget_after(folder / "log.jsonl", 2)
    return begun == LOG[:1]


# -- options -----------------------------------------------------------------------------------------------------------

RECIPE = {
    "title": "A test", "paper": "x", "sources": ["a", "b"], "corpus": None, "begins": None, "unverified": ["c"],
    "choices": ["d"], "text": {"level": "char", "vocab_size": 60, "words": "none"},
    "settings": {"variant": "roformer", "objective": "mlm", "lr": 0.001, "betas": [0.9, 0.99], "mask_prob": 0.15,
                 "model": {"hidden_size": 32}},
    "phases": [{"name": "one", "max_length": 64, "steps": 10}, {"name": "two", "max_length": 128, "steps": 5}],
    "demo": {"steps": 3},
}  # fmt: skip
OPTIONS = {
    "files": ["a.txt"], "out": "run", "seed": 3, "lr": 0.001, "steps": 10, "model": {"hidden_size": 32},
    "mask_actions": [0.8, 0.1, 0.1],
    "betas": [0.9, 0.999], "resume": False, "device": "cpu", "threads": None, "schedule": "linear",
}  # fmt: skip
TUNING = {
    "task": "classification", "train": ["a.csv"], "columns": {"text": "review"}, "model": "m", "max_length": 64,
    "lr": 0.0001, "betas": [0.9, 0.999], "seeds": [0, 1], "epochs": 2,
}  # fmt: skip


def settings(values):
    return lambda folder: put(folder, "a.yaml", yaml.safe_dump(values, sort_keys=False))


def load_recipe(folder):
    Recipe.load(str(folder / "a.yaml"))


def options(*kinds):
    return lambda folder: _settings(argparse.Namespace(config=folder / "a.yaml"), *kinds)


# -- fine-tuning -------------------------------------------------------------------------------------------------------

CSV = 'text,text_pair,label\n"好, very","b ""q""",yes\n坏,c,no\n"two\nlines",d,yes\n'
OBJECTS = [
    {"text": "好", "label": "yes", "id": 1},
    {"text": "坏", "text_pair": "x", "label": ["a", "b"]},
    {"text": "c", "label": 1.5},
]
QUESTIONS = [
    {"id": "q1", "question": "哪里?", "answers": [{"text": "北京", "answer_start": 0}]},
    {"id": "q2", "question": "谁?", "answers": {"text": ["中国"], "answer_start": [3]}},
]
SQUAD = {"version": "1", "data": [{"title": "t", "paragraphs": [{"context": "北京是中国的首都", "qas": QUESTIONS}]}]}
TSV = 'text\ttext_pair\tlabel\n好, very\tb "q\tyes\n坏\tc\tno\n'
CONLL = "-DOCSTART- O\n\n中 B-LOC\n国 I-LOC\n。 O\n\n我 O\n"
TAGGED = "19980101-01-001-001/m  [中国/ns 政府/n]nt  是/v\n好/a\n"


def examples(task, suffix, content, least=0.25, **options):
    def make(folder):
        put(folder, f"rows{suffix}", content)

    return Reader(
        f"rows{suffix} {task}", f"rows{suffix}", {".jsonl": "lines", ".json": "json"}.get(suffix, "text"), make,
        lambda folder: read_examples(folder / f"rows{suffix}", task, **options), least=least,
    )  # fmt: skip


def finetuned(folder):
    model(folder)
    vocabulary(folder)
    put(
        folder,
        "finetune.json",
        {
            "task": "classification",
            "settings": {
                "labels": ["no", "yes"],
                "max_length": 32,
                "types": True,
                "problem_type": "single_label_classification",
            },
        },
    )


# -- other people's checkpoints ----------------------------------------------------------------------------------------


def tensorflow(folder):
    folder.mkdir()
    tensorflow_copy("bert", folder).rename(folder / "model")
    put(folder / "model", "vocab.txt", "".join(f"{token}\n" for token in TENSORFLOW_VOCAB))


def read_tensorflow(folder):
    found = TensorflowCheckpoint(folder / "model")
    for name in found.entries:
        found.read(name)


def block_checksums(folder, whole):
    """Every block of the index that is still whole gets the checksum of its bytes."""
    path = folder / "model/model.ckpt.index"
    data = bytearray(path.read_bytes())
    end = len(whole) - 48
    for begin, size in _blocks(whole):
        if begin + size + 5 <= min(end, len(data)):
            found = _masked(crc32c(np.frombuffer(bytes(data[begin : begin + size + 1]), np.uint8)))
            data[begin + size + 1 : begin + size + 5] = struct.pack("<I", found)
    path.write_bytes(data)


def _blocks(whole):
    from fastbert.tensorflow_checkpoint import _block
    from fastbert.wire import varint

    footer, numbers, at = whole[-48:], [], 0
    for _ in range(4):
        number, at = varint(footer, at)
        numbers.append(number)
    yield numbers[2], numbers[3]
    for _, handle in _block(whole, *numbers[2:]):
        offset, at = varint(handle, 0)
        yield offset, varint(handle, at)[0]


def convert(function, source):
    def read(folder):
        out = folder / "out"
        try:
            function(folder / source, out)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        assert not [path for path in folder.iterdir() if path.name.startswith(".out")]

    return read


def fairseq(folder):
    folder.mkdir()
    write(folder / "model", roberta())
    write_vocabulary(folder / "model")


# -- all of them -------------------------------------------------------------------------------------------------------

ROW = {
    "op": "gelu",
    "provider": "fastbert",
    "shape": {"N": 3},
    "status": "measured",
    "device": "x",
    "commit": "y",
    "date": "z",
    "p50_us": 1.5,
}
INDEX = "model.safetensors.index.json"
ROWS = (json.dumps(ROW) + "\n") * 3


def at(file, function, **options):
    return lambda folder: function(folder / file, **options)


def holding(file, content):
    return lambda folder: put(folder, file, content)


BIN, WEIGHTS, TENSORFLOW = "pytorch_model.bin", "model.safetensors", "model/model.ckpt"
SHARD, VECTORS, CONFIG = "corpus/train-00000.arrow", "vectors.bin", "config.json"
similar = at(VECTORS, SimilarWords.from_vectors, progress=False)
without_full = only(tokenizer("bpe"), "tokenizer.json")
from_model = convert(from_tensorflow, "model")
from_fairseq_model = convert(from_fairseq, "model")
READERS = [
    Reader("config", CONFIG, "json", model, at(CONFIG, fastbert.EncoderConfig.from_json_file)),
    Reader("config of a model", CONFIG, "json", model, load_model, alone=False),
    Reader("safetensors", WEIGHTS, "bytes", model, load_model),
    Reader("safetensors header", WEIGHTS, "json", header, load_model, with_data, alone=False),
    Reader("large safetensors", WEIGHTS, "bytes", large(save_file, WEIGHTS), at(WEIGHTS, read_safetensors)),
    Reader("index", INDEX, "json", sharded, load_model),
    Reader("weights of an index", "one.safetensors", "bytes", sharded, load_model, named="safetensors"),
    Reader("bin", BIN, "bytes", pickled(), load_model),
    Reader("old bin", BIN, "bytes", pickled(_use_new_zipfile_serialization=False), load_model),
    Reader("large bin", BIN, "bytes", large(torch.save, BIN), at(BIN, read_bin)),
    Reader("vocab.txt", "vocab.txt", "text", vocabulary, load_tokenizer),
    Reader("tokenizer_config.json", "tokenizer_config.json", "json", vocabulary, load_tokenizer),
    Reader("added_tokens.json", "added_tokens.json", "json", vocabulary, load_tokenizer),
    *(
        Reader(f"tokenizer.json {level}", "tokenizer.json", "json", tokenizer(level), load_tokenizer)
        for level in ("char", "word", "bpe", "unigram")
    ),
    Reader("vocab.json", "vocab.json", "json", without_full, load_tokenizer),
    Reader("merges.txt", "merges.txt", "text", without_full, load_tokenizer),
    Reader("spiece", "spiece.model", "bytes", only(tokenizer("unigram"), "tokenizer.json"), load_tokenizer),
    Reader("manifest", "corpus/manifest.json", "json", corpus(10), open_corpus),
    Reader("shard", SHARD, "bytes", corpus(10), open_corpus, stated_size),
    Reader("long shard", SHARD, "bytes", corpus(6000), open_corpus, stated_size),
    Reader("verified shard", SHARD, "bytes", corpus(10), at("corpus", Corpus.open, progress=False)),
    *(
        Reader(f"work {name}", f".corpus.work/{name}", kind, work_folder, go_on, least=0.0)
        for name, kind in (("plan.json", "json"), ("scan.json", "json"), ("hashes.npy", "bytes"))
    ),
    Reader("work record.json", ".corpus.work/unit-00000/record.json", "json", work_folder, go_on, least=0.0),
    Reader("text", "a.txt", "text", holding("a.txt", TEXT), lambda f: list(read_rows(as_paths(f / "a.txt")))),
    Reader("word list", "words.txt", "text", holding("words.txt", "北京\n人民\n"), at("words.txt", _listed), least=0.1),
    Reader("text vectors", VECTORS, "text", vectors(False), similar),
    Reader("vectors", VECTORS, "bytes", vectors(True), similar),
    Reader("large vectors", VECTORS, "bytes", vectors(True, 500, 1000), at(VECTORS, read_vectors, progress=False)),
    Reader("zipped vectors", VECTORS, "bytes", zipped, at(VECTORS, read_vectors, progress=False)),
    Reader("similar words", "similar.txt", "text", table, at("similar.txt", SimilarWords.read)),
    Reader("cilin", "a.txt", "text", holding("a.txt", CILIN), at("a.txt", SimilarWords.from_cilin, progress=False)),
    Reader("checkpoint manifest", f"{CHECKPOINT}/manifest.json", "json", training, at(CHECKPOINT, state.verify)),
    Reader("checkpoint state", f"{CHECKPOINT}/state.json", "json", training, at(CHECKPOINT, resume.read_state)),
    Reader("moments", f"{CHECKPOINT}/optimizer.safetensors", "bytes", training, load_moments),
    Reader("log", "log.jsonl", "lines", log, read_journal, least=0.0),
    Reader("recipe", "a.yaml", "yaml", settings(RECIPE), load_recipe),
    Reader("recipe of another", "a.yaml", "yaml", settings(RECIPE | {"extends": "roberta-base"}), load_recipe),
    Reader("pretrain options", "a.yaml", "yaml", settings(OPTIONS), options(RecipeOptions, PretrainConfig)),
    Reader("finetune options", "a.yaml", "yaml", settings(TUNING), options(DemoOptions, FinetuneConfig)),
    examples("classification", ".csv", CSV),
    examples("classification", ".tsv", TSV),
    examples("classification", ".jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OBJECTS)),
    examples("classification", ".json", OBJECTS),
    examples("classification", ".txt", TEXT, 0.05, labelled=None),
    examples("qa", ".json", SQUAD),
    examples("tagging", ".conll", CONLL),
    examples("tagging", ".tagged", TAGGED, format="tagged"),
    Reader("finetune.json", "finetune.json", "json", finetuned, read_task),
    Reader("tensorflow index", f"{TENSORFLOW}.index", "bytes", tensorflow, read_tensorflow, named="model.ckpt"),
    Reader(
        *("sealed tensorflow index", f"{TENSORFLOW}.index", "bytes", tensorflow, read_tensorflow, block_checksums),
        named="model.ckpt",
    ),
    Reader("tensorflow data", f"{TENSORFLOW}.data-00000-of-00002", "bytes", tensorflow, read_tensorflow),
    Reader("tensorflow config", "model/bert_config.json", "json", tensorflow, from_model, alone=False),
    Reader("tensorflow vocabulary", "model/vocab.txt", "text", tensorflow, from_model),
    Reader("fairseq", "model/model.pt", "bytes", fairseq, from_fairseq_model),
    Reader("fairseq dictionary", "model/dict.txt", "text", fairseq, from_fairseq_model),
    Reader("fairseq pairs", "model/encoder.json", "json", fairseq, from_fairseq_model, alone=False),
    Reader("fairseq merges", "model/vocab.bpe", "text", fairseq, from_fairseq_model),
    Reader("rows of measurements", "a.jsonl", "lines", holding("a.jsonl", ROWS), lambda f: list(rows.read(f))),
]


def test_there_are_a_thousand_mutations():
    assert len(READERS) * DEFAULT >= 1000 and len({reader.name for reader in READERS}) == len(READERS)


@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_a_result_or_an_error_that_names_the_place(tmp_path, reader, record_property):
    folder = tmp_path / "files"
    reader.make(folder)
    path = folder / reader.file
    whole, found, faults = path.read_bytes(), Counter(), []
    others = {other: other.read_bytes() for other in folder.rglob("*") if reader.seal and other.is_file()}
    first = int(FIRST) if FIRST else time.time_ns() % 10**9 if COUNT else 0
    for seed in (None, *range(first, first + int(COUNT or DEFAULT))):
        mutation = mutate(whole, reader.kind, random.Random(f"{reader.name}:{seed}"))
        for other, content in others.items():
            _write(other, content)
        _write(path, whole if seed is None else mutation.data)
        if reader.seal and path.is_file():
            reader.seal(folder, whole)
        if seed is None:
            assert reader.read(folder) is not False
            continue
        verdict, fault = _verdict(reader, folder, path, mutation)
        found[verdict] += 1
        faults += [f"{first}:{seed} {mutation.name}: {fault}"] if fault else []
    print(f"{reader.name}: mutations from {first} on: {dict(found)}")
    record_property("mutations", dict(found))
    assert not faults, "\n".join(faults)
    assert sum(found.values()) - found["accepted"] >= reader.least * sum(found.values()), found


def _write(path, data):
    """data: None for a folder in the place of the file."""
    if path.is_dir():
        shutil.rmtree(path)
    if data is None:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_bytes(data)


def _verdict(reader, folder, path, mutation):
    """What became of reading, and what is wrong with that, if anything is."""
    verdict, said, size = "accepted", None, len(mutation.data or b"")
    resident = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    tracemalloc.start()
    begin = time.process_time()
    try:
        reader.read(folder)
    except FastBertError as error:
        verdict, said = type(error).__name__, str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        verdict = type(error).__name__
        where = traceback.extract_tb(error.__traceback__)[-1]
        return verdict, f"{verdict} {where.filename}:{where.lineno} {str(error)[:200]}"
    finally:
        seconds, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    grown = _resident("VmHWM") - resident
    if seconds > SECONDS:
        return verdict, f"{seconds:.2f} s"
    spare = SPARE_OF_YAML if reader.kind == "yaml" else SPARE
    if peak > 2 * size + spare or grown > 2 * size + SPARE_OF_PROCESS:
        return verdict, f"{peak:,} bytes allocated, {grown:,} more resident, for {size:,}"
    if said is not None and (reader.named or path.name) not in said:
        return verdict, f"the file is not named: {said[:300]}"
    if said is not None and mutation.fields and reader.alone and not any(field in said for field in mutation.fields):
        return verdict, f"{mutation.fields} not named: {said[:300]}"
    return verdict, f"a message of {len(said)} characters: {said[:200]}" if said and len(said) > 2000 else None


def _resident(kind):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024
