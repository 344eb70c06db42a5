"""Which samples each step takes, and their batches, made ahead in a background thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from fastbert.data import Batch, MaskedLM
from fastbert.errors import ConfigError
from fastbert.train.world import World


class MicroBatch(NamedTuple):
    """A batch, with the number of its labelled tokens."""

    batch: Batch
    labels: int


class Feed:
    """The micro-batches of this process for update number 0, 1, 2, ...

    The samples of an update are the next `global_batch` in the order of the epoch, whatever the number of processes;
    micro-batch m of process r takes the run that begins at (m * processes + r) * batch_size of them. What is left at
    the end of an epoch and does not fill an update is not used in that epoch.
    """

    def __init__(self, objective: MaskedLM, batch_size: int, accumulation: int, world: World):
        self._objective, self._batch_size, self._accumulation, self._world = objective, batch_size, accumulation, world
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

    def _load(self, update: int) -> list[MicroBatch]:
        epoch, indices = self.samples(update)
        own = indices.reshape(self._accumulation, self._world.size, self._batch_size)[:, self._world.rank]
        return [micro_batch(self._objective, part, epoch, self._world) for part in own]


def micro_batch(objective: MaskedLM, indices: np.ndarray, epoch: int, world: World) -> MicroBatch:
    """The batch of some samples, in pinned memory if it is going to a GPU."""
    batch = objective.batch(indices, epoch)
    labels = int((batch.labels >= 0).sum())
    if world.device.type == "cuda":
        tensors = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        batch = replace(batch, **tensors)
    return MicroBatch(batch, labels)
