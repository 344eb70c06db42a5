"""Pairs of segments: what they are made of, how they are labelled, and that nothing of the corpus is lost."""

import pickle

import numpy as np
import pytest
from chances import chi_square

from fastbert.data import Corpus, MaskedLM, Tokenizer, pack_pairs, prepare
from fastbert.errors import ConfigError

TEXT = "春天来了。“花开了！”他说，天气很好？是的……\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty documents of made-up sentences, some in one row, some of one word, in three shards."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    documents = []
    for number in range(40):
        mark = chr(0x4E00 + number)  # of this document alone
        rows = []
        for _ in range(rng.integers(1, 8)):
            sentences = [
                " ".join(mark * rng.integers(1, 4) for _ in range(rng.integers(1, 9))) + " 。"
                for _ in range(rng.integers(1, 4))
            ]
            rows.append(" ".join(sentences))
        documents.append("\n".join(rows))
    (folder / "text.txt").write_text("\n\n".join([*documents, "丐"]), encoding="utf-8")
    tokenizer = Tokenizer.train(folder / "text.txt", 100, min_frequency=1, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert.data.text._BLOCK", 200)  # a shard is closed between blocks of text
        prepare(folder / "text.txt", tokenizer, folder / "out", words="segmented", shard_tokens=900, progress=False)
    split = Corpus.open(folder / "out")
    assert len(split.shards) >= 3
    return split, tokenizer


def laid(corpus, task, epoch=0, max_length=40, **options):
    """The samples, and of each in an epoch the segments (global places of their pieces) and the label."""
    from fastbert.data.draws import sample_keys

    split, tokenizer = corpus
    samples = pack_pairs(split, tokenizer, max_length, task, **options)
    indices = np.arange(len(samples))
    found = samples.lay(indices, sample_keys(0, epoch, indices), split.shards)
    offsets = np.cumsum([0] + [len(shard.input_ids) for shard in split.shards])
    runs = [(offsets[shard] + start, offsets[shard] + end) for shard, start, end in found.runs]
    assert [end - start for start, end in runs] == found.lengths.tolist() and min(found.lengths) > 0
    segments = [runs[end - parts : end] for parts, end in zip(found.parts, np.cumsum(found.parts), strict=True)]
    return samples, segments, found.labels


def global_facts(corpus):
    """Of every piece of the corpus the document, and whether a sentence begins there."""
    split, tokenizer = corpus
    ids = np.concatenate([shard.input_ids for shard in split.shards])
    documents = np.concatenate([np.repeat(s.documents, np.diff(s.row_offsets)) for s in split.shards])
    rows = np.concatenate([np.isin(np.arange(len(s.input_ids)), s.row_offsets) for s in split.shards])
    return documents, rows | np.append(False, ids[:-1] == tokenizer.token_to_id("。")), ids


@pytest.mark.parametrize("task", ["nsp", "sop", None])
@pytest.mark.parametrize("max_length", [5, 12, 40, 200])
def test_chunks_hold_every_piece_once_and_fit(corpus, task, max_length):
    documents, begins, ids = global_facts(corpus)
    samples, segments, _ = laid(corpus, task, max_length=max_length)
    covered = np.zeros(len(documents), int)
    for first, last in zip(samples.sentences[samples.first], samples.sentences[samples.last], strict=True):
        covered[first:last] += 1
        assert len(set(documents[first:last])) == 1 and last - first <= max_length - 3
    assert covered.max() == 1
    alone = np.flatnonzero(covered == 0)
    assert len(alone) < 0.4 * len(ids) if max_length == 5 else set(documents[alone]) <= {40} | set(documents[alone - 1])
    for parts in segments:
        assert sum(end - start for start, end in parts) <= max_length - 3


def test_next_sentence_pairs_are_what_their_labels_say(corpus):
    documents, begins, _ = global_facts(corpus)
    samples, segments, labels = laid(corpus, "nsp")
    alone = samples.last - samples.first == 1
    for (a, b), label, single in zip(segments, labels.tolist(), alone.tolist(), strict=True):
        assert len(set(documents[a[0] : a[1]])) == len(set(documents[b[0] : b[1]])) == 1
        assert begins[a[0]] and begins[b[0]]
        if label:
            assert documents[a[0]] != documents[b[0]]
        else:
            assert a[1] == b[0] and documents[a[0]] == documents[b[0]] and not single
    assert labels[alone].all() and len(alone) > 100


def test_half_of_the_pairs_are_random_and_another_half_in_each_epoch(corpus):
    views = [laid(corpus, "nsp", epoch) for epoch in range(60)]
    several = views[0][0].last - views[0][0].first > 1
    labels = np.array([view[2][several] for view in views])
    assert chi_square(np.bincount(labels.ravel()), [0.5, 0.5]) > 0.01
    assert (
        chi_square(np.bincount(labels.sum(0) > 30, minlength=2), [0.5513, 0.4487]) > 0.01
    )  # of 60 coins, more than 30
    assert len({view.tobytes() for view in labels}) == 60


def test_random_segments_come_from_every_other_document_alike(corpus):
    documents, _, _ = global_facts(corpus)
    counts = np.zeros(41)
    for epoch in range(40):
        _, segments, labels = laid(corpus, "nsp", epoch)
        for (_, b), label in zip(segments, labels, strict=True):
            counts[documents[b[0]]] += label
    # The documents that have many pairs of their own are drawn a little less often, as they are not drawn for these.
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


@pytest.mark.parametrize("max_length", [12, 40])
def test_sentence_order_pairs_are_swapped_where_the_label_says_so(corpus, max_length):
    _, begins, _ = global_facts(corpus)
    samples, segments, labels = laid(corpus, "sop", max_length=max_length)
    begin, end = samples.sentences[samples.first], samples.sentences[samples.last]
    starts = np.concatenate([shard.word_start for shard in corpus[0].shards])
    for i, ((a, b), label) in enumerate(zip(segments, labels.tolist(), strict=True)):
        first, second = (b, a) if label else (a, b)
        assert (first[0], second[1]) == (begin[i], end[i]) and first[1] == second[0]
        if samples.last[i] - samples.first[i] > 1:
            assert begins[second[0]]
        elif starts[begin[i] + 1 : end[i]].any():
            assert starts[second[0]]
            borders = np.flatnonzero(starts[begin[i] + 1 : end[i]]) + begin[i] + 1
            middle = (begin[i] + end[i]) // 2
            assert abs(second[0] - middle) == np.abs(borders - middle).min()
    views = np.array([laid(corpus, "sop", epoch, max_length)[2] for epoch in range(20)])
    assert chi_square(np.bincount(views.ravel()), [0.5, 0.5]) > 0.01


def test_electras_segments_are_in_order_and_the_first_is_about_half(corpus):
    shares, lone = [], 0
    for epoch in range(10):
        samples, segments, labels = laid(corpus, None, epoch)
        assert labels is None
        for i, parts in enumerate(segments):
            assert (
                parts[0][0] == samples.sentences[samples.first[i]]
                and parts[-1][1] == samples.sentences[samples.last[i]]
            )
            if samples.last[i] - samples.first[i] > 1:
                lone += len(parts) == 1
                shares.append((parts[0][1] - parts[0][0]) / 37 if len(parts) == 2 else None)
    assert chi_square([lone, len(shares) - lone], [0.1, 0.9]) > 0.01
    assert 0.3 < np.mean([share for share in shares if share is not None]) < 0.7


def test_sentences_end_with_their_closing_marks(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT * 2, encoding="utf-8")
    tokenizer = Tokenizer.train(tmp_path / "t.txt", 100, min_frequency=1, progress=False)
    prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", progress=False)
    samples = pack_pairs(Corpus.open(tmp_path / "out"), tokenizer, 64, "sop")
    ids = Corpus.open(tmp_path / "out").shards[0].input_ids
    cut = [tokenizer.decode(part) for part in np.split(ids, samples.sentences[1:-1])]
    assert cut == ["春天来了。", "“花开了！”", "他说，天气很好？", "是的……"] * 2


@pytest.mark.parametrize("level", ["char", "wordpiece", "bpe", "unigram", "word"])
def test_sentences_end_alike_whatever_the_pieces_are(tmp_path, level):
    words = "春天 来 了 。 “ 花 开 了 ！ ” 他 说 ， 天气 很 好 ？ 是 的 ！ "
    (tmp_path / "t.txt").write_text((words * 9 + "\n") * 9, encoding="utf-8")
    tokenizer = Tokenizer.train(tmp_path / "t.txt", 300, level, words="segmented", progress=False)
    prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", words="segmented", progress=False)
    assert len(pack_pairs(Corpus.open(tmp_path / "out"), tokenizer, 64, "sop").sentences) - 1 == 4 * 81


def test_a_document_over_several_shards_is_one(tmp_path):
    """Text of it is no random text, and no separator stands where a shard ends."""
    (tmp_path / "t.txt").write_text("一 二 三 四 。\n" * 60, encoding="utf-8")
    tokenizer = Tokenizer.train(tmp_path / "t.txt", 50, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert.data.text._BLOCK", 100)
        prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", words="segmented", shard_tokens=50, progress=False)
    split = Corpus.open(tmp_path / "out")
    assert len(split.shards) > 3
    with pytest.raises(ConfigError, match="has 1 document in the split 'train', expected at least 2"):
        MaskedLM(split, tokenizer, max_length=40, objective="mlm+nsp")
    batch = MaskedLM(split, tokenizer, max_length=40, separators="row").batch(range(6), 0)
    twice = (batch.input_ids[1:] == tokenizer.sep_id) & (batch.input_ids[:-1] == tokenizer.sep_id)
    assert not twice.any()


def test_some_chunks_are_made_for_a_smaller_length(corpus):
    sizes = []
    for short_prob in (0.0, 0.5):
        samples, _, _ = laid(corpus, "sop", max_length=103, short_prob=short_prob)
        sizes.append((samples.room == 100).mean())
    assert sizes[0] == 1 and 0.3 < sizes[1] < 0.7
    again, _, _ = laid(corpus, "sop", max_length=103, short_prob=0.5)
    assert np.array_equal(samples.room, again.room) and np.array_equal(samples.first, again.first)
    other, _, _ = laid(corpus, "sop", max_length=103, short_prob=0.5, seed=1)
    assert not np.array_equal(samples.sentences[samples.first], other.sentences[other.first])


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
@pytest.mark.parametrize("masking", ["token", "whole_word", "ngram"])
def test_a_pair_looks_the_same_in_every_batch(corpus, objective, masking):
    made = MaskedLM(*corpus, max_length=40, objective=objective, masking=masking, seed=5)
    made = pickle.loads(pickle.dumps(made))
    whole, rng = made.batch(range(len(made)), 3), np.random.default_rng(1)
    borders = whole.cu_seqlens.tolist()
    for size in (1, 3, 20):
        indices = rng.integers(0, len(made), size)
        batch = made.batch(indices, 3)
        ends = batch.cu_seqlens.tolist()
        for place, index in enumerate(indices.tolist()):
            own, all_of = slice(ends[place], ends[place + 1]), slice(borders[index], borders[index + 1])
            for name in ("input_ids", "labels", "token_type_ids"):
                assert getattr(batch, name)[own].tolist() == getattr(whole, name)[all_of].tolist()
            assert batch.sentence_labels[place] == whole.sentence_labels[index]


def test_special_tokens_and_types_of_a_pair(corpus):
    split, tokenizer = corpus
    batch = MaskedLM(split, tokenizer, max_length=40, objective="mlm+nsp").batch(range(100), 0)
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids, types = batch.input_ids[start:end].numpy(), batch.token_type_ids[start:end].numpy()
        seps = np.flatnonzero(ids == tokenizer.sep_id)
        assert ids[0] == tokenizer.cls_id and len(seps) == 2 and seps[1] == len(ids) - 1
        assert types.tolist() == [0] * (seps[0] + 1) + [1] * (len(ids) - seps[0] - 1)
        assert (batch.labels[start:end].numpy()[[0, *seps]] == -100).all()
    assert batch.max_seqlen == np.diff(batch.cu_seqlens.numpy()).max() <= 40


def test_static_pairs_and_masks_come_again(corpus):
    made = MaskedLM(*corpus, max_length=40, objective="mlm+nsp", static_masks=3)
    views = [made.batch(range(50), epoch) for epoch in range(7)]
    for name in ("input_ids", "labels", "sentence_labels"):
        seen = [getattr(view, name).numpy().tobytes() for view in views]
        assert seen[0] == seen[3] == seen[6] and seen[1] == seen[4] and len(set(seen)) == 3


def test_what_pairs_cannot_be_made_of_is_refused(corpus, tmp_path):
    split, tokenizer = corpus
    with pytest.raises(ConfigError, match="max_length is 4, expected 5 to 65536"):
        MaskedLM(split, tokenizer, max_length=4, objective="mlm+sop")
    with pytest.raises(ConfigError, match="packing is 'single', expected 'pairs': the objective 'mlm.nsp' asks"):
        MaskedLM(split, tokenizer, max_length=40, objective="mlm+nsp", packing="single")
    with pytest.raises(ConfigError, match="packing is 'pairs', expected another"):
        MaskedLM(split, tokenizer, max_length=40, packing="pairs")
    with pytest.raises(ConfigError, match="separators is 'row' with packing 'pairs'"):
        MaskedLM(split, tokenizer, max_length=40, objective="mlm+nsp", separators="row")
    with pytest.raises(ConfigError, match="objective is 'nsp', expected one of 'mlm', 'mlm.nsp'"):
        MaskedLM(split, tokenizer, max_length=40, objective="nsp")
    (tmp_path / "one.txt").write_text("一 二 三\n四 五\n", encoding="utf-8")
    own = Tokenizer.train(tmp_path / "one.txt", 50, min_frequency=1, progress=False)
    prepare(tmp_path / "one.txt", own, tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="has 1 document in the split 'train', expected at least 2"):
        MaskedLM(Corpus.open(tmp_path / "out"), own, max_length=40, objective="mlm+nsp")
