"""One fine-tuning run: updates, validations, the best weights."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fastbert.errors import ConfigError, FastBertError
from fastbert.finetune.examples import Example
from fastbert.finetune.options import FinetuneConfig
from fastbert.finetune.report import Scores
from fastbert.finetune.tasks import Sample, Task
from fastbert.models.tasks import TaskModel
from fastbert.nn import Encoder
from fastbert.optim import param_groups, schedule
from fastbert.train import setup, state
from fastbert.train.feed import MicroBatch, deal
from fastbert.train.interrupt import Interrupt
from fastbert.train.journal import Journal
from fastbert.train.step import TrainStep
from fastbert.train.world import World

TASK_FILE = "finetune.json"


def layer_groups(model: TaskModel, weight_decay: float, layer_decay: float) -> list[dict]:
    """`param_groups` with layer-wise learning rates (Clark et al. 2020, arXiv 2003.10555, appendix B): `lr_scale` is 1
    for the head and the pooler, layer_decay for the last layer, layer_decay^2 for the one before it, and so on down to
    the embeddings. A layer that is applied several times, as ALBERT's, is one.
    """
    layers = next(module for module in model.modules() if isinstance(module, Encoder)).layers
    scales = {p: layer_decay ** (len(layers) + 1) for p in model.model.embeddings.parameters()}
    for depth, layer in enumerate(reversed(layers), start=1):
        scales |= {p: layer_decay**depth for p in layer.parameters()}
    groups = []
    for group in param_groups(model, weight_decay):
        parts: dict[float, list] = {}
        for parameter in group["params"]:
            parts.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        groups += [{**group, "params": part, "lr_scale": scale} for scale, part in parts.items()]
    return groups


class Split(NamedTuple):
    """Examples, and the samples that a task has made of them."""

    examples: Sequence[Example]
    samples: Sequence[Sample]


class Tuner:
    """Trains a model for a task as `config` says, with one seed, into `folder`: log.jsonl, and in model/ the best model
    of all validations, or without validation the last one."""

    def __init__(
        self,
        config: FinetuneConfig,
        seed: int,
        folder: Path,
        task: Task,
        model: TaskModel,
        train: Split,
        validation: Split | None,
        world: World,
    ):
        self.config, self.seed, self.folder, self.task, self.world = config, seed, folder, task, world
        self.model = model.to(world.device).train()
        self.train, self.validation = train, validation
        self.updates_per_epoch = -(-len(self.train.samples) // self.global_batch)
        self.steps = config.steps or max(1, math.ceil((config.epochs or 3) * self.updates_per_epoch))
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        world.align(self.model.parameters())
        factor = schedule(config.schedule, steps=self.steps, warmup=config.warmup)
        self.lr = lambda step: config.lr * factor(step)
        self.updates = self._train_step()
        self.step = self.update = 0
        self.best: Scores | None = None
        self.best_step, self.worse, self.loss = 0, 0, math.nan
        self._counts = Counter()  # since the last record
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    @property
    def global_batch(self) -> int:
        return self.config.batch_size * self.config.accumulation * self.world.size

    @property
    def saved(self) -> Path:
        return self.folder / setup.MODEL

    def run(self, interrupt: Interrupt) -> bool:
        """Trains until the last step, an early stop, or an interrupt; returns whether it was interrupted."""
        self.journal = self._open_journal()
        try:
            return self._run(interrupt)
        finally:
            self.journal.close()

    def _run(self, interrupt: Interrupt) -> bool:
        self.journal.begin(self.steps, 0)
        self._mark, stopped = time.perf_counter(), False
        while self.step < self.steps:
            self._train_once()
            stopped = self.world.max(interrupt.requested)[0] > 0
            last = self.step == self.steps
            every = self.config.validate_every or self.updates_per_epoch
            if last or stopped or self.step % self.config.log_every == 0:
                self._log()
            if self.validation and (last or self.step % every == 0) and not stopped:
                self._validate()
                if self.config.patience and self.worse >= self.config.patience:
                    self.journal.say(f"no better {self.metric} in {self.worse} validations: stopped early")
                    break
            if stopped:
                break
        if not self.saved.is_dir():  # nothing was validated: the last weights
            self._save()
        self.journal.record("end", step=self.step, best_step=self.best_step, interrupted=stopped)
        return stopped

    # -- updates -------------------------------------------------------------------------------------------------------

    def _train_step(self) -> TrainStep:
        config = self.config
        groups = layer_groups(self.model, config.weight_decay, config.layer_decay)
        settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
        optimizer = torch.optim.AdamW(groups, capturable=self.world.device.type == "cuda", **settings)
        dtype = setup.working_dtype(config.precision, self.world.device)
        return TrainStep(self.model, optimizer, self.lr, world=self.world, dtype=dtype, clip=config.clip)

    def _train_once(self) -> None:
        hands = list(enumerate(self._hands(self.update)))[self.world.rank :: self.world.size]
        batches = [self.task.batch([self.train.samples[i] for i in hand]) for _, hand in hands]
        own = [sum(batch.counts[per] for batch in batches) for per in ("label", "sample", "token")]
        labels, samples, tokens = self.world.sum(*own)
        for (number, _), batch in zip(hands, batches, strict=True):
            seed, last = _seed(self.seed, self.update, number, 0), number == hands[-1][0]
            self.updates.accumulate(_pinned(batch, self.world), labels, seed, samples=samples, tokens=tokens, last=last)
        self.updates.apply()
        self._counts.update({"label": int(labels), "sample": int(samples), "token": int(tokens)})
        self.update += 1
        self.step = self.updates.look()
        self._check_finite()
        self.journal.advance(self.step)

    def _hands(self, update: int) -> list[np.ndarray]:
        """The samples of an update, as micro-batches over all processes: the next `global_batch` in the order of the
        epoch, a function of seed and epoch alone, dealt out by length. The last update of an epoch has what is left."""
        epoch, place = divmod(update, self.updates_per_epoch)
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._order = epoch, generator.permutation(len(self.train.samples))
        chosen = self._order[1][place * self.global_batch : (place + 1) * self.global_batch]
        count = min(len(chosen), self.config.accumulation * self.world.size)
        lengths = np.array([len(self.train.samples[i].ids) for i in chosen])
        spare = -len(chosen) % count
        lengths = np.append(lengths, np.full(spare, -1))
        return [chosen[hand[hand < len(chosen)]] for hand in deal(lengths, count)]

    def _check_finite(self) -> None:
        bad = -self.world.max(-self.updates.progress.first_bad.item())[0]
        if math.isinf(bad):
            return
        chosen = np.concatenate(self._hands(int(bad)))
        where = [self.train.examples[self.train.samples[i].example].where for i in chosen]
        self.journal.record("error", reason="loss", update=int(bad), examples=where)
        shown = ", ".join(where[:8]) + (", ... (all in the log)" if len(where) > 8 else "")
        raise FastBertError(
            f"the loss or its gradient is not finite in step {int(bad) + 1}, on {shown}. Try a lower lr, a longer "
            "warmup, or precision='fp32'"
        )

    # -- between updates -----------------------------------------------------------------------------------------------

    def _open_journal(self) -> Journal:
        if not self.world.is_main:
            return Journal(None)
        journal = Journal(self.folder, title=f"seed {self.seed}", tensorboard=self.config.tensorboard)
        journal.record(
            "begin",
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            seed=self.seed,
            steps=self.steps,
            versions=setup.versions(),
            device=setup.device_name(self.world.device),
            processes=self.world.size,
            precision=str(next(self.updates.working.parameters()).dtype).removeprefix("torch."),
            parameters=self.model.num_parameters(),
            samples=len(self.train.samples),
            architecture=self.model.config.to_dict(),
            config=asdict(self.config),
        )
        return journal

    def _log(self) -> None:
        (total,) = self.world.sum(self.updates.progress.losses.item())
        self.updates.progress.losses.zero_()
        (term,) = self.model.terms
        now = time.perf_counter()
        speed, lr = self._counts["token"] / (now - self._mark), self.lr(max(0, self.step - 1))
        self.loss = total / max(1, self._counts[term.per])
        self._counts.clear()
        self._mark = now
        norm = self.updates.progress.grad_norm.item()
        figures = {"loss": self.loss, "lr": lr, "grad_norm": norm, "tokens_per_second": round(speed, 1)}
        self.journal.record("train", step=self.step, **figures)
        self.journal.progress(self.step, self.loss, lr, speed)

    def _validate(self) -> None:
        begin = time.perf_counter()
        size = 2 * self.config.batch_size
        _, scores = evaluate(self.task, self.updates.working, self.validation, size, self.world)
        value = chosen_metric(scores, self.metric)
        self.journal.record("validation", step=self.step, **scores.metrics)
        better = self.best is None or value > chosen_metric(self.best, self.metric)
        self.worse = 0 if better else self.worse + 1
        shown = "  ".join(f"{name} {number:.4f}" for name, number in scores.metrics.items())
        self.journal.say(f"step {self.step}/{self.steps}: {shown}{'  (the best)' if better else ''}")
        if better:
            self.best, self.best_step = scores, self.step
            self._save()
        self._mark += time.perf_counter() - begin

    @property
    def metric(self) -> str:
        return self.config.metric or self.task.metric

    def _save(self) -> None:
        self.best_step = self.step
        if self.world.is_main:
            with state.new_folder(self.saved) as folder:
                save_model(folder, self.model, self.task)
        self.world.barrier()


def save_model(folder: Path, model: TaskModel, task: Task) -> None:
    """A model folder in the transformers layout, with its tokenizer, and finetune.json, which says what the task is."""
    model.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    content = {"task": task.name, "settings": task.settings(), "versions": setup.versions()}
    (folder / TASK_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def chosen_metric(scores: Scores, name: str) -> float:
    """The number by which models are compared; one that is not a number loses."""
    if name not in scores.metrics:
        raise ConfigError(f"metric is {name!r}, expected one of {', '.join(scores.metrics)}")
    value = scores.metrics[name]
    value = -value if name in _SMALLER_IS_BETTER else value
    return -math.inf if math.isnan(value) else value


_SMALLER_IS_BETTER = ("mean_squared_error",)


def evaluate(task: Task, model: nn.Module, split: Split, batch_size: int, world: World) -> tuple[list[dict], Scores]:
    """Predictions of all examples, and how good they are; the processes share the work, and all have the result."""
    predictions = task.predictions(*split, infer(task, model, split.samples, batch_size, world))
    return predictions, task.score(split.examples, predictions)


@torch.no_grad()
def infer(
    task: Task,
    model: nn.Module,
    samples: Sequence[Sample],
    batch_size: int,
    world: World,
    advance: Callable[[int], None] = lambda count: None,
) -> list[np.ndarray]:
    """The logits of each sample. Those of about the same length are computed together."""
    order = np.argsort([len(sample.ids) for sample in samples], kind="stable")
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    found: list[np.ndarray | None] = [None] * len(samples)
    training = model.training
    model.eval()
    for chosen in batches[world.rank :: world.size]:
        batch = task.batch([samples[i]._replace(target=None) for i in chosen])
        inputs = {name: t.to(world.device) for name, t in batch.inputs.items()}
        for i, row in zip(chosen, task.logits(model(**inputs, max_seqlen=batch.max_seqlen), batch), strict=True):
            found[i] = row
        advance(len(chosen))
    model.train(training)
    return found if world.size == 1 else _together(found, samples, batches, world)


def _together(found: list, samples: Sequence[Sample], batches: list, world: World) -> list[np.ndarray]:
    """The results of all processes in each of them."""
    own = [row for row in found if row is not None]
    (width,) = world.max(own[0].shape[-1] if own else 0)
    (by_token,) = world.max(float(bool(own) and own[0].ndim == 2))
    sizes = [int(width) * (len(sample.ids) if by_token else 1) for sample in samples]
    ends = np.cumsum([0, *sizes])
    flat = torch.zeros(int(ends[-1]), dtype=torch.float32)
    for row, begin, end in zip(found, ends[:-1], ends[1:], strict=True):
        if row is not None:
            flat[begin:end] = torch.from_numpy(np.ascontiguousarray(row).reshape(-1))
    world.add(flat)
    shape = (-1, int(width)) if by_token else (int(width),)
    return [flat[begin:end].numpy().reshape(shape) for begin, end in zip(ends[:-1], ends[1:], strict=True)]


def _pinned(batch: MicroBatch, world: World) -> MicroBatch:
    if world.device.type != "cuda":
        return batch
    return batch._replace(inputs={name: t.pin_memory() for name, t in batch.inputs.items()})


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
