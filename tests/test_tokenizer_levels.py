"""Tokenizers of the levels beside BERT's: RoBERTa's bytes, ALBERT's SentencePiece, WoBERT's words."""

import base64
import json
import pickle
import struct
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fastbert.data import LEVELS, Tokenizer, frequent_words
from fastbert.data.text import CJK
from fastbert.errors import ConfigError, DataError, MissingDependencyError, MissingFileError

TEXT = """\
中国人民银行在北京发布了１９９８年的报告。
Hello world, hello 世界! 3.14 and 1998 are numbers; worlds and worldly words don't end.
江泽民主席在新年讲话中说：“中国人民万岁”。
café naïve résumé café 😀 😀 emoji ＡＢＣ ＡＢＣ ``quoted'' words, the end of the words.
中国人民在北京说 hello 😀 世界报告新年讲话主席银行发布的了。
"""
ALPHABET = (
    "中国人民银行的。，“”《 \t\u3000\u200b\u200d\u00ad\x00\x0b\x1c\x85\xa0\ufeff▁Ġ"
    "abcXYZ019.,!#-_'`éün\u0303\u0301\u00b4ＡＢ１２％😀👍🏽𠀀豈々ー한ñß\u2028\u2581"
)
LINE = st.text(st.sampled_from(ALPHABET) | st.characters(codec="utf-8"), max_size=30)
# Computed before there were levels beside these two: corpora on disk hold them.
PINNED = {
    "char": "4d17cd9aca48b36d44ce578ddc81be58025e79ee577b386cb81a7361ec83cfbd",
    "wordpiece": "1edb5b11f9d376f14ccd7a9ef3a08b712e5f60e2955635d744e9776c810757d3",
}


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(corpus_file):
    sizes = {"bpe": 400, "unigram": 260, "word": 330}
    return {level: Tokenizer.train(corpus_file, sizes.get(level, 300), level, progress=False) for level in LEVELS}


@pytest.fixture(params=LEVELS)
def tokenizer(request, trained):
    return trained[request.param]


@pytest.fixture(params=["bpe", "unigram", "word"])
def new(request, trained):
    return trained[request.param]


def texts(tokenizer, ids):
    return [tokenizer.id_to_token(int(i)) for i in ids]


def pieces(tokenizer, text):
    return texts(tokenizer, tokenizer.encode(text, add_special_tokens=False))


def test_fingerprints_of_old_corpora_still_hold(tmp_path):
    from test_tokenizer import TEXT as OLD

    (tmp_path / "corpus.txt").write_text(OLD * 3, encoding="utf-8")
    for level, fingerprint in PINNED.items():
        assert Tokenizer.train(tmp_path / "corpus.txt", 300, level, progress=False).fingerprint == fingerprint


# what each level is


