"""What a model is trained to do: objectives turn a corpus into batches of inputs and labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import torch

from fastbert.data.arrays import expand, first_of
from fastbert.data.checks import check
from fastbert.data.draws import MOST_SAMPLES, permutation, sample_keys
from fastbert.data.masking import STRATEGIES, Masking, Vocabulary
from fastbert.data.pairs import Pairs, pack_pairs
from fastbert.data.samples import PACKINGS, SEPARATORS, Laid, Samples, pack
from fastbert.data.shards import Corpus
from fastbert.data.similar_pieces import SimilarPieces
from fastbert.data.similar_words import SimilarWords
from fastbert.data.tokenizer import Tokenizer
from fastbert.errors import ConfigError, DataError


@dataclass(frozen=True)
class Objective:
    """What goes with the name of an objective. sentences: what is asked about a pair of segments; masking and actions:
    what is used if nothing is said."""

    sentences: str | None = None
    masking: str = "whole_word"
    actions: tuple[float, float, float] = (0.8, 0.1, 0.1)

    @property
    def packing(self) -> str:
        return "full_sentences" if self.sentences is None else "pairs"


OBJECTIVES = {
    "mlm": Objective(),
    "mlm+nsp": Objective("nsp"),
    "mlm+sop": Objective("sop"),
    "mac+sop": Objective("sop", masking="macbert"),
    "rtd": Objective(masking="token", actions=(0.85, 0.0, 0.15)),
}


@dataclass(frozen=True)
class Batch:
    """A packed batch. input_ids int64 [T]; labels int64 [T], -100 where nothing is to be guessed; cu_seqlens int32
    [B+1]; max_seqlen; token_type_ids int64 [T] or None where all are 0; sentence_labels int64 [B] (next-sentence
    prediction: 0 the second segment follows the first, 1 it is random; sentence order: 0 in order, 1 swapped) or None.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    token_type_ids: torch.Tensor | None = None
    sentence_labels: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()})


