"""Tokenizers: training, the transformers layout, words aligned with pieces."""

import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import Tokenizer
from fastbert.data.text import CJK
from fastbert.errors import ConfigError, DataError, MissingFileError

TEXT = """\
中国 人民 银行 在 北京 发布 了 １９９８年 的 报告 。
Hello world , hello 世界 ! 3.14 and 1998 are numbers ; worlds and worldly words .
江 泽民 主席 在 新年 讲话 中 说 ： “ 中国 人民 万岁 ” 。
café naïve résumé café 😀 😀 emoji ＡＢＣ ＡＢＣ
中国 人民 在 北京 说 hello 😀 世界 报告 新年 讲话 主席 银行 发布 的 了 。
"""
# Han, Latin, digits, full width, accents composed and not, emoji and joiners, spaces of all widths, controls, rarities.
ALPHABET = (
    "中国人民银行的。，“”《 \t\u3000\u200b\u200d\u00ad\x00\x1c\ufeff"
    "abcXYZ019.,!#-_'éün\u0303\u0301ＡＢ１２％😀👍🏽𠀀豈々ー한ñß\u2028"
)
MIXED = st.text(st.sampled_from(ALPHABET) | st.characters(codec="utf-8"), max_size=12)


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["char", "wordpiece"])
def tokenizer(request, corpus_file):
    return Tokenizer.train(corpus_file, 300, request.param, progress=False)


@pytest.fixture(scope="module")
def char(corpus_file):
    return Tokenizer.train(corpus_file, 300, progress=False)


def texts(tokenizer, ids):
    return [tokenizer.id_to_token(int(i)) for i in ids]


def test_char_level_keeps_chinese_characters_apart_and_joins_latin(char):
    assert texts(char, char.encode("中国hello世界。", add_special_tokens=False)) == [
        "中",
        "国",
        "hello",
        "世",
        "界",
        "。",
    ]


def test_wordpiece_level_learns_pieces_of_several_characters(corpus_file):
    tokenizer = Tokenizer.train(corpus_file, 300, "wordpiece", progress=False)
    assert texts(tokenizer, tokenizer.encode_words(["人民", "银行"])[0]) == ["人民", "银行"]


def test_special_tokens_come_first_and_frame_a_text(char):
    assert (
        (char.pad_id, char.unk_id, char.cls_id, char.sep_id, char.mask_id) == (0, 1, 2, 3, 4) == tuple(char.special_ids)
    )
    ids = char.encode("中[MASK]国")
    assert texts(char, ids) == ["[CLS]", "中", "[MASK]", "国", "[SEP]"]
    assert char.encode_batch(["中[MASK]国", ""]) == [ids, [2, 3]]


@pytest.mark.parametrize("size", [6, 20, 60, 150])
def test_vocabulary_never_exceeds_the_size_asked_for(corpus_file, size):
    assert Tokenizer.train(corpus_file, size, progress=False).vocab_size <= size


def test_small_vocabularies_keep_the_most_frequent_characters(tmp_path):
    (tmp_path / "t.txt").write_text("甲甲甲甲乙乙乙丙丙丁")
    assert texts(tokenizer := Tokenizer.train(tmp_path / "t.txt", 7, progress=False), range(5, 7)) == ["甲", "乙"]
    assert tokenizer.encode("丁", add_special_tokens=False) == [tokenizer.unk_id]


def test_training_repeats_itself(corpus_file, tokenizer):
    level = "char" if "中国" not in texts(tokenizer, range(tokenizer.vocab_size)) else "wordpiece"
    assert Tokenizer.train(corpus_file, 300, level, progress=False).fingerprint == tokenizer.fingerprint


def test_lowercase_and_accents_are_options(corpus_file):
    cased = Tokenizer.train(corpus_file, 300, lowercase=False, progress=False)
    assert cased.encode("hello") != cased.encode("Hello")
    uncased = Tokenizer.train(corpus_file, 300, progress=False)
    assert uncased.encode("café") == uncased.encode("CAFE\u0301")


def test_decode_restores_chinese_and_spaces_latin(char):
    text = "中国人民说hello world。"
    assert char.decode(char.encode(text)) == text
    assert char.decode(char.encode("中[MASK]"), skip_special_tokens=False) == "[CLS]中[MASK][SEP]"


def test_ids_outside_the_vocabulary_are_refused(char):
    for index in (-1, char.vocab_size):
        with pytest.raises(DataError, match=f"{index} is outside of the vocabulary of {char.vocab_size}"):
            char.decode([index])


# words and pieces


