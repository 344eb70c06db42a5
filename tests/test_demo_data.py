"""The data that the worked examples are fine-tuned on."""

import csv
import json

import pytest

from fastbert.data import Corpus, reviews, tagged_rows
from fastbert.finetune.demo_data import SPLITS, entities, write_ner, write_pos, write_sentiment


@pytest.fixture(scope="module")
def corpus(daily):
    daily("char")
    return daily.folder / "corpus-char"


def test_reviews_are_there_once():
    found = reviews()
    texts = [text for text, _ in found]
    assert len(set(texts)) == len(texts) == 17_361 and {label for _, label in found} == {"positive", "negative"}
    assert min(sum(label == kind for _, label in found) for kind in ("positive", "negative")) > 8000


@pytest.mark.parametrize(
    "words, tags, names",
    [
        (["江", "泽民", "主席"], ["nr", "nr", "n"], "B-PER I-PER I-PER O O"),
        (["李", "鹏", "朱", "镕基"], ["nr"] * 4, "B-PER I-PER B-PER I-PER I-PER"),
        (["毛泽东", "邓小平"], ["nr"] * 2, "B-PER I-PER I-PER B-PER I-PER I-PER"),
        (["北京", "上海", "新华社"], ["ns", "ns", "nt"], "B-LOC I-LOC B-LOC I-LOC B-ORG I-ORG I-ORG"),
        (["他", "说"], ["r", "v"], "O O"),
        (["江", "、", "泽民"], ["nr", "w", "nr"], "B-PER O B-PER I-PER"),
    ],
)
def test_entities(words, tags, names):
    characters, found = entities(words, tags)
    assert characters == list("".join(words)) and found == names.split()


def test_entities_of_the_whole_month():
    persons = 0
    for words, tags in tagged_rows():
        characters, names = entities(words, tags)
        assert len(characters) == len(names) == sum(map(len, words))
        persons += names.count("B-PER")
    assert 19_000 < persons < 35_267 - 8_000  # of 35,267 words tagged nr, surnames have gone to their given names


def test_sentiment_splits(corpus, tmp_path):
    paths = write_sentiment(tmp_path, corpus)
    rows = {}
    for name in SPLITS:
        with open(paths[name], encoding="utf-8", newline="") as file:
            rows[name] = list(csv.DictReader(file))
    sizes = {name: len(found) for name, found in rows.items()}
    assert sum(sizes.values()) == 17_361 and 1600 < sizes["test"] < 1900 and 1600 < sizes["validation"] < 1900
    texts = [row["text"] for found in rows.values() for row in found]
    assert len(set(texts)) == len(texts)
    again = write_sentiment(tmp_path / "few", corpus, limit=100)
    with open(again["train"], encoding="utf-8", newline="") as file:
        few = list(csv.DictReader(file))
    assert few == rows["train"][:100] and 20 < sum(row["label"] == "positive" for row in few) < 80
    assert again["test"].read_bytes() == paths["test"].read_bytes()


@pytest.mark.parametrize("write", [write_ner, write_pos])
def test_tagged_splits(write, corpus, tmp_path):
    """The test rows are the pretraining corpus's own validation rows, and none of them is among the others."""
    paths = write(tmp_path, corpus)
    rows = {
        name: [json.loads(line) for line in paths[name].read_text(encoding="utf-8").splitlines()] for name in SPLITS
    }
    text = {name: {"".join(row["tokens"]) for row in found} for name, found in rows.items()}
    assert sum(map(len, rows.values())) == 19_484
    assert not text["test"] & (text["train"] | text["validation"]) and not text["train"] & text["validation"]
    held_out = Corpus.open(corpus, "validation", verify=False)
    assert len(rows["test"]) >= held_out.manifest["splits"]["validation"]["rows"] > 400
    assert all(len(row["tokens"]) == len(row["tags"]) for found in rows.values() for row in found)