class MaskedLM:
    """Masked language modelling, alone or with a question about two segments: len(objective) samples; a batch is a pure
    function of (seed, epoch, sample indices).

    objective: "mlm"; "mlm+nsp", with next-sentence prediction (BERT, NEZHA); "mlm+sop", with sentence-order prediction
    (ALBERT); "mac+sop", masking as correction with sentence order (MacBERT); "rtd", what ELECTRA's generator is given.
    packing: how rows become samples, "full_sentences", "doc_sentences", "single" (see fastbert.data.samples), "pairs"
    (the only one for objectives with a question about segments) or "two_segments" (see fastbert.data.pairs); None: that
    of the objective. separators: "sample" or "row", see `pack`. short_prob: see `pack_pairs`.
    masking: a Masking, the name of a strategy with the Masking's other defaults, or None: that of the objective.
    mask_prob: in place of the Masking's. similar_words: the table, for "macbert"; also compiled, as SimilarPieces.
    static_masks: 0, every epoch has masks and pairs of its own (dynamic masking, RoBERTa); n, there are n of them, in
    turn (static masking; BERT's code makes 10 copies, NEZHA's 5).

    For validation use one epoch number throughout, so that the masks stay the same. Raises ConfigError for an argument
    that makes no sense, DataError if the corpus was made with another tokenizer. Picklable.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        objective: str = "mlm",
        packing: str | None = None,
        separators: str = "sample",
        short_prob: float = 0.0,
        masking: str | Masking | None = None,
        mask_prob: float | None = None,
        similar_words: SimilarWords | SimilarPieces | None = None,
        static_masks: int = 0,
        seed: int = 0,
    ):
        what = _objective(objective)
        self.masking = _masking(what, masking, mask_prob)
        packing = what.packing if packing is None else packing
        check_objective(objective, self.masking.strategy, packing, separators)
        check("seed", seed, Integral, "an integer")
        check("static_masks", static_masks, Integral, "an integer of at least 0", lambda masks: masks >= 0)
        check("corpus", corpus, Corpus, "a Corpus")
        check("tokenizer", tokenizer, Tokenizer, "a Tokenizer")
        corpus.check_tokenizer(tokenizer)
        self.corpus, self.seed, self.static_masks = corpus, seed, static_masks
        self.samples = _samples(what, corpus, tokenizer, max_length, packing, separators, short_prob, seed)
        similar = _compiled(self.masking, similar_words, tokenizer)
        self._vocabulary = Vocabulary(tokenizer.mask_id, tokenizer.ordinary_ids, similar)
        self._cls, self._sep = tokenizer.cls_id, tokenizer.sep_id

    def __len__(self) -> int:
        return len(self.samples)

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of sample indices (int64) for an epoch, a pure function of (seed, epoch)."""
        check("epoch", epoch, Integral, "an integer")
        return permutation(self.seed, epoch, len(self))

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The samples `indices` as they look in `epoch`. DataError for indices that are none."""
        check("epoch", epoch, Integral, "an integer")
        indices = self._checked(indices)
        keys = sample_keys(self.seed, epoch % self.static_masks if self.static_masks else epoch, indices)
        laid = self.samples.lay(indices, keys, self.corpus.shards)
        ids, word_start, cu_seqlens, seps, is_text = self._gather(laid)
        places, lengths = None, np.diff(cu_seqlens)
        if not self.masking.special:
            places, lengths, word_start = np.flatnonzero(is_text), lengths - 1 - laid.parts, word_start[is_text]
        chosen = self.masking.choose(keys, lengths, word_start)

        first = first_of(lengths)
        sample = np.searchsorted(first, chosen.first, side="right") - 1
        pieces = chosen.pieces if places is None else places[chosen.pieces]
        labels = np.full(len(ids), -100)
        labels[pieces] = truth = ids[pieces]
        ids[pieces] = self.masking.show(keys[sample], chosen.first - first[sample], chosen, truth, self._vocabulary)
        return Batch(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(np.diff(cu_seqlens).max()),
            token_type_ids=self._token_types(laid, cu_seqlens, seps),
            sentence_labels=None if laid.labels is None else torch.from_numpy(laid.labels),
        )

    def _checked(self, indices: Sequence[int]) -> np.ndarray:
        try:
            indices = np.asarray(indices)
        except ValueError as error:
            raise DataError(f"sample indices are {indices!r}, expected integers in one dimension") from error
        if indices.ndim != 1 or not 0 < len(indices) <= MOST_SAMPLES:
            raise DataError(
                f"sample indices have shape {indices.shape}, expected 1 to {MOST_SAMPLES} of them in one dimension"
            )
        if indices.dtype.kind not in "iu":
            raise DataError(f"sample indices have dtype {indices.dtype}, expected integers: the first is {indices[0]}")
        outside = (indices < 0) | (indices >= len(self))
        if outside.any():
            raise DataError(f"sample index {indices[outside][0]} is outside of the {len(self)} samples")
        return indices.astype(np.int64)

    def _gather(self, laid: Laid) -> tuple[np.ndarray, ...]:
        """Packed ids (int64 [T]) and word_start (uint8 [T]), with [CLS] before each sample and [SEP] after each part,
        which begin words; borders of samples (int64 [B + 1]); places of [SEP] (int64 [P]); what is text (bool [T])."""
        shards = self.corpus.shards
        seps = np.cumsum(laid.lengths + 1) + np.repeat(np.arange(len(laid.parts)), laid.parts)
        cu_seqlens = np.concatenate([[0], seps[np.cumsum(laid.parts) - 1] + 1])
        total = int(cu_seqlens[-1])
        is_text = np.ones(total, bool)
        is_text[cu_seqlens[:-1]] = is_text[seps] = False
        ids, word_start = np.empty(total, np.int64), np.ones(total, np.uint8)
        ids[is_text] = np.concatenate([shards[shard].input_ids[start:end] for shard, start, end in laid.runs])
        word_start[is_text] = np.concatenate([shards[shard].word_start[start:end] for shard, start, end in laid.runs])
        ids[cu_seqlens[:-1]], ids[seps] = self._cls, self._sep
        return ids, word_start, cu_seqlens, seps, is_text

    def _token_types(self, laid: Laid, cu_seqlens: np.ndarray, seps: np.ndarray) -> torch.Tensor | None:
        """0 up to the first [SEP] of a sample, 1 after it; None if these are no pairs."""
        if not isinstance(self.samples, Pairs):
            return None
        types = np.zeros(cu_seqlens[-1], np.int64)
        second = seps[np.cumsum(laid.parts) - laid.parts] + 1
        types[expand(second, cu_seqlens[1:] - second)] = 1
        return torch.from_numpy(types)


def _objective(name: str) -> Objective:
    if name not in tuple(OBJECTIVES):
        raise ConfigError(f"objective is {name!r}, expected one of {', '.join(map(repr, OBJECTIVES))}")
    return OBJECTIVES[name]


def _masking(what: Objective, masking: str | Masking | None, prob: float | None) -> Masking:
    if not isinstance(masking, Masking):
        masking = Masking(what.masking if masking is None else masking, actions=what.actions)
    return masking if prob is None else replace(masking, prob=prob)


def check_objective(objective: str, masking: str, packing: str, separators: str) -> None:
    """ConfigError unless an objective can be learnt with this masking and these samples."""
    what = _objective(objective)
    if "macbert" == what.masking != masking:
        raise ConfigError(f"masking is {masking!r}, expected 'macbert' for the objective {objective!r}")
    if packing not in PACKINGS:
        raise ConfigError(f"packing is {packing!r}, expected one of {', '.join(map(repr, PACKINGS))}")
    if what.sentences and packing != "pairs":
        raise ConfigError(f"packing is {packing!r}, expected 'pairs': the objective {objective!r} asks about pairs")
    if not what.sentences and packing == "pairs":
        raise ConfigError(f"packing is 'pairs', expected another: the objective {objective!r} asks nothing about pairs")
    if separators != SEPARATORS[0] and packing in ("pairs", "two_segments"):
        raise ConfigError(f"separators is {separators!r} with packing {packing!r}, expected {SEPARATORS[0]!r}")


def _samples(what, corpus, tokenizer, max_length, packing, separators, short_prob, seed) -> Samples:
    if packing in ("pairs", "two_segments"):
        return pack_pairs(corpus, tokenizer, max_length, what.sentences, short_prob=short_prob, seed=seed)
    return pack(corpus, max_length, packing, separators)


def _compiled(
    masking: Masking, table: SimilarWords | SimilarPieces | None, tokenizer: Tokenizer
) -> SimilarPieces | None:
    if STRATEGIES[masking.strategy].masks:
        if table is not None:
            raise ConfigError(f"similar_words is given with masking {masking.strategy!r}, expected 'macbert'")
        return None
    if table is None:
        raise ConfigError(
            "masking 'macbert' needs similar_words, a table: `fastbert prepare similar-words` makes one of word "
            "vectors, of a thesaurus or of your text"
        )
    pieces = table if isinstance(table, SimilarPieces) else SimilarPieces(table, tokenizer)
    if not len(pieces):
        raise DataError(f"{table!r} has no word with a similar one of as many pieces: nothing would be replaced by one")
    return pieces