@given(words=st.lists(MIXED, max_size=8))
def test_words_and_pieces_align(char, words):
    """The pieces of a row of words are the pieces of each word in turn, and the flags tell them apart."""
    ids, starts = char.encode_words(words)
    alone = [list(char.encode_words([word])[0]) for word in words]
    assert list(ids) == [i for pieces in alone for i in pieces]
    assert ids.dtype == np.int32 and starts.dtype == np.uint8 and len(ids) == len(starts)
    assert [len(run) for run in np.split(ids, np.flatnonzero(starts))[1:]] == [
        len(pieces) for pieces in alone if pieces
    ]


@given(words=st.lists(MIXED, max_size=8))
def test_words_encode_as_the_pretokenized_input_of_tokenizers(tokenizer, words):
    backend = tokenizer._backend
    backend.encode_special_tokens = True
    try:
        expected = backend.encode(words, is_pretokenized=True, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = False
    ids, starts = tokenizer.encode_words(words)
    assert list(ids) == expected.ids
    assert list(starts) == [int(i == 0 or a != expected.word_ids[i - 1]) for i, a in enumerate(expected.word_ids)]


@given(text=st.text(st.sampled_from(ALPHABET) | st.characters(codec="utf-8", exclude_characters="\n"), max_size=30))
def test_runs_encode_as_the_whole_text(char, text):
    """words="none" cuts a row into runs first; the ids must not notice. A word begins at every piece but ## ones."""
    encoded = char.encode_rows([char.cut(text)], whole=False)
    assert list(encoded.ids) == char.encode(text, add_special_tokens=False)
    assert list(encoded.word_start) == [not token.startswith("##") for token in texts(char, encoded.ids)]


def test_continuing_chinese_pieces_are_words_of_their_own_without_a_segmentation(corpus_file):
    tokenizer = Tokenizer.train(corpus_file, 300, "wordpiece", progress=False)
    encoded = tokenizer.encode_rows([["worldly人"]], whole=False)
    for token, start in zip(texts(tokenizer, encoded.ids), encoded.word_start, strict=True):
        assert start == (not token.startswith("##") or token[2] in "人")


def test_rows_keep_their_lengths_and_count_vanished_words(char):
    rows = [["中国", "人"], [], ["\u200b"], ["hello", "\u200b", "世界"]]
    encoded = char.encode_rows(rows)
    assert list(encoded.lengths) == [3, 0, 0, 3]
    assert list(encoded.vanished) == [0, 0, 1, 1]


def test_names_of_special_tokens_in_a_corpus_are_text(char):
    ids, _ = char.encode_words(["[MASK]", "[SEP]", "[CLS]"])
    assert not set(ids.tolist()) & {char.mask_id, char.sep_id, char.cls_id}


def test_the_table_of_known_words_is_bounded(char, monkeypatch):
    monkeypatch.setattr("fastbert.data.pieces.MAX_UNITS", 3)
    fresh = pickle.loads(pickle.dumps(char))
    rows = [["中国"], ["人民", "hello"], ["银行", "北京"], ["中国", "说"]]
    for row in rows:
        assert list(fresh.encode_words(row)[0]) == list(char.encode_words(row)[0])
        assert len(fresh._table._index) <= 3


# files


def test_saving_and_loading_keeps_everything(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "vocab.txt", "tokenizer_config.json"}
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == tokenizer.fingerprint
    (tmp_path / "tokenizer.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == tokenizer.fingerprint


def test_transformers_loads_it_with_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path / "ours")
    for cls in (transformers.AutoTokenizer, transformers.BertTokenizerFast):
        theirs = cls.from_pretrained(tmp_path / "ours")
        for text in [*TEXT.splitlines(), "Ｈello\u3000中[MASK]国", "caf\u00e9 e\u0301 😀\u200b𠀀"]:
            assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.mask_token_id == tokenizer.mask_id and len(theirs) == tokenizer.vocab_size
        theirs.save_pretrained(tmp_path / cls.__name__)
        assert Tokenizer.from_pretrained(tmp_path / cls.__name__).fingerprint == tokenizer.fingerprint


def test_a_folder_with_vocab_txt_alone_is_uncased_chinese_bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n中\n国\nab\n##c\n", encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("中国ABC") == [2, 5, 6, 7, 8, 3]


def test_options_of_the_config_win_over_tokenizer_json(char, tmp_path):
    char.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": False}))
    cased = Tokenizer.from_pretrained(tmp_path)
    assert cased.fingerprint != char.fingerprint
    assert cased.encode("Hello") != char.encode("Hello")


def test_truncation_and_padding_of_a_loaded_tokenizer_are_switched_off(char, tmp_path):
    char.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.encode("中国人民银行") == char.encode("中国人民银行")
    assert loaded.fingerprint == char.fingerprint


def _encode(job):
    tokenizer, text = job
    return tokenizer.fingerprint, tokenizer.encode(text)


def test_it_works_in_a_spawned_worker(char):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_encode, (char, "中国hello")).result() == (char.fingerprint, char.encode("中国hello"))


