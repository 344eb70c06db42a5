"""What `prepare` refuses: input that is no text, arguments that make no sense, folders that it must not replace."""

import os

import numpy as np
import pytest

from fastbert.data import Corpus, Tokenizer, pack, prepare
from fastbert.errors import ConfigError, DataError, MissingFileError


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("中国 人民 银行\n发布 报告\n\n新年 讲话\n\nhello worlds 在 北京\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(text_file):
    return Tokenizer.train(text_file, 100, min_frequency=1, progress=False)


@pytest.fixture
def folder(text_file, tokenizer, tmp_path):
    prepare(text_file, tokenizer, tmp_path / "corpus", validation_fraction=0.4, progress=False)
    return tmp_path / "corpus"


def test_invalid_utf8_names_file_offset_and_line_before_any_work(tokenizer, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes("\ufeff中国\n".encode() + b"abc\n" + b"xy\xe4\xb8 z\n")
    with pytest.raises(
        DataError, match=r"bad.txt: invalid UTF-8 at byte offset 16 \(line 3\): e4 b8; errors='replace'"
    ):
        prepare(path, tokenizer, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["bad.txt"]


def test_files_that_are_none(tokenizer, tmp_path):
    with pytest.raises(MissingFileError, match="absent.txt"):
        prepare(tmp_path / "absent.txt", tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="is a folder, expected a text file"):
        prepare([tmp_path], tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="no input file"):
        prepare([], tokenizer, tmp_path / "out")


def test_a_file_given_twice_is_refused_however_it_is_spelt(text_file, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    (tmp_path / "link.txt").symlink_to(text_file)
    for again in (text_file, "corpus.txt", f"../{text_file.parent.name}/corpus.txt", tmp_path / "link.txt"):
        with pytest.raises(DataError, match=rf"{again} is given twice \(first as {text_file}\)"):
            prepare([text_file, again], tokenizer, tmp_path / "out")
        with pytest.raises(DataError, match="is given twice"):
            Tokenizer.train([text_file, again], 100)


@pytest.mark.parametrize("content", ["", "\n \n\u3000\n", "\u200b\n"])
def test_an_empty_corpus_is_an_error(tokenizer, tmp_path, content):
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(DataError, match="empty|nothing is left"):
        prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["t.txt"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"words": "hanlp"}, "words is 'hanlp', expected one of 'none', 'segmented', 'rjieba'"),
        ({"words": 3}, "words is 3, expected one of .*'package.module:function' or a function"),
        ({"words": "no.such_module:cut"}, "words is 'no.such_module:cut', which cannot be imported: No module"),
        ({"words": "json:cut"}, "words is 'json:cut', which cannot be imported"),
        ({"words": "json:__name__"}, "words is 'json:__name__', a str, expected a function"),
        ({"words": "ltp"}, "segmenter_model is None, expected the folder of an LTP model"),
        ({"words": "rjieba", "segmenter_model": "x"}, "segmenter_model is 'x', expected None with words='rjieba'"),
        ({"processes": 0}, "processes is 0, expected None or an integer of at least 1"),
        ({"unit_bytes": 0}, "unit_bytes is 0, expected an integer of at least 1"),
        ({"errors": "ignore"}, "errors is 'ignore'"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"words": "none", "tag_separator": "/"}, "tag_separator is '/'"),
        ({"words": "segmented", "tag_separator": ""}, "tag_separator is ''"),
        ({"words": "segmented", "tag_separator": 3}, "tag_separator is 3, expected None .* a string"),
        ({"validation_fraction": "0.1"}, "validation_fraction is '0.1', expected a number"),
        ({"validation_fraction": True}, "validation_fraction is True, expected a number"),
        ({"shard_tokens": 1e6}, "shard_tokens is 1000000.0, expected an integer"),
        ({"tokenizer": None}, "tokenizer is None, expected a Tokenizer"),
        ({"tokenizer": "bert-base-chinese"}, "tokenizer is 'bert-base-chinese', expected a Tokenizer"),
        ({"files": 3}, "files is 3, expected a path"),
        ({"out": None}, "out is None, expected the path"),
    ],
)
def test_bad_arguments_are_named_before_the_text_is_read(
    text_file, tokenizer, tmp_path, monkeypatch, argument, message
):
    monkeypatch.setattr("fastbert.data.preparation.cut_units", None)
    with pytest.raises(ConfigError, match=message):
        prepare(**{"files": text_file, "tokenizer": tokenizer, "out": tmp_path / "out"} | argument)


def test_numbers_of_numpy_are_numbers(text_file, tokenizer, tmp_path):
    fraction, size = np.float32(0.5), np.int64(20)
    prepare(text_file, tokenizer, tmp_path / "out", validation_fraction=fraction, shard_tokens=size, progress=False)
    assert len(pack(Corpus.open(tmp_path / "out"), np.int32(16)))


def test_the_current_folder_is_not_replaced(folder, text_file, tokenizer, monkeypatch):
    monkeypatch.chdir(folder / "tokenizer")
    for out in (folder, ".."):
        with pytest.raises(DataError, match="holds the current folder"):
            prepare(text_file, tokenizer, out, overwrite=True)
    with pytest.raises(DataError, match="is not a corpus folder"):
        prepare(text_file, tokenizer, ".", overwrite=True)
    prepare(text_file, tokenizer, "new/..//./new", progress=False)
    assert Corpus.open(folder / "tokenizer" / "new").tokens


def test_a_link_to_a_corpus_stays_a_link(folder, text_file, tokenizer, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    prepare(text_file, tokenizer, tmp_path / "link", overwrite=True, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["corpus", "link"] and (tmp_path / "link").is_symlink()
    assert Corpus.open(folder).manifest["splits"].keys() == {"train"}


def test_an_existing_folder_is_replaced_only_on_demand_and_only_if_it_is_a_corpus(folder, text_file, tokenizer):
    with pytest.raises(DataError, match="exists already; overwrite=True"):
        prepare(text_file, tokenizer, folder)
    assert prepare(text_file, tokenizer, folder, overwrite=True, progress=False).splits.keys() == {"train"}
    assert not (folder / "validation-00000.arrow").exists() and os.listdir(folder.parent) == ["corpus"]
    precious = folder.parent / "precious"
    precious.mkdir()
    with pytest.raises(DataError, match="is not a corpus folder"):
        prepare(text_file, tokenizer, precious, overwrite=True)
