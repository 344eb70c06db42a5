"""Spans of words: the rule, word by word, against what is done for a whole batch at once."""

import numpy as np
import pytest
from chances import chi_square
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.draws import SPAN, draw, sample_keys, shuffled, stream, unit
from fastbert.data.masking import STRATEGIES
from fastbert.data.spans import select_spans, word_runs

WEIGHTS = [strategy.weights for strategy in STRATEGIES.values() if strategy.weights] + [(0.0, 0.0, 1.0), (0.0, 1.0)]


def by_the_rule(keys, lengths, budget, word_start, weights):
    """First piece and size of every word that the rule chooses, sorted."""
    begin, size, words = word_runs(lengths, word_start)
    order, first, chosen = shuffled(keys, words), 0, []
    cumulated = np.cumsum(weights)
    for sample, count in enumerate(words.tolist()):
        taken, left = set(), int(budget[sample])
        for start in order[first : first + count].tolist():
            there = min(len(weights), first + count - start)
            lot = (
                unit(draw(stream(keys[sample : sample + 1], SPAN), np.array([start - first])))[0] * cumulated[there - 1]
            )
            n = min(there, 1 + sum(lot >= edge for edge in cumulated.tolist()))
            while n and size[start : start + n].sum() > left:
                n -= 1
            span = set(range(start, start + n))
            if n and not span & taken:
                taken |= span
                left -= int(size[start : start + n].sum())
        chosen += [(int(begin[word]), int(size[word])) for word in sorted(taken)]
        first += count
    return sorted(chosen)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    density, seed = draw(st.floats(0.05, 1)), draw(st.integers(0, 2**32))
    starts = np.random.default_rng(seed).random(sum(lengths)) < density
    prob = draw(st.sampled_from([0.1, 0.15, 0.5, 1.0]))
    return np.array(lengths), starts.astype(np.uint8), np.rint(prob * np.array(lengths)).astype(np.int64), seed


@settings(max_examples=400)
@given(case=batches(), weights=st.sampled_from(WEIGHTS))
def test_a_batch_at_once_is_the_rule_word_by_word(case, weights):
    lengths, starts, budget, seed = case
    keys = sample_keys(seed, 1, np.arange(len(lengths)))
    chosen = select_spans(keys, lengths, budget, starts, weights)
    assert sorted(zip(chosen.first.tolist(), chosen.size.tolist(), strict=True)) == by_the_rule(
        keys, lengths, budget, starts, weights
    )
    assert len(set(chosen.pieces.tolist())) == len(chosen.pieces)
    for span in np.unique(chosen.span):
        words = np.flatnonzero(chosen.span == span)
        assert np.array_equal(words, np.arange(words[0], words[-1] + 1)) and len(words) <= len(weights)
        assert np.array_equal(chosen.first[words][1:], (chosen.first + chosen.size)[words][:-1])


@pytest.mark.parametrize("name", ["ngram", "macbert", "span"])
def test_lengths_of_spans_are_as_published(name):
    """Of the first span of each sample, which nothing shortens."""
    weights, count = np.array(STRATEGIES[name].weights), 4000
    keys, lengths = sample_keys(3, 0, np.arange(count)), np.full(count, 400)
    starts, budget = np.ones(count * 400, np.uint8), np.full(count, 11)
    chosen = select_spans(keys, lengths, budget, starts, weights)
    first_word = shuffled(keys, lengths).reshape(count, -1)[:, 0]
    inner = first_word % 400 <= 400 - len(weights)
    length_of = dict(zip(*np.unique(chosen.span, return_counts=True), strict=True))
    span_of = dict(zip(chosen.first.tolist(), chosen.span.tolist(), strict=True))
    lengths_seen = np.array([length_of[span_of[word]] for word in first_word[inner].tolist()])
    assert chi_square(np.bincount(lengths_seen, minlength=len(weights) + 1)[1:], weights / weights.sum()) > 0.01


def test_albert_and_macbert_lengths_are_those_of_the_papers():
    assert np.allclose(
        np.array(STRATEGIES["ngram"].weights) / sum(STRATEGIES["ngram"].weights), [6 / 11, 3 / 11, 2 / 11]
    )
    assert STRATEGIES["macbert"].weights == (0.4, 0.3, 0.2, 0.1)


def test_a_sample_without_budget_has_nothing_chosen():
    chosen = select_spans(
        sample_keys(0, 0, np.arange(2)), np.array([5, 5]), np.array([0, 2]), np.ones(10, np.uint8), (1, 1)
    )
    assert chosen.pieces.min() >= 5 and len(chosen.pieces) == 2
    nothing = select_spans(sample_keys(0, 0, np.arange(1)), np.array([5]), np.array([0]), np.ones(5, np.uint8), (1, 1))
    assert len(nothing.pieces) == len(nothing.span) == 0
