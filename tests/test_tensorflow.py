"""TensorFlow checkpoints: the reader against files that TensorFlow wrote, every kind of damage, and what
fastbert convert --from-tensorflow makes of each family.
"""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorflow_values import FAMILIES, GENERATOR, HIDDEN, SCALARS, config, value, variables

import fastbert
from fastbert.cli import main
from fastbert.crc32c import crc32c
from fastbert.data import Tokenizer
from fastbert.errors import CheckpointError, ConfigError, DataError, FastBertError, MissingFileError
from fastbert.tensorflow_checkpoint import TensorflowCheckpoint, _masked
from fastbert.train.from_tensorflow import from_tensorflow

GOLDENS = Path(__file__).parent / "goldens"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "国", "a", "##b"]


def copy(family, target):
    return Path(shutil.copytree(GOLDENS / f"tf_{family}", target / family))


def slow_crc32c(data):
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


@given(st.integers(0, 700), st.integers(0, 99))
def test_crc32c_is_that_of_its_definition(size, seed):
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    assert crc32c(data) == slow_crc32c(data.tobytes())


def test_crc32c_of_known_strings():
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(np.arange(32, dtype=np.uint8)) == 0x46DD794E


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_as_tensorflow_wrote_it(family):
    checkpoint = TensorflowCheckpoint(GOLDENS / f"tf_{family}")
    shapes = variables(family)
    assert len(checkpoint.entries) == len(shapes) + len(SCALARS) + 8
    for name, shape in shapes.items():
        assert np.array_equal(checkpoint.read(name).numpy(), value(name, shape)), name
    assert checkpoint.read("global_step").item() == 7 and checkpoint.read("loss_scale").item() == 2.0


def test_dtypes_and_what_is_not_read():
    checkpoint = TensorflowCheckpoint(GOLDENS / "tf_mixed")
    numbers = torch.arange(6).view(2, 3)
    for name, dtype in {"half": torch.float16, "bfloat": torch.bfloat16, "ints": torch.int32}.items():
        assert torch.equal(checkpoint.read(name), numbers.to(dtype)) and checkpoint.read(name).dtype == dtype
    assert torch.equal(checkpoint.read("double"), torch.tensor(2.5, dtype=torch.float64))
    with pytest.raises(CheckpointError, match="words.*dtype number 7"):
        checkpoint.read("words")
    with pytest.raises(CheckpointError, match="slices.*cut in slices"):
        checkpoint.read("slices")


def test_paths_of_a_checkpoint(tmp_path):
    folder = copy("roformer", tmp_path)
    for path in (folder, folder / "model.ckpt", folder / "model.ckpt.index", str(folder / "model.ckpt")):
        assert TensorflowCheckpoint(path).prefix == folder / "model.ckpt"
    for path in (tmp_path, tmp_path / "nowhere", folder / "model"):
        with pytest.raises(MissingFileError, match="no TensorFlow checkpoint at .*expected"):
            TensorflowCheckpoint(path)
    shutil.copy(folder / "model.ckpt.index", folder / "other.ckpt.index")
    with pytest.raises(CheckpointError, match="model.ckpt, other.ckpt"):
        TensorflowCheckpoint(folder)
    (folder / "other.ckpt.index").unlink()
    (folder / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(MissingFileError, match="data-00000-of-00001"):
        TensorflowCheckpoint(folder).read("bert/embeddings/word_embeddings")


def test_a_damaged_index_is_refused_or_says_the_same(tmp_path):
    folder = copy("roformer", tmp_path)
    index = folder / "model.ckpt.index"
    whole, entries = index.read_bytes(), TensorflowCheckpoint(folder).entries
    for position in [*range(0, len(whole), 23), *range(len(whole) - 53, len(whole))]:
        index.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            assert TensorflowCheckpoint(folder).entries == entries, position
        except CheckpointError as error:
            assert "model.ckpt.index is damaged" in str(error)
    for size in (0, 7, 48, 500, len(whole) - 1):
        index.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="model.ckpt.index is damaged"):
            TensorflowCheckpoint(folder)


def test_damaged_data_are_refused_by_name(tmp_path):
    folder, name = copy("bert", tmp_path), "bert/embeddings/word_embeddings"
    entry = TensorflowCheckpoint(folder).entries[name]
    data = folder / f"model.ckpt.data-{entry.shard:05d}-of-00002"
    whole = bytearray(data.read_bytes())
    whole[entry.offset + 9] ^= 1
    data.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"{name}.*checksum"):
        TensorflowCheckpoint(folder).read(name)
    data.write_bytes(whole[: entry.offset + entry.size - 1])
    with pytest.raises(CheckpointError, match=f"{name}.*truncated"):
        TensorflowCheckpoint(folder).read(name)


