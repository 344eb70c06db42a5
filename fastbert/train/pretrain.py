"""Pretraining: the loop from batches to checkpoints.

Everything random is a function of the seed and the number of the update: the order of samples, the masks, the dropout.
A checkpoint therefore needs no state of any generator, and on the CPU, with as many threads, a resumed run equals one
that never stopped, bit by bit.
"""

import hashlib
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastbert.errors import FastBertError
from fastbert.optim import schedule
from fastbert.train import setup, state
from fastbert.train.config import PretrainConfig
from fastbert.train.feed import micro_batch
from fastbert.train.interrupt import Interrupt
from fastbert.train.journal import Journal
from fastbert.train.world import World

_PER = ("label", "sample", "token")  # what a term of the loss is a mean over


@dataclass(frozen=True)
class PretrainResult:
    """What a run came to. model is None if it was interrupted, validation_loss if there was nothing to validate on."""

    folder: Path
    model: Path | None
    step: int
    loss: float
    validation_loss: float | None
    interrupted: bool


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Trains a model as `config` says; alone, or as one of the processes of torchrun.

    Writes into config.out: log.jsonl, checkpoints/step-*, and at the end model/, a folder in the transformers layout.
    SIGINT and SIGTERM end it after the current step, with a checkpoint. Raises ConfigError, DataError, CheckpointError,
    MissingFileError or MissingDependencyError before any work is done, FastBertError if the loss is not finite.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with World.join(config.device) as world:
        trainer = Trainer(config, world)
        try:
            return trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One run, in one process. `step` counts the updates that were made, `update` those that were tried: they differ by
    what the loss scale skipped. Samples follow `update`, the learning rate follows `step`. Where updates can be
    skipped, only the device knows `step`: between looks it is the most it can be.
    """

    def __init__(self, config: PretrainConfig, world: World):
        self.config, self.world, self.folder = config, world, Path(config.out)
        setup.check_device(config, world)
        setup.check_options(config, world)
        if world.is_main:
            setup.check_folder(config)
        setup.architecture(config)  # before text is prepared for what cannot be built
        resumed, damaged = setup.find_checkpoint(config, world)
        self._build_data()
        self._build_model(resumed)
        self.step = self.update = 0
        self.counts = Counter()  # since the last record, by what a term of the loss is per
        self.loss, self.validation_loss = math.nan, None
        if resumed is not None:
            self._restore(resumed)
        self.journal = self._open_journal(resumed)
        for text in damaged:
            self.journal.say(text)

    def run(self) -> PretrainResult:
        """Trains until the last step or an interrupt."""
        self.journal.begin(self.steps, self.step)
        self._mark, stop = time.perf_counter(), False
        with Interrupt(announce=self.world.is_main) as interrupt:
            while self.step < self.steps and not stop:
                self._train_step()
                stop = self.world.max(interrupt.requested)[0] > 0
                self._after_step(stop)
        if self.step < self.steps:
            return PretrainResult(self.folder, None, self.step, self.loss, self.validation_loss, True)
        model = self.folder / setup.MODEL
        if self.world.is_main:
            with state.new_folder(model) as folder:
                self._write_model(folder)
        self.journal.record("end", step=self.step, loss=self.loss, validation_loss=self.validation_loss)
        return PretrainResult(self.folder, model, self.step, self.loss, self.validation_loss, False)

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self.feed.close()
        self.journal.close()

    # -- building ------------------------------------------------------------------------------------------------------

    def _build_data(self) -> None:
        config = self.config
        self.tokenizer, corpus, held_out = setup.open_data(config, self.world)
        similar = setup.similar_pieces(config, self.tokenizer)
        self.data_digest = setup.digest(corpus, similar)
        self.objective = setup.objective(config, corpus, self.tokenizer, similar)
        self.held_out = held_out and setup.objective(config, held_out, self.tokenizer, similar)
        setup.check_labels(self.objective)
        self.feed = setup.feed(config, self.objective, self.tokenizer, self.world)
        self.steps = config.steps or max(1, int((config.epochs or 1) * self.feed.updates_per_epoch))

    def _build_model(self, resumed: Path | None) -> None:
        config, device = self.config, self.world.device
        factor = schedule(config.schedule, steps=self.steps, warmup=config.warmup, degree=config.degree)
        self.lr = lambda step: config.lr * factor(step)
        torch.manual_seed(config.seed)
        self.model = setup.build_model(config, self.tokenizer, resumed).to(device).train()
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.world.align(self.model.parameters())
        teacher = setup.distillation(config, self.model, self.tokenizer, self.world)
        self.updates = setup.train_step(config, self.model, self.lr, self.world, teacher)

    def _open_journal(self, resumed: Path | None) -> Journal:
        if not self.world.is_main:
            return Journal(None)
        if resumed is None:
            setup.clear_folder(self.folder)
        journal = Journal(
            self.folder, tensorboard=self.config.tensorboard, resume_from=None if resumed is None else self.step
        )
        journal.record(
            "begin" if resumed is None else "resume",
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            step=self.step,
            steps=self.steps,
            versions=setup.versions(),
            device=setup.device_name(self.world.device),
            processes=self.world.size,
            threads=torch.get_num_threads(),
            precision=str(next(self.updates.working.parameters()).dtype).removeprefix("torch."),
            parameters=self.model.num_parameters(),
            samples=len(self.objective),
            architecture=self.model.config.to_dict(),
            config=asdict(self.config),
        )
        return journal

    # -- one step ------------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        batches = self.feed.take(self.update)
        own = Counter({per: sum(batch.counts[per] for batch in batches) for per in _PER})
        labels, samples, tokens = self.world.sum(*(own[per] for per in _PER))
        for index, batch in enumerate(batches):
            seed = _derived_seed(self.config.seed, self.update, index, self.world.rank)
            self.updates.accumulate(batch, labels, seed, samples=samples, tokens=tokens)
        self.counts.update(own)
        self.updates.apply()
        self.update += 1
        self.step += 1

    # -- between steps -------------------------------------------------------------------------------------------------

    def _after_step(self, stop: bool) -> None:
        config = self.config
        last = self.step == self.steps
        log = last or _due(self.step, config.log_every)
        validate = self.held_out is not None and (last or _due(self.step, config.validate_every))
        save = last or _due(self.step, config.checkpoint_every)
        if self.world.device.type == "cpu" or log or validate or save or stop:  # on a GPU, looking means waiting
            self._check_finite()
            most, self.step = self.step, self.updates.look()
            if self.step < most:  # what is due is due once this step has been made
                log = validate = save = False
        self.journal.advance(self.step)
        if log:
            self._log()
        begin = time.perf_counter()
        if validate:
            self._validate()
        if save or stop:
            self._save()
        self._mark += time.perf_counter() - begin

    def _check_finite(self) -> None:
        bad = -self.world.max(-self.updates.progress.first_bad.item())[0]
        if math.isinf(bad):
            return
        epoch, samples = self.feed.samples(int(bad))
        self.journal.record("error", reason="loss", update=int(bad), epoch=epoch, samples=samples.tolist())
        shown = ", ".join(map(str, samples[:16])) + (", ... (all in the log)" if len(samples) > 16 else "")
        raise FastBertError(
            f"the loss or its gradient is not finite in step {int(bad) + 1}, on samples {shown} of epoch {epoch}; "
            "nothing was saved since the last checkpoint. Try a lower lr, a longer warmup, or precision='fp32'"
        )

    def _window(self) -> dict:
        """For each term of the loss the sum of its means x what it is per, and how many of those there were, since the
        last record, over all processes."""
        losses = self.updates.progress.losses.tolist()
        found = self.world.sum(*losses, *(self.counts[per] for per in _PER))
        return {"losses": found[: len(losses)], "counts": dict(zip(_PER, found[len(losses) :], strict=True))}

    def _log(self) -> None:
        window = self._window()
        self.updates.progress.losses.zero_()
        self.counts.clear()
        now, tokens = time.perf_counter(), window["counts"]["token"]
        speed, lr = tokens / (now - self._mark), self.lr(self.step - 1)
        figures = self._figures(**window)
        self._mark, self.loss = now, figures["loss"]
        self.journal.record(
            "train",
            step=self.step,
            **figures,
            lr=lr,
            grad_norm=self.updates.progress.grad_norm.item(),
            tokens=int(tokens),
            tokens_per_second=round(speed, 1),
        )
        self.journal.progress(self.step, self.loss, lr, speed)

    def _figures(self, losses: list[float], counts: dict[str, float]) -> dict[str, float]:
        """The loss, and where it has several terms the mean of each by its name."""
        terms = self.updates.terms
        means = {term.name: loss / max(counts[term.per], 1) for term, loss in zip(terms, losses, strict=True)}
        total = {"loss": sum(term.weight * means[term.name] for term in terms)}
        return total | (means if len(terms) > 1 else {})

    @torch.no_grad()
    def _validate(self) -> None:
        count = min(len(self.held_out), self.config.validation_samples)
        chosen = torch.linspace(0, len(self.held_out) - 1, count, dtype=torch.float64).long().numpy()
        terms, counts = self.updates.terms, Counter()
        total, right = (torch.zeros(n, dtype=torch.float64, device=self.world.device) for n in (len(terms), 1))
        size, rank = self.config.batch_size, self.world.rank
        model = self.updates.working.eval()
        for begin in range(rank * size, count, self.world.size * size):
            batch = micro_batch(self.held_out, chosen[begin : begin + size], 0, self.world)
            losses, guessed = self.updates.evaluate(batch)
            total += losses.double() * total.new_tensor([batch.counts[term.per] for term in terms])
            right += 0 if guessed is None else guessed
            counts.update(batch.counts)
        model.train()
        found = self.world.sum(*total.tolist(), right.item(), *(counts[per] for per in _PER))
        counts = dict(zip(_PER, found[len(terms) + 1 :], strict=True))
        figures = self._figures(found[: len(terms)], counts)
        if counts["sample"]:
            figures["sentence_accuracy"] = found[len(terms)] / counts["sample"]
        self.validation_loss = figures["loss"]
        self.journal.record("validation", step=self.step, **figures)
        perplexity = math.exp(min(figures.get(terms[0].name, self.validation_loss), 700.0))
        said = f"validation loss {self.validation_loss:.4f}, perplexity {perplexity:,.1f}"
        if counts["sample"]:
            said += f", accuracy of the sentence head {figures['sentence_accuracy']:.1%}"
        self.journal.say(f"step {self.step}/{self.steps}: {said}")

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        window = self._window()
        if self.world.is_main:
            content = {
                "step": self.step,
                "update": self.update,
                "window": window,
                "loss": None if math.isnan(self.loss) else self.loss,
                "validation_loss": self.validation_loss,
                "loss_scale": self.updates.loss_scale and self.updates.loss_scale.state(),
                "data": self.data_digest,
                "global_batch": self.feed.global_batch,
                "config": asdict(self.config),
                "versions": setup.versions(),
            }
            moments, root = state.optimizer_tensors(self.model, self.updates.optimizer), self.folder / setup.CHECKPOINTS
            folder = state.save(root, self.step, self._write_model, moments, content)
            state.prune(root, self.config.keep_last)
            self.journal.record("checkpoint", step=self.step, folder=folder.name)
        self.world.barrier()

    def _restore(self, checkpoint: Path) -> None:
        content = state.read_state(checkpoint)
        setup.check_resumable(self.config, content, self.feed.global_batch, self.data_digest)
        state.load_optimizer(self.model, self.updates.optimizer, checkpoint)
        self.step, self.update = content["step"], content["update"]
        self.updates.restore(self.step, self.update, setup.loss_scale_of(content))
        self.loss = math.nan if content["loss"] is None else content["loss"]
        self.validation_loss = content["validation_loss"]
        if self.world.is_main:
            window = setup.window_of(content)
            self.updates.progress.losses.copy_(torch.tensor(window["losses"], dtype=torch.float64))
            self.counts.update({per: int(count) for per, count in window["counts"].items()})

    def _write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        for part in {folder, setup.word_model(folder)}:
            self.tokenizer.save_pretrained(part)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _derived_seed(*numbers: int) -> int:
    """A seed of 63 bits that is as good as independent for every tuple of numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
