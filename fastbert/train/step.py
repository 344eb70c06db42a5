"""The arithmetic of an update, on the device from end to end: gradients of micro-batches, optimizer, loss scale,
learning rate. The host hands over batches and waits for nothing; it looks at a few numbers when it wants to know.

Weights and gradients. `model` holds the weights in float32. In 16 bits a working copy of it is what runs: every update
writes it once, from the float32 weights. Gradients are summed over the micro-batches in float32
(`gradients.MainGradients`). A sharded model (`sharding.shard`) gathers its copies itself.

What an update costs besides the micro-batches, for n weights (BERT-base with V = 21128: 102 M), with LAMB: gradients
read twice, weights and two moments read and written, the weights read for the copy and that written: 4 (2 + 6) n + 6 n
= 38 n bytes or 3.9 GB, 1.2 ms at the 3.35 TB/s of an H100; the gradients of the first micro-batch 6 n, of others 10 n.
"""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastbert.errors import ConfigError, FastBertError
from fastbert.models.outputs import ModelOutput
from fastbert.optim import FusedLAMB, is_sharded
from fastbert.train.distillation import Distillation
from fastbert.train.feed import MicroBatch
from fastbert.train.gradients import MainGradients, ShardedGradients
from fastbert.train.spikes import Spikes
from fastbert.train.world import World

