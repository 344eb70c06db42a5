"""Similar words as pieces of a tokenizer: against the rule in plain words, one word at a time."""

import multiprocessing
import pickle
from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import Tokenizer, similar_pieces
from fastbert.data.arrays import first_of
from fastbert.data.draws import mix
from fastbert.data.similar_pieces import SimilarPieces
from fastbert.data.similar_words import SimilarWords
from fastbert.errors import ConfigError, DataError

LETTERS = "abcd"
PINNED_WORDS = ["言率", "ba", "是", "机率", "法言", "率"]
PINNED_RANDOM = ["文率", "言", "是法是b", "概率"]
GOLDEN, FULL = 0x9E3779B97F4A7C15, (1 << 64) - 1


def tokenizer_of(pieces):
    """Of single characters, and ## forms of letters."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    model = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return Tokenizer(backend)


TOKENIZER = tokenizer_of([*"概率机几语言法文的是", *LETTERS, *(f"##{letter}" for letter in LETTERS)])
TABLE = SimilarWords(
    {
        "概率": ["机率", "几率", "率", "概率论", "法率", "言率", "语率", "文率"],  # 论 is unknown
        "语言": ["语法", "法言"],
        "的": ["是"],
        "ab": ["AB", "ba", "概率", "abc"],
        "AB": ["ca", "ba"],
        "言": ["语法"],
        "论": ["的"],
        "率": [],
    }
)


def ids_of(word):
    return TOKENIZER.encode(word, add_special_tokens=False)


def packed(words):
    """(ids, first, size) of words laid end to end."""
    rows = [ids_of(word) for word in words]
    size = np.array([len(row) for row in rows], np.int64)
    return np.array([piece for row in rows for piece in row], np.int64), first_of(size), size


def split(pieces, size):
    return [tuple(part.tolist()) for part in np.split(pieces, np.cumsum(size)[:-1])]


def draws(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 64, count, dtype=np.uint64)


def distribution(similar, word, count=20_000):
    """How often each text stands in place of a word, or None if nothing does."""
    ids, first, size = packed([word])
    found, pieces = similar.replacements(ids, first.repeat(count), size.repeat(count), draws(count))
    assert found.all() or not found.any()
    counts = Counter(split(pieces, size.repeat(count)))
    if not found[0]:
        assert list(counts) == [tuple(ids.tolist())]
        return None
    return {TOKENIZER.decode(run): n for run, n in counts.items()}


def assert_uniform(counts, expected):
    """Chi-square, of as many degrees of freedom as there are texts but one, within five standard deviations."""
    assert set(counts) == set(expected)
    mean, free = sum(counts.values()) / len(expected), len(expected) - 1
    assert sum((n - mean) ** 2 / mean for n in counts.values()) <= free + 5 * (2 * free) ** 0.5


# What is put in place


def test_a_replacement_is_one_of_the_best_of_as_many_pieces():
    similar = SimilarPieces(TABLE, TOKENIZER)
    assert_uniform(distribution(similar, "概率"), ["机率", "几率", "法率", "言率", "语率"])
    assert_uniform(distribution(similar, "语言"), ["语法", "法言"])
    assert_uniform(distribution(similar, "的"), ["是"])
    assert_uniform(distribution(similar, "ab"), ["ba", "概率", "ca"])  # AB has the same pieces
    for word in ("言", "论", "率", "是", "机率", "概", "abc"):
        assert distribution(similar, word, 3) is None
    assert len(similar) == 4
    assert_uniform(distribution(SimilarPieces(TABLE, TOKENIZER, among=1), "概率"), ["机率"])
    every = SimilarPieces(TABLE, TOKENIZER, among=100)
    assert_uniform(distribution(every, "概率"), ["机率", "几率", "法率", "言率", "语率", "文率"])


def test_random_words_are_uniform_over_the_words_of_their_size():
    similar = SimilarPieces(TABLE, TOKENIZER)
    count = 30_000
    by_size = {
        1: ["的", "是", "言", "率"],
        2: "概率 机率 几率 法率 言率 语率 文率 语言 语法 法言 ab ba ca".split(),
        3: ["abc"],
    }
    for size, expected in by_size.items():
        sizes = np.full(count, size)
        counts = Counter(TOKENIZER.decode(run) for run in split(similar.random_words(sizes, draws(count)), sizes))
        assert_uniform(counts, expected)
    sizes = np.full(count, 4)
    pieces = similar.random_words(sizes, draws(count)).reshape(count, 4)
    for column in pieces.T:
        assert_uniform(Counter(column.tolist()), range(5, TOKENIZER.vocab_size))
    assert abs(np.corrcoef(pieces.T) - np.eye(4)).max() < 0.03


WORD = st.text(LETTERS + "概率论", min_size=1, max_size=4)


@given(
    st.dictionaries(WORD, st.lists(WORD, unique=True, max_size=6), min_size=1, max_size=20),
    st.lists(WORD.filter(lambda word: "论" not in word), max_size=30),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_everything_is_as_in_plain_words(words, text, among, seed):
    table = SimilarWords({word: [other for other in others if other != word] for word, others in words.items()})
    usable = {
        word: tuple(ids_of(word)) for word in dict.fromkeys([*table, *sum(table.values(), ())]) if "论" not in word
    }
    if not usable:
        with pytest.raises(DataError, match="has no word whose pieces"):
            SimilarPieces(table, TOKENIZER)
        return
    similar = SimilarPieces(table, TOKENIZER, among=among)
    ids, first, size = packed(text)
    order = np.random.default_rng(seed).permutation(len(text))  # words need not be in order
    first, size, draw = first[order], size[order], draws(len(text), seed)
    found, pieces = similar.replacements(ids, first, size, draw)
    assert found.dtype == bool and pieces.dtype == np.int64 and len(pieces) == size.sum()
    of_size = {}
    for run in dict.fromkeys(usable.values()):
        of_size.setdefault(len(run), []).append(run)
    random = split(similar.random_words(size, draw), size)
    for i, (yes, run) in enumerate(zip(found.tolist(), split(pieces, size) if text else [], strict=True)):
        own, lot = tuple(ids[first[i] : first[i] + size[i]].tolist()), int(draw[i]) >> 32
        choices = []
        for word, others in table.items():
            if usable.get(word) == own:
                choices += [usable[other] for other in others if other in usable]
        choices = list(dict.fromkeys(c for c in choices if len(c) == len(own) and c != own))[:among]
        assert yes == bool(choices) and run == (choices[lot * len(choices) >> 32] if choices else own)
        if len(own) in of_size:
            assert random[i] == of_size[len(own)][lot * len(of_size[len(own)]) >> 32]
        else:
            lots = [mix(np.array([int(draw[i]) + j * GOLDEN & FULL], np.uint64))[0] for j in range(len(own))]
            assert random[i] == tuple(5 + (int(x) >> 32) * (TOKENIZER.vocab_size - 5) // (1 << 32) for x in lots)


def test_no_hash_is_taken_for_a_word(monkeypatch):
    """Where all runs of one size have one hash, the pieces decide."""
    similar = SimilarPieces(TABLE, TOKENIZER)
    hashed = similar._hash
    words = ["概率", "语言", "的", "ab", "是", "机率", "abc", "言"]
    target = {size: hashed(*key) for size, key in ((1, _key("的")), (2, _key("概率")), (3, _key("概率")))}

    def collide(pieces, size, place):
        return np.array([target[n][0] for n in size.tolist()], np.uint64)

    monkeypatch.setattr(similar, "_hash", collide)
    ids, first, size = packed(words)
    found, pieces = similar.replacements(ids, first, size, draws(len(words)))
    assert found.tolist() == [True, False, True, False, False, False, False, False]
    assert split(pieces, size)[1] == tuple(ids_of("语言"))


def _key(word):
    ids, first, size = packed([word])
    return ids, size, np.arange(len(ids))


def test_keys_of_one_hash_are_hashed_anew(monkeypatch):
    calls = []
    original = SimilarPieces._hash

    def collide_once(self, pieces, size, place):
        calls.append(1)
        return np.zeros(len(size), np.uint64) if len(calls) == 1 else original(self, pieces, size, place)

    monkeypatch.setattr(SimilarPieces, "_hash", collide_once)
    similar = SimilarPieces(TABLE, TOKENIZER)
    assert len(calls) == 2
    assert_uniform(distribution(similar, "语言"), ["语法", "法言"])


@pytest.mark.parametrize("buckets", [1, 1 << 10])
def test_a_large_table_finds_all_its_words_and_no_other(buckets, monkeypatch):
    monkeypatch.setattr(similar_pieces, "_BUCKETS", buckets)
    words = [f"{a}{b}{c}{d}{e}" for a in LETTERS for b in LETTERS for c in LETTERS for d in LETTERS for e in LETTERS]
    table = SimilarWords({word: [word[::-1]] for word in words if word != word[::-1]})
    similar = SimilarPieces(table, TOKENIZER)
    shorter = [word[:4] for word in words[::7]]
    ids, first, size = packed([*words, *shorter])
    found, pieces = similar.replacements(ids, first, size, draws(len(size)))
    assert found.tolist() == [word in table for word in words] + [False] * len(shorter)
    assert split(pieces, size)[: len(words)] == [tuple(ids_of(word[::-1])) for word in words]


def test_nothing_to_replace_and_nothing_to_replace_it_with():
    none, alone = np.zeros(0, np.int64), SimilarPieces(SimilarWords({"的": [], "概率": []}), TOKENIZER)
    assert len(alone) == 0 and distribution(alone, "的", 3) is None
    for similar in (alone, SimilarPieces(TABLE, TOKENIZER)):
        found, pieces = similar.replacements(none, none, none, none.astype(np.uint64))
        assert len(found) == len(pieces) == len(similar.random_words(none, none.astype(np.uint64))) == 0


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match="table is {}, expected a SimilarWords"):
        SimilarPieces({}, TOKENIZER)
    with pytest.raises(ConfigError, match="tokenizer is None"):
        SimilarPieces(TABLE, None)
    with pytest.raises(ConfigError, match="among is 0, expected an integer of at least 1"):
        SimilarPieces(TABLE, TOKENIZER, among=0)
    with pytest.raises(DataError, match="has no word whose pieces"):
        SimilarPieces(SimilarWords({"论": []}), TOKENIZER)


# The same everywhere


def test_the_fingerprint_is_of_what_decides():
    one = SimilarPieces(TABLE, TOKENIZER).fingerprint
    assert len(one) == 64 and SimilarPieces(SimilarWords(dict(TABLE), "another"), TOKENIZER).fingerprint == one
    others = [
        SimilarPieces(TABLE, TOKENIZER, among=4),
        SimilarPieces(SimilarWords({**TABLE, "语言": ["法言", "语法"]}), TOKENIZER),
        SimilarPieces(SimilarWords({**TABLE, "文": []}), TOKENIZER),
        SimilarPieces(SimilarWords({**TABLE, "率": ["的", "是"]}), TOKENIZER),
        SimilarPieces(SimilarWords({**TABLE, "率": ["是", "的"]}), TOKENIZER),
        SimilarPieces(TABLE, tokenizer_of([*"率概机几语言法文的是", *LETTERS, *(f"##{letter}" for letter in LETTERS)])),
        SimilarPieces(TABLE, tokenizer_of([*TOKENIZER._tokens[5:], "论"])),
    ]
    assert len({one, *(similar.fingerprint for similar in others)}) == 8


def _replace(serialised, arguments):
    similar = pickle.loads(serialised)
    torch.set_num_threads(1)
    return similar.fingerprint, *similar.replacements(*arguments), similar.random_words(*arguments[2:])


def test_a_copy_in_a_spawned_process_does_the_same():
    similar = SimilarPieces(TABLE, TOKENIZER)
    ids, first, size = packed(["概率", "ab", "的", "论"] * 50)
    arguments = ids, first, size, draws(len(size))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs = pool.apply(_replace, (pickle.dumps(similar), arguments))
    ours = _replace(pickle.dumps(similar), arguments)
    assert theirs[0] == similar.fingerprint
    assert all(np.array_equal(a, b) for a, b in zip(theirs[1:], ours[1:], strict=True))


def test_this_replacement_never_changes():
    """Written down, so that a checkpoint resumes with the words it was begun with, whatever the version."""
    similar = SimilarPieces(TABLE, TOKENIZER)
    ids, first, size = packed(["概率", "ab", "的", "概率", "语言", "率"])
    _, pieces = similar.replacements(ids, first, size, draws(6))
    assert [TOKENIZER.decode(run) for run in split(pieces, size)] == PINNED_WORDS
    sizes = np.array([2, 1, 4, 2])
    assert [TOKENIZER.decode(run) for run in split(similar.random_words(sizes, draws(4)), sizes)] == PINNED_RANDOM
