"""Words by every segmenter: the same pieces as the text in one, spaces where the text has them, errors that name the
row."""

import json
import re
import string
import sys
import types
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from fastbert.data import WORDS, Corpus, Tokenizer, prepare
from fastbert.data.segmenters import fingerprint_of, name_of, segmenter, versions_of
from fastbert.data.text import SPACES, Row
from fastbert.errors import ConfigError, DataError, MissingDependencyError, MissingFileError

# Chinese, Latin, digits, full width, accents in both normal forms, emoji with joiners, spaces of all kinds.
ALPHABET = [
    *(
        "中国",
        "人民银行",
        "北京",
        "T恤",
        "OKabc",
        "Ｔ恤１２",
        "iPhone15",
        "3.14",
        "café",
        "cafe\u0301",
        "über",
        "u\u0308",
    ),
    *(
        "👩\u200d👧",
        "👍🏽",
        "a\u200bb",
        "\u200b",
        "，",
        "。",
        "、",
        "“",
        ".",
        "-",
        "_",
        "+",
        "$",
        "％",
        "（",
        "é",
        "ﾊﾟ",
        "한국",
    ),
    *(
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        " ",
        "  ",
        "\t",
        "\u3000",
        "\xa0",
        "\u2028",
        "\ufeff",
        "\ufffd",
        "𠀀",
        "豈",
        "≠",
        "ß",
    ),
]
TEXTS = st.lists(
    st.sampled_from(ALPHABET) | st.characters(codec="utf-8", exclude_characters="\n\r\0"), max_size=12
).map("".join)
ROWS = st.lists(TEXTS.filter(lambda text: text.strip()), min_size=1, max_size=5)
AUTOMATIC = ["rjieba", "jieba", "every character", "str.split", "nothing", "at random"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    alphabet = " ".join(part for part in ALPHABET if part.isprintable())
    path.write_text(f"{alphabet}\n{string.printable}\n中国 abc 123\n" * 3, encoding="utf-8")
    return [Tokenizer.train(path, 300, lowercase=lower, min_frequency=1, progress=False) for lower in (True, False)]


def rows(*texts):
    return [Row(0, "t.txt", line, text) for line, text in enumerate(texts, 1)]


def squeezed(text):
    return re.sub(f"[{SPACES}]+", " ", text).strip(" ")


def cutter(name, seed=0):
    if name in WORDS:
        pytest.importorskip(name)
        return name
    generator = np.random.default_rng(seed)

    def at_random(text):
        cuts = [0, *np.flatnonzero(generator.random(len(text)) < 0.4).tolist(), len(text)]
        return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]

    return {"every character": list, "str.split": str.split, "nothing": lambda text: [text], "at random": at_random}[
        name
    ]


# what automatic segmenters come to


@pytest.mark.parametrize("name", AUTOMATIC)
@given(texts=ROWS, seed=st.integers(0, 9))
def test_the_pieces_are_those_of_the_text_in_one(tokenizers, name, texts, seed):
    for tokenizer in tokenizers:
        words = segmenter(cutter(name, seed), tokenizer)(rows(*texts))
        encoded = tokenizer.encode_rows(words)
        pieces = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
        assert [list(ids) for ids in pieces] == [tokenizer.encode(text, add_special_tokens=False) for text in texts]


@pytest.mark.parametrize("name", AUTOMATIC)
@given(texts=ROWS, seed=st.integers(0, 9))
def test_the_words_spell_the_row_with_one_space_for_several(tokenizers, name, texts, seed):
    found = segmenter(cutter(name, seed), tokenizers[0])(rows(*texts))
    if name != "str.split":  # which takes control characters for spaces
        assert ["".join(words) for words in found] == [squeezed(text) for text in texts]
    for words in found:
        for word in words:
            assert word and not re.search(f"^[{SPACES}]{{2}}|[{SPACES}]$|^ $", word)
        assert not words[0].startswith(" ")


@given(texts=ROWS)
def test_rows_do_not_see_each_other(tokenizers, texts):
    cut = segmenter("rjieba", tokenizers[0]) if "rjieba" in sys.modules else segmenter(list, tokenizers[0])
    assert cut(rows(*texts)) == [cut(rows(text))[0] for text in texts]


@given(texts=ROWS)
def test_borders_stand_wherever_they_may(tokenizers, texts):
    """A segmenter that cuts everywhere is joined only inside of what BERT's pre-tokenizer takes as one."""
    normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    for words in segmenter(list, tokenizers[0])(rows(*texts)):
        for word in words:
            pieces = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normalizer.normalize_str(word))
            assert len(pieces) <= 1, word


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\x0bb", ["a\x0bb"]),
        ("中\x0b国", ["中\x0b", "国"]),
        (".\x0cT", [".\x0c", "T"]),
        ("a \x0bb", ["a", " \x0bb"]),
        ("a\x0b b", ["a\x0b", " b"]),
        ("\x0b a\u3000\u3000b \x0c", ["\x0b a", " b \x0c"]),
        ("👩\u200d👧a\u0301中\u0301", ["👩\u200d👧a\u0301", "中", "\u0301"]),
        ("T恤OK１２，x_y", ["T", "恤", "OK１２", "，", "x", "_", "y"]),
    ],
)
def test_words_of_a_segmenter_that_cuts_everywhere(tokenizers, text, words):
    assert segmenter(list, tokenizers[0])(rows(text)) == [words]


