"""The gradients of an update: where they are summed, over micro-batches and over processes.

`MainGradients` where every process has the whole model, `ShardedGradients` where each has a part of it (FSDP2, Zhao et
al. 2023, arXiv 2304.11277). Both exchange gradients once in an update, whatever the number of its micro-batches, during
the backward pass of the last: `expect` says before each whether it is that.
"""

from functools import partial

import torch
from torch import Tensor, nn

from fastbert.errors import ConfigError
from fastbert.nn import Encoder
from fastbert.optim import main_gradients
from fastbert.train.world import World

_ALIGNED = 64  # elements: where a parameter's gradient may begin in the buffer
_ROW = 4096  # elements of the buffer whose squares are summed first
_BUCKET = 25 << 18  # elements that are exchanged together, at least: 25 MiB in float32, as in DistributedDataParallel


class MainGradients:
    """The gradients of a model's weights in one float32 buffer, of which every weight has its part as `.grad`.

    Those of a working copy come in its dtype, rounded once per micro-batch as products round them (twice in the word
    table, which two products share), and are added as they are made: 10 bytes an element, where autograd would need 18,
    by way of a float32 copy. Of an update the first takes the place of what the update before has left, which is 6, and
    saves zeroing. `stale`: the parts, by number, in which that is still to happen.

    Several processes: as in DistributedDataParallel (Li et al. 2020, arXiv 2006.15704, section 3.2), the buffer is
    exchanged in buckets, from its end, each as soon as the last backward pass has made its gradients and those of the
    buckets before it; what is exchanged are the float32 sums over all micro-batches. reduce_dtype: what they are
    rounded to for that; None: they are not.
    """

    def __init__(self, model: nn.Module, working: nn.Module, world: World, reduce_dtype: torch.dtype | None = None):
        pairs = zip(model.parameters(), working.parameters(), strict=True)
        pairs = [(parameter, copied) for parameter, copied in pairs if parameter.requires_grad]
        if not pairs:
            raise ConfigError("the model has no parameter that requires a gradient, expected at least one")
        parameters = [parameter for parameter, _ in pairs]
        sizes = [-(-parameter.numel() // _ALIGNED) * _ALIGNED for parameter in parameters]
        end = sum(sizes)
        self.buffer = parameters[0].new_zeros(-(-end // _ROW) * _ROW)
        for parameter, part in zip(parameters, self.buffer[:end].split(sizes), strict=True):
            parameter.grad = part[: parameter.numel()].view_as(parameter)
        self.parts = [parameter.grad for parameter in parameters]
        self.stale: set[int] = set()
        self._taken = working is not model
        self._exchange = _Exchange(self.buffer, sizes, world, reduce_dtype) if world.size > 1 else None
        if self._taken:
            for encoder in (module for module in working.modules() if isinstance(module, Encoder)):
                main_gradients(encoder.shared_parameters())
        for number, (_, copied) in enumerate(pairs):
            if self._taken:
                copied.register_post_accumulate_grad_hook(partial(self._take, number))
            elif self._exchange is not None:
                copied.register_post_accumulate_grad_hook(partial(self._made, number))
        self.begin()

    def expect(self, last: bool) -> None:
        """Before the backward pass of a micro-batch; last: none of this update follows."""
        if self._exchange is not None:
            self._exchange.expect(last)

    def _take(self, number: int, copied: Tensor) -> None:
        if number in self.stale:
            self.parts[number].copy_(copied.grad)
            self.stale.discard(number)
        else:
            self.parts[number].add_(copied.grad)
        copied.grad = None
        self._made(number, copied)

    def _made(self, number: int, _copied: Tensor) -> None:
        if self._exchange is not None:
            self._exchange.made(number)

    def norm(self) -> Tensor:
        """Of all together; of rows first, for a CPU adds one number after the other to a sum in float32."""
        return torch.linalg.vector_norm(torch.linalg.vector_norm(self.buffer.view(-1, _ROW), dim=1))

    def fill(self) -> None:
        """Zeroes what has had no gradient in this update."""
        for number in self.stale:
            self.parts[number].zero_()
        self.stale = set()

    def complete(self) -> None:
        """After the last micro-batch: fills, and waits for the sums over all processes."""
        self.fill()
        if self._exchange is not None:
            self._exchange.complete()

    def begin(self) -> None:
        """For the next update."""
        if self._taken:
            self.stale = set(range(len(self.parts)))
        else:
            self.buffer.zero_()


class _Exchange:
    """Sums a buffer of gradients over all processes, bucket by bucket, in the same order in all of them."""

    def __init__(self, buffer: Tensor, sizes: list[int], world: World, dtype: torch.dtype | None):
        self._world, self._dtype = world, dtype
        self._bucket_of = [0] * len(sizes)
        ends, end, begin = [], sum(sizes), sum(sizes)
        for number in range(len(sizes) - 1, -1, -1):
            begin -= sizes[number]
            self._bucket_of[number] = len(ends)
            if end - begin >= _BUCKET or number == 0:
                ends.append((begin, end))
                end = begin
        self._buckets = [buffer[begin:end] for begin, end in ends]
        self._forget()

    def expect(self, last: bool) -> None:
        if self._open:
            raise ConfigError("a micro-batch was added after the last one of the update, expected apply()")
        self._open = last

    def made(self, number: int) -> None:
        """A backward pass has made this gradient."""
        if not self._open:
            return
        self._missing[self._bucket_of[number]] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send()

    def complete(self) -> None:
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, carried, work in self._sent:
            self._world.finish(work)
            if carried is not bucket:
                bucket.copy_(carried)
        self._forget()

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        carried = bucket if self._dtype is None else bucket.to(self._dtype)
        self._sent.append((bucket, carried, self._world.begin_adding(carried)))

    def _forget(self) -> None:
        self._sent, self._open = [], False
        self._missing = [self._bucket_of.count(number) for number in range(len(self._buckets))]


class ShardedGradients:
    """The gradients of a model that `sharding.shard` has sharded: fully_shard sums them over processes and
    micro-batches, and each process has its part."""

    def __init__(self, model: nn.Module, world: World):
        self._model, self._world = model, world
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.stale: set[int] = set()

    def expect(self, last: bool) -> None:
        """Before the forward pass of a micro-batch; last: none of this update follows."""
        self._model.set_requires_gradient_sync(last)

    def norm(self) -> Tensor:
        """Of all together, over all processes."""
        own = [torch.linalg.vector_norm(parameter.grad.to_local().double()) for parameter in self._parameters]
        total = torch.stack(own).square().sum()
        self._world.add(total)
        return total.sqrt().float()

    def fill(self) -> None:
        """Zeroes for what has had no gradient in this update."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def complete(self) -> None:
        """After the last micro-batch."""
        self.fill()

    def begin(self) -> None:
        """For the next update."""
        for parameter in self._parameters:
            parameter.grad = None