_SMALLEST_LOSS_SCALE, _LARGEST_LOSS_SCALE = 2.0**-14, 2.0**24
_AHEAD = 1 << 12  # learning rates on the device; one wait for it in so many updates
_SHAPES = 64  # that --compile may meet: feed.Buckets makes at most 33 of them


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2017, arXiv 1710.03740, section 3.2), without a word to the host:
    halved after an update with a gradient that is not finite, doubled after 2000 updates in a row without.
    """

    def __init__(self, device: torch.device, first: float = 2.0**16, interval: int = 2000):
        self.scale = torch.full((), first, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)
        self.interval = interval

    def update(self, finite: Tensor) -> None:
        good = torch.where(finite, self.good + 1, 0)
        grows = good == self.interval
        self.scale.mul_(torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)).clamp_(max=_LARGEST_LOSS_SCALE)
        self.good.copy_(torch.where(grows, 0, good))

    def state(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "good": self.good.item()}

    def load(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self.good.fill_(state["good"])


class Progress:
    """What has happened, as tensors on the device, the same in all processes but for `losses` and `update_loss`.

    made: how many updates were made; tried: also those that the loss scale or a spike skipped. losses: for each of
    `terms` of the loss the sum of its means x what it is per, since it was last zeroed. update_loss: of this update,
    this process's share until all are added up. grad_norm: of the last update, before clipping. first_bad: the first
    update that may not be made, because its loss or gradients are not finite, or spike where that ends the run; from
    then on none is made, so that weights and moments stay as they were before it.
    """

    def __init__(self, device: torch.device, terms: int):
        self.made, self.tried = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self.losses = torch.zeros(terms, dtype=torch.float64, device=device)
        self.update_loss, self.grad_norm = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self.first_bad = torch.full((1,), math.inf, dtype=torch.float64, device=device)

    @property
    def halted(self) -> Tensor:
        """Whether some update could not be made, `[1]`."""
        return self.first_bad.isfinite()

    def note(self, good: Tensor) -> None:
        """Remembers this update if it is not good."""
        bad = torch.minimum(self.first_bad, self.tried.double())
        self.first_bad.copy_(torch.where(good, self.first_bad, bad))


class Rates:
    """The learning rate on the device, where alone it is known how many updates were made: `rate`, float32 `[1]`, from
    a table of the next _AHEAD updates.
    """

    def __init__(self, rate: Callable[[int], float], device: torch.device):
        self._of = rate
        self.rate = torch.zeros(1, device=device)
        self._table = torch.zeros(_AHEAD, device=device)
        self._first = torch.zeros(1, dtype=torch.int64, device=device)
        self.begin(0)

    def begin(self, made: int) -> None:
        """Makes the table anew, from the update that follows `made` ones."""
        self._table.copy_(torch.tensor([self._of(made + i) for i in range(_AHEAD)], dtype=torch.float64))
        self._first.fill_(made)
        self._left = _AHEAD - 1
        self.rate.copy_(self._table[:1])

    def reach(self, made: Tensor) -> None:
        """Before every update: makes the table anew where it may end, and waits for the device to do so."""
        if self._left == 0:
            self.begin(int(made))
        self._left -= 1

    def follow(self, made: Tensor) -> None:
        """The rate of the update that follows `made` ones, on the device."""
        torch.index_select(self._table, 0, made - self._first, out=self.rate)


class TrainStep:
    """Updates of a model with a loss: `accumulate` for each micro-batch, then `apply`.

    model: in float32, on its device, in training mode. It states the `terms` of its loss, and returns their means as
    `losses`; each counts in an update by its share of all labels, samples or tokens. optimizer: over its parameters.
    rate(step): the learning rate of the update that follows `step` made ones, times the `lr_scale` of a
    parameter group that has one. dtype: what the model runs in; None:
    float32. clip: largest norm of the gradients, 0: any; FusedLAMB has its own. compile: the loss through
    torch.compile, without a graph break. graphs: one CUDA graph for the gradients of each shape of a batch, and one for
    the rest of the update; the first batch of a shape runs without. Both pay where shapes are few (feed.Buckets).
    distillation: what a teacher adds to the terms of the model. reduce_dtype: what gradients are rounded to when they
    are summed over processes; None: they are not. spikes: what is done about updates that stand out; None: nothing.

    A model that `sharding.shard` has sharded runs in the dtypes that were given there: dtype must be the same, and
    reduce_dtype is not asked here.

    `working` is the model that runs; use it for validation. Everything random follows from the seed of each
    micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float],
        *,
        world: World,
        dtype: torch.dtype | None = None,
        clip: float = 0.0,
        compile: bool = False,
        graphs: bool = False,
        distillation: Distillation | None = None,
        reduce_dtype: torch.dtype | None = None,
        spikes: Spikes | None = None,
    ):
        if graphs and world.device.type != "cuda":
            raise ConfigError(f"graphs is set, but the device is {world.device}, expected a GPU")
        self.model, self.optimizer, self.world, self.clip = model, optimizer, world, clip
        self.dtype, self.spikes = dtype or torch.float32, spikes
        self.distillation = distillation
        self.terms = model.terms + (() if distillation is None else distillation.terms)
        self.progress = Progress(world.device, len(self.terms))
        self.loss_scale = LossScale(world.device) if dtype == torch.float16 else None
        sharded = any(map(is_sharded, model.parameters()))
        self.working = model if dtype is None or sharded else copy.deepcopy(model).to(dtype)
        if sharded:
            self.gradients = ShardedGradients(model, world)
        else:
            self.gradients = MainGradients(model, self.working, world, reduce_dtype)
        self.rates, self._scaled = Rates(rate, world.device), {}
        self._place_rate()
        self._run = _compiled(self._forward) if compile else self._forward
        self._graphs = _Graphs(world.device) if graphs else None
        self._transfers = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None

    def accumulate(
        self,
        batch: MicroBatch,
        labels: float,
        seed: int,
        *,
        samples: float = 0,
        tokens: float = 0,
        last: bool = True,
    ) -> None:
        """Adds the gradients of a micro-batch's share in the means over all `labels` of the update, and over all its
        `samples` and `tokens` if a term is per those. ConfigError if the batch alone has more. last: whether none of
        the update follows: with several processes, gradients are then summed over them meanwhile.
        """
        torch.manual_seed(seed)
        inputs = self._inputs(batch, {"label": labels, "sample": samples, "token": tokens})
        self.gradients.expect(last and self._graphs is None)
        if self._graphs is None:
            self._add_gradients(self._run, inputs, batch.max_seqlen)
            return
        stale = frozenset(self.gradients.stale)
        key = tuple(tuple(t.shape) for t in inputs.values()), batch.max_seqlen, stale

        def captured(given: dict[str, Tensor]) -> set[int]:
            self.gradients.stale = set(stale)
            self._add_gradients(self._run, given, batch.max_seqlen)
            return self.gradients.stale

        self.gradients.stale = set(self._graphs.run(key, captured, inputs))

    def apply(self) -> None:
        """Moves the weights, unless a gradient is not finite, and forgets the gradients."""
        self.rates.reach(self.progress.made)
        self.gradients.complete()
        self.world.add(self.progress.update_loss)
        if self._graphs is None:
            self._move({})
        else:
            self._graphs.run("update", self._move, {})
        self.gradients.begin()

    def once(self, batch: MicroBatch, labels: float, *, samples: float = 0, tokens: float = 0) -> list[float]:
        """Leaves the gradients of this micro-batch alone in the parameters of `model`, computed without compiled code
        and graphs; returns the means of all terms over it. For looking into an update that could not be made.
        """
        inputs = self._inputs(batch, {"label": labels, "sample": samples, "token": tokens})
        self.gradients.begin()
        self.gradients.expect(isinstance(self.gradients, ShardedGradients))  # whose sums are all that can be had
        losses = self._add_gradients(self._forward, inputs, batch.max_seqlen)
        self.gradients.fill()
        return losses.tolist()

    def evaluate(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """The means of all terms over a batch `[k]`, as the working copy is now; and how many of its sentence labels
        are guessed, or None."""
        inputs = self._to_device(batch.inputs)
        losses, output = self._evaluate(inputs, batch.max_seqlen)
        if isinstance(self.gradients, ShardedGradients):
            self.model.reshard()  # a backward pass would do it, but none follows
        if "sentence_labels" not in inputs:
            return losses, None
        return losses, (output.sentence_logits.argmax(-1) == inputs["sentence_labels"]).sum()

    def look(self) -> int:
        """How many updates were made: waits for the device. FastBertError if no loss scale helps against overflow."""
        made = int(self.progress.made)
        if self.loss_scale is not None and self.loss_scale.scale.item() < _SMALLEST_LOSS_SCALE:
            raise FastBertError(
                f"gradients overflow in fp16 even with a loss scale of {self.loss_scale.scale.item():g}, after step "
                f"{made}; nothing was saved since the last checkpoint. Try precision='bf16'"
            )
        return made

    def restore(self, made: int, tried: int, scale: dict[str, float] | None = None, spikes: dict | None = None) -> None:
        """Goes on where `made` of `tried` updates had been made, with weights and optimizer as they are now."""
        self.progress.made.fill_(made)
        self.progress.tried.fill_(tried)
        if self.loss_scale is not None and scale:  # the run had none where it was begun in another precision
            self.loss_scale.load(scale)
        if self.spikes is not None and spikes:
            self.spikes.load(spikes)
        self.rates.begin(made)
        self._place_rate()
        self._refresh()

    # -- on the device -------------------------------------------------------------------------------------------------

    def _evaluate(self, inputs: dict[str, Tensor], max_seqlen: int) -> tuple[Tensor, ModelOutput]:
        named = dict(inputs)
        if "sentence_labels" in named:
            named[self.working.sentence_label] = named.pop("sentence_labels")
        output = self.working(**named, max_seqlen=max_seqlen, return_logits=False)
        if self.distillation is None:
            return output.losses, output
        taught = self.distillation.losses(self.working, output.label_states, inputs, max_seqlen)
        return torch.cat([output.losses, taught]), output

    def _forward(self, inputs: dict[str, Tensor], max_seqlen: int) -> Tensor:
        return self._evaluate(inputs, max_seqlen)[0]

    def _add_gradients(self, run: Callable, inputs: dict[str, Tensor], max_seqlen: int) -> Tensor:
        weights, amounts = inputs["share"].unbind()
        losses = run({name: t for name, t in inputs.items() if name != "share"}, max_seqlen)
        weights = weights.to(losses.dtype)
        losses.backward(weights if self.loss_scale is None else weights * self.loss_scale.scale)
        losses = losses.detach().double()
        self.progress.losses += losses * amounts
        self.progress.update_loss += losses @ inputs["share"][0]
        return losses

    def _move(self, _inputs: dict[str, Tensor]) -> None:
        progress, scale = self.progress, None if self.loss_scale is None else self.loss_scale.scale
        progress.note(progress.update_loss.isfinite())
        if isinstance(self.optimizer, FusedLAMB):  # it unscales, clips and skips what is not finite by itself
            norm = self._norm(scale) if self.spikes is not None else None
            self.optimizer.grad_scale, self.optimizer.found_inf = scale, self._forbidden(norm).float().squeeze()
            self.optimizer.step()
            progress.grad_norm.copy_(self.optimizer.grad_norm)
        else:
            norm = self._norm(scale)
            self.optimizer.grad_scale = self._divisor(norm, scale)
            self.optimizer.found_inf = (self._forbidden(norm) | ~norm.isfinite()).float().squeeze()
            self.optimizer.step()
            progress.grad_norm.copy_(norm)
        finite = progress.grad_norm.isfinite()
        if self.loss_scale is None:
            progress.note(finite)
        else:
            self.loss_scale.update(finite)
        progress.tried += 1
        progress.made += finite & ~progress.halted & (True if self.spikes is None else ~self.spikes.skips)
        progress.update_loss.zero_()
        self._refresh()

    def _norm(self, scale: Tensor | None) -> Tensor:
        norm = self.gradients.norm()
        return norm if scale is None else norm / scale

    def _forbidden(self, norm: Tensor | None) -> Tensor:
        """Whether this update may not be made, whatever its gradients: since one before it, or as a spike, `[1]`."""
        progress = self.progress
        if self.spikes is None:
            return progress.halted
        spiked = self.spikes.judge(progress.tried, progress.update_loss, norm, progress.halted)
        if self.spikes.action == "stop":
            progress.note(~spiked)
        return progress.halted | self.spikes.skips

    def _divisor(self, norm: Tensor, scale: Tensor | None) -> Tensor | None:
        """What the optimizer divides the gradients by: the loss scale, and more where they are clipped."""
        if not self.clip:
            return scale
        excess = ((norm + 1e-6) / self.clip).clamp(min=1.0)
        return excess if scale is None else excess * scale

    @torch.no_grad()
    def _refresh(self) -> None:
        """What follows from the state: the next learning rate and the working copy."""
        self.rates.follow(self.progress.made)
        for scale, rate in self._scaled.items():
            torch.mul(self.rates.rate, scale, out=rate)
        if self.working is not self.model:
            torch._foreach_copy_(list(self.working.parameters()), list(self.model.parameters()))

    # -- what is made once ---------------------------------------------------------------------------------------------

    def _place_rate(self) -> None:
        for group in self.optimizer.param_groups:
            scale = group.get("lr_scale", 1.0)
            group["lr"] = self.rates.rate if scale == 1.0 else self._scaled.setdefault(scale, self.rates.rate * scale)

    def _inputs(self, batch: MicroBatch, whole: Mapping[str, float]) -> dict[str, Tensor]:
        """The batch on the device, with its shares of the update."""
        share = self._share(batch, whole)
        return self._to_device(batch.inputs | {"share": share if self._transfers is None else share.pin_memory()})

    def _share(self, batch: MicroBatch, whole: Mapping[str, float]) -> Tensor:
        """For each term, its weight in the update's loss and what it is per, `[2, k]`."""
        rows, own = [], batch.counts
        for term in self.terms:
            part, total = own[term.per], whole[term.per]
            if part > total:
                raise ConfigError(
                    f"the {term.per}s of the update are {total:g}, but this micro-batch alone has {part}: the share of "
                    f"{term.name} is its part of all"
                )
            rows.append((term.weight * (part / max(total, 1)), part))
        return torch.tensor(rows, dtype=torch.float64).T.contiguous()

    def _to_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pinned tensors go to a GPU on a stream of their own, while it still computes what came before."""
        if self._transfers is None:
            return inputs
        main = torch.cuda.current_stream()
        with torch.cuda.stream(self._transfers):
            inputs = {name: t.to(self.world.device, non_blocking=True) for name, t in inputs.items()}
        main.wait_stream(self._transfers)
        for t in inputs.values():
            t.record_stream(main)
        return inputs


def _compiled(function: Callable) -> Callable:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    return torch.compile(function, fullgraph=True, dynamic=False)


class _Graphs:
    """Functions of tensors as CUDA graphs, one for each key. All share one pool of memory: they run one after another
    and leave nothing in it."""

    def __init__(self, device: torch.device):
        self._kept: dict[object, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], object]] = {}
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, key: object, function: Callable[[dict[str, Tensor]], object], inputs: dict[str, Tensor]) -> object:
        """function(inputs), and what it returned when it was captured. The first time it runs as it is, which also
        compiles and allocates what must not happen during a capture, and is captured for the times to come."""
        if key in self._kept:
            graph, given, result = self._kept[key]
            for name, t in inputs.items():
                given[name].copy_(t)
            graph.replay()
            return result
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        given = {name: t.clone() for name, t in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        # The thread that makes batches may pin memory meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = function(given)
        self._kept[key] = graph, given, result
        return result
