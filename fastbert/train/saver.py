"""Checkpoints written while training goes on: a copy in memory, and a thread that writes it to disk."""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert.errors import FastBertError
from fastbert.optim import is_sharded
from fastbert.train import state
from fastbert.train.world import World


class Saved(NamedTuple):
    """A checkpoint that is complete: seconds that training stood still for it, and that it took to write."""

    step: int
    held_up: float
    took: float


class Saver:
    """Checkpoints of a model and its optimizer under `root`, and at the end the model folder.

    `save` copies weights and moments into memory of its own (12 bytes a parameter, on the first process; pinned where
    they come from a GPU), and returns. A thread writes the copy; the next save waits for it. Every process calls
    `save`, for sharded tensors are gathered; the first one writes.

    model: as it is before it is moved or sharded. write(model, folder) writes a model folder.
    """

    def __init__(
        self,
        root: Path,
        model: nn.Module,
        write: Callable[[nn.Module, Path], None],
        world: World,
        *,
        keep_last: int,
        asynchronous: bool,
    ):
        self.root, self.world, self.keep_last, self.asynchronous = root, world, keep_last, asynchronous
        self.step: int | None = None  # of the last checkpoint that was begun
        self.best: tuple[float, str] | None = None  # the lowest validation loss that was saved, and its checkpoint
        self.error: FastBertError | None = None
        self._write, self._thread, self._saved = write, None, deque()
        self._moments: dict[str, Tensor] = {}
        self._pin = world.device.type == "cuda"
        self._copy = _twin(model, self._pin) if world.is_main else None

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        content: dict,
        validation_loss: float | None = None,
    ) -> None:
        """Saves the state of content["step"], with `content` as state.json. validation_loss: of just this state, if
        known."""
        begin = time.perf_counter()
        self.wait()
        moments = state.optimizer_tensors(model, optimizer)
        self._take([parameter.detach() for parameter in model.parameters()], moments)
        self.step = content["step"]
        if not self.world.is_main:
            return
        if validation_loss is not None and (self.best is None or validation_loss < self.best[0]):
            self.best = validation_loss, state.name_of(self.step)
        content |= {"best": self.best}
        if self.asynchronous:
            held_up = time.perf_counter() - begin
            self._thread = threading.Thread(target=self._store, args=(content, held_up), name="saver", daemon=True)
            self._thread.start()
        else:
            self._store(content)

    def wait(self) -> None:
        """Returns once nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def tidy(self, step: int) -> None:
        """Removes what is not to be kept once there is a checkpoint of `step`."""
        state.prune(self.root, step, self.keep_last, self.best and self.best[1])

    def saved(self) -> list[Saved]:
        """The checkpoints that have been completed since this was last asked."""
        return [self._saved.popleft() for _ in range(len(self._saved))]

    def write_model(self, model: nn.Module, folder: Path) -> None:
        """Writes a model folder. Every process calls it, as `save`."""
        self.wait()
        self._take([parameter.detach() for parameter in model.parameters()], {})
        if not self.world.is_main:
            return
        with state.new_folder(folder) as temporary:
            self._write(self._copy, temporary)

    def _take(self, weights: list[Tensor], moments: dict[str, Tensor]) -> None:
        copies = [] if self._copy is None else list(self._copy.parameters())
        for i, weight in enumerate(weights):
            self._fill(weight, lambda _, i=i: copies[i])
        for name, moment in moments.items():
            self._fill(moment, lambda whole, name=name: self._moments.setdefault(name, _room(whole, self._pin)))
        if self._pin:
            torch.cuda.current_stream().synchronize()

    @torch.no_grad()
    def _fill(self, tensor: Tensor, room: Callable[[Tensor], Tensor]) -> None:
        """Copies a tensor to where room(whole tensor) says, on the first process."""
        whole = tensor.full_tensor() if is_sharded(tensor) else tensor
        if self.world.is_main:
            room(whole).copy_(whole, non_blocking=True)

    def _store(self, content: dict, held_up: float | None = None) -> None:
        begin, step = time.perf_counter(), content["step"]
        try:
            state.save(self.root, step, lambda folder: self._write(self._copy, folder), self._moments, content)
            self.tidy(step)
        except Exception as error:  # for the thread that trains to see
            self.error = error
            return
        took = time.perf_counter() - begin
        self._saved.append(Saved(step, took if held_up is None else held_up, took))


def _twin(model: nn.Module, pin: bool) -> nn.Module:
    """A model like it, with memory of its own, in which the same parameters are shared."""
    rooms = {id(p): nn.Parameter(_room(p, pin), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, rooms)


def _room(like: Tensor, pin: bool) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=pin)
