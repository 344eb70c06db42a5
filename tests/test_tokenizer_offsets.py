"""Which characters of a text its ids are made of, at every level of a tokenizer."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_tokenizer_levels import ALPHABET, LINE, TEXT

from fastbert.data import LEVELS, Tokenizer
from fastbert.errors import DataError

SIZES = {"bpe": 400, "unigram": 260, "word": 330}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return {level: Tokenizer.train(path, SIZES.get(level, 300), level, progress=False) for level in LEVELS}


@pytest.mark.parametrize("level", LEVELS)
@example("e\u0301[MASK]x")
@example("中国\u200b人民 \x00worldly\u3000ＡＢＣ")
@given(text=LINE | st.text(st.sampled_from(ALPHABET), max_size=30))
def test_ids_are_those_of_encode_and_offsets_are_in_order(trained, level, text):
    ids, offsets = trained[level].encode_with_offsets(text)
    assert list(ids) == trained[level].encode(text, add_special_tokens=False)
    assert len(offsets) == len(ids)
    assert all(0 <= begin <= end <= len(text) for begin, end in offsets)
    for column in zip(*offsets, strict=True):
        assert list(column) == sorted(column)
    covered = {place for begin, end in offsets for place in range(begin, end)}
    rest = [char for place, char in enumerate(text) if place not in covered and not char.isspace()]
    assert not any(trained[level].encode(char, add_special_tokens=False) for char in rest)


@pytest.mark.parametrize("level", ["char", "wordpiece", "word"])
@given(text=LINE | st.text(st.sampled_from(ALPHABET), max_size=30))
def test_the_characters_of_a_piece_are_that_piece_when_normalised(trained, level, text):
    tokenizer = trained[level]
    for index, (begin, end) in zip(*tokenizer.encode_with_offsets(text), strict=True):
        if index != tokenizer.unk_id:
            piece = unicodedata.normalize("NFD", text[begin:end].lower())
            piece = "".join(c for c in piece if unicodedata.category(c) not in ("Mn", "Cc", "Cf") and c != "\ufffd")
            assert tokenizer.id_to_token(index).removeprefix("##") == piece.strip()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("word", ["café", "cafe\u0301", "unbelievably", "ＡＢＣ", "3.14", "😀"])
def test_a_word_can_be_told_again_from_its_pieces(trained, level, word):
    text = f"at {word} end"
    _, offsets = trained[level].encode_with_offsets(text)
    inside = [(begin, end) for begin, end in offsets if begin < 3 + len(word) and end > 3]
    assert text[inside[0][0] : inside[-1][1]] == word


def test_pieces_of_a_word_have_places_of_their_own(trained):
    text = "说 Unbelievably"
    ids, offsets = trained["word"].encode_with_offsets(text)
    pieces = [trained["word"].id_to_token(index).removeprefix("##") for index in ids]
    assert len(pieces) > 3
    assert [text[begin:end].lower() for begin, end in offsets] == pieces


def test_places_of_pieces_by_hand(trained):
    def parts(level, text):
        return [text[begin:end] for begin, end in trained[level].encode_with_offsets(text)[1]]

    assert parts("char", " Café１ 中国\x00人") == ["Café１", "中", "国", "人"]
    assert parts("word", "Hello, 中国人民银行caf\u0301e \x00年") == ["Hello", ",", "中国人民银行", "caf\u0301e", "年"]
    assert parts("wordpiece", "世界 Hello") == ["世界", "Hello"]
    assert parts("bpe", "hello 世界 é") == ["he", "llo", "世界", "", "é"]
    assert trained["char"].encode_with_offsets("") == trained["word"].encode_with_offsets("\x00 ") == ([], [])


@pytest.mark.parametrize("level", LEVELS)
def test_a_text_that_is_none_is_named(trained, level):
    with pytest.raises(DataError, match="lone surrogate"):
        trained[level].encode_with_offsets("a\ud800")
    assert list(map(list, trained[level].encode_with_offsets(""))) == [[], []]
