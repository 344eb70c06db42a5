"""Which samples each step takes, and their batches, made ahead in a background thread."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbert.data import MaskedLM
from fastbert.errors import ConfigError
from fastbert.train.world import World

_IGNORED = -100


class MicroBatch(NamedTuple):
    """inputs: what the model takes, by name, input_ids [T], cu_seqlens, labels and label_positions among it, and
    sentence_labels, which TrainStep hands over under the name that the model has for them; max_seqlen; the number of
    labels, of real tokens, and of samples with a sentence label."""

    inputs: dict[str, Tensor]
    max_seqlen: int
    labels: int
    tokens: int
    samples: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many it has of what a term of the loss is per."""
        return {"label": self.labels, "sample": self.samples, "token": self.tokens}


@dataclass(frozen=True)
class Buckets:
    """Batches of few shapes, as a compiler and CUDA graphs want them.

    The tokens of a batch are filled up to a multiple of `granule`, 1/32 of the most there can be, with sequences of
    [PAD] that have no labels of any kind, so that they add nothing to any gradient. What is left of the room for
    sequences is empty, and what is left of that for labels is filled with the label -100 at place 0.
    """

    batch_size: int
    max_length: int
    mask_prob: float
    pad_id: int

    @property
    def granule(self) -> int:
        return max(64, -(-self.batch_size * self.max_length // (32 * 64)) * 64)

    def fill(self, batch: MicroBatch) -> MicroBatch:
        ids, ends = batch.inputs["input_ids"], batch.inputs["cu_seqlens"]
        tokens = -(-len(ids) // self.granule) * self.granule
        sequences = self.batch_size + -(-self.granule // self.max_length)
        # A sample has max(1, round(mask_prob x its pieces)) labels; if each is drawn for itself, there may be more.
        most = max(int(self.mask_prob * tokens + self.batch_size), len(batch.inputs["labels"]))
        labels = -(-most // 64) * 64
        more = torch.arange(len(ids), tokens, self.max_length, dtype=torch.int32)[1:]
        ends = torch.cat([ends, more, ends.new_full((sequences + 1 - len(ends) - len(more),), tokens)])
        filled = {
            "input_ids": _padded(ids, tokens, self.pad_id),
            "cu_seqlens": ends,
            "labels": _padded(batch.inputs["labels"], labels, _IGNORED),
            "label_positions": _padded(batch.inputs["label_positions"], labels, 0),
        }
        if "token_type_ids" in batch.inputs:
            filled["token_type_ids"] = _padded(batch.inputs["token_type_ids"], tokens, 0)
        if "sentence_labels" in batch.inputs:
            filled["sentence_labels"] = _padded(batch.inputs["sentence_labels"], sequences, _IGNORED)
        return batch._replace(inputs=batch.inputs | filled, max_seqlen=self.max_length)


def _padded(t: Tensor, size: int, value: int) -> Tensor:
    return torch.cat([t, t.new_full((size - len(t),), value)])


class Feed:
    """The micro-batches of this process for update number 0, 1, 2, ...

    The samples of an update are the next `global_batch` in the order of the epoch, whatever the number of processes.
    They are dealt out by length, so that all micro-batches of all processes have as many samples and about as many
    tokens, the longest first. What is left at the end of an epoch and does not fill an update is not used in that
    epoch.
    """

    def __init__(
        self,
        objective: MaskedLM,
        batch_size: int,
        accumulation: int,
        world: World,
        buckets: Buckets | None = None,
    ):
        self._objective, self._batch_size, self._accumulation, self._world = objective, batch_size, accumulation, world
        self._buckets = buckets
        self.global_batch = batch_size * accumulation * world.size
        self.updates_per_epoch = len(objective) // self.global_batch
        if not self.updates_per_epoch:
            raise ConfigError(
                f"batch_size {batch_size} x accumulation {accumulation} x {world.size} processes is "
                f"{self.global_batch} samples, but the corpus gives {len(objective)} of max_length "
                f"{objective.samples.max_length}"
            )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self._ahead: tuple[int, Future | None] = (-1, None)

    def samples(self, update: int) -> tuple[int, np.ndarray]:
        """The epoch of an update and the indices of all its samples, over all processes."""
        epoch, place = divmod(update, self.updates_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._objective.order(epoch)
        return epoch, self._order[1][place * self.global_batch : (place + 1) * self.global_batch]

    def take(self, update: int) -> list[MicroBatch]:
        """The micro-batches of an update; those of the next one are begun."""
        number, ready = self._ahead
        if number != update:
            ready = self._thread.submit(self._load, update)
        batches = ready.result()
        self._ahead = update + 1, self._thread.submit(self._load, update + 1)
        return batches

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def own(self, update: int) -> np.ndarray:
        """The indices of the samples of this process's micro-batches, [accumulation, batch_size]."""
        _, indices = self.samples(update)
        samples = self._objective.samples
        hands = deal(samples.end[indices] - samples.start[indices], self._accumulation * self._world.size)
        return indices[hands][self._world.rank :: self._world.size]

    def _load(self, update: int) -> list[MicroBatch]:
        epoch, _ = self.samples(update)
        return [micro_batch(self._objective, part, epoch, self._world, self._buckets) for part in self.own(update)]


def deal(lengths: np.ndarray, hands: int) -> np.ndarray:
    """Places in `lengths` dealt out to `hands`, as many to each, [hands, n]: the longest first, there and back again,
    so that the sums of the hands differ by little."""
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, hands)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T


def micro_batch(
    objective: MaskedLM, indices: Sequence[int], epoch: int, world: World, buckets: Buckets | None = None
) -> MicroBatch:
    """The batch of some samples, in pinned memory if it is going to a GPU."""
    made = objective.batch(indices, epoch)
    batch = labelled(
        made.input_ids, made.labels, made.cu_seqlens, made.max_seqlen, made.token_type_ids, made.sentence_labels
    )
    if buckets is not None:
        batch = buckets.fill(batch)
    if world.device.type == "cuda":
        batch = batch._replace(inputs={name: t.pin_memory() for name, t in batch.inputs.items()})
    return batch


def labelled(
    input_ids: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    token_type_ids: Tensor | None = None,
    sentence_labels: Tensor | None = None,
) -> MicroBatch:
    """A packed batch with labels [T], -100 where there is none, as one with those of labelled tokens only."""
    places = (labels != _IGNORED).nonzero().squeeze(1)
    inputs = {"input_ids": input_ids, "cu_seqlens": cu_seqlens, "token_type_ids": token_type_ids}
    inputs |= {"labels": labels[places], "label_positions": places, "sentence_labels": sentence_labels}
    given = {name: t for name, t in inputs.items() if t is not None}
    samples = 0 if sentence_labels is None else int((sentence_labels != _IGNORED).sum())
    return MicroBatch(given, max_seqlen, len(places), len(input_ids), samples)
