"""Model folders that are damaged, malicious or contradict themselves: always an error of ours that says where, never
code from the file; and every class, in every dtype, comes back bit for bit.
"""

import contextlib
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import small_config

import fastbert
from fastbert.errors import CheckpointError, ConfigError, DtypeError, FastBertError, MissingFileError
from fastbert.models import CLASSES

KINDS = [kind for kinds in CLASSES.values() for kind in kinds]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
WORD = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    fastbert.BertForMaskedLM(small_config("bert")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def as_bin(folder, content, **options):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin", **options)


def in_shards(folder, suffix, save, parts, weight_map):
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, tensors in parts.items():
        save(tensors, folder / name)
    (folder / f"{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_every_class_comes_back_bit_for_bit(tmp_path, kind, dtype, recwarn):
    torch.manual_seed(1)
    model = kind(small_config(kind.model_type)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    for path in [path for path in (tmp_path / "one").rglob("*") if path.is_file()]:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    read = kind.from_pretrained(tmp_path / "one")
    assert read.config == model.config
    theirs = dict(read.named_parameters())
    for name, parameter in model.named_parameters():
        assert theirs[name].dtype == dtype
        assert torch.equal(theirs[name].view(BITS[dtype]), parameter.view(BITS[dtype])), name
    assert not recwarn.list


class Gadget:
    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def touching(marker):
    """Ways to run code while a pickle is read, each of which would make the file `marker`."""
    command = f"open({str(marker)!r}, 'w').close()"
    inner = pickle.dumps(Gadget(exec, command))
    return {
        "system": Gadget(os.system, f"touch {marker}"),
        "exec": Gadget(exec, command),
        "eval": Gadget(eval, command),
        "open": Gadget(open, str(marker), "w"),
        "storage": Gadget(torch.storage._load_from_bytes, inner),
        "loads": Gadget(pickle.loads, inner),
        "numpy": Gadget(numpy.load, str(marker), None, True),
        "map": Gadget(list, Gadget(map, exec, [command])),
    }


NAMES = list(touching("marker"))


@pytest.mark.parametrize("inside", ["alone", "value", "key", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_pickles_that_run_code_are_refused_before_they_do(folder, name, inside):
    marker = folder / "marker"
    gadget = touching(marker)[name]
    if inside == "plain":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({WORD: gadget}, protocol=2))
    elif inside == "key":
        as_bin(folder, tensors_of(folder) | {gadget: torch.zeros(1)})
    else:
        as_bin(folder, gadget if inside == "alone" else tensors_of(folder) | {"more": gadget})
    with pytest.raises(CheckpointError, match="pytorch_model.bin cannot be read with weights_only: it refers to"):
        fastbert.from_pretrained(folder)
    assert not marker.exists()


def test_the_gadgets_do_run_where_they_may(tmp_path):
    for name in ("system", "exec", "eval", "open", "storage", "loads", "map"):
        with contextlib.suppress(RuntimeError):  # torch complains afterwards
            pickle.loads(pickle.dumps(touching(tmp_path / name)[name]))
        assert (tmp_path / name).exists(), name


def test_tensors_that_lie_about_their_size_are_refused(folder):
    storage = torch.zeros(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    rebuild = torch._utils._rebuild_tensor_v2
    for offset, size, stride in ((0, (10**9,), (1,)), (3, (2,), (1,)), (-1, (2,), (1,)), (0, (2, 2), (4, 1))):
        as_bin(folder, {WORD: Gadget(rebuild, typed, offset, size, stride, False, OrderedDict())})
        with pytest.raises(CheckpointError, match="pytorch_model.bin cannot be read"):
            fastbert.from_pretrained(folder)


@pytest.mark.parametrize("legacy", [True, False])
def test_truncated_and_flipped_bins(folder, legacy):
    as_bin(folder, tensors_of(folder), _use_new_zipfile_serialization=not legacy)
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    assert type(fastbert.from_pretrained(folder)) is fastbert.BertForMaskedLM
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            fastbert.from_pretrained(folder)


def test_archives_out_of_which_more_comes_than_they_have(folder):
    as_bin(folder, tensors_of(folder))
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="pytorch_model.bin has the compressed record"):
        fastbert.from_pretrained(folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
        largest = max(archive.filelist, key=lambda record: record.file_size)
        archive.filelist += [largest] * 3  # the same bytes under further entries
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin has records of \d+ bytes in"):
        fastbert.from_pretrained(folder)


def test_other_things_than_tensors_by_name(folder):
    for content, words in (
        ([torch.zeros(1)], "holds a list"),
        ({"model": {WORD: torch.zeros(1)}}, "holds 'model', a dict"),
        ({WORD: torch.zeros(1), "step": 3}, "holds 'step', a int"),
        ({5: torch.zeros(1)}, "expected tensors by name"),
    ):
        as_bin(folder, content)
        with pytest.raises(CheckpointError, match=f"pytorch_model.bin {words}|{words}"):
            fastbert.from_pretrained(folder)


def test_safetensors_with_a_false_header(folder):
    path = folder / "model.safetensors"
    header = {WORD: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    overlapping = header | {"other": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}
    cases = {
        "huge": struct.pack("<Q", 1 << 62) + b"{}",
        "long": struct.pack("<Q", 200_000_000) + b"{}",
        "text": struct.pack("<Q", 8) + b"not json" + bytes(16),
        "shape": header | {WORD: header[WORD] | {"shape": [5]}},
        "outside": header | {WORD: header[WORD] | {"data_offsets": [0, 64], "shape": [16]}},
        "overlap": overlapping,
        "dtype": header | {WORD: header[WORD] | {"dtype": "F31"}},
        "overflow": header | {WORD: header[WORD] | {"shape": [1 << 40, 1 << 40]}},
    }
    for name, content in cases.items():
        if isinstance(content, dict):
            text = json.dumps(content).encode()
            content = struct.pack("<Q", len(text)) + text + bytes(24 if name == "overlap" else 16)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="model.safetensors is damaged or not safetensors"):
            fastbert.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensors_that_are_not_finite_are_named(folder, dtype, value):
    tensors = tensors_of(folder)
    tensors[QUERY] = tensors[QUERY].to(dtype)  # alone in its dtype, which is allowed
    save_file(tensors, folder / "model.safetensors")
    assert fastbert.from_pretrained(folder).model.encoder.layers[1].attention.query.weight.dtype == dtype
    tensors[QUERY][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{QUERY} holds 1 value.* NaN or infinite, of 256"):
        fastbert.from_pretrained(folder)
    tensors[QUERY][3, 5], tensors["bert.unused"] = 0.0, torch.full((3,), value)
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="does not use: bert.unused"):
        fastbert.from_pretrained(folder)


def test_tensors_of_another_kind_are_named(folder):
    tensors = tensors_of(folder)
    for wrong, words in (
        (tensors[QUERY].to(torch.int32), "torch.int32, expected a dense tensor of torch.float64"),
        (tensors[QUERY] > 0, "torch.bool"),
        (tensors[QUERY].to(torch.complex64), "torch.complex64"),
        (tensors[QUERY].to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (tensors[QUERY].to_sparse(), "torch.sparse_coo"),
        (tensors[QUERY].to("meta"), "without data"),
    ):
        as_bin(folder, tensors | {QUERY: wrong})
        with pytest.raises(CheckpointError, match=f"{QUERY} is .*{words}"):
            fastbert.from_pretrained(folder)


def test_a_misnamed_tensor_is_asked_about(folder):
    tensors = tensors_of(folder)
    tensors[wrong := QUERY.replace("query", "qeury")] = tensors.pop(QUERY)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensor.*: {QUERY} \(did you mean '{wrong}'\?\)"):
        fastbert.from_pretrained(folder)
    tensors[QUERY] = tensors.pop(wrong)
    head = "cls.predictions.transform.dense.bias"
    tensors[head.replace("bias", "bais")] = tensors.pop(head)
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=rf"has no {head} \(did you mean '.*bais'\?\): drawn anew"):
        fastbert.from_pretrained(folder)


def test_a_bias_that_differs_from_its_other_name_is_refused(folder):
    tensors = tensors_of(folder)
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="cls.predictions.decoder.bias differs from the head's own bias"):
        fastbert.from_pretrained(folder)


SHARDED = [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)]


@pytest.mark.parametrize("suffix, save", SHARDED, ids=["safetensors", "bin"])
def test_shards(folder, suffix, save):
    whole = fastbert.from_pretrained(folder)
    tensors = tensors_of(folder)
    names = sorted(tensors)
    parts = {"a-1": {n: tensors[n] for n in names[::2]}, "a-2": {n: tensors[n] for n in names[1::2]}}
    files = {name: part for part, own in parts.items() for name in own}
    in_shards(folder, suffix, save, parts, files)
    read = fastbert.from_pretrained(folder)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), read.parameters(), strict=True))

    twice = parts | {"a-2": parts["a-2"] | {names[0]: tensors[names[0]]}}
    in_shards(folder, suffix, save, twice, files)
    with pytest.raises(CheckpointError, match=f"tensor {names[0]} is in a-1 and in a-2"):
        fastbert.from_pretrained(folder)
    in_shards(folder, suffix, save, parts, files | {names[0]: "a-2"})
    with pytest.raises(CheckpointError, match=f"tensor {names[0]} is in .*a-1; .*names 'a-2'"):
        fastbert.from_pretrained(folder)
    in_shards(folder, suffix, save, parts, files | {"cls.more": "a-2"})
    with pytest.raises(CheckpointError, match="lacks tensors that .* names: cls.more"):
        fastbert.from_pretrained(folder)
    (folder / "a-2").write_bytes((folder / "a-2").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="a-2"):
        fastbert.from_pretrained(folder)
    (folder / "a-2").unlink()
    with pytest.raises(MissingFileError, match="a-2, named in"):
        fastbert.from_pretrained(folder)


