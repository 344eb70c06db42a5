"""Which pieces a model must guess, and what it sees in their place.

Dynamic masking as a pure function of (seed, epoch, sample index), see fastbert.data.draws; numpy on a whole packed
batch. Positions here count the pieces that can be chosen: those of text, and [CLS] and [SEP] only where asked.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple, Protocol

import numpy as np

from fastbert.data.arrays import expand, first_of
from fastbert.data.checks import check
from fastbert.data.draws import ACTION, CHOICE, COUNT, ORDER, REPLACEMENT, Shuffle, below, draw, shuffled, stream, unit
from fastbert.data.spans import Chosen, select_spans, word_runs
from fastbert.errors import ConfigError

COUNTS = ("rounded", "stochastic", "bernoulli")


class Strategy(NamedTuple):
    """What is chosen as one, and what one action is drawn for: every "piece", "word" or "span". weights: of spans of
    1, 2, ... words; None: single pieces."""

    weights: tuple[float, ...] | None
    action: str

    @property
    def masks(self) -> bool:
        """Whether [MASK] is shown; otherwise words are replaced by similar ones."""
        return self.action != "word"


STRATEGIES = {
    "token": Strategy(None, "piece"),
    "whole_word": Strategy((1.0,), "piece"),
    "ngram": Strategy((1.0, 1 / 2, 1 / 3), "piece"),
    "macbert": Strategy((0.4, 0.3, 0.2, 0.1), "word"),
    "span": Strategy(tuple(0.2 * 0.8**n for n in range(10)), "span"),
}


class WordReplacer(Protocol):
    """What replaces words in MacBERT's masking: see fastbert.data.similar_pieces."""

    def replacements(self, ids, first, size, draw) -> tuple[np.ndarray, np.ndarray]: ...

    def random_words(self, size, draw) -> np.ndarray: ...


class Vocabulary(NamedTuple):
    """What is shown in place of a chosen piece: mask_id; ids that are not special (int64), of which a random one is
    drawn; similar words, for "macbert"."""

    mask_id: int
    ordinary: np.ndarray
    similar: WordReplacer | None = None


