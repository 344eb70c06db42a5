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

from fastbert.errors import FastBertError, ProcessError, StorageError
from fastbert.optim import is_sharded, schedule
from fastbert.train import health, resume, setup, state
from fastbert.train.config import PretrainConfig
from fastbert.train.feed import micro_batch
from fastbert.train.interrupt import Interrupt
from fastbert.train.journal import Journal
from fastbert.train.saver import Saver
from fastbert.train.sharding import shard
from fastbert.train.spikes import describe
from fastbert.train.world import World, launch

_GO_ON, _INTERRUPTED, _CANNOT_SAVE = range(3)
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
    SIGINT and SIGTERM end it after the current step, with a checkpoint. Processes that torchrun has started anew after
    one has failed go on from the last checkpoint.

    Raises ConfigError, DataError, CheckpointError, MissingFileError or MissingDependencyError before any work is done;
    FastBertError if the loss or its gradients are not finite, or spike where that is to end the run, after a checkpoint
    of the state before; StorageError if a file cannot be written; ProcessError if another process fails or hangs.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with World.join(config.device, config.timeout) as world:
        trainer = Trainer(resume.after_restart(config, world), world)
        try:
            return trainer.run()
        except StorageError as error:
            raise StorageError(f"{error}; {trainer.standing()}") from error
        finally:
            trainer.close()


