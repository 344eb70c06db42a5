"""What a model is trained to do: objectives turn a corpus into batches of inputs and labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np
import torch

from fastbert.data.arrays import first_of
from fastbert.data.checks import check
from fastbert.data.masking import MOST_SAMPLES, SELECT, budgets, corrupt, permutation, sample_keys
from fastbert.data.samples import pack
from fastbert.data.shards import Corpus
from fastbert.data.tokenizer import Tokenizer
from fastbert.errors import ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """A packed batch. input_ids int64 [T]; labels int64 [T], -100 where nothing is to be guessed; cu_seqlens int32
    [B+1]; max_seqlen; token_type_ids int64 [T] or None where all are 0."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    token_type_ids: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()})


class MaskedLM:
    """Masked language modelling: len(objective) samples; a batch is a pure function of (seed, epoch, sample indices).

    packing: "full_sentences", "doc_sentences" or "single" (see `pack`). masking: "whole_word" or "token" (see
    fastbert.data.masking). mask_prob of the pieces of each sample are chosen, 80 % of them become [MASK], 10 % another
    piece, 10 % stay. For validation use one epoch number throughout, so that the masks stay the same. Raises
    ConfigError for an argument that makes no sense, DataError if the corpus was made with another tokenizer.
    Picklable.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        packing: str = "full_sentences",
        masking: str = "whole_word",
        mask_prob: float = 0.15,
        seed: int = 0,
    ):
        if masking not in tuple(SELECT):
            raise ConfigError(f"masking is {masking!r}, expected one of {', '.join(map(repr, SELECT))}")
        check("mask_prob", mask_prob, Real, "a number above 0 and at most 1", lambda prob: 0 < prob <= 1)
        check("seed", seed, Integral, "an integer")
        check("corpus", corpus, Corpus, "a Corpus")
        check("tokenizer", tokenizer, Tokenizer, "a Tokenizer")
        corpus.check_tokenizer(tokenizer)
        self.corpus, self.seed, self.mask_prob = corpus, seed, mask_prob
        self.samples = pack(corpus, max_length, packing)
        self._select = SELECT[masking]
        self._mask_id = tokenizer.mask_id
        self._ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
        self._cls, self._sep = np.array([tokenizer.cls_id]), np.array([tokenizer.sep_id])

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
        ids, word_start, lengths = self._gather(indices)
        keys = sample_keys(self.seed, epoch, indices)
        chosen = self._select(keys, lengths, budgets(lengths, self.mask_prob), word_start)

        first = first_of(lengths)
        sample = np.searchsorted(first, chosen, side="right") - 1
        position = chosen - first[sample]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths + 2)])
        place = cu_seqlens[sample] + 1 + position
        labels = np.full(len(ids), -100)
        labels[place] = ids[place]
        ids[place] = corrupt(keys[sample], position, ids[place], self._mask_id, self._ordinary)
        return Batch(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(lengths.max()) + 2,
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

    def _gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Packed ids with [CLS] and [SEP] (int64), word_start without them (uint8), and lengths without them
        (int64)."""
        samples, shards = self.samples, self.corpus.shards
        start, end = samples.start[indices], samples.end[indices]
        places = zip(samples.shard[indices].tolist(), start.tolist(), end.tolist(), strict=True)
        runs = [(shards[shard], slice(first, last)) for shard, first, last in places]
        parts = [part for shard, run in runs for part in (self._cls, shard.input_ids[run], self._sep)]
        word_start = np.concatenate([shard.word_start[run] for shard, run in runs])
        return np.concatenate(parts, dtype=np.int64), word_start, end - start
