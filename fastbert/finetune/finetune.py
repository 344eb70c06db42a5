"""From files of examples and a pretrained model to a fine-tuned one, with reports."""

import hashlib
import json
import math
import shutil
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from fastbert import EncoderConfig, checkpoint, hub, model_class
from fastbert.config import nearest
from fastbert.data import Tokenizer
from fastbert.errors import CheckpointError, ConfigError, DataError
from fastbert.finetune.answering import QuestionAnswering
from fastbert.finetune.classification import Classification
from fastbert.finetune.examples import Example, read_examples
from fastbert.finetune.loop import Split, Tuner, chosen_metric, evaluate
from fastbert.finetune.options import FinetuneConfig
from fastbert.finetune.report import Scores
from fastbert.finetune.tagging import Tagging
from fastbert.finetune.tasks import Task
from fastbert.models.tasks import TaskModel
from fastbert.train import setup, state
from fastbert.train.interrupt import Interrupt
from fastbert.train.journal import LOG
from fastbert.train.world import World

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Tagging, QuestionAnswering)}
SCORES, REPORT, CONFUSION, PREDICTIONS = "scores.json", "report.txt", "confusion.png", "predictions.jsonl"


@dataclass(frozen=True)
class SeedResult:
    """What the run with one seed came to: where it is, its best model, and that one's scores; None for a split that
    there is not."""

    seed: int
    folder: Path
    model: Path
    validation: Scores | None
    test: Scores | None


@dataclass(frozen=True)
class FinetuneResult:
    """What all runs came to. model: the best one by validation, None if none was finished. mean and deviation: of each
    metric over the seeds, on the test split or else on validation; the deviation is that of a sample (n - 1)."""

    folder: Path
    seeds: list[SeedResult]
    metric: str
    mean: dict[str, float]
    deviation: dict[str, float]
    model: Path | None
    interrupted: bool


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Trains a pretrained model for a task as `config` says, once for each seed; alone, or as one of the processes of
    torchrun.

    Writes into config.out (of several seeds into its folders seed-N): log.jsonl; model/, the best model, a folder in
    the transformers layout with finetune.json, which fastbert predict reads; report.txt and scores.json; with labels to
    confuse and matplotlib installed confusion.png; with a test split predictions.jsonl.
    SIGINT and SIGTERM end it after the current step; the best model so far stays. Raises ConfigError, DataError,
    CheckpointError or MissingFileError before any work is done, FastBertError if the loss is not finite.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with World.join(config.device) as world:
        return _Finetuning(config, world).run()