@pytest.mark.parametrize("suffix, save", SHARDED, ids=["safetensors", "bin"])
def test_an_index_that_leads_elsewhere_or_nowhere(folder, suffix, save):
    tensors = tensors_of(folder)
    save(tensors, folder.parent / "outside")
    for path in ("../outside", str(folder.parent / "outside"), "..", "sub/../../outside", "."):
        in_shards(folder, suffix, save, {}, dict.fromkeys(tensors, path))
        with pytest.raises(CheckpointError, match="index.json names the file .* expected one in its own folder"):
            fastbert.from_pretrained(folder)
    for text in (
        "",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
        "\xff",
    ):
        (folder / f"{suffix}.index.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match="index.json"):
            fastbert.from_pretrained(folder)


def test_what_is_too_deep_or_too_large_is_an_error(tmp_path):
    """Nesting beyond the parser, and sizes that nothing can hold, before anything is built."""
    deep = tmp_path / "config.json"
    deep.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="config.json: not valid JSON"):
        fastbert.EncoderConfig.from_json_file(deep)
    with pytest.raises(FastBertError, match="config.json"):
        fastbert.from_pretrained(tmp_path)
    for name, value in (("num_hidden_layers", 10**9), ("vocab_size", 10**21), ("num_labels", 2**40)):
        with pytest.raises(ConfigError, match=f"{name}' = {value} is too large; expected at most"):
            fastbert.EncoderConfig("bert", **{name: value})
    for name in ("layer_norm_eps", "initializer_range"):
        with pytest.raises(ConfigError, match=f"{name}' = inf"):
            fastbert.EncoderConfig("bert", **{name: float("inf")})


def test_dtypes_and_devices_that_nothing_runs_on(tmp_path):
    config = fastbert.EncoderConfig("bert", hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9)
    fastbert.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(DtypeError, match="float8_e4m3fn"):
        fastbert.from_pretrained(tmp_path, dtype="float8_e4m3fn")
    for device in ("xpu", "vulkan"):
        with pytest.raises(ConfigError, match=f"device is '{device}'"):
            fastbert.from_pretrained(tmp_path, device=device)
