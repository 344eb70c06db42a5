"""Tables of similar words: on disk, from vectors, from Cilin, from a text of one's own."""

import gzip
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import similar_words, vectors
from fastbert.data.similar_words import SimilarWords, build_similar_words
from fastbert.data.text import Tally
from fastbert.data.vectors import nearest, read_vectors
from fastbert.errors import ConfigError, DataError, MissingDependencyError, MissingFileError

needs_gensim = pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="no extra `vectors`")

HEADER = "# fastbert similar words, version 1: by hand\n"
TABLE = {"概率": ["机率", "几率"], "语言": ["语法"], "Bert": [], "New York": ["#1 a"]}
CILIN = "Aa01A01= 人 士 人物 人士 人选\nAb01A01# 男人 女人 男 女\nAc01A01@ 巨人\nAd01A01= 人士 居民 市民\n"
# Two families of words, each in contexts of its own.
FAMILIES = [["苹果", "香蕉", "梨子", "西瓜"], ["火车", "飞机", "轮船", "汽车"]]
CONTEXTS = [["我们", "爱", "吃", "甜", "的"], ["他", "坐", "去", "很", "快"]]


def rows_of_text(count=1500):
    rng = np.random.default_rng(0)
    rows = []
    for family in rng.integers(0, 2, count).tolist():
        words = [str(word) for word in rng.permutation(CONTEXTS[family])]
        words.insert(int(rng.integers(1, 5)), FAMILIES[family][rng.integers(0, 4)])
        rows.append([*words, "。"])
    return rows


def vector_bytes(words, matrix, binary, newline=b"\n"):
    """A word2vec file, written from the description of its format."""
    out = [f"{len(words)} {len(matrix[0])}\n".encode()]
    for word, vector in zip(words, np.asarray(matrix, "<f4"), strict=True):
        word = word if isinstance(word, bytes) else word.encode()
        numbers = vector.tobytes() if binary else " ".join(map(repr, vector.tolist())).encode()
        out.append(word + b" " + numbers + (newline if binary else b"\n"))
    return b"".join(out)


@pytest.fixture
def put(tmp_path):
    def put(content, name="file"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return put


# The table


def test_a_table_is_a_mapping_that_survives_the_disk(tmp_path):
    table = SimilarWords(TABLE, "by\nhand")
    assert len(table) == 4 and "Bert" in table and "机率" not in table
    assert table["概率"] == ("机率", "几率") and table["Bert"] == () and list(table) == list(TABLE)
    table.write(tmp_path / "deep" / "table")
    text = (tmp_path / "deep" / "table").read_text(encoding="utf-8")
    assert text == HEADER + "概率\t机率\t几率\n语言\t语法\nBert\nNew York\t#1 a\n"
    again = SimilarWords.read(tmp_path / "deep" / "table")
    assert again == table and again.origin == "by hand" and list(again) == list(table)
    assert again != SimilarWords({**TABLE, "语言": []}) and again != SimilarWords({"概率": ["几率", "机率"]})
    with pytest.raises(KeyError):
        table["机率"]


WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n"), min_size=1, max_size=5)
WORD = WORD.filter(lambda word: word == word.strip())


@given(st.dictionaries(WORD, st.lists(WORD, unique=True, max_size=4), min_size=1, max_size=8))
def test_any_words_survive_the_disk(tmp_path_factory, words):
    table = SimilarWords({word: [other for other in others if other != word] for word, others in words.items()})
    path = tmp_path_factory.mktemp("any") / "table"
    table.write(path)
    assert SimilarWords.read(path) == table


def test_an_edited_table_is_read(put):
    text = "\ufeff" + HEADER.replace("\n", "\r\n") + "概率\t机率\t\t\r\n\r\n  \r\n语言"
    assert dict(SimilarWords.read(put(text))) == {"概率": ("机率",), "语言": ()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ":1: '' is not the first line"),
        ("概率\t机率\n", ":1: '概率.*' is not the first line"),
        (HEADER.replace("version 1", "version 2") + "a\n", ":1: the version of the table is 2, expected 1"),
        (HEADER, "holds no word"),
        (HEADER + "a\n\tb\n", ":3: '' is no word"),
        (HEADER + "a\t\tb\n", ":2: '' is no word"),
        (HEADER + "a\t b\n", ":2: ' b' is no word"),
        (HEADER + "a\tb\rc\n", r":2: 'b\\rc' is no word"),
        (HEADER + "a\tb\n\na\tc\n", ":4: 'a' has an entry on line 2"),
        (HEADER + "a\tb\tb\n", ":2: 'b' is there twice"),
        (HEADER + "a\tb\ta\n", ":2: 'a' is its own similar word"),
        (HEADER.encode() + b"a\nb\t\xe4\xba\n", ":3: invalid UTF-8 at byte 2 of the line: e4 ba"),
    ],
)
def test_a_damaged_table_is_told_by_its_line(put, content, message):
    with pytest.raises(DataError, match=f"file(?: |(?={message})){message.removeprefix('file')}"):
        SimilarWords.read(put(content))