def varint(number):
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def field(number, content):
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def block(pairs, compression=0):
    """A block in which every key is whole."""
    body = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
    body += struct.pack("<II", 0, 1) + bytes([compression])
    return body + struct.pack("<I", _masked(slow_crc32c(body)))


def write_checkpoint(prefix, tensors, blocks=1, compression=0):
    """What TensorFlow would write of float32 arrays by name, the index in several blocks."""
    pairs, data = [(b"", field(1, 1))], b""
    for name in sorted(tensors):
        content = tensors[name].tobytes()
        shape = b"".join(field(2, field(1, size)) for size in tensors[name].shape)
        entry = field(1, 1) + field(2, shape) + field(4, len(data)) + field(5, len(content))
        checksum = _masked(crc32c(np.frombuffer(content, np.uint8)))
        pairs.append((name.encode(), entry + varint(6 << 3 | 5) + struct.pack("<I", checksum)))
        data += content
    table, handles, step = b"", [], -(-len(pairs) // blocks)
    for start in range(0, len(pairs), step):
        part = block(pairs[start : start + step], compression)
        handles.append((pairs[min(start + step, len(pairs)) - 1][0], varint(len(table)) + varint(len(part) - 5)))
        table += part
    ends = varint(len(table)) + varint(0) + varint(len(table)) + varint(len(block(handles)) - 5)
    footer = ends.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    Path(f"{prefix}.index").write_bytes(table + block(handles) + footer)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)


def written(folder, family, keep, **changes):
    """A checkpoint of those variables of a family that `keep` accepts, with its config."""
    folder.mkdir()
    shapes = {name: shape for name, shape in variables(family).items() if keep(name)}
    write_checkpoint(folder / "model.ckpt", {name: value(name, shape) for name, shape in shapes.items()})
    name, values = config(family)
    (folder / name).write_text(json.dumps(values | changes))
    return folder