def test_special_tokens_stand_where_their_authors_put_them(trained):
    bpe, unigram, word = (trained[level] for level in ("bpe", "unigram", "word"))
    assert texts(bpe, [0, 1, 2, 3, bpe.vocab_size - 1]) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert (bpe.cls_id, bpe.pad_id, bpe.sep_id, bpe.unk_id, bpe.mask_id) == (0, 1, 2, 3, bpe.vocab_size - 1)
    assert texts(unigram, range(5)) == ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    assert (unigram.pad_id, unigram.unk_id, unigram.cls_id, unigram.sep_id, unigram.mask_id) == (0, 1, 2, 3, 4)
    assert texts(word, range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_special_tokens_frame_a_text_and_are_found_in_it(tokenizer):
    mask = tokenizer.special_tokens["mask_token"]
    ids = tokenizer.encode(f"中国{mask}人")
    assert (ids[0], ids[-1], ids.count(tokenizer.mask_id)) == (tokenizer.cls_id, tokenizer.sep_id, 1)
    assert tokenizer.encode_batch([f"中国{mask}人", ""]) == [ids, [tokenizer.cls_id, tokenizer.sep_id]]


def test_names_of_special_tokens_in_a_corpus_are_text(tokenizer):
    names = [*tokenizer.special_tokens.values(), "##a"]
    ids, _ = tokenizer.encode_words([*names, *(" " + name for name in names)])
    assert not set(ids.tolist()) & set(tokenizer.special_ids) - {tokenizer.unk_id}


def test_tokens_that_are_no_words_are_not_looked_up(tmp_path):
    """Neither special tokens, which a cased normaliser leaves as they are, nor continuations."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nab\n##c\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RoFormerTokenizer", "do_lower_case": false}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert texts(tokenizer, tokenizer.encode_words(["ab", "[MASK]", "##c", "abc"])[0]) == [
        *["ab", "[UNK]", "[UNK]", "[UNK]", "[UNK]", "[UNK]", "[UNK]", "ab", "##c"]
    ]
    tokenizer._backend.add_special_tokens(["[MASK]ed"])
    longer = Tokenizer(tokenizer._backend, level="word")
    assert texts(longer, longer.encode("ab[MASK]ed[MASK]")) == ["[CLS]", "ab", "[MASK]ed", "[MASK]", "[SEP]"]


def test_the_mask_takes_in_the_space_before_it(trained):
    bpe, unigram = trained["bpe"], trained["unigram"]
    assert bpe.encode("hello <mask> hello") == bpe.encode("hello<mask> hello")
    assert unigram.encode("hello [MASK] hello") == unigram.encode("hello[MASK] hello")


def test_fingerprints_tell_apart_what_gives_other_ids(trained, tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, score in zip(folders, (-1.0, -2.0), strict=True):
        folder.mkdir()
        _unigram_folder(folder, [["▁a", score], ["▁", -1.0], ["a", -0.5]])
    first, second = map(Tokenizer.from_pretrained, folders)
    assert first.fingerprint != second.fingerprint and first.encode("a") != second.encode("a")
    trained["word"].save_pretrained(tmp_path)
    config = {"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    wordpiece = Tokenizer.from_pretrained(tmp_path)
    assert wordpiece.level == "wordpiece" and wordpiece.fingerprint != trained["word"].fingerprint


def test_ordinary_ids_are_all_that_are_not_special(tokenizer):
    assert tokenizer.ordinary_ids.dtype == np.int64
    assert sorted([*tokenizer.ordinary_ids, *tokenizer.special_ids]) == list(range(tokenizer.vocab_size))
    assert tokenizer.level in LEVELS and len(tokenizer.special_ids) == 5


def test_bytes_keep_every_character_and_the_spaces(trained):
    bpe = trained["bpe"]
    assert pieces(bpe, "Hello hello") == ["He", "llo", "Ġhello"]
    for text in ("Hello  world\t中国 é e\u0301 😀\x00 𠀀", " a"):
        assert bpe.decode(bpe.encode(text)) == text


def test_unigram_normalises_as_albert(trained):
    unigram = trained["unigram"]
    assert pieces(unigram, "``Ｗords''") == pieces(unigram, '"words"') != pieces(unigram, "'words'")
    assert unigram.encode("CAFÉ  words") == unigram.encode(" cafe\u0301 words ")
    assert unigram.decode(unigram.encode("the end  of Words")) == "the end of words"


def test_words_of_the_vocabulary_are_one_token_and_others_are_encoded_as_by_bert(trained):
    word = trained["word"]
    assert pieces(word, "中国人民银行在北京") == ["中国人民银行", "在", "北京"]
    assert pieces(word, "Hello。新年3.14") == ["hello", "。", "新年", "3", ".", "14"]
    assert texts(word, word.encode_words(["新年", "新年讲", "3.14", "１４"])[0]) == [
        *["新年", "新", "年", "讲", "3", ".", "14", "[UNK]"]
    ]


def test_a_word_level_vocabulary_has_characters_then_the_most_frequent_words(trained, corpus_file):
    tokens = texts(trained["word"], range(trained["word"].vocab_size))
    words = [token for token in tokens if len(token) > 1 and token[0] in "中国人民北京新年世界"]
    frequent = frequent_words(corpus_file, 1000, progress=False)
    assert words and words == [token for token in frequent if token in words]
    assert {"中", "京", "##o"} <= set(tokens) and len(tokens) <= 330
    assert frequent_words(corpus_file, 3, progress=False) == frequent[:3]
    assert frequent_words(corpus_file, 1000, min_frequency=13, progress=False) == []


def test_words_are_ordered_by_how_often_they_occur(tmp_path):
    (tmp_path / "t.txt").write_text("丙丁 甲乙 甲乙 戊己 甲乙 丙丁 戊己 庚辛 甲 hello hello", encoding="utf-8")
    found = frequent_words(tmp_path / "t.txt", 9, words="segmented", progress=False)
    assert found == ["甲乙", "丙丁", "戊己"]  # equally frequent ones by their characters


def test_characters_come_before_words_where_room_is_scarce(trained, corpus_file):
    small = Tokenizer.train(corpus_file, 150, "word", progress=False)
    tokens = set(texts(small, range(150)))
    characters = {token for token in texts(trained["char"], range(159)) if len(token.removeprefix("##")) == 1}
    assert len(characters) > 75 and characters <= tokens and "中国" in tokens


def test_words_may_come_from_a_segmented_text(tmp_path):
    (tmp_path / "t.txt").write_text("甲乙/n 丙丁戊/v ，/w hello/nx\n" * 3, encoding="utf-8")
    tokenizer = Tokenizer.train(tmp_path / "t.txt", 60, "word", words="segmented", tag_separator="/", progress=False)
    tokens = texts(tokenizer, range(tokenizer.vocab_size))
    assert {"甲乙", "丙丁戊", "，", "甲", "hello"} <= set(tokens)
    assert "/" not in tokens and "x" not in tokens


@pytest.mark.parametrize(
    ("level", "size"), [("bpe", 262), ("bpe", 300), ("unigram", 8), ("unigram", 40), ("unigram", 41), ("word", 40)]
)
def test_vocabularies_never_exceed_the_size_asked_for(corpus_file, level, size):
    tokenizer = Tokenizer.train(corpus_file, size, level, progress=False)
    assert tokenizer.vocab_size <= size
    assert len(tokenizer.encode(TEXT)) > 2


def test_training_repeats_itself(trained, corpus_file):
    for level, size in (("bpe", 400), ("word", 330)):
        assert Tokenizer.train(corpus_file, size, level, progress=False).fingerprint == trained[level].fingerprint
    again, first = Tokenizer.train(corpus_file, 260, "unigram", progress=False), trained["unigram"]
    assert set(texts(again, range(again.vocab_size))) == set(texts(first, range(first.vocab_size)))


def test_options_that_a_level_lacks_are_refused(corpus_file, tmp_path):
    for arguments, message in (
        ((261, "bpe"), "vocab_size is 261, expected an integer of at least 262"),
        ((7, "unigram"), "vocab_size is 7, expected an integer of at least 8"),
        ((300, "syllable"), "'syllable', expected one of 'char', 'wordpiece', 'bpe', 'unigram', 'word'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Tokenizer.train(corpus_file, *arguments)
    for options, message in (
        (dict(level="bpe", lowercase=True), "lowercase is True, expected None or False at level 'bpe'"),
        (dict(level="char", words="rjieba"), "words is 'rjieba' .*expected one of .* at level 'char'"),
        (dict(level="word", words="none"), "words is 'none' .*expected one of .* at level 'word'"),
        (dict(level="bpe", tag_separator="/"), "tag_separator '/', expected .* only with 'segmented'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Tokenizer.train(corpus_file, 300, **options)
    (tmp_path / "empty.txt").write_text("\x01\n")
    for level in ("unigram", "word"):
        with pytest.raises(DataError, match="nothing to train a tokenizer on.*empty.txt"):
            Tokenizer.train(tmp_path / "empty.txt", 300, level, progress=False)


def test_a_cased_unigram_keeps_case_and_accents(corpus_file, tmp_path):
    cased = Tokenizer.train(corpus_file, 260, "unigram", lowercase=False, strip_accents=False, progress=False)
    assert cased.encode("Hello") != cased.encode("hello") and cased.encode("café") != cased.encode("cafe")
    cased.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == cased.fingerprint


# words inside text


@settings(deadline=None, max_examples=150)
@given(text=LINE)
@example("the \u2581the \u2581\u2581 ")
@example("\u00b4the\u00b4 end\u00b4")
def test_a_text_cut_into_units_has_the_ids_of_the_text(trained, text):
    assume(not any(name in text for tokenizer in trained.values() for name in tokenizer.special_tokens.values()))
    for tokenizer in trained.values():
        encoded = tokenizer.encode_rows([tokenizer.cut(text)], whole=False)
        assert list(encoded.ids) == tokenizer.encode(text, add_special_tokens=False), tokenizer.level


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.lists(st.text(st.sampled_from(ALPHABET), max_size=6), max_size=5), max_size=4))
def test_pieces_never_reach_over_a_word_border(trained, rows):
    for tokenizer in trained.values():
        encoded = tokenizer.encode_rows(rows)
        edges = np.cumsum(encoded.lengths)
        for row, ids, starts in zip(
            [*rows, []], np.split(encoded.ids, edges), np.split(encoded.word_start, edges), strict=True
        ):
            if row and tokenizer.level == "unigram":
                row = [" " + row[0], *row[1:]]
            alone = [tokenizer.encode_rows([["", word]]).ids.tolist() for word in row]
            assert list(ids) == [i for word in alone for i in word]
            assert list(starts) == [int(i == 0) for word in alone for i in range(len(word))]


def test_the_space_before_a_word_is_heeded_where_the_level_knows_it(trained):
    rows = [["hello", " hello", "hello"]]
    assert texts(trained["bpe"], trained["bpe"].encode_rows(rows).ids) == ["he", "llo", "Ġhello", "he", "llo"]
    unigram = texts(trained["unigram"], trained["unigram"].encode_rows([["中国", "the", " the"]]).ids)
    assert "".join(unigram) == "▁中国the▁the"
    for level in ("char", "wordpiece", "word"):
        first, second, third = np.split(trained[level].encode_rows(rows).ids, 3)
        assert list(first) == list(second) == list(third)


@pytest.mark.parametrize(
    ("level", "text", "expected"),
    [
        ("char", "中国 end", ["中", "国", "end"]),
        ("wordpiece", "中国 end，x\u3000y", ["中国", "end，x", "y"]),
        ("bpe", "中国  end\t", ["中国", "  end", "\t"]),
        ("unigram", "中国  end\tx ", ["中国", " end", " x"]),
        ("word", "北京 Hello,银行\x00", ["北京", "hello", ",", "银行"]),
    ],
)
def test_units_of_each_level(trained, level, text, expected):
    assert trained[level].cut(text) == expected


def _starts(tokenizer, units):
    encoded = tokenizer.encode_rows([units], whole=False)
    return list(zip(texts(tokenizer, encoded.ids), encoded.word_start.tolist(), strict=True))


def test_where_words_begin_by_alberts_rule(tmp_path):
    pieces = ["▁", "un", "▁un", "do", ".", "d.", "--", "'s", "9", "d9", "中", "国", "o中", "€", "<", "a"]
    vocab = [[piece, -1.0 if len(piece) > 1 else -9.0] for piece in pieces]
    folder = _unigram_folder(tmp_path, vocab)
    tokenizer = Tokenizer.from_pretrained(folder)
    expected = {
        " undo": [("▁un", 1), ("do", 0)],
        " un.": [("▁un", 1), (".", 1)],
        " und.": [("▁un", 1), ("d.", 0)],
        " un--": [("▁un", 1), ("--", 0)],
        " un's": [("▁un", 1), ("'s", 1)],
        " un9": [("▁un", 1), ("9", 1)],
        " und9": [("▁un", 1), ("d9", 1)],
        " un中国": [("▁un", 1), ("中", 1), ("国", 1)],
        " uno中": [("▁un", 1), ("o中", 1)],
        " un€<a": [("▁un", 1), ("€", 1), ("<", 1), ("a", 0)],
    }
    for unit, pieces in expected.items():
        assert _starts(tokenizer, [unit]) == pieces


def test_where_words_begin_in_bytes(trained):
    bpe = trained["bpe"]
    assert _starts(bpe, ["Hello", " hello,"]) == [("He", 1), ("llo", 0), ("Ġhello", 1), (",", 0)]
    text = "豈一丁龥"  # each of bytes of their own: none was learnt from
    flags = [flag for _, flag in _starts(bpe, [text])]
    assert sum(flags) == len(text) < len(flags)


def test_where_words_begin_by_berts_rule_at_word_level(trained):
    flags = _starts(trained["word"], ["worldliest", "银行"])
    assert flags[-1] == ("银行", 1) and flags[0][1] == 1 and {flag for token, flag in flags if token[:2] == "##"} == {0}


def test_rows_of_known_words_are_looked_up(new, monkeypatch):
    rows = [["Hello", " world", "中国"]] * 3
    first = new.encode_rows(rows)
    monkeypatch.setattr(new._table, "_encode", None)
    again = new.encode_rows(rows)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("limit", ["MAX_UNITS", "MAX_PIECES"])
def test_the_table_of_known_words_is_bounded(new, monkeypatch, limit):
    monkeypatch.setattr(f"fastbert.data.pieces.{limit}", 3)
    fresh = pickle.loads(pickle.dumps(new))
    for row in [["中国"], ["人民", "hello"], ["银行", "北京"], ["中国", "说"]]:
        assert list(fresh.encode_words(row)[0]) == list(new.encode_words(row)[0])
    assert len(fresh._table._index) <= 4  # of six: what was there before the last row, and that


# files


FILES = {
    "bpe": {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"},
    "unigram": {"tokenizer.json", "tokenizer_config.json"},
    "word": {"tokenizer.json", "vocab.txt", "tokenizer_config.json"},
}


def test_saving_and_loading_keeps_everything(new, tmp_path):
    new.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES[new.level]
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.fingerprint, loaded.level) == (new.fingerprint, new.level)
    assert pickle.loads(pickle.dumps(loaded)).fingerprint == new.fingerprint
    if new.level != "unigram":
        (tmp_path / "tokenizer.json").unlink()
        plain = Tokenizer.from_pretrained(tmp_path)
        assert (plain.fingerprint, plain.level) == (new.fingerprint, new.level)
        mask = new.special_tokens["mask_token"]
        assert plain.encode(f"中国 {mask} hello") == new.encode(f"中国 {mask} hello")


SAMPLES = [
    *TEXT.replace("3.14", "314").splitlines(),
    "Ｈello\u3000中国",
    "caf\u00e9 e\u0301 😀\u200b𠀀  \t two  spaces ",
    "",
    "它 MASK 国",
    "中国 MASK hello",
]


def test_transformers_loads_it_with_the_same_ids(new, tmp_path):
    transformers = pytest.importorskip("transformers")
    new.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    expected = {"bpe": "RobertaTokenizer", "unigram": "AlbertTokenizer", "word": "RoFormerTokenizer"}
    assert type(theirs).__name__ == expected[new.level]
    for text in SAMPLES:
        text = text.replace("MASK", new.special_tokens["mask_token"])
        assert theirs(text)["input_ids"] == new.encode(text), text
    assert theirs.mask_token_id == new.mask_id and len(theirs) == new.vocab_size
    theirs.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.from_pretrained(tmp_path / "theirs")
    assert (again.fingerprint, again.level) == (new.fingerprint, new.level)


def _encode(job):
    tokenizer, text = job
    return tokenizer.fingerprint, tokenizer.encode(text), tokenizer.encode_words(["中国", " hello"])[0].tolist()


def test_it_works_in_a_spawned_worker(trained):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for tokenizer in trained.values():
            tokenizer.encode_rows([tokenizer.cut("中国")])  # pickling leaves the table and rjieba behind
            assert pool.submit(_encode, (tokenizer, "中国hello")).result() == _encode((tokenizer, "中国hello"))


def test_a_prefix_space_is_an_option_of_bytes(trained, tmp_path):
    trained["bpe"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": True}))
    prefixed = Tokenizer.from_pretrained(tmp_path)
    assert prefixed.fingerprint != trained["bpe"].fingerprint
    assert prefixed.encode("hello") == trained["bpe"].encode(" hello") == prefixed.encode(" hello")
    for text in ("hello hello", "\thello", ""):
        units = prefixed.cut(text)
        assert list(prefixed.encode_rows([units], whole=False).ids) == prefixed.encode(text, add_special_tokens=False)
    prefixed.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again").fingerprint == prefixed.fingerprint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "RoFormerTokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": "RoFormerTokenizerFast", "tokenize_chinese_chars": True}),
        ("config.json", {"model_type": "roformer"}),
        ("config.json", {"model_type": "bert", "tokenizer_class": "RoFormerTokenizer"}),
    ],
)
def test_a_published_folder_of_words_is_recognised(tmp_path, name, content):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n北京\n北\n京\n", encoding="utf-8")
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.level == "word" and tokenizer.encode("北京京") == [2, 5, 7, 3]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert Tokenizer.from_pretrained(tmp_path).level == "char"


def test_tokenizer_files_of_older_versions_are_read(trained, tmp_path):
    """As published in 2020: no type of the model, merges as text, a prefix space of another name."""
    for level, tokenizer in trained.items():
        tokenizer.save_pretrained(tmp_path / level)
        path = tmp_path / level / "tokenizer.json"
        content = json.loads(path.read_text())
        model = content["model"]
        del model["type"]
        if level == "bpe":
            model |= {"merges": [" ".join(merge) for merge in model["merges"]], "unk_token": None}
            del model["byte_fallback"], model["ignore_merges"], content["pre_tokenizer"]["use_regex"]
        if level == "unigram":
            del model["byte_fallback"]
            content["pre_tokenizer"]["pretokenizers"][1] = {
                **{"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": True}
            }
        path.write_text(json.dumps(content))
        assert Tokenizer.from_pretrained(tmp_path / level).fingerprint == tokenizer.fingerprint


def test_word_level_without_rjieba_names_the_extra(trained, monkeypatch):
    fresh = pickle.loads(pickle.dumps(trained["word"]))
    monkeypatch.setitem(sys.modules, "rjieba", None)
    assert texts(fresh, fresh.encode_words(["北京"])[0]) == ["北京"]
    for call in (fresh.cut, fresh.encode):
        with pytest.raises(MissingDependencyError, match=r"rjieba.*pip install fastbert-kernels\[zh\]"):
            call("北京")


# words added to characters


def test_words_join_the_tokens_that_texts_can_give(tmp_path):
    tokens = ["[UNK]", "[unused1]", "[PAD]", "[MASK]", "[CLS]", "[SEP]", "中", "##中", "中国", "ab", "##b", "a.", "。"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    char = Tokenizer.from_pretrained(tmp_path)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    reduced = char.reduced()
    assert reduced.level == "char" and texts(reduced, range(reduced.vocab_size)) == [*special, "中", "ab", "##b", "。"]
    word = char.with_words(["中国", "Ab", "北京", "中国", "Ü"])
    assert texts(word, range(word.vocab_size)) == [*special, "中", "ab", "##b", "。", "中国", "北京", "u"]
    assert (word.level, word.pad_id, word.mask_id) == ("word", 0, 4)
    assert texts(word.reduced(), range(10)) == [*special, "中", "ab", "##b", "。", "u"]
    for bad in ("", "a b", "\u0301"):
        with pytest.raises(DataError, match="the word .* expected text without spaces"):
            char.with_words([bad])


def test_words_are_refused_where_they_make_no_sense(trained, tmp_path):
    for level in ("bpe", "unigram", "wordpiece"):
        with pytest.raises(ConfigError, match=f"level is '{level}', expected 'char' or 'word'"):
            trained[level].with_words(["中国"])
    added = pickle.loads(pickle.dumps(trained["char"]))
    added._backend.add_tokens(["词语"])
    with pytest.raises(DataError, match="added tokens '词语'"):
        Tokenizer(added._backend).with_words(["中国"])


# damaged and foreign files


def _unigram_folder(folder, vocab, **model):
    from fastbert.data.backends import unigram_backend

    special = [[token, 0.0] for token in ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")]
    content = json.loads(unigram_backend([tuple(one) for one in special + vocab]).to_str())
    content["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _field(number, value):
    if isinstance(value, int):
        return bytes([*_varint(number << 3), *_varint(value)])
    if isinstance(value, float):
        return bytes(_varint(number << 3 | 5)) + struct.pack("<f", value)
    return bytes([*_varint(number << 3 | 2), *_varint(len(value))]) + value


def _varint(value):
    digits = []
    while True:
        value, digit = value >> 7, value & 127
        digits.append(digit | 128 * (value > 0))
        if not value:
            return digits


def spiece(pieces, trainer=b"", normalizer=b""):
    special = [("<pad>", 0.0, 3), ("<unk>", 0.0, 2), ("[CLS]", 0.0, 3), ("[SEP]", 0.0, 3), ("[MASK]", 0.0, 4)]
    messages = [
        _field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kind))
        for piece, score, kind in [*special, *((piece, score, 1) for piece, score in pieces)]
    ]
    trainer = _field(2, _field(3, 1) + _field(40, 1) + trainer)
    return b"".join(messages) + trainer + _field(3, _field(1, b"nfkc") + normalizer)


PIECES = [("▁the", -1.0), ("▁", -3.0), ("end", -2.5), ("中", -4.25), ("9,", -1.0), ("9", -5.0), (",", -5.0)]


def charsmap(key="９", text="9"):
    """A table that replaces one character: a block of 256 units for the children of each byte, and one for the text."""
    units, at = [0] * 256 * (len(key.encode()) + 2), 0
    for block, byte in enumerate(key.encode(), 1):
        units[at] |= (at ^ 256 * block) << 10
        at = 256 * block ^ byte
        units[at] = byte
    units[at] |= (at ^ 256 * (block + 1)) << 10 | 1 << 8
    units[256 * (block + 1)] = 1 << 31
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + text.encode() + b"\0"


def test_a_table_of_replacements_is_read_and_never_leads_outside(tmp_path):
    whole = charsmap()
    (tmp_path / "spiece.model").write_bytes(spiece(PIECES, normalizer=_field(2, whole)))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert pieces(tokenizer, "９,end") == pieces(tokenizer, "9,end")
    tokenizer.save_pretrained(tmp_path / "full")
    assert Tokenizer.from_pretrained(tmp_path / "full").fingerprint == tokenizer.fingerprint
    leaf = 4 + 4 * 256 * 4
    for at, number in ((4, 1 << 31), (4, 0x7FFFFC00), (leaf, 1 << 31 | 2), (0, 4), (0, len(whole))):
        damaged = whole[:at] + struct.pack("<I", number) + whole[at + 4 :]
        (tmp_path / "spiece.model").write_bytes(spiece(PIECES, normalizer=_field(2, damaged)))
        with pytest.raises(DataError, match="spiece.model: precompiled_charsmap is"):
            Tokenizer.from_pretrained(tmp_path)
        content = json.loads((tmp_path / "full" / "tokenizer.json").read_text())
        step = next(step for step in content["normalizer"]["normalizers"] if step["type"] == "Precompiled")
        step["precompiled_charsmap"] = base64.b64encode(damaged).decode()
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match="tokenizer.json: precompiled_charsmap of the normalizer"):
            Tokenizer.from_pretrained(tmp_path / "other")


def test_a_sentencepiece_model_is_read_without_its_library(tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece(PIECES))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.level == "unigram" and tokenizer.vocab_size == 5 + len(PIECES)
    assert pieces(tokenizer, "The end中 9,x") == ["▁the", "▁", "end", "中", "▁", "9", ",", "<unk>"]
    tokenizer.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again").fingerprint == tokenizer.fingerprint


def test_sentencepiece_agrees(corpus_file, tmp_path):
    """With its library as the oracle, where that is installed; its table of replacements is read too."""
    library = pytest.importorskip("sentencepiece")
    library.SentencePieceTrainer.train(
        input=str(corpus_file), model_prefix=str(tmp_path / "spiece"), vocab_size=90, model_type="unigram", pad_id=0,
        unk_id=1, bos_id=-1, eos_id=-1, pad_piece="<pad>", control_symbols="[CLS],[SEP],[MASK]", minloglevel=2,
    )  # fmt: skip
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in [
        "the end of the words",
        "中国人民银行 hello ",
        "ＡＢ１２ ﬁne\u3000x",
        "don't   end; numbers",
        "a\x0bb",
    ]:
        assert pieces(ours, text) == [
            piece if theirs.piece_to_id(piece) != 1 else "<unk>" for piece in theirs.encode(text.lower(), out_type=str)
        ]
        units = ours.encode_rows([ours.cut(text)], whole=False)
        assert list(units.ids) == ours.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (spiece(PIECES)[:40], "is not a SentencePiece model: a field of"),
        (b"\xff" * 11, "a number of more than 10 bytes"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\x80", "it ends inside a number"),
        (spiece(PIECES, trainer=_field(3, 2)), "the model has type 2, expected 1"),
        (spiece(PIECES, trainer=_field(35, 1)), "without byte fallback"),
        (spiece(PIECES, trainer=_field(40, 99)), "unk_id is 99, expected the id of one of 12 pieces"),
        (spiece(PIECES, trainer=_field(40, 5)), "unk_id is 5, expected the id of unk_token '<unk>'"),
        (spiece(PIECES, normalizer=_field(3, 0)), "add_dummy_prefix is 0"),
        (spiece(PIECES, normalizer=_field(2, b"\xff\xff\xff\xffabc")), "precompiled_charsmap is"),
        (spiece(PIECES).replace(b"[SEP]", b"[sep]"), r"spiece.model: the vocabulary .* no sep_token '\[SEP\]'"),
        (b"", "unk_id is 0, expected"),
    ],
)
def test_damaged_sentencepiece_models_are_named(tmp_path, content, message):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("level", "change", "message"),
    [
        ("bpe", {"model": {"dropout": 0.1}}, "dropout of the model is 0.1"),
        ("bpe", {"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix of the model is '##'"),
        ("bpe", {"pre_tokenizer": {"use_regex": False}}, "use_regex of the pre_tokenizer is false"),
        ("bpe", {"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer is 'Whitespace', expected 'ByteLevel'"),
        (
            "unigram",
            {"pre_tokenizer": {"pretokenizers": [{"type": "Metaspace"}]}},
            r"the pre_tokenizer is \['Metaspace'\]",
        ),
        ("unigram", {"model": {"type": "WordLevel"}}, "the model is 'WordLevel', expected one of 'WordPiece', 'BPE'"),
        ("unigram", {"model": {"byte_fallback": True}}, "byte_fallback True"),
        ("unigram", {"model": {"unk_id": 2}}, "unk_id is 2, expected the id of unk_token '<unk>'"),
        ("unigram", {"normalizer": {"normalizers": [{"type": "NFC"}]}}, "the step {'type': 'NFC'}"),
        ("unigram", {"normalizer": {"type": "NFKC"}}, "the normalizer is 'NFKC', expected 'Sequence'"),
        ("word", {"model": {"type": "BPE", "merges": []}}, "holds a BPE model, expected WordPiece"),
    ],
)
def test_parts_of_other_families_are_refused(trained, tmp_path, level, change, message):
    trained[level].save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for part, values in change.items():
        content[part] |= values
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_missing_special_tokens_are_named_with_their_file(trained, tmp_path):
    trained["bpe"].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    del vocab["<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(DataError, match="vocab.json.*: the vocabulary of 3.. tokens has no mask_token '<mask>'"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(MissingFileError, match="vocab.json with merges.txt, or spiece.model"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"h\xff e\n", "merges.txt: invalid UTF-8"),
        (b"h e l\n", "'h e l' is no merge"),
        (b"h zzz\n", "'h zzz' is no merge"),
    ],
)
def test_damaged_merges_are_named(trained, tmp_path, content, message):
    trained["bpe"].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.from_pretrained(tmp_path)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_mutated_files_raise_typed_errors(trained, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mutated")
    level = data.draw(st.sampled_from(["bpe", "unigram", "word", "spiece"]))
    if level == "spiece":
        (folder / "spiece.model").write_bytes(spiece(PIECES, normalizer=_field(3, 1)))
    else:
        trained[level].save_pretrained(folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    if path.name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer.json").unlink()
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        Tokenizer.from_pretrained(folder).encode("中国hello")
    except (DataError, MissingFileError):
        pass


def test_cjk_lead_bytes_are_those_of_the_rule():
    import re

    leads = {char.encode()[0] for char in map(chr, [*range(0x2E80, 0xD800), *range(0xF900, 0x30000)])}
    cjk = {char.encode()[0] for char in map(chr, [*range(0x3400, 0xD800), *range(0xF900, 0x30000)])
           if re.match(f"[{CJK}]", char)}  # fmt: skip
    rule = {byte for byte in range(0xC2, 0xF5) if re.match("[\xe3-\xe9\xef\xf0]", chr(byte))}
    assert cjk == rule <= leads


@pytest.mark.parametrize("level", ["bpe", "unigram"])
@pytest.mark.parametrize("words", ["segmented", "rjieba"])
def test_no_piece_is_learnt_across_words(tmp_path, level, words):
    """And no space where there is none in the text: as `encode_rows` gives them."""
    space = " " if words == "segmented" else ""
    text = space.join(["世界", "人民", "喜欢", "音乐", "，", "世界", "人民", "。"]) + " the end\n"
    (tmp_path / "t.txt").write_text(text * 50, encoding="utf-8")
    tokenizer = Tokenizer.train(tmp_path / "t.txt", 320, level, words=words, progress=False)
    learnt = {tokenizer.decode([index]).strip() for index in tokenizer.ordinary_ids.tolist()}
    assert len(learnt & set("世界人民喜欢音乐")) + len(learnt & {"世界", "人民", "喜欢", "音乐"}) >= 4
    assert not any(piece in "世界人民喜欢音乐" and len(piece) > 2 for piece in learnt) and "界人" not in learnt
    if level == "bpe":
        row = ["世界", "人民", "喜欢", "音乐", "。", " end"]
        assert [tokenizer.decode([index]) for index in tokenizer.encode_rows([row]).ids] == row