class _Finetuning:
    """All runs of a config."""

    def __init__(self, config: FinetuneConfig, world: World):
        self.config, self.world, self.out = config, world, Path(config.out)
        self._check_out()
        config.model = str(hub.local_folder(config.model))
        tokenizer = Tokenizer.from_pretrained(config.model)
        examples = read_splits(config)
        held_out = [] if config.validation else examples.get("validation", [])
        self.task = make_task(config, tokenizer, [*examples["train"], *held_out])
        self.architecture = architecture(config, self.task)
        if config.metric not in (None, *self.task.metrics):
            known = self.task.metrics
            raise ConfigError(
                f"metric is {config.metric!r}, expected one of {', '.join(known)}{nearest(config.metric, known)}"
            )
        # what is wrong with any of it is found before anything is trained
        self.splits = {name: Split(found, self.task.samples(found)) for name, found in examples.items()}
        for name, split in self.splits.items():
            if world.is_main:
                print(described(name, self.task, *split), flush=True)

    def run(self) -> FinetuneResult:
        config, results, interrupted = self.config, [], False
        build(config, self.architecture, self.task)  # what is wrong with it is found before anything is removed
        self.world.barrier()
        if self.world.is_main:
            clear(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
        self.world.barrier()
        with Interrupt(announce=self.world.is_main) as interrupt:
            for seed in config.seeds:
                folder = self.out if len(config.seeds) == 1 else self.out / f"seed-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                tuner = self._tuner(seed, folder)
                interrupted = tuner.run(interrupt)
                if tuner.saved.is_dir():
                    results.append(self._finish(tuner))
                if interrupted:
                    break
        return self._together(results, interrupted)

    def _tuner(self, seed: int, folder: Path) -> Tuner:
        torch.manual_seed(seed)
        model = build(self.config, self.architecture, self.task)
        splits = self.splits
        return Tuner(self.config, seed, folder, self.task, model, splits["train"], splits.get("validation"), self.world)

    def _finish(self, tuner: Tuner) -> SeedResult:
        """Tests the best model and writes the reports."""
        test = None
        if "test" in self.splits:
            best = type(tuner.model).from_pretrained(tuner.saved, dtype=torch.float32, device=self.world.device)
            dtype = setup.working_dtype(self.config.precision, self.world.device)
            best = best if dtype is None else best.to(dtype)
            size = 2 * self.config.batch_size
            predictions, test = evaluate(self.task, best, self.splits["test"], size, self.world)
            if self.world.is_main:
                write_predictions(tuner.folder / PREDICTIONS, self.splits["test"].examples, predictions)
        found = SeedResult(tuner.seed, tuner.folder, tuner.saved, tuner.best, test)
        if self.world.is_main:
            self._write_reports(found, tuner)
        return found

    def _write_reports(self, found: SeedResult, tuner: Tuner) -> None:
        text = [f"{self.task.name}, {self.config.model}, seed {found.seed}, best of step {tuner.best_step}"]
        content = {}
        for name, scores in (("validation", found.validation), ("test", found.test)):
            if scores is not None:
                text.append(f"\n{name}: {scores}")
                content[name] = scores.to_json()
        (found.folder / REPORT).write_text("\n".join(text) + "\n", encoding="utf-8")
        (found.folder / SCORES).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        last = found.test or found.validation
        if last is not None and last.confusion is not None and find_spec("matplotlib") is not None:
            last.plot(found.folder / CONFUSION)
        print("\n".join(text[1:]), flush=True)

    def _together(self, results: list[SeedResult], interrupted: bool) -> FinetuneResult:
        metric = self.config.metric or self.task.metric
        finished = results[:-1] if interrupted and len(results) > 1 else results
        shown = [found.test or found.validation for found in finished]
        names = [] if not shown or shown[0] is None else list(shown[0].metrics)
        columns = {name: [scores.metrics[name] for scores in shown] for name in names}
        mean = {name: statistics.fmean(values) for name, values in columns.items()}
        deviation = {n: float(np.std(v, ddof=1)) if len(v) > 1 else math.nan for n, v in columns.items()}
        best = None
        if results:
            compared = [found.validation for found in results]  # never by the test
            values = [0.0 if scores is None else chosen_metric(scores, metric) for scores in compared]
            best = results[values.index(max(values))].model
        result = FinetuneResult(self.out, finished, metric, mean, deviation, best, interrupted)
        if self.world.is_main:
            if len(finished) > 1:
                print(seed_table(result), flush=True)
                (self.out / REPORT).write_text(seed_table(result) + "\n", encoding="utf-8")
            print(f"\nmodel: {best}" if best else "\nno model", flush=True)
        return result

    def _check_out(self) -> None:
        if not self.world.is_main:
            return
        out, model = self.out.resolve(), Path(self.config.model).resolve()
        if out == model or out in model.parents:
            raise ConfigError(f"model {self.config.model!r} is in out {self.config.out!r}; choose another folder")
        there = self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir()))
        ours = (self.out / LOG).exists() or any(self.out.glob(f"seed-*/{LOG}")) if there else False
        if there and not (self.config.overwrite and ours):
            advice = "overwrite it, or choose another folder" if ours else "choose another folder"
            raise ConfigError(f"out {self.config.out!r} contains {'a run' if ours else 'something else'}; {advice}")


def clear(out: Path) -> None:
    """Removes a run from a folder."""
    for folder in (out, *filter(Path.is_dir, out.glob("seed-*"))):
        state.remove_folder(folder / setup.MODEL)
        state.remove_folder(folder / setup.BOARD)
        for name in (LOG, SCORES, REPORT, CONFUSION, PREDICTIONS):
            (folder / name).unlink(missing_ok=True)
        if folder != out and not any(folder.iterdir()):
            shutil.rmtree(folder)


def read_splits(config: FinetuneConfig) -> dict[str, list[Example]]:
    """The examples of train, and of validation and test if there are."""
    named = {"columns": config.columns or None, "format": config.format, "errors": config.errors}
    splits = {
        name: read_examples(files, config.task, **named)
        for name in ("train", "validation", "test")
        if (files := getattr(config, name))
    }
    if "validation" not in splits and config.validation_fraction:
        parts: dict[bool, list[Example]] = {False: [], True: []}
        for example in splits["train"]:
            parts[_hash(example, config.task) < config.validation_fraction * 2**64].append(example)
        if not parts[False] or not parts[True]:
            raise DataError(
                f"validation_fraction {config.validation_fraction} of {len(splits['train'])} examples leaves "
                f"{len(parts[True])} for validation and {len(parts[False])} for training, expected some of each"
            )
        splits = {"train": parts[False], "validation": parts[True], **splits} | {"train": parts[False]}
    return splits