class Trainer:
    """One run, in one process. `step` counts the updates that were made, `update` those that were tried: they differ by
    what the loss scale or a spike skipped. Samples follow `update`, the learning rate follows `step`. Where updates can
    be skipped, only the device knows `step`: between looks it is the most it can be.
    """

    def __init__(self, config: PretrainConfig, world: World):
        self.config, self.world, self.folder = config, world, Path(config.out)
        setup.check_device(config, world)
        setup.check_options(config, world)
        if world.is_main:
            setup.check_folder(config)
        setup.architecture(config)  # before text is prepared for what cannot be built
        resumed, damaged = resume.find_checkpoint(config, world)
        self._build_data()
        self._build_model(resumed)
        self.step = self.update = 0
        self.counts = Counter()  # since the last record, by what a term of the loss is per
        self.loss, self.validation_loss, self._validated = math.nan, None, -1
        if resumed is not None:
            self._restore(resumed)
        self.journal = self._open_journal(resumed)
        for text in damaged:
            self.journal.record("damaged", step=self.step, reason=text)
            self.journal.say(text)

    def run(self) -> PretrainResult:
        """Trains until the last step or an interrupt."""
        self.journal.begin(self.steps, self.step)
        self._mark, stop = time.perf_counter(), False
        with Interrupt(announce=self.world.is_main) as interrupt:
            while self.step < self.steps and not stop:
                self.world.note(f"in step {self.step + 1}")
                self._train_step()
                stop = self._agree(interrupt.requested)
                self._after_step(stop)
            self._finish_saving()
        if self.step < self.steps:
            return PretrainResult(self.folder, None, self.step, self.loss, self.validation_loss, True)
        model = self.folder / setup.MODEL
        self.saver.write_model(self.model, model)
        best = {} if self.saver.best is None else {"best_checkpoint": self.saver.best[1]}
        self.journal.record("end", step=self.step, loss=self.loss, validation_loss=self.validation_loss, **best)
        return PretrainResult(self.folder, model, self.step, self.loss, self.validation_loss, False)

    def standing(self) -> str:
        """What there is to go on from."""
        self.saver.wait()
        there = state.newest_first(self.saver.root)
        if not there:
            return f"the run in {self.folder} ends after step {self.step}, without any checkpoint"
        return (
            f"the run in {self.folder} ends after step {self.step}, its last checkpoint is {there[0].name}: once there "
            "is room, it goes on from there with resume"
        )

    def close(self) -> None:
        """Ends the threads, the one that writes a checkpoint once it is complete, and closes the files."""
        self.feed.close()
        self.saver.wait()
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
        self.model = setup.build_model(config, self.tokenizer, resumed)
        self.saver = Saver(
            self.folder / setup.CHECKPOINTS,
            self.model,
            lambda model, folder: setup.write_model(model, self.tokenizer, folder),
            self.world,
            keep_last=config.keep_last,
            asynchronous=config.async_checkpoints,
        )
        self.model.to(device).train()
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.world.align(self.model.parameters())
        if config.parallel == "fsdp" and self.world.size > 1:
            dtype = setup.working_dtype(config.precision, device)
            shard(self.model, self.world, dtype, setup.DTYPES.get(config.reduce_dtype))
        teacher = setup.distillation(config, self.model, self.tokenizer, self.world)
        self.updates = setup.train_step(config, self.model, self.lr, self.world, teacher)

    def _open_journal(self, resumed: Path | None) -> Journal:
        if not self.world.is_main:
            return Journal(None)
        with state.storing(self.folder):
            if resumed is None:
                setup.clear_folder(self.folder)
            else:
                self.saver.tidy(self.step)
            state.remove_remains(self.saver.root)
            resume_from = None if resumed is None else self.step
            journal = Journal(self.folder, tensorboard=self.config.tensorboard, resume_from=resume_from)
        journal.record(
            "begin" if resumed is None else "resume",
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            step=self.step,
            steps=self.steps,
            versions=setup.versions(),
            device=setup.device_name(self.world.device),
            processes=self.world.size,
            launch=launch(),
            threads=torch.get_num_threads(),
            precision=str(self.updates.dtype).removeprefix("torch."),
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
            last = index == len(batches) - 1
            seed = self._seed(self.update, index)
            self.updates.accumulate(batch, labels, seed, samples=samples, tokens=tokens, last=last)
        self.counts.update(own)
        self.updates.apply()
        self.update += 1
        self.step += 1

    def _seed(self, update: int, index: int) -> int:
        """That of a micro-batch: the same whichever process has it."""
        return _derived_seed(self.config.seed, update, index * self.world.size + self.world.rank, 0)

    def _agree(self, interrupted: bool) -> bool:
        """Whether to stop, because some process was asked to. StorageError if the first one could not save."""
        own = _CANNOT_SAVE if self.saver.error is not None else _INTERRUPTED if interrupted else _GO_ON
        (found,) = self.world.max(own)
        if found == _CANNOT_SAVE:
            self._raise_of_saver()
        return found == _INTERRUPTED

    def _raise_of_saver(self) -> None:
        raise self.saver.error or ProcessError("process 0 cannot save a checkpoint, and says why; this one ends too")

    # -- between steps -------------------------------------------------------------------------------------------------

    def _after_step(self, stop: bool) -> None:
        config = self.config
        last = self.step == self.steps
        log = last or _due(self.step, config.log_every)
        validate = self.held_out is not None and (last or _due(self.step, config.validate_every))
        save = last or _due(self.step, config.checkpoint_every)
        if self.world.device.type == "cpu" or log or validate or save or stop:  # on a GPU, looking means waiting
            most, self.step = self.step, self.updates.look()
            self._check_health()
            if self.step < most:  # what is due is due once this step has been made
                log = validate = save = False
        self.journal.advance(self.step)
        self._tell_of_saved()
        if log:
            self._log()
        begin = time.perf_counter()
        if validate:
            self._validate()
        if save or stop:
            self._save()
        self._mark += time.perf_counter() - begin

    def _check_health(self) -> None:
        """Tells of updates that were skipped. FastBertError if one could not be made: weights and moments are as they
        were before it, and are saved."""
        spikes = [] if self.updates.spikes is None else self.updates.spikes.look()
        for spike in spikes:
            epoch, samples = self.feed.samples(spike.update)
            self.journal.record("spike", step=self.step, epoch=epoch, samples=samples.tolist(), **spike._asdict())
            self.journal.say(f"{describe(spike, self.config.spike_sigmas)}: {self.config.spikes}")
        bad = self.updates.progress.first_bad.item()
        if math.isinf(bad):
            return
        self.update = int(bad)
        self.updates.progress.losses.zero_()  # they have what came after it
        self.counts.clear()
        if self.saver.step != self.step:
            self._save()
        spiked = next((spike for spike in spikes if spike.update == self.update), None)
        epoch, samples = self.feed.samples(self.update)
        faults = [] if spiked else self._diagnose()
        where = {"update": self.update, "epoch": epoch, "samples": samples.tolist()}
        self.journal.record("error", reason="spike" if spiked else "loss", faults=faults, **where)
        self._finish_saving()
        where = f"{health.named(samples)} of epoch {epoch}"
        saved = f"weights and moments before it are in {state.name_of(self.step)}"
        if spiked:
            told = describe(spiked, self.config.spike_sigmas)
            raise FastBertError(f"{told}, on {where}; {saved}. To leave it out, resume with spikes 'skip'")
        raise FastBertError(
            f"the loss or its gradient is not finite in step {self.update + 1}, on {where}; {saved}. "
            f"{health.describe(faults)}. Try a lower lr, a longer warmup, or precision='fp32'"
        )

    def _diagnose(self) -> list[dict]:
        """What is not finite when the update that could not be made is computed again, on all processes."""
        self.world.note(f"looking into step {self.update + 1}")
        batches = self.feed.take(self.update)
        labels, samples, tokens = self.world.sum(*(sum(batch.counts[per] for batch in batches) for per in _PER))
        found = []
        for index, batch in enumerate(batches):
            fault = health.diagnose(
                self.updates, batch, labels, self._seed(self.update, index), samples=samples, tokens=tokens
            )
            if fault:
                found.append({"samples": self.feed.own(self.update)[index].tolist(), **fault})
        return self.world.gather(found)

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
        sharded = any(map(is_sharded, model.parameters()))
        for first in range(0, count, self.world.size * size):
            own = chosen[first + rank * size : first + (rank + 1) * size]
            if not len(own):
                if sharded:  # the others need this process's part of the weights
                    self.updates.evaluate(micro_batch(self.held_out, chosen[:1], 0, self.world))
                continue
            batch = micro_batch(self.held_out, own, 0, self.world)
            torch.manual_seed(_derived_seed(self.config.seed, int(own[0])))  # ELECTRA draws words
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
        self.validation_loss, self._validated = figures["loss"], self.step
        self.journal.record("validation", step=self.step, **figures)
        perplexity = math.exp(min(figures.get(terms[0].name, self.validation_loss), 700.0))
        said = f"validation loss {self.validation_loss:.4f}, perplexity {perplexity:,.1f}"
        if counts["sample"]:
            said += f", accuracy of the sentence head {figures['sentence_accuracy']:.1%}"
        self.journal.say(f"step {self.step}/{self.steps}: {said}")

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.world.note(f"saving step {self.step}")
        self.saver.wait()
        self._tell_of_saved()
        content = {
            "step": self.step,
            "update": self.update,
            "window": self._window(),
            "loss": None if math.isnan(self.loss) else self.loss,
            "validation_loss": self.validation_loss,
            "loss_scale": self.updates.loss_scale and self.updates.loss_scale.state(),
            "spikes": self.updates.spikes and self.updates.spikes.state(),
            "data": self.data_digest,
            "global_batch": self.feed.global_batch,
            "config": asdict(self.config),
            "versions": setup.versions(),
        }
        self.journal.sync()
        scored = self.config.keep_best and self._validated == self.step
        loss = self.validation_loss if scored else None
        self.saver.save(self.model, self.updates.optimizer, content, loss)

    def _finish_saving(self) -> None:
        """Waits for the checkpoint that is being written. StorageError if it cannot be."""
        self.saver.wait()
        self._agree(False)
        self._tell_of_saved()

    def _tell_of_saved(self) -> None:
        for saved in self.saver.saved():
            seconds = {"held_up_s": round(saved.held_up, 4), "took_s": round(saved.took, 4)}
            self.journal.record("checkpoint", step=saved.step, folder=state.name_of(saved.step), **seconds)

    def _restore(self, checkpoint: Path) -> None:
        content = resume.read_state(checkpoint)
        resume.check_resumable(self.config, content, self.feed.global_batch, self.data_digest)
        state.load_optimizer(self.model, self.updates.optimizer, checkpoint)
        self.step, self.update = content["step"], content["update"]
        self.updates.restore(self.step, self.update, resume.loss_scale_of(content), content.get("spikes"))
        self.loss = math.nan if content["loss"] is None else content["loss"]
        self.validation_loss = content["validation_loss"]
        self.saver.step = self.step
        if best := content.get("best"):
            self.saver.best = tuple(best)
        if self.world.is_main:
            window = resume.window_of(content)
            self.updates.progress.losses.copy_(torch.tensor(window["losses"], dtype=torch.float64))
            self.counts.update({per: int(count) for per, count in window["counts"].items()})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _derived_seed(*numbers: int) -> int:
    """A seed of 63 bits that is as good as independent for every tuple of numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