@dataclass(frozen=True)
class Masking:
    """A way to choose pieces and to replace them.

    strategy: what is chosen as one.
      "token": single pieces.
      "whole_word": words, as Google's whole-word masking takes them (BERT-wwm, arXiv 1906.08101).
      "ngram": spans of 1 to 3 words with weights 1/n (ALBERT, 1909.11942).
      "macbert": spans of 1 to 4 words with weights 0.4, 0.3, 0.2, 0.1; each word is replaced by a similar word (or
        a random one, or stays), never by [MASK] (MacBERT, 2004.13922).
      "span": spans of 1 to 10 words with weights 0.2 x 0.8^(n-1), replaced as one (SpanBERT, 1907.10529).
    prob: share of the pieces of a sample that is chosen, in whole words as far as they fit.
    count: "rounded": of n pieces max(1, round(prob n)) (BERT); "stochastic": floor(prob n + u), u uniform in [0, 1)
      (RoBERTa); "bernoulli": each piece or word for itself with probability prob (WoBERT), for "token" and
      "whole_word".
    actions: shares of what is replaced by [MASK] ("macbert": by a similar word), replaced by a random piece (a random
      word), and left as it is.
    weights: those of spans of 1, 2, ... words in place of the strategy's own.
    most: largest number of pieces that are chosen in a sample.
    special: [CLS] and [SEP] can be chosen too, and count as pieces (RoBERTa, WoBERT).

    ConfigError for what makes no sense.
    """

    strategy: str = "whole_word"
    prob: float = 0.15
    count: str = "rounded"
    actions: Sequence[float] = (0.8, 0.1, 0.1)
    weights: Sequence[float] | None = None
    most: int | None = None
    special: bool = False

    def __post_init__(self):
        if self.strategy not in tuple(STRATEGIES):
            raise ConfigError(f"masking is {self.strategy!r}, expected one of {', '.join(map(repr, STRATEGIES))}")
        check("mask_prob", self.prob, Real, "a number above 0 and at most 1", lambda prob: 0 < prob <= 1)
        if self.count not in COUNTS:
            raise ConfigError(f"mask_count is {self.count!r}, expected one of {', '.join(map(repr, COUNTS))}")
        actions = _checked_shares("mask_actions", self.actions, "3 shares that sum to 1", lambda x: len(x) == 3)
        object.__setattr__(self, "actions", actions)
        if not math.isclose(sum(self.actions), 1, abs_tol=1e-6):
            raise ConfigError(f"mask_actions is {self.actions!r}, expected 3 shares that sum to 1")
        if self.weights is not None:
            if self.strategy in ("token", "whole_word"):
                raise ConfigError(
                    f"span_weights is {self.weights!r} with masking {self.strategy!r}, expected None: it has no spans"
                )
            expected = "1 to 64 weights"
            weights = _checked_shares("span_weights", self.weights, expected, lambda x: 0 < len(x) <= 64 and sum(x) > 0)
            object.__setattr__(self, "weights", weights)
        if self.most is not None:
            check("max_predictions", self.most, Integral, "an integer of at least 1", lambda most: most >= 1)
        if self.count == "bernoulli" and (self.most is not None or self.strategy not in ("token", "whole_word")):
            raise ConfigError(
                f"mask_count is 'bernoulli' with masking {self.strategy!r} and max_predictions {self.most}, expected "
                "'token' or 'whole_word' and None: there is no budget that could be kept"
            )

    def choose(self, keys: np.ndarray, lengths: np.ndarray, word_start: np.ndarray) -> Chosen:
        """What is chosen of samples of `lengths` pieces (int64 [B]) with keys uint64 [B]; word_start uint8 [sum of
        lengths], 1 where a word begins. Positions count through the whole batch."""
        weights = STRATEGIES[self.strategy].weights
        if self.count == "bernoulli":
            return _select_each(keys, lengths, self.prob, None if weights is None else word_start)
        budget = self._budgets(keys, lengths)
        if weights is None:
            return _select_pieces(keys, lengths, budget)
        return select_spans(keys, lengths, budget, word_start, self.weights or weights)

    def _budgets(self, keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """How many pieces of each sample to choose. Google's code counts [CLS] and [SEP] in the length; here they are
        left out unless they can be chosen, so that the share of chosen pieces is `prob`."""
        if self.count == "stochastic":
            budget = np.floor(self.prob * lengths + unit(stream(keys, COUNT)))
        else:
            budget = np.maximum(1, np.rint(self.prob * lengths))
        return (budget if self.most is None else np.minimum(budget, self.most)).astype(np.int64)

    def show(
        self, keys: np.ndarray, positions: np.ndarray, chosen: Chosen, ids: np.ndarray, vocabulary: Vocabulary
    ) -> np.ndarray:
        """What the model sees in place of chosen pieces (int64). keys uint64 [W] and positions int64 [W] (of its first
        piece, within its sample) of each chosen word; ids int64: its pieces, word after word."""
        size, strategy = chosen.size, STRATEGIES[self.strategy]
        if strategy.action == "word":
            kinds = self._kinds(draw(stream(keys, ACTION), positions))
            return _show_words(keys, positions, size, ids, *kinds, vocabulary.similar)
        inner = np.arange(len(ids)) - np.repeat(first_of(size), size)
        piece_keys, piece_positions = np.repeat(keys, size), np.repeat(positions, size) + inner
        if strategy.action == "piece":
            action = draw(stream(piece_keys, ACTION), piece_positions)
        else:
            heads = np.flatnonzero(np.diff(chosen.span, prepend=-1))
            of_spans = np.repeat(positions[heads], np.diff(heads, append=len(positions)))
            action = np.repeat(draw(stream(keys, ACTION), of_spans), size)
        masked, random = self._kinds(action)
        shown = np.where(masked, vocabulary.mask_id, ids)
        random = np.flatnonzero(random)
        lot = draw(stream(piece_keys[random], REPLACEMENT), piece_positions[random])
        shown[random] = vocabulary.ordinary[below(lot, len(vocabulary.ordinary))]
        return shown

    def _kinds(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is masked (or replaced by a similar word), and what is replaced by a random piece (bool)."""
        masked = action < _share(self.actions[0])
        return masked, ~masked & (action < _share(self.actions[0] + self.actions[1]))


def _show_words(
    keys: np.ndarray,
    positions: np.ndarray,
    size: np.ndarray,
    ids: np.ndarray,
    similar: np.ndarray,
    random: np.ndarray,
    table: WordReplacer,
) -> np.ndarray:
    """MacBERT's words: similar ones where asked for and there is one, else random ones of as many pieces."""
    first, shown = first_of(size), ids.copy()
    words = np.flatnonzero(similar)
    lots = draw(stream(keys[words], CHOICE), positions[words])
    found, pieces = table.replacements(ids, first[words], size[words], lots)
    shown[expand(first[words], size[words])] = pieces
    words = np.concatenate([np.flatnonzero(random), words[~found]])
    lots = draw(stream(keys[words], REPLACEMENT), positions[words])
    shown[expand(first[words], size[words])] = table.random_words(size[words], lots)
    return shown


def _select_pieces(keys: np.ndarray, lengths: np.ndarray, budget: np.ndarray) -> Chosen:
    """Exactly `budget` pieces of each sample, without replacement."""
    shuffle = Shuffle(keys, lengths)
    wanted = budget + 4 * np.sqrt(budget) + 8
    order, sample = shuffle.until(wanted)
    there = np.bincount(sample, minlength=len(lengths))
    if (there < budget).any():
        order, there = shuffled(keys, lengths), lengths
    first = order[expand(first_of(there), budget)]
    return Chosen(first, np.ones_like(first), np.arange(len(first)))


def _select_each(keys: np.ndarray, lengths: np.ndarray, prob: float, word_start: np.ndarray | None) -> Chosen:
    """Every word, or piece if word_start is None, for itself with probability `prob`."""
    begin, size, words = word_runs(lengths, word_start)
    item = np.arange(len(begin)) - np.repeat(first_of(words), words)
    taken = unit(draw(np.repeat(stream(keys, ORDER), words), item)) < prob
    first, size = begin[taken], size[taken]
    return Chosen(first, size, np.arange(len(first)))


def _share(share: float) -> np.uint64:
    return np.uint64(min(int(share * 2.0**64), (1 << 64) - 1))


def _checked_shares(
    name: str, values: Sequence[float], expected: str, fits: Callable[[tuple], bool]
) -> tuple[float, ...]:
    try:
        shares = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        shares = ()
    if not fits(shares) or not all(math.isfinite(share) and share >= 0 for share in shares):
        raise ConfigError(f"{name} is {values!r}, expected {expected}, each at least 0")
    return shares
