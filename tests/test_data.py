"""From text files to an open corpus: what is kept, what is refused, what a crash leaves behind."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import Corpus, MaskedLM, Tokenizer, pack, prepare
from fastbert.data.preparation import hold_out
from fastbert.errors import ConfigError, DataError, MissingDependencyError, MissingFileError

DOCUMENTS = [
    ["中国 人民 银行 发布 报告", "hello worlds 在 北京", "一 二 三"],
    ["新年 讲话", "“ 人民 万岁 ”"],
    ["1998 年 ， 3.14 ＡＢ １２"],
    ["一 个 很长 很长 的 句子 ， 说 了 许多 许多 话 ， 还 没有 说完 ， 又 说 了 许多 话 。", "完 了 。"],
]
TEXT = "\n\n".join("\n".join(rows) for rows in DOCUMENTS) + "\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(text_file):
    return Tokenizer.train(text_file, 200, min_frequency=1, progress=False)


@pytest.fixture
def folder(text_file, tokenizer, tmp_path):
    prepare(text_file, tokenizer, tmp_path / "corpus", words="segmented", validation_fraction=0.4, progress=False)
    return tmp_path / "corpus"


def rows_of(corpus):
    """(document, [words as tuples of ids]) of every row."""
    out = []
    for shard in corpus.shards:
        for i, document in enumerate(shard.documents.tolist()):
            run = slice(shard.row_offsets[i], shard.row_offsets[i + 1])
            ids, starts = shard.input_ids[run], shard.word_start[run]
            out.append((document, [tuple(w.tolist()) for w in np.split(ids, np.flatnonzero(starts))[1:]]))
    return out


def expected_rows(tokenizer):
    rows = [(d, row.split()) for d, rows in enumerate(DOCUMENTS) for row in rows]
    return [(d, [tuple(tokenizer.encode_words([word])[0].tolist()) for word in words]) for d, words in rows]


# round trip


@pytest.mark.parametrize("shard_tokens", [1, 20, 1 << 25])
def test_prepare_and_open_keep_rows_words_and_documents(text_file, tokenizer, tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr("fastbert.data.text._BLOCK", 1)
    out = tmp_path / "corpus"
    report = prepare(text_file, tokenizer, out, words="segmented", shard_tokens=shard_tokens, progress=False)
    corpus = Corpus.open(out, tokenizer=tokenizer)
    assert rows_of(corpus) == expected_rows(tokenizer)
    assert all(len(shard.input_ids) >= shard_tokens for shard in corpus.shards[:-1])
    assert len(corpus.shards) == {1: 8, 20: 3, 1 << 25: 1}[shard_tokens]
    words = TEXT.split()
    assert report.splits == {
        "train": {
            "documents": 4,
            "rows": 8,
            "tokens": corpus.tokens,
            "words": len(words),
            "unknown_tokens": 0,
        }
    }
    assert report.characters == sum(map(len, words))
    assert not report.dropped and "nothing was dropped" in str(report)


def test_the_manifest_describes_the_folder(folder, tokenizer, text_file):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokenizer"] == {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    assert manifest["sources"] == [{"path": str(text_file), "bytes": len(TEXT.encode()), "rows": 8}]
    assert manifest["settings"]["words"] == "segmented"
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            assert (folder / shard["file"]).stat().st_size == shard["bytes"]
    assert Corpus.open(folder).load_tokenizer().fingerprint == tokenizer.fingerprint


def test_preparing_twice_gives_the_same_bytes(folder, text_file, tokenizer, tmp_path):
    prepare(text_file, tokenizer, tmp_path / "again", words="segmented", validation_fraction=0.4, progress=False)
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()


def test_shards_are_plain_arrow_files(folder):
    table = pa.ipc.open_file(folder / "train-00000.arrow").read_all()
    assert [(f.name, str(f.type)) for f in table.schema] == [
        ("document", "int64"),
        ("input_ids", "list<item: uint16>"),
        ("word_start", "list<item: uint8>"),
    ]
    assert len(table) == len(Corpus.open(folder))


def test_opening_copies_nothing(folder):
    before = pa.total_allocated_bytes()
    corpus = Corpus.open(folder)
    assert pa.total_allocated_bytes() == before
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder / "train-00000.arrow") in line
    ]
    low, high = (int(x, 16) for x in mapped[0].split()[0].split("-"))
    for array in vars(corpus.shards[0]).values():
        assert low <= array.ctypes.data < high
        assert not array.flags.owndata and not array.flags.writeable


def test_large_vocabularies_are_stored_as_int32(tmp_path):
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*specials, *(f"w{i}" for i in range(70000))]) + "\n")
    (tmp_path / "t.txt").write_text("w69999 w1\n")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", progress=False)
    ids = Corpus.open(tmp_path / "out").shards[0].input_ids
    assert ids.dtype == np.int32 and ids.tolist() == [70004, 6]


def test_a_pickled_corpus_maps_the_same_files(folder):
    corpus = Corpus.open(folder, "validation")
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.split == "validation" and rows_of(copy) == rows_of(corpus)


# words


def test_tags_are_cut_off(tokenizer, tmp_path, folder):
    tagged = "\n\n".join("\n".join(" ".join(f"{w}/n" for w in row.split()) for row in d) for d in DOCUMENTS)
    (tmp_path / "tagged.txt").write_text(tagged, encoding="utf-8")
    prepare(tmp_path / "tagged.txt", tokenizer, tmp_path / "out", words="segmented", tag_separator="/", progress=False)
    assert rows_of(Corpus.open(tmp_path / "out")) == expected_rows(tokenizer)
    with pytest.raises(DataError, match=r"tagged.txt:1: '中国/n' has no tag, expected word_tag"):
        prepare(tmp_path / "tagged.txt", tokenizer, tmp_path / "o2", words="segmented", tag_separator="_")
    assert not (tmp_path / "o2").exists()


def test_without_words_each_character_and_each_latin_word_is_one(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("中国hello worlds，3.14\n", encoding="utf-8")
    report = prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", words="none", progress=False)
    (_, words), *_ = rows_of(Corpus.open(tmp_path / "out"))
    assert ["".join(tokenizer.id_to_token(i) for i in word).replace("##", "") for word in words] == [
        *("中", "国", "hello", "worlds", "，", "3", ".", "14")
    ]
    assert report.splits["train"]["words"] == 8


def test_rjieba_finds_words(tokenizer, tmp_path):
    pytest.importorskip("rjieba")
    (tmp_path / "t.txt").write_text("中国人民银行发布报告 hello\n", encoding="utf-8")
    prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", words="rjieba", progress=False)
    (_, words), *_ = rows_of(Corpus.open(tmp_path / "out"))
    assert [len(word) for word in words][:4] == [6, 2, 2, 1]
    assert "rjieba" in json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]


def test_rjieba_missing_names_the_extra(tokenizer, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(MissingDependencyError, match=r"pip install fastbert-kernels\[zh\]"):
        prepare(text_file, tokenizer, tmp_path / "out", words="rjieba")


# documents and splits


def test_a_document_is_in_one_split_only(folder):
    train, validation = (Corpus.open(folder, split) for split in ("train", "validation"))
    documents = [{int(d) for shard in c.shards for d in shard.documents} for c in (train, validation)]
    assert documents[0] and documents[1] and not documents[0] & documents[1]
    assert documents[0] | documents[1] == {0, 1, 2, 3}


def test_the_split_follows_the_text_not_its_place(text_file, tokenizer, tmp_path):
    (tmp_path / "reversed.txt").write_text("\n\n".join("\n".join(d) for d in reversed(DOCUMENTS)), encoding="utf-8")
    held = []
    for name, path in (("a", text_file), ("b", tmp_path / "reversed.txt")):
        prepare(path, tokenizer, tmp_path / name, words="segmented", validation_fraction=0.4, progress=False)
        held.append({str(words) for _, words in rows_of(Corpus.open(tmp_path / name, "validation"))})
    assert held[0] == held[1]


def test_a_file_ends_a_document(tokenizer, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n\n一 二\n三\n\n \n四\n", encoding="utf-8")
    prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, tmp_path / "out", progress=False)
    assert [d for d, _ in rows_of(Corpus.open(tmp_path / "out"))] == [0, 0, 1, 2, 2, 3]


@given(hashes=st.lists(st.integers(0, 9) | st.integers(0, 2**64 - 1), min_size=1), fraction=st.floats(0, 0.99))
def test_hold_out_leaves_something_on_both_sides(hashes, fraction):
    held = hold_out(np.array(hashes, np.uint64), fraction)
    if fraction and len(set(hashes)) > 1:
        assert 0 < held.sum() < len(hashes)
        assert len(set(zip(hashes, held.tolist(), strict=True))) == len(set(hashes))
    else:
        assert not held.any()


def test_the_share_held_out_is_the_fraction():
    held = hold_out(np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64), 0.05)
    assert abs(held.mean() - 0.05) < 0.003


def test_every_common_line_end_ends_a_row(text_file, tokenizer, tmp_path):
    plain = tmp_path / "plain"
    prepare(text_file, tokenizer, plain, words="segmented", progress=False)
    for name, end in (("cr", "\r"), ("crlf", "\r\n")):
        (tmp_path / f"{name}.txt").write_bytes(TEXT.replace("\n", end).encode())
        prepare(tmp_path / f"{name}.txt", tokenizer, tmp_path / name, words="segmented", progress=False)
        assert rows_of(Corpus.open(tmp_path / name)) == rows_of(Corpus.open(plain))
    (tmp_path / "mixed.txt").write_bytes(b"a\rb\r\nc\xff\r")
    with pytest.raises(DataError, match=r"byte offset 6 \(line 3\): ff"):
        prepare(tmp_path / "mixed.txt", tokenizer, tmp_path / "mixed", progress=False)


# what is dropped is told


@pytest.mark.parametrize("text", ["中国\n人民\n", "中国\n\n中国\n"])
@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_single_document_cannot_be_split_and_the_report_says_so(tokenizer, tmp_path, text, fraction):
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    report = prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", validation_fraction=fraction, progress=False)
    assert report.splits.keys() == {"train"}
    assert "note: no validation split: there are no two different documents" in str(report)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"] == report.notes
    assert prepare(tmp_path / "t.txt", tokenizer, tmp_path / "whole", progress=False).notes == []


def test_drops_and_repairs_are_counted_with_their_places(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeff中国\n\u200b\n一 \u200b \x00 二\n".encode() + b"\xff\xfe\n\xe4\xb8 hello\n")
    report = prepare(path, tokenizer, tmp_path / "out", words="segmented", errors="replace", progress=False)
    assert report.dropped == {
        "row without a character that the tokenizer keeps": {"count": 2, "examples": [f"{path}:2", f"{path}:4"]},
        "word without a character that the tokenizer keeps": {"count": 2, "examples": [f"{path}:3", f"{path}:5"]},
    }
    assert report.repaired == {
        "NUL character, removed": {"count": 1, "examples": [f"{path}:3"]},
        "line with invalid UTF-8, replaced by U+FFFD": {"count": 2, "examples": [f"{path}:4", f"{path}:5"]},
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["dropped"], manifest["repaired"]) == (report.dropped, report.repaired)
    assert "dropped: 2 x row without" in str(report) and "repaired: 2 x line" in str(report)
    assert report.splits["train"]["rows"] == 3


def test_unknown_tokens_are_counted(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("中国 龘 龘\n", encoding="utf-8")
    report = prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", words="segmented", progress=False)
    assert report.splits["train"]["unknown_tokens"] == 2


# damage


def test_a_missing_manifest_or_shard_is_named(folder, tmp_path):
    with pytest.raises(MissingFileError, match="absent/manifest.json"):
        Corpus.open(tmp_path / "absent")
    (folder / "train-00000.arrow").unlink()
    with pytest.raises(MissingFileError, match="train-00000.arrow does not exist"):
        Corpus.open(folder)


def test_a_truncated_shard_is_named_even_without_verification(folder):
    path = folder / "train-00000.arrow"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    for verify in (True, False):
        with pytest.raises(
            DataError, match=f"train-00000.arrow has {size - 10} bytes, expected {size}: it is cut short"
        ):
            Corpus.open(folder, verify=verify)


def test_a_flipped_bit_is_found(folder):
    path = folder / "train-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match="train-00000.arrow is damaged: its sha256"):
        Corpus.open(folder)


def test_another_tokenizer_is_refused_by_fingerprint(folder, tokenizer, text_file):
    other = Tokenizer.train(text_file, 50, progress=False)
    message = f"made with the tokenizer {tokenizer.fingerprint}, got {other.fingerprint}"
    with pytest.raises(DataError, match=message):
        Corpus.open(folder, tokenizer=other)
    with pytest.raises(DataError, match=message):
        MaskedLM(Corpus.open(folder), other, max_length=16)


def test_a_split_that_is_not_there_is_named(text_file, tokenizer, tmp_path):
    prepare(text_file, tokenizer, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="splits has no 'validation', expected one of 'train'"):
        Corpus.open(tmp_path / "out", "validation")


def test_a_shard_of_another_shape_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "train-00000.arrow"
    table = pa.ipc.open_file(path).read_all().drop(["word_start"])
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    manifest["splits"]["train"]["shards"][0]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="has the columns document: int64, input_ids"):
        Corpus.open(folder, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not the manifest of a fastbert corpus"),
        ({"version": 9}, "format version 9, expected 1"),
        ({"tokenizer": None}, "field 'tokenizer' is None"),
        ({"splits": {"train": {"shards": []}}}, "'train' has no shards"),
        ({"splits": {"train": {"shards": [{"file": "x"}]}}}, "field 'splits.train.shards.rows' is None"),
        (
            {"splits": {"train": {"shards": [{"file": "../x", "rows": 1, "tokens": 1, "bytes": 1, "sha256": ""}]}}},
            "expected a name in its folder",
        ),
    ],
)
def test_a_damaged_manifest_is_named(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        Corpus.open(folder)


def test_a_damaged_column_name_is_refused(folder):
    shard = folder / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes().replace(b"document", b"\x80ocument"))
    with pytest.raises(DataError, match="train-00000.arrow holds damaged columns"):
        Corpus.open(folder, verify=False)


@given(data=st.data())
def test_mutated_folders_raise_typed_errors(text_file, tokenizer, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mutated") / "corpus"
    prepare(text_file, tokenizer, folder, words="segmented", progress=False)
    path = folder / data.draw(st.sampled_from(["manifest.json", "train-00000.arrow"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        Corpus.open(folder, verify=data.draw(st.booleans()))
    except (DataError, MissingFileError):
        pass


# crashes


@pytest.mark.parametrize(("where", "kept"), [("save_pretrained", [".out.work"]), ("encode_rows", [])])
def test_a_failure_on_the_way_leaves_what_is_finished(text_file, tokenizer, tmp_path, monkeypatch, where, kept):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, where, fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(text_file, tokenizer, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == kept


def test_a_failure_on_the_way_keeps_what_was_there(folder, text_file, tokenizer, monkeypatch):
    before = rows_of(Corpus.open(folder))
    monkeypatch.setattr(Tokenizer, "save_pretrained", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(text_file, tokenizer, folder, overwrite=True, progress=False)
    assert rows_of(Corpus.open(folder)) == before and sorted(os.listdir(folder.parent)) == [".corpus.work", "corpus"]


# packing


def spans(samples):
    return list(zip(samples.shard.tolist(), samples.start.tolist(), samples.end.tolist(), strict=True))


def greedy(corpus, capacity, packing):
    """The rule of `pack`, row by row."""
    out = []
    for number, shard in enumerate(corpus.shards):
        parts = []
        for i, document in enumerate(shard.documents.tolist()):
            start, end = int(shard.row_offsets[i]), int(shard.row_offsets[i + 1])
            while end - start > capacity:
                borders = [p for p in range(start + 1, start + capacity + 1) if shard.word_start[p]]
                cut = borders[-1] if borders else start + capacity
                parts.append((document, start, cut))
                start = cut
            parts.append((document, start, end))
        spans = []
        for document, start, end in parts:
            fits = (
                spans and end - spans[-1][1] <= capacity and (packing == "full_sentences" or spans[-1][0] == document)
            )
            if fits and packing != "single":
                spans[-1] = (document, spans[-1][1], end)
            else:
                spans.append((document, start, end))
        out += [(number, start, end) for _, start, end in spans]
    return out


@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences", "single"])
@pytest.mark.parametrize("shard_tokens", [20, 1 << 25])
def test_packing_is_greedy_and_loses_nothing(text_file, tokenizer, tmp_path, monkeypatch, packing, shard_tokens):
    monkeypatch.setattr("fastbert.data.text._BLOCK", 1)
    prepare(text_file, tokenizer, tmp_path / "out", words="segmented", shard_tokens=shard_tokens, progress=False)
    corpus = Corpus.open(tmp_path / "out")
    for length in (3, 4, 5, 8, 10, 16, 21, 64, 512):
        samples = pack(corpus, length, packing)
        assert spans(samples) == greedy(corpus, length - 2, packing)
        assert (samples.end - samples.start).sum() == corpus.tokens
        assert np.mean([end - start + 2 for _, start, end in spans(samples)]) / length == pytest.approx(samples.fill)


def test_bad_packing_arguments_are_named(folder):
    corpus = Corpus.open(folder)
    with pytest.raises(ConfigError, match="packing is 'dense', expected one of 'full_sentences'"):
        pack(corpus, 128, "dense")
    for length in (2, 1 << 17, "9", 9.5, None):
        with pytest.raises(ConfigError, match=f"max_length is {length!r}, expected 3 to 65536"):
            pack(corpus, length)
