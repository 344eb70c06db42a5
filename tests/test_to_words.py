"""A word-level model made of one that reads characters."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbert import EncoderConfig
from fastbert.data import Tokenizer
from fastbert.errors import CheckpointError, ConfigError, DataError, MissingFileError
from fastbert.models import from_pretrained, model_class
from fastbert.train.words import to_words

# Not in the order of the new vocabulary, with tokens that no text can give; "ab" is one token, "北" none.
TOKENS = [
    "[UNK]",
    "[unused1]",
    "[PAD]",
    "[MASK]",
    "[CLS]",
    "[SEP]",
    "中",
    "##中",
    "国",
    "人",
    "ab",
    "##c",
    "。",
    "中国",
]
WORDS = ["中国", "国人", "北京人", "AbC", "ab", "人"]
FAMILIES = ["bert", "nezha", "albert", "electra", "roformer"]


SIZES = dict(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32
)


def folder_of(path, model_type="bert", rows=16, **fields):
    torch.manual_seed(0)
    fields = {"vocab_size": rows, "pad_token_id": 2} | fields
    model = model_class(model_type)(EncoderConfig(model_type, **SIZES, **fields))
    torch.nn.init.normal_(model.head.bias)
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(TOKENS), encoding="utf-8")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return path


@pytest.mark.parametrize("model_type", FAMILIES)
def test_kept_rows_are_copied_and_new_words_are_the_mean_of_their_characters(tmp_path, model_type):
    folder = folder_of(tmp_path / "old", model_type)
    tokenizer = to_words(folder, tmp_path / "new", words=WORDS)
    old, new = from_pretrained(folder), from_pretrained(tmp_path / "new")
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.vocab_size)]
    kept = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "国", "人", "ab", "##c", "。"]
    assert tokens == [*kept, "中国", "国人", "北京人", "abc"]
    assert type(new) is type(old) and new.config.vocab_size == 16 and new.config.pad_token_id == 0
    parts = {"中国": ["中", "国"], "国人": ["国", "人"], "北京人": ["[UNK]", "[UNK]", "人"], "abc": ["ab", "##c"]}
    for before, after in (
        (old.model.embeddings.word.weight, new.model.embeddings.word.weight),
        (old.head.bias, new.head.bias),
    ):
        row = {token: before[index] for index, token in enumerate(TOKENS)}
        for index, token in enumerate(tokens):
            expected = torch.stack([row[part] for part in parts[token]]).mean(0) if token in parts else row[token]
            torch.testing.assert_close(after[index], expected, rtol=0, atol=1e-6 if token in parts else 0)
        torch.testing.assert_close(after[15], torch.stack([row[token] for token in kept]).mean(0))
    untouched = dict(new.named_parameters())
    for name, parameter in old.named_parameters():
        if name not in ("model.embeddings.word.weight", "head.bias"):
            assert torch.equal(parameter, untouched[name]), name
    assert Tokenizer.from_pretrained(tmp_path / "new").fingerprint == tokenizer.fingerprint
    assert new(torch.tensor([tokenizer.encode("中国人ABC")])).logits.shape == (1, 5, 16)


def test_every_tensor_of_the_folder_comes_along(tmp_path):
    """Those that no class of ours has too; a decoder and a bias of their own change like the tied ones."""
    folder = folder_of(tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
        "cls.seq_relationship.weight": torch.randn(2, 8),
        "bert.pooler.dense.weight": torch.randn(16, 16),
    }
    tensors["bert.embeddings.word_embeddings.weight"][[6, 8], 0] = 60000.0  # too large to add up in half precision
    save_file({name: tensor.half().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tokenizer_class": "BertTokenizer", "own": [1]}
    (folder / "config.json").write_text(json.dumps(config))
    to_words(folder, tmp_path / "new", words=WORDS, pad_to_multiple_of=1)
    new = load_file(tmp_path / "new" / "model.safetensors")
    assert set(new) == set(tensors) and {tensor.dtype for tensor in new.values()} == {torch.float16}
    assert torch.equal(new["cls.predictions.decoder.weight"], new["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(new["cls.predictions.decoder.bias"], new["cls.predictions.bias"])
    assert new["cls.predictions.bias"].shape == (15,)
    assert new["bert.embeddings.word_embeddings.weight"][11, 0] == 60000
    for name in ("cls.seq_relationship.weight", "bert.pooler.dense.weight"):
        assert torch.equal(new[name], tensors[name].half())
    after = json.loads((tmp_path / "new" / "config.json").read_text())
    changes = {"vocab_size": 15, "pad_token_id": 0, "tokenizer_class": "RoFormerTokenizer"}
    assert after == config | changes


def test_words_may_stand_in_a_file(tmp_path):
    (tmp_path / "words.txt").write_bytes("\ufeff中国\r\n\n 国人 \n".encode())
    tokenizer = to_words(folder_of(tmp_path / "old"), tmp_path / "new", words=tmp_path / "words.txt")
    assert [tokenizer.id_to_token(index) for index in (11, 12)] == ["中国", "国人"]
    (tmp_path / "words.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="words.txt: invalid UTF-8 at byte offset 0"):
        to_words(tmp_path / "old", tmp_path / "other", words=str(tmp_path / "words.txt"))
    with pytest.raises(MissingFileError, match="absent.txt does not exist"):
        to_words(tmp_path / "old", tmp_path / "other", words=tmp_path / "absent.txt")


def test_transformers_reads_the_result(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = to_words(folder_of(tmp_path / "old"), tmp_path / "new", words=WORDS)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")("中国人 AbC。")["input_ids"]
    assert ids == tokenizer.encode("中国人 AbC。")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "new", attn_implementation="eager").eval()
    ours = from_pretrained(tmp_path / "new")
    with torch.no_grad():
        torch.testing.assert_close(ours(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits)


def test_nothing_is_written_where_it_cannot_be_done(tmp_path):
    folder = folder_of(tmp_path / "old")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(DataError, match="full exists already"):
        to_words(folder, full, words=WORDS)
    with pytest.raises(ConfigError, match="pad_to_multiple_of is 0"):
        to_words(folder, tmp_path / "new", words=WORDS, pad_to_multiple_of=0)
    with pytest.raises(DataError, match="the word 'a b'"):
        to_words(folder, tmp_path / "new", words=["a b"])
    with pytest.raises(CheckpointError, match="word_embeddings.weight has 13 rows, expected one for each of 14 tokens"):
        to_words(folder_of(tmp_path / "short", rows=13), tmp_path / "new", words=WORDS)
    with pytest.raises(ConfigError, match="pad_token_id is 2, expected 0: RoBERTa's positions"):
        to_words(folder_of(tmp_path / "roberta", "roberta"), tmp_path / "new", words=WORDS)
    with pytest.raises(MissingFileError, match="absent"):
        to_words(tmp_path / "absent", tmp_path / "new", words=WORDS)
    to_words(folder, tmp_path / "words", words=WORDS)
    with pytest.raises(ConfigError, match="level 'word', expected 'char'"):
        to_words(tmp_path / "words", tmp_path / "new", words=WORDS)
    assert not (tmp_path / "new").exists() and [path.name for path in full.iterdir()] == ["mine"]
