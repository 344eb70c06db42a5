"""fairseq's RoBERTa with its arguments and its dictionary -> a model folder with a tokenizer."""

import argparse
import json
import os

import pytest
import torch
from test_models import VOCAB, build
from test_ports import assert_equal, fairseq

import fastbert
from fastbert.cli import main
from fastbert.data import Tokenizer
from fastbert.errors import CheckpointError, ConfigError, DataError, MissingFileError
from fastbert.train.from_fairseq import from_fairseq

ARGUMENTS = dict(
    arch="roberta_base",
    encoder_layers=3,
    encoder_embed_dim=16,
    encoder_attention_heads=2,
    encoder_ffn_embed_dim=24,
    activation_fn="gelu",
    dropout=0.1,
    attention_dropout=0.2,
    seed=1,
)


def roberta():
    model = build("roberta", type_vocab_size=1, layer_norm_eps=1e-5)
    with torch.no_grad():
        model.model.embeddings.token_type.weight.zero_()
    return model


def write(folder, trained, arguments=None, **content):
    folder.mkdir(exist_ok=True)
    own = {
        "args": argparse.Namespace(**(arguments or ARGUMENTS)),
        "model": fairseq(trained),
        "extra_state": {"epoch": 3},
    }
    torch.save(own | content, folder / "model.pt")
    return folder


def write_vocabulary(folder):
    """GPT-2's side: ids of byte pairs and merges. fairseq's: its own order of these ids, then what fills up."""
    pairs = ["l", "o", "w", "Ġ", "lo", "low", "Ġlow", "e", "r", "é", *"abcdfghijkmnpqstuvxyzABCD"][: VOCAB - 7]
    (folder / "encoder.json").write_text(json.dumps({pair: 100 + index for index, pair in enumerate(pairs)}))
    order = [*range(len(pairs))][::-1]
    lines = [f"{100 + index} {count}" for count, index in enumerate(order)] + ["madeupword0000 0", "madeupword0001 0"]
    (folder / "dict.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "vocab.bpe").write_text("#version: 0.2\nl o\nlo w\nĠ low\n", encoding="utf-8")
    return [pairs[index] for index in order]


def test_the_model_and_its_config(tmp_path, recwarn):
    model = roberta()
    write(tmp_path / "in", model)
    assert_equal(model, from_fairseq(tmp_path / "in", tmp_path / "out"))
    read = fastbert.from_pretrained(tmp_path / "out")
    assert_equal(model, read)
    expected = model.config.to_dict() | dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    assert read.config.to_dict() == expected
    assert not recwarn.list and sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_the_tokenizer_has_fairseqs_ids(tmp_path):
    write(tmp_path / "in", roberta())
    order = write_vocabulary(tmp_path / "in")
    from_fairseq(tmp_path / "in" / "model.pt", tmp_path / "out")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *order, "madeupword0000", "madeupword0001", "<mask>"]
    assert [tokenizer.id_to_token(index) for index in range(VOCAB)] == tokens
    assert (tokenizer.level, tokenizer.pad_id) == ("bpe", 1)
    ids = [int(index) for index in tokenizer.encode_rows([["low", " low"]]).ids]
    assert ids == [tokens.index("low"), tokens.index("Ġlow")]


def test_what_is_not_fairseqs_is_refused(tmp_path):
    model, source, out = roberta(), tmp_path / "in", tmp_path / "out"
    with pytest.raises(MissingFileError, match="in does not exist; expected a fairseq checkpoint"):
        from_fairseq(source, out)
    marker = tmp_path / "marker"

    class Gadget:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for content, words in (
        (dict(cfg=Gadget()), r"cannot be read with weights_only: it refers to \w+\.system"),
        (dict(args=argparse.Namespace(x=Gadget())), r"cannot be read with weights_only: it refers to \w+\.system"),
        (dict(args=None), "no fairseq checkpoint"),
        (dict(args={"encoder_layers": 3}), "no fairseq checkpoint"),
        (dict(model=[torch.zeros(1)]), "holds a list"),
        (dict(model={"a": torch.zeros(1)}), "no sentence_encoder.embed_tokens.weight"),
    ):
        with pytest.raises(CheckpointError, match=words):
            from_fairseq(write(source, model, **content), out)
    assert not marker.exists()
    few = {name: value for name, value in ARGUMENTS.items() if name != "encoder_layers"}
    with pytest.raises(CheckpointError, match="the arguments lack encoder_layers"):
        from_fairseq(write(source, model, few), out)
    with pytest.raises(ConfigError, match="hidden_act.*gelu_fast2"):
        from_fairseq(write(source, model, ARGUMENTS | {"activation_fn": "gelu_fast2"}), out)
    with pytest.raises(CheckpointError, match="lacks 16 tensor.*encoder.layer.3"):
        from_fairseq(write(source, model, ARGUMENTS | {"encoder_layers": 4}), out)
    write_vocabulary(write(source, model))
    (source / "dict.txt").write_text("100 5\n")
    with pytest.raises(DataError, match=f"dict.txt makes 6 tokens, expected {VOCAB}"):
        from_fairseq(source, out)
    assert not out.exists()


def test_command(tmp_path, capsys):
    write(tmp_path / "in", roberta())
    arguments = ["convert", "--from-fairseq", "--model", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--activation", "as-written"]) == 2
    assert "activation is 'as-written', expected it not to be set with from_fairseq" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "RobertaForMaskedLM of" in capsys.readouterr().out
    assert type(fastbert.from_pretrained(tmp_path / "out")) is fastbert.RobertaForMaskedLM