def _hash(example: Example, task: str) -> int:
    """Of what must not be on both sides of a split: a text, a pair, or a context with all its questions."""
    text = json.dumps([example.text, None if task == "qa" else example.text_pair], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def make_task(config: FinetuneConfig, tokenizer: Tokenizer, train: Sequence[Example]) -> Task:
    """The task that `config` asks for, with the labels of the training examples."""
    found = EncoderConfig.from_json_file(checkpoint.config_file(config.model))
    common = {"max_length": config.max_length, "types": found.type_vocab_size > 1}
    if config.task == "classification":
        kind = config.problem_type or Classification.kind_of(train)
        if config.problem_type is None and all(_is_fraction(example.label) for example in train):
            raise ConfigError(
                f"{train[0].where}: label is {train[0].label!r}, and all others are numbers with a point too; set "
                "problem_type to regression, or to single_label_classification if they are names"
            )
        labels = ["value"] if kind == "regression" else Classification.find_labels(train)
        if kind != "regression" and len(labels) < 2:
            raise DataError(f"train has the one label {labels[0]!r}, expected at least two")
        return Classification(tokenizer, labels, problem_type=kind, truncation=config.truncation, **common)
    if config.task == "tagging":
        labels, habits = Tagging.find_labels(train), Tagging.habits_of(train)
        if len(labels) < 2:
            raise DataError(f"train has the one tag {labels[0]!r}, expected at least two")
        return Tagging(tokenizer, labels, overlap=config.stride, constrained=config.constrained, **habits, **common)
    own = {"max_answer_length": config.max_answer_length, "null_threshold": config.null_threshold}
    return QuestionAnswering(tokenizer, stride=config.stride, **own, **QuestionAnswering.habits_of(train), **common)


def _is_fraction(label) -> bool:
    """A text that is a number with a decimal point, as a CSV file has it."""
    try:
        return isinstance(label, str) and "." in label and math.isfinite(float(label))
    except ValueError:
        return False


def architecture(config: FinetuneConfig, task: Task) -> EncoderConfig:
    """The model's architecture with the labels of the task. ConfigError or CheckpointError for what does not fit."""
    changes = {"problem_type": task.problem_type}
    if task.labels:
        changes["id2label"] = dict(enumerate(task.labels))
    found = EncoderConfig.from_json_file(checkpoint.config_file(config.model))
    if config.classifier_dropout is not None:
        name = "classifier_dropout_prob" if found.model_type == "albert" else "classifier_dropout"
        changes[name] = config.classifier_dropout
    found = found.changed(**changes)
    if found.max_length is not None and config.max_length > found.max_length:
        raise ConfigError(f"max_length is {config.max_length}, but the model has {found.max_length} positions")
    if task.tokenizer.vocab_size > found.vocab_size:
        raise CheckpointError(
            f"{config.model}: the tokenizer has {task.tokenizer.vocab_size} tokens, but vocab_size of the model is "
            f"{found.vocab_size}"
        )
    return found


def build(config: FinetuneConfig, architecture: EncoderConfig, task: Task) -> TaskModel:
    """The model to train: the pretrained one with a new head, or a random one."""
    build = model_class(architecture.model_type, task.model_task)
    if config.random:
        return build(architecture)
    with warnings.catch_warnings():  # that the head is new, and the old one of no use, is how it should be
        warnings.filterwarnings("ignore", message=".*drawn anew.*")
        warnings.filterwarnings("ignore", message=".*does not use.*")
        same = architecture.to_dict()
        del same["model_type"]
        return build.from_pretrained(config.model, dtype=torch.float32, ignore_mismatched_sizes=True, **same)


def described(name: str, task: Task, examples: Sequence[Example], samples: Sequence) -> str:
    """A line about a split: how much there is, how long, what its labels are."""
    lengths = sorted(len(sample.ids) for sample in samples)
    cut = task.truncated(samples)
    text = (
        f"{name}: {len(examples):,} examples, {len(samples):,} samples of {lengths[len(lengths) // 2]} pieces (median)"
    )
    text += f", {cut:,} {'cut' if task.name == 'classification' else 'parts of longer texts'}" if cut else ""
    if task.name == "classification" and task.labels and task.problem_type != "regression":
        counts = {label: 0 for label in task.labels}
        for example in examples:
            for label in example.label if isinstance(example.label, list) else [str(example.label)]:
                counts[label] += 1
        most = sorted(counts.items(), key=lambda item: -item[1])
        text += "; " + ", ".join(f"{label} {count:,}" for label, count in most[:8]) + (", ..." if len(most) > 8 else "")
    return text


def write_predictions(path: Path, examples: Sequence[Example], predictions: Sequence[dict]) -> None:
    """One JSON object a line: what was predicted of each example, where it stands, and what is true."""
    with open(path, "w", encoding="utf-8") as file:
        for example, prediction in zip(examples, predictions, strict=True):
            known = {"id": example.id} if example.id is not None else {}
            record = {**known, "where": example.where, **prediction, "truth": example.label}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def seed_table(result: FinetuneResult) -> str:
    """The scores of all seeds, their mean and deviation."""
    names = list(result.mean)
    lines = [f"\n{'seed':<12}" + "".join(f"{name:>14}" for name in names)]
    for found in result.seeds:
        metrics = (found.test or found.validation).metrics
        lines.append(f"{found.seed:<12}" + "".join(f"{metrics[name]:>14.4f}" for name in names))
    for title, values in (("mean", result.mean), ("deviation", result.deviation)):
        lines.append(f"{title:<12}" + "".join(f"{values[name]:>14.4f}" for name in names))
    for title, of in (("lowest", min), ("highest", max)):
        found = {n: of((seed.test or seed.validation).metrics[n] for seed in result.seeds) for n in names}
        lines.append(f"{title:<12}" + "".join(f"{found[name]:>14.4f}" for name in names))
    return "\n".join(lines)