# what users get wrong


def test_bad_arguments_name_what_was_expected(corpus_file, tmp_path):
    with pytest.raises(ConfigError, match="'syllable', expected one of 'char', 'wordpiece'"):
        Tokenizer.train(corpus_file, 100, "syllable")
    for size in (5, "100", 100.0, None):
        with pytest.raises(ConfigError, match=f"vocab_size is {size!r}, expected an integer, more than the 5 special"):
            Tokenizer.train(corpus_file, size)
    with pytest.raises(ConfigError, match="min_frequency is '2', expected an integer"):
        Tokenizer.train(corpus_file, 100, min_frequency="2")
    with pytest.raises(MissingFileError, match="nowhere.txt"):
        Tokenizer.train(tmp_path / "nowhere.txt", 100)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="empty.txt"):
        Tokenizer.train(tmp_path / "empty.txt", 100, progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ab", "the text b'ab' is a bytes, expected a str"),
        (("a", "b"), r"the text \('a', 'b'\) is a tuple, expected a str"),
        ("x\ud800abc", r"the text 'x\\ud800abc' has the lone surrogate '\\ud800' at index 1, expected Unicode"),
    ],
)
def test_what_is_no_text_is_refused(char, text, message):
    for encode in (char.encode, lambda text: char.encode_batch(["a", text]), lambda text: char.encode_words([text])):
        with pytest.raises(DataError, match=message):
            encode(text)


VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n中\n国\n词\n语\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"词语": 9}),
        ("added_tokens.json", {"中": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "[PAD]"}, "9": {"content": "词语"}}}),
    ],
)
def test_added_tokens_without_a_tokenizer_json_are_refused_by_name(tmp_path, name, content):
    """As the slow tokenizers of older transformers save them."""
    (tmp_path / "vocab.txt").write_text(VOCABULARY, encoding="utf-8")
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=f"{name}.* adds the tokens '(词语|中)', .*expected them in .*tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_added_tokens_of_a_tokenizer_json_are_taken(tmp_path):
    (tmp_path / "vocab.txt").write_text(VOCABULARY, encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    tokenizer._backend.add_tokens(["词语"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 0, "词语": 9}), encoding="utf-8")
    assert Tokenizer.from_pretrained(tmp_path).encode("中词语国") == [2, 5, 9, 6, 3]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"词语": 10}), encoding="utf-8")
    with pytest.raises(DataError, match="adds the tokens '词语'"):
        Tokenizer.from_pretrained(tmp_path)


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="absent"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(MissingFileError, match="neither tokenizer.json nor vocab.txt"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n\xe4\xb8\n", "byte offset 24"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nx\n", r"no mask_token '\[MASK\]'"),
        (
            "vocab.txt",
            b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nx\ny\nx\n",
            "vocab.txt:6: the token 'x' stands again on line 8",
        ),
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"[]", "expected an object"),
        (
            "tokenizer.json",
            b'{"model": {"type": "WordLevel"}}',
            "the model is 'WordLevel', expected one of 'WordPiece'",
        ),
        ("tokenizer_config.json", b'{"mask_token": 3}', "mask_token is 3"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": ["x"]}',
            r"added_tokens_decoder is \['x'\], expected tokens",
        ),
        ("tokenizer_config.json", b'{"do_lower_case": "yes"}', "do_lower_case is 'yes'"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / "vocab.txt").write_text(VOCABULARY, encoding="utf-8")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.from_pretrained(tmp_path)


@given(data=st.data())
def test_mutated_tokenizer_files_raise_typed_errors(char, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mutated")
    char.save_pretrained(folder)
    path = folder / data.draw(st.sampled_from(["tokenizer.json", "vocab.txt", "tokenizer_config.json"]))
    if path.name == "vocab.txt":
        (folder / "tokenizer.json").unlink()
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        Tokenizer.from_pretrained(folder).encode("中国hello")
    except (DataError, MissingFileError):
        pass


def test_cjk_ranges_are_those_of_the_normaliser():
    import re

    from tokenizers.normalizers import BertNormalizer

    normalizer = BertNormalizer(clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False)
    ours = re.compile(f"[{CJK}]")
    for code in [*range(0x2E80, 0xA000), *range(0xF800, 0xFB00), *range(0x1FFF0, 0x30000, 7)]:
        assert bool(ours.match(chr(code))) == (normalizer.normalize_str(chr(code)) == f" {chr(code)} ")