def test_an_index_that_repeats_long_keys(tmp_path):
    write_checkpoint(tmp_path / "model", {"x" * 5000: np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match="model.index is damaged .*a key of 0 . 5000 bytes"):
        TensorflowCheckpoint(tmp_path)


def test_an_index_of_several_blocks_and_a_compressed_one(tmp_path):
    tensors = {f"layer_{index}": np.full((2, index + 1), index, np.float32) for index in range(40)}
    write_checkpoint(tmp_path / "model", tensors, blocks=4)
    checkpoint = TensorflowCheckpoint(tmp_path)
    assert set(checkpoint.entries) == set(tensors)
    assert all(np.array_equal(checkpoint.read(name).numpy(), tensor) for name, tensor in tensors.items())
    write_checkpoint(tmp_path / "model", tensors, compression=1)
    with pytest.raises(CheckpointError, match=r"compressed \(kind 1\)"):
        TensorflowCheckpoint(tmp_path)


# A matrix, a norm, a part of the head: where each stands in transformers' models.
PLACES = {
    "bert": {
        "bert.encoder.layer.1.attention.self.key.weight": "bert/encoder/layer_1/attention/self/key/kernel",
        "bert.encoder.layer.0.output.LayerNorm.weight": "bert/encoder/layer_0/output/LayerNorm/gamma",
        "bert.embeddings.position_embeddings.weight": "bert/embeddings/position_embeddings",
        "cls.predictions.bias": "cls/predictions/output_bias",
        "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
    },
    "nezha": {
        "nezha.pooler.dense.bias": "bert/pooler/dense/bias",
        "nezha.encoder.layer.1.intermediate.dense.weight": "bert/encoder/layer_1/intermediate/dense/kernel",
        "cls.predictions.transform.LayerNorm.bias": "cls/predictions/transform/LayerNorm/beta",
    },
    "albert": {
        "albert.encoder.embedding_hidden_mapping_in.weight": "bert/encoder/embedding_hidden_mapping_in/kernel",
        **{
            f"albert.encoder.albert_layer_groups.0.albert_layers.0.{ours}": (
                f"bert/encoder/transformer/group_0/inner_group_0/{theirs}"
            )
            for ours, theirs in {
                "attention.query.weight": "attention_1/self/query/kernel",
                "attention.dense.weight": "attention_1/output/dense/kernel",
                "attention.LayerNorm.weight": "LayerNorm/gamma",
                "ffn.weight": "ffn_1/intermediate/dense/kernel",
                "ffn_output.weight": "ffn_1/intermediate/output/dense/kernel",
                "full_layer_layer_norm.bias": "LayerNorm_1/beta",
            }.items()
        },
        "albert.pooler.weight": "bert/pooler/dense/kernel",
        "predictions.dense.weight": "cls/predictions/transform/dense/kernel",
        "predictions.bias": "cls/predictions/output_bias",
        "sop_classifier.classifier.weight": "cls/seq_relationship/output_weights",
    },
    "electra": {
        "electra.embeddings_project.weight": "electra/embeddings_project/kernel",
        "discriminator_predictions.dense.weight": "discriminator_predictions/dense/kernel",
        "discriminator_predictions.dense_prediction.weight": "discriminator_predictions/dense_1/kernel",
    },
    "roformer": {
        "roformer.encoder.layer.0.attention.self.query.weight": "bert/encoder/layer_0/attention/self/query/kernel",
        "cls.predictions.transform.dense.weight": "cls/predictions/transform/dense/kernel",
    },
}
CLASSES = {
    "bert": "BertForPreTraining",
    "nezha": "NezhaForPreTraining",
    "albert": "AlbertForPreTraining",
    "electra": "ElectraForPreTraining",
    "roformer": "RoFormerForMaskedLM",
}


def of(name, family):
    shape = variables(family)[name]
    tensor = torch.from_numpy(value(name, shape))
    return tensor.t() if name.endswith("kernel") else tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_moves_every_variable(tmp_path, family, recwarn):
    variant = "roformer" if family == "roformer" else None
    done = from_tensorflow(GOLDENS / f"tf_{family}", tmp_path / "out", variant=variant)
    assert not recwarn.list
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for place, name in PLACES[family].items():
        assert torch.equal(tensors[place], of(name, family)), place
    own = [name for name in variables(family) if not name.startswith("generator")]
    rest = [tensor for name, tensor in tensors.items() if "embed_positions" not in name]
    assert len(rest) == len(own)
    for name in own:
        assert sum(torch.equal(tensor, of(name, family)) for tensor in rest) == 1, name
    model = fastbert.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == CLASSES[family] == done[0].kind.__name__
    assert model.config.hidden_size == HIDDEN and not recwarn.list


def test_electra_comes_as_discriminator_and_generator(tmp_path, recwarn):
    done = from_tensorflow(GOLDENS / "tf_electra", tmp_path / "out")
    assert [part.folder for part in done] == [tmp_path / "out", tmp_path / "out" / "generator"]
    joint = fastbert.ElectraForJointPreTraining.from_pretrained(tmp_path / "out")
    generator = joint.generator
    assert {name: getattr(generator.config, name) for name in GENERATOR} == GENERATOR  # read off the tensors
    assert torch.equal(generator.head.bias, of("generator_predictions/output_bias", "electra"))
    query = generator.model.encoder.layers[1].attention.query.weight
    assert torch.equal(query, of("generator/encoder/layer_1/attention/self/query/kernel", "electra"))
    assert not recwarn.list


def test_sizes_of_electra_are_those_of_a_config_or_of_the_tensors(tmp_path):
    folder = copy("electra", tmp_path)
    values = json.loads((folder / "base_discriminator_config.json").read_text())
    (folder / "base_generator_config.json").write_text(json.dumps(values | GENERATOR | {"num_attention_heads": 3}))
    generator = from_tensorflow(folder, tmp_path / "out")[1].config
    assert generator.num_attention_heads == 3
    for name in ("base_generator_config.json", "base_discriminator_config.json"):
        (folder / name).unlink()
    discriminator = from_tensorflow(folder, tmp_path / "other")[0].config
    sizes = ("vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    assert {name: getattr(discriminator, name) for name in sizes} == {name: values[name] for name in sizes}
    assert discriminator.num_attention_heads == 1
    (folder / "a_discriminator_config.json").write_text("{}")
    (folder / "b_discriminator_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a_discriminator_config.json, b_discriminator_config.json"):
        from_tensorflow(folder, tmp_path / "third")


@pytest.mark.parametrize(
    "family, variant, trained",
    [
        ("bert", None, "gelu_new"),
        ("bert", "wobert", "gelu"),
        ("albert", None, "gelu_new"),
        ("nezha", None, "gelu_new"),
        ("nezha", "wonezha", "gelu"),
        ("electra", None, "gelu"),
        ("roformer", "roformer", "gelu"),
    ],
)
def test_activation_as_trained_and_as_written(tmp_path, family, variant, trained):
    source = GOLDENS / f"tf_{family}"
    (done, *_) = from_tensorflow(source, tmp_path / "trained", variant=variant)
    assert (done.config.hidden_act, done.written_act) == (trained, "gelu")
    (done, *_) = from_tensorflow(source, tmp_path / "written", variant=variant, activation="as-written")
    assert done.config.hidden_act == "gelu"
    assert json.loads((tmp_path / "written" / "config.json").read_text())["hidden_act"] == "gelu"


def test_another_activation_than_gelu_stays(tmp_path):
    folder = written(tmp_path / "relu", "albert", lambda name: True, hidden_act="relu")
    assert from_tensorflow(folder, tmp_path / "out")[0].config.hidden_act == "relu"


def test_the_class_is_the_one_that_has_what_is_there(tmp_path, recwarn):
    def bare(name):  # as HFL publishes its models
        return not name.startswith("cls/")

    def words(name):  # as bert4keras saves WoBERT
        return "seq_relationship" not in name and "pooler" not in name

    for keep, kind in ((bare, "BertModel"), (words, "BertForMaskedLM")):
        folder = written(tmp_path / kind, "bert", keep)
        assert from_tensorflow(folder, tmp_path / f"{kind}-out")[0].kind.__name__ == kind
    assert not recwarn.list
    folder = written(tmp_path / "lost", "bert", lambda name: "layer_1/output/dense/kernel" not in name)
    with pytest.raises(CheckpointError, match="lacks 1 tensor.*encoder.layer.1.output.dense.weight"):
        from_tensorflow(folder, tmp_path / "lost-out")


def test_what_it_is_must_be_said_and_fit(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="nezha, wonezha, roformer"):
        from_tensorflow(GOLDENS / "tf_roformer", out)
    with pytest.raises(ConfigError, match="'nezha'.*bert or wobert"):
        from_tensorflow(GOLDENS / "tf_bert", out, variant="nezha")
    with pytest.raises(ConfigError, match="'roformer'.*nezha or wonezha"):  # its config has use_relative_position
        from_tensorflow(GOLDENS / "tf_nezha", out, variant="roformer")
    with pytest.raises(ConfigError, match="'berd'.*did you mean 'bert'"):
        from_tensorflow(GOLDENS / "tf_bert", out, variant="berd")
    with pytest.raises(ConfigError, match="as-thought"):
        from_tensorflow(GOLDENS / "tf_bert", out, activation="as-thought")
    with pytest.raises(CheckpointError, match="variables.*half.*such as bert/embeddings/word_embeddings"):
        from_tensorflow(GOLDENS / "tf_mixed", out)
    folder = copy("bert", tmp_path)
    (folder / "bert_config.json").unlink()
    with pytest.raises(MissingFileError, match="no config.*bert_config.json"):
        from_tensorflow(folder, out)
    assert not out.exists()
    out.mkdir()
    (out / "something").touch()
    with pytest.raises(DataError, match="exists already"):
        from_tensorflow(GOLDENS / "tf_bert", out)


@pytest.mark.parametrize("more, lower", [([], True), (["Berlin"], False)])
def test_the_vocabulary_goes_along(tmp_path, more, lower):
    folder = copy("bert", tmp_path)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB + more), encoding="utf-8")
    from_tensorflow(folder, tmp_path / "out")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.level == "char" and tokenizer.vocab_size == len(VOCAB) + len(more)
    values = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert values == {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
    from_tensorflow(folder, tmp_path / "words", variant="wobert")
    assert Tokenizer.from_pretrained(tmp_path / "words").level == "word"
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in [*VOCAB, *"bcdefgh"]), encoding="utf-8")
    with pytest.raises(CheckpointError, match="vocab.txt has 16 tokens.*13"):
        from_tensorflow(folder, tmp_path / "large")


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path):
    """So that it can be repeated; and the error names the file that is wrong, not its copy."""
    folder = copy("bert", tmp_path)
    (folder / "vocab.txt").write_bytes("[PAD]\n中国\n".encode("gb18030"))
    with pytest.raises(DataError, match="bert/vocab.txt: invalid UTF-8"):
        from_tensorflow(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB), encoding="utf-8")
    from_tensorflow(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_command(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["convert", "--from-tensorflow", "--model", str(GOLDENS / "tf_nezha"), "--out", str(out)]
    assert main(arguments) == 0
    assert "NezhaForPreTraining" in (shown := capsys.readouterr().out)
    assert "hidden_act gelu_new (as-trained; the config beside it says gelu)" in shown
    for wrong, words in (
        ([], "exists already"),
        (["--to-words"], "got 2 conversions to do, expected one of --from-tensorflow"),
        (["--count", "3"], "count is 3"),
        (["--variant", "nezah"], "did you mean 'nezha'"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert words in capsys.readouterr().err
    assert main(["convert", "--to-words", "--variant", "nezha", "--model", "a", "--out", "b"]) == 2
    assert "variant is 'nezha'" in capsys.readouterr().err


def test_damage_never_escapes_as_another_error(tmp_path):
    folder = copy("bert", tmp_path)
    random = np.random.default_rng(0)
    files = [path for path in sorted(folder.iterdir())]
    for number in range(12):
        path = files[number % len(files)]
        whole = bytearray(path.read_bytes())
        damaged = whole.copy()
        for place in random.integers(0, len(whole), 3):
            damaged[place] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(damaged)
        try:
            from_tensorflow(folder, tmp_path / str(number))
        except FastBertError:
            pass
        path.write_bytes(whole)