def test_every_mark_space_and_symbol_between_letters(tokenizers):
    kinds = ("P", "S", "Z", "C", "M")
    marks = [
        c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] in kinds and unicodedata.category(c) != "Cn"
    ]
    marks = [c for c in marks if c not in "\n\r\0" and not "\ud800" <= c <= "\udfff" and not "\ue000" <= c <= "\uf8ff"]
    texts = [f"a{c}b{c}中{c}1" for c in marks]
    for tokenizer in tokenizers:
        encoded = tokenizer.encode_rows(segmenter(list, tokenizer)(rows(*texts)))
        expected = tokenizer.encode_batch(texts, add_special_tokens=False)
        pieces = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
        wrong = [text for text, ids, other in zip(texts, pieces, expected, strict=True) if list(ids) != other]
        assert not wrong


@pytest.mark.parametrize("name", ["rjieba", "jieba"])
def test_words_of_jieba(tokenizers, name, capfd):
    pytest.importorskip(name)
    cut = segmenter(name, tokenizers[0])
    assert cut(rows("  中国人民银行\u3000发布 OKabc的3.14报告 hello\t world ", "cafe\u0301和１＋２")) == [
        ["中国人民银行", " 发布", " OKabc", "的", "3", ".", "14", "报告", " hello", " world"],
        ["cafe\u0301", "和", "１＋２"],
    ]
    assert capfd.readouterr() == ("", "")


# spaces that stand in the text already


def test_spaces_of_segmented_text_count_between_letters_that_are_not_chinese(tokenizers):
    cut = segmenter("segmented", tokenizers[0])
    assert cut(rows("他 说 hello world ， 3 月 iPhone 15 pro  max é ü 한국 Ａ １", " a", "中\u3000b　c")) == [
        [
            "他",
            "说",
            "hello",
            " world",
            "，",
            "3",
            "月",
            "iPhone",
            " 15",
            " pro",
            " max",
            " é",
            " ü",
            " 한국",
            " Ａ",
            " １",
        ],
        ["a"],
        ["中", "b", " c"],
    ]
    tagged = segmenter("segmented", tokenizers[0], tag_separator="/")
    assert tagged(rows("hello/n world/n 1/2/m 月/n /w a/b")) == [["hello", " world", " 1/2", "月", "", "a"]]


@given(
    words=st.lists(TEXTS.filter(lambda text: text and len(text.split()) == 1 and text.split()[0] == text), min_size=1)
)
def test_segmented_words_are_never_changed(tokenizers, words):
    (found,) = segmenter("segmented", tokenizers[0])(rows(" ".join(words)))
    assert [word.removeprefix(" ") for word in found] == words
    for before, word, raw in zip(words, found[1:], words[1:], strict=False):
        text = Tokenizer.decode.__globals__["_spaced"]
        assert word.startswith(" ") == (text(before[-1]) and text(raw[0]))


def test_wordpiece_ignores_the_space_before_a_word(tokenizers):
    for tokenizer in tokenizers:
        plain, spaced = (
            tokenizer.encode_words(["hello", "中国", "."]),
            tokenizer.encode_words([" hello", " 中国", " ."]),
        )
        assert all((a == b).all() for a, b in zip(plain, spaced, strict=True))


# plug-ins


def cut_in_two(text):
    return [text[: len(text) // 2], text[len(text) // 2 :]]


class Halves:
    def __call__(self, text):
        return cut_in_two(text)


def test_plug_ins_by_name_and_as_functions(tokenizers, tmp_path, monkeypatch):
    (tmp_path / "some_cutter.py").write_text("class Tools:\n    halves = lambda t: [t[:2], t[2:]]\n__version__ = '3'\n")
    monkeypatch.syspath_prepend(tmp_path)
    expected = [["中国", "人民"]]
    for words in ("some_cutter:Tools.halves", cut_in_two, Halves()):
        assert segmenter(words, tokenizers[0])(rows("中国人民")) == expected
    assert name_of(cut_in_two).endswith("test_segmenters:cut_in_two") and name_of(Halves()).endswith(":Halves")
    assert fingerprint_of("some_cutter:Tools.halves", None)["source"] != fingerprint_of(Halves(), None)["source"]
    (tmp_path / "t.txt").write_text("中国人民\n", encoding="utf-8")
    report = prepare(
        tmp_path / "t.txt", tokenizers[0], tmp_path / "out", words="some_cutter:Tools.halves", progress=False
    )
    assert report.splits["train"]["words"] == 2 and "words: some_cutter:Tools.halves" in str(report)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["words"] == "some_cutter:Tools.halves"
    assert Corpus.open(tmp_path / "out").shards[0].word_start.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda text: text.replace("人", "入").split(), r"t.txt:2: .* character 3 on.*'中国入民' where.*'中国人民'"),
        (lambda text: [text, "。"] if "人" in text else [text], r"t.txt:2: the words of .* from character 5 on"),
        (lambda text: [text[:-1]], "t.txt:1: the words of .* do not spell the text: from character 1 on"),
        (lambda text: [1], r"t.txt:1: the segmenter .* gave \[1\], expected a list of str"),
        (lambda text: text, r"t.txt:1: the segmenter .* gave 'x', expected a list of str"),
        (lambda text: None, "t.txt:1: the segmenter .* gave None, expected a list of str"),
        (lambda text: [text][len(text) > 3], "t.txt:2: the segmenter .* failed with IndexError: list index"),
    ],
)  # fmt: skip
def test_plug_ins_that_go_wrong_name_the_row(tokenizers, function, message):
    with pytest.raises(DataError, match=message):
        segmenter(function, tokenizers[0])(rows("x", "中国人民"))