def test_a_missing_table_says_how_to_make_one(tmp_path):
    with pytest.raises(MissingFileError, match="fastbert prepare similar-words"):
        SimilarWords.read(tmp_path / "none")
    with pytest.raises(DataError, match="is a folder"):
        SimilarWords.read(tmp_path)


@pytest.mark.parametrize(
    "words", [{}, {"a": "bc"}, {"a": [1]}, {"": []}, {"a": ["a"]}, {"a": ["b", "b"]}, {"a\tb": []}, {"\ud800": []}]
)
def test_what_no_file_could_hold_is_no_table(words):
    with pytest.raises(DataError, match="similar words"):
        SimilarWords(words)


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table"
    SimilarWords({"old": []}).write(path)

    def fail(*paths):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        SimilarWords(TABLE).write(path)
    assert dict(SimilarWords.read(path)) == {"old": ()} and os.listdir(tmp_path) == ["table"]


# Neighbours


@given(
    count=st.integers(1, 40),
    groups=st.integers(1, 4),
    top=st.integers(1, 8),
    least=st.floats(-1, 1),
    scores=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
def test_neighbours_are_those_of_brute_force(count, groups, top, least, scores, seed):
    rng = np.random.default_rng(seed)
    matrix = (rng.normal(size=(count, 5)) * 10.0 ** rng.integers(-30, 30, (count, 1))).astype(np.float32)
    group = rng.integers(0, groups, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_SCORES", scores)
        found = nearest(matrix, group, top=top, least=least, progress=False)
    assert found.shape == (count, top) and found.dtype == np.int64
    exact = matrix.astype(float)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    for i, row in enumerate(found.tolist()):
        others = [j for j in range(count) if j != i and group[j] == group[i]]
        similarity = {j: float(exact[i] @ exact[j]) for j in others}
        best = sorted((similarity[j] for j in others if similarity[j] >= least), reverse=True)[:top]
        mine = [j for j in row if j >= 0]
        assert row == mine + [-1] * (top - len(mine)) and len(set(mine)) == len(mine)
        np.testing.assert_allclose([similarity[j] for j in mine], best, atol=1e-5)


WORDS = ["概率", "机率", "几率", "概", "率", "Bert", "bert", "12", "："]
MATRIX = [[1, 0.1], [1, 0], [1, 0.4], [1, 0], [-1, 0], [0, 1], [0.1, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("newline", [b"\n", b""])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_table_from_vectors(put, binary, newline, zipped):
    content = vector_bytes(WORDS, MATRIX, binary, newline)
    table = SimilarWords.from_vectors(put(gzip.compress(content) if zipped else content), progress=False)
    expected = {
        "概率": ("机率", "几率"),
        "机率": ("概率", "几率"),
        "几率": ("概率", "机率"),
        "概": (),
        "率": (),
        "Bert": ("bert",),
        "bert": ("Bert",),
    }
    assert dict(table) == expected and list(table) == list(expected)
    report = table.report
    assert (report.words, report.similar, report.same_length, report.pairs) == (7, 5, 5, 8)
    assert report.coverage == pytest.approx(5 / 7)
    assert report.dropped == {"word without a letter or CJK character": {"count": 2, "examples": ["'12'", "'：'"]}}
    assert "7 words" in str(report) and "2 x word without" in str(report)


def test_the_search_takes_its_options(put):
    path = put(vector_bytes(WORDS, MATRIX, True))
    assert SimilarWords.from_vectors(path, top=1)["几率"] == ("概率",)
    assert SimilarWords.from_vectors(path, least=0.98)["几率"] == ()
    assert SimilarWords.from_vectors(path, least=-1)["概"] == ("率",)
    free = SimilarWords.from_vectors(path, same_length=False)
    assert set(free["概"]) == {"机率", "概率", "几率"} and free.report.similar == 6 and free.report.same_length == 5
    first = SimilarWords.from_vectors(path, limit=2)
    assert list(first) == ["概率", "机率"] and "first 2 words" in first.origin
    for name, value in (("top", 0), ("top", True), ("least", 1.5), ("least", "x"), ("limit", 0)):
        with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
            SimilarWords.from_vectors(path, **{name: value})


@pytest.mark.parametrize("binary", [False, True])
def test_words_that_cannot_be_used_are_counted(put, binary):
    words = ["a", "b", "a", b"\xe4\xba", "c", "d", "e", "日\u3000"]
    values = [[1, 2], [3, 4], [5, 6], [7, 8], [np.nan, 1], [1, np.inf], [0, 0], [1, 1]]
    path, dropped = put(vector_bytes(words, values, binary)), Tally()
    found = read_vectors(path, dropped=dropped)
    assert found.words == ["a", "b", "日\u3000"] and found.matrix.tolist() == [[1, 2], [3, 4], [1, 1]]
    assert {reason: entry["count"] for reason, entry in dropped.reasons.items()} == {
        "word that was there before": 1,
        "word in invalid UTF-8": 1,
        "vector that is not finite": 2,
        "vector that is all zero": 1,
    }
    place = f"{path}: word 3" if binary else f"{path}:4"
    assert dropped.reasons["word that was there before"]["examples"] == [place]
    report = SimilarWords.from_vectors(path).report
    assert sum(entry["count"] for entry in report.dropped.values()) == 6 and report.words == 2


GOOD_TEXT, GOOD_BINARY = vector_bytes(["a", "b"], [[1, 2], [3, 4]], False), vector_bytes(["a", "b"], [[1, 2]] * 2, True)
ZIPPED = gzip.compress(GOOD_TEXT, mtime=0)  # the time would be in the names of the tests, which processes must agree on


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: the first line is '', expected '<words> <dimensions>'"),
        (b"a 0.1 0.2\nb 0.3 0.4\n", ":1: the first line is 'a 0.1 0.2'"),
        (b"0 2\n", ":1: the first line is '0 2'"),
        (b"2 0\na\nb\n", ":1: the first line is '2 0'"),
        (GOOD_TEXT[: GOOD_TEXT.index(b"b")], "is cut short: it ends within word 2 of the 2"),
        (GOOD_BINARY[:-3], "is cut short: it ends within word 2 of the 2"),
        (GOOD_BINARY[:-10], "is cut short: it ends within word 2 of the 2"),
        (GOOD_BINARY + b"c", "goes on after the 2 words"),
        (GOOD_TEXT + b"c 1 2\n", "goes on after the 2 words"),
        (b"2 2\na 1 2\nb 3\n", ":3: 1 numbers after the word, expected the 2"),
        (b"2 2\na 1 2\nb c 3 4\n", ":3: 3 numbers after the word, expected the 2"),
        (b"2 2\na 1 2\nb 3 x\n", ":3: could not convert string to float: b'x'"),
        (GOOD_BINARY[:-11] + b"\x01" * 70000, "word 2 does not end within 65536 bytes"),
        (ZIPPED[:-12], "is a damaged gzip file"),
        (ZIPPED[:10] + b"\xff" * 40, "is a damaged gzip file"),
        (ZIPPED[:-8] + b"\0" * 8, "is a damaged gzip file"),
    ],
)
def test_damaged_vectors_are_told(put, content, message):
    with pytest.raises(DataError) as caught:
        read_vectors(put(content))
    assert message in str(caught.value) and "file" in str(caught.value)


@pytest.mark.parametrize("words", [[b"\xe4\xba"], ["12"]])
def test_vectors_of_no_word_are_told(put, words):
    with pytest.raises(DataError, match="holds no word"):
        SimilarWords.from_vectors(put(vector_bytes(words, [[1, 2]], True)))


def test_missing_vectors(tmp_path):
    with pytest.raises(MissingFileError, match="expected a file of word vectors"):
        SimilarWords.from_vectors(tmp_path / "none")
    with pytest.raises(DataError, match="is a folder, expected a file of word vectors"):
        SimilarWords.from_vectors(tmp_path)


# Cilin


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_from_cilin(put, encoding, end):
    path = put(CILIN.replace("\n", end).encode(encoding), "cilin.txt")
    table = SimilarWords.from_cilin(path)
    assert dict(table) == {
        "人": ("士",),
        "士": ("人",),
        "人物": ("人士", "人选"),
        "人士": ("人物", "人选", "居民", "市民"),
        "人选": ("人物", "人士"),
        **dict.fromkeys(("男人", "女人", "男", "女", "巨人"), ()),
        "居民": ("人士", "市民"),
        "市民": ("人士", "居民"),
    }
    assert table.origin == "Cilin cilin.txt, synonyms, same length" and table.report.similar == 7
    related = SimilarWords.from_cilin(path, related=True, same_length=False)
    assert related["男"] == ("男人", "女人", "女") and related["人"] == ("士", "人物", "人士", "人选")
    assert related["巨人"] == ()


def test_synonyms_rank_before_related_words(put):
    path = put("Aa01A01# 甲 乙\nAa01A02= 甲 丙 丙 7\n")
    table = SimilarWords.from_cilin(path, related=True)
    assert table["甲"] == ("丙", "乙") and "7" not in table
    assert table.report.dropped["word without a letter or CJK character"]["examples"] == [f"{path}:2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CILIN + "Aa01A0= 人\n", ":5: 'Aa01A0= 人' is no line of Cilin"),
        ("人 士\n", ":1: '人 士' is no line of Cilin"),
        (CILIN.encode() + b"Aa01A01= \xff\n", ":5: neither UTF-8 nor GB18030"),
        (CILIN.encode("gb18030") + b"Aa01A01= \xff\n", ":5: neither UTF-8 nor GB18030"),
        ("", "holds no word"),
    ],
)
def test_a_damaged_cilin_is_told_by_its_line(put, content, message):
    with pytest.raises(DataError, match=message):
        SimilarWords.from_cilin(put(content))


# A text of one's own

OPTIONS = {"dimensions": 16, "epochs": 20, "top": 3, "progress": False}
PROGRAM = """
from test_similar_words import *
print(repr(dict(SimilarWords.from_rows(rows_of_text(), **OPTIONS))))
"""


@needs_gensim
def test_a_table_from_a_text_finds_what_stands_alike_and_finds_it_again(put):
    rows = rows_of_text()
    table = SimilarWords.from_rows(rows, **OPTIONS)
    for family in FAMILIES:
        for word in family:
            assert table[word] and set(table[word]) <= {*family} - {word}
    assert "。" not in table
    shares = {word: sum(row.count(word) for row in rows) / (7 * len(rows)) for word in table}
    assert table.report.coverage == pytest.approx(sum(share for word, share in shares.items() if table[word]))
    path = put("".join(" ".join(f"{word}/x" for word in row) + "\n" for row in rows), "text.txt")
    again = SimilarWords.from_corpus(path, tag_separator="/", **OPTIONS)
    assert again == table and again.origin.startswith("text text.txt, min count 5, dimensions 16, window 5, epochs 20")
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(dict(table))
    assert SimilarWords.from_rows(rows, seed=1, **OPTIONS) != table


@needs_gensim
def test_a_long_row_is_not_cut_off():
    table = SimilarWords.from_rows([["甲"] * 10_000 + ["乙", "丙"] * 5], **OPTIONS)
    assert set(table) == {"甲", "乙", "丙"}


class Failing:
    """Rows that a file gives no more when it is read again."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield from rows_of_text(20)
        if self.passes == 2:
            raise DataError("the file changed")


@needs_gensim
def test_bad_rows_are_told():
    with pytest.raises(DataError, match="the file changed"):
        SimilarWords.from_rows(Failing(), **OPTIONS)
    with pytest.raises(DataError, match="row 1 is the str '甲 乙', expected a list of words"):
        SimilarWords.from_rows(["甲 乙"], **OPTIONS)
    with pytest.raises(DataError, match="no word occurs 5 times among the 2 of the text"):
        SimilarWords.from_rows([["甲", "乙"]], **OPTIONS)


def test_arguments_for_training_are_checked(put, monkeypatch):
    with pytest.raises(ConfigError, match="rows is <generator .*expected rows that can be gone through several times"):
        SimilarWords.from_rows(row for row in [["甲"]])
    for name, value in (("min_count", 0), ("dimensions", 1.5), ("window", 0), ("epochs", 0), ("seed", -1), ("top", 0)):
        with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
            SimilarWords.from_rows([["甲"]], **{name: value})
    with pytest.raises(ConfigError, match="words is 'none', expected another one"):
        SimilarWords.from_corpus(put("甲\n"), words="none")
    monkeypatch.setitem(sys.modules, "gensim", None)
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    with pytest.raises(MissingDependencyError, match=r"fastbert-kernels\[vectors\]"):
        SimilarWords.from_rows([["甲"]])


# What the command does


def test_a_table_is_built_from_one_source(put, tmp_path):
    out = tmp_path / "table"
    cilin = put(CILIN, "cilin")
    report = build_similar_words(out, cilin=cilin, related=True, progress=False)
    assert report.words == 12 and SimilarWords.read(out) == SimilarWords.from_cilin(cilin, related=True)
    with pytest.raises(DataError, match="exists already; overwrite=True replaces it"):
        build_similar_words(out, cilin=cilin)
    source = put(vector_bytes(WORDS, MATRIX, True), "vectors")
    report = build_similar_words(out, vectors=source, overwrite=True, top=1)
    assert report.pairs == 5 and SimilarWords.read(out) == SimilarWords.from_vectors(source, top=1)


@needs_gensim
def test_a_table_is_built_from_a_text(put, tmp_path):
    path = put("".join(" ".join(row) + "\n" for row in rows_of_text()), "text.txt")
    report = build_similar_words(tmp_path / "table", text=[path], words="segmented", **OPTIONS)
    assert SimilarWords.read(tmp_path / "table") == SimilarWords.from_corpus(path, **OPTIONS) and report.coverage > 0.5


def test_what_cannot_be_built_is_refused_before_any_work(put, tmp_path, monkeypatch):
    cilin, out = put(CILIN, "cilin"), tmp_path / "table"
    for sources in ({}, {"cilin": cilin, "vectors": cilin}):
        with pytest.raises(ConfigError, match="expected one of vectors, cilin and text"):
            build_similar_words(out, **sources)
    for source, option in (("cilin", "top"), ("vectors", "seed"), ("text", "related"), ("text", "origin")):
        with pytest.raises(ConfigError, match=f"{source} takes no option '{option}', expected some of"):
            build_similar_words(out, **{source: cilin, option: 1})
    with pytest.raises(DataError, match="is not a table of similar words: it is not replaced"):
        build_similar_words(cilin, cilin=cilin, overwrite=True)
    with pytest.raises(DataError, match="is a folder"):
        build_similar_words(tmp_path, cilin=cilin, overwrite=True)
    assert cilin.read_text(encoding="utf-8") == CILIN and not out.exists()
    assert set(similar_words._BUILDERS["text"][1]) >= {"words", "tag_separator", "errors", "seed", "top", "progress"}