def test_arguments_that_make_no_sense(tokenizers, tmp_path):
    for words in ("hanlp", "a b:c", "a:", ":b", None, 3):
        with pytest.raises(ConfigError, match="words is .*, expected one of 'none', 'segmented', 'rjieba'"):
            segmenter(words, tokenizers[0])
    with pytest.raises(MissingFileError, match="segmenter_model .*/absent is not a folder"):
        segmenter("ltp", tokenizers[0], model=tmp_path / "absent")


@pytest.mark.parametrize(
    ("package", "advice"),
    [("rjieba", r"fastbert-kernels\[zh\]"), ("jieba", "pip install jieba"), ("ltp", "pip install ltp")],
)
def test_a_package_that_is_not_installed_is_named(tokenizers, tmp_path, monkeypatch, package, advice):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingDependencyError, match=f"words='{package}' needs the package {package}: pip.*{advice[4:]}"
    ):
        segmenter(package, tokenizers[0], model=tmp_path if package == "ltp" else None)


def test_versions_go_into_the_manifest(tokenizers, tmp_path):
    pytest.importorskip("rjieba")
    (tmp_path / "t.txt").write_text("中国人民\n", encoding="utf-8")
    report = prepare(tmp_path / "t.txt", tokenizers[0], tmp_path / "out", words="rjieba", progress=False)
    version = versions_of("rjieba")["rjieba"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["rjieba"] == version
    assert manifest["segmentation"] == report.segmentation == {"words": "rjieba", "versions": {"rjieba": version}}
    assert f"words: rjieba (rjieba {version})" in str(report)
    assert versions_of("none") == versions_of("json:loads") == {}


# LTP, for which a module of the same interface stands in: no model can be had here


class StandIn:
    """LTP 4.2 as documented: pipeline(list of texts, tasks=["cws"]).cws is a list of lists of words. As the real one,
    it reads no more than 512 pieces and leaves out what its tokenizer removes from the begin of a text."""

    made = []

    def __init__(self, folder):
        self.folder, self.calls = folder, []
        self.made.append(self)

    def pipeline(self, texts, tasks):
        assert tasks == ["cws"] and all(texts) and len(texts) <= 32
        self.calls.append(texts)
        cut = [re.findall(r"\S{1,2}", text.lstrip("\u200b")[:510]) for text in texts]
        return types.SimpleNamespace(cws=cut)


@pytest.fixture
def ltp(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ltp", types.SimpleNamespace(LTP=StandIn))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    StandIn.made.clear()
    return tmp_path


def test_ltp_reads_long_rows_in_parts_at_sentence_ends(tokenizers, ltp):
    cut = segmenter("ltp", tokenizers[0], model=ltp)
    long = "中国人民" * 100 + "国。" + "银行" * 200 + "。" + "北京" * 300
    found = cut(rows("中国 人民ab c", long, *["新年"] * 40))
    assert found[0] == ["中国", " 人民", "ab", " c"] and found[2:] == [["新年"]] * 40
    assert "".join(found[1]) == long and "国。" in found[1]
    (made,) = StandIn.made
    assert made.folder == str(ltp) and [len(texts) for texts in made.calls] == [32, 13]
    assert [len(text) for text in made.calls[0][1:5]] == [402, 401, 500, 100]


def test_what_ltp_leaves_out_at_the_begin_is_kept(tokenizers, ltp):
    cut = segmenter("ltp", tokenizers[0], model=ltp)
    assert cut(rows("\u200b\u200b中国人", "\u200b")) == [["\u200b\u200b", "中国", "人"], ["\u200b"]]


def test_ltp_needs_a_model_folder_and_nothing_else_takes_one(tokenizers, ltp):
    with pytest.raises(ConfigError, match="segmenter_model is None"):
        segmenter("ltp", tokenizers[0])
    with pytest.raises(ConfigError, match="segmenter_model is .*, expected None with words='none'"):
        segmenter("none", tokenizers[0], model=ltp)
    before = fingerprint_of("ltp", ltp)
    (ltp / "config.json").write_text("{}")
    assert fingerprint_of("ltp", ltp) != before
