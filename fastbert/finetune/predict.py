"""What a fine-tuned model says of new texts."""

import types
import typing
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path

import torch

from fastbert import checkpoint, from_pretrained, hub, model_class
from fastbert.data import Tokenizer
from fastbert.errors import CheckpointError, DataError, MissingFileError, shown
from fastbert.files import read_json
from fastbert.finetune.examples import Example
from fastbert.finetune.finetune import TASKS
from fastbert.finetune.loop import TASK_FILE, infer
from fastbert.finetune.report import Scores
from fastbert.finetune.tasks import Task
from fastbert.train.setup import working_dtype
from fastbert.train.world import World, resolve_device


class Predictor:
    """A fine-tuned model, its tokenizer and its task, loaded once.

    folder: written by finetune, in the transformers layout with finetune.json; or the name of such a model on the
    Hugging Face hub. device: "auto" or as torch writes it. precision: "auto", "fp32", "bf16" or "fp16".
    MissingFileError, CheckpointError or ConfigError for a folder that is none.
    """

    def __init__(self, folder: str | PathLike, device: str = "auto", precision: str = "auto"):
        folder = hub.local_folder(folder)
        self.task = read_task(folder)
        self.device = resolve_device(device)
        self.model = from_pretrained(
            folder, dtype=working_dtype(precision, self.device) or torch.float32, device=self.device
        )
        self._check(folder)

    def _check(self, folder: Path) -> None:
        """The model is one for the task, with its labels."""
        task, found, path = self.task, self.model.config, folder / TASK_FILE
        wanted = model_class(found.model_type, task.model_task)
        if type(self.model) is not wanted:
            raise CheckpointError(
                f"{path} names the task {task.name!r}, but the model is a {type(self.model).__name__}, expected a "
                f"{wanted.__name__}"
            )
        for name, mine, its in (
            ("labels", task.labels or found.labels, found.labels),
            ("problem_type", task.problem_type, found.problem_type),
        ):
            if mine != its:
                raise CheckpointError(f"{path} says {name} {mine!r}, but config.json of the model {its!r}")
        if found.max_length is not None and task.max_length > found.max_length:
            raise CheckpointError(f"{path} says max_length {task.max_length}, but the model has {found.max_length}")

    def __call__(self, texts: Sequence, batch_size: int = 64) -> list[dict]:
        """A prediction for each text, in order.

        texts: strings; pairs of strings for pairs of texts, and (question, context) for qa; lists of tokens, or strings
        to be cut, for tagging. Returns dictionaries: label, score and scores (labels and scores; value); tokens, tags
        and spans; answer, begin, end and score.
        """
        if isinstance(texts, str):
            raise DataError(f"texts is the text {texts!r}, expected a list of texts")
        return self.predict(
            [self.example(f"text {number}", text) for number, text in enumerate(texts, start=1)], batch_size
        )

    def predict(
        self, examples: Sequence[Example], batch_size: int = 64, advance: Callable[[int], None] = lambda count: None
    ) -> list[dict]:
        """A prediction for each example, in order. advance is told how many samples were computed."""
        if not examples:
            return []
        bare = [Example(e.text, e.text_pair, None, e.id, e.where) for e in examples]
        samples = self.task.samples(bare)
        logits = infer(self.task, self.model, samples, batch_size, World(self.device), advance)
        return self.task.predictions(bare, samples, logits)

    def score(self, examples: Sequence[Example], predictions: Sequence[dict]) -> Scores:
        """How good predictions of labelled examples are."""
        return self.task.score(examples, predictions)

    def example(self, where: str, text) -> Example:
        """A text as __call__ takes it, as an example; where: its name in messages."""
        pair = isinstance(text, list | tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if self.task.name == "qa":
            if not pair:
                raise DataError(f"{where} is {text!r}, expected a question and a context")
            return Example(text[1], text[0], where=where)
        if self.task.name == "tagging":
            if isinstance(text, list | tuple) and text and all(isinstance(token, str) and token for token in text):
                return Example(list(text), where=where)
        elif pair:
            return Example(text[0], text[1], where=where)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where} is {text!r}, expected a text that is not empty")
        return Example(text, where=where)


def predict(folder: str | PathLike, texts: Iterable, **settings) -> list[dict]:
    """`Predictor(folder, **settings)(texts)`: a prediction for each text."""
    return Predictor(folder, **settings)(texts if isinstance(texts, str) else list(texts))


def read_task(folder: Path) -> Task:
    """The task of a fine-tuned model: what finetune.json says."""
    checkpoint.config_file(folder)
    path = folder / TASK_FILE
    if not path.is_file():
        raise MissingFileError(f"model folder {folder} has no {TASK_FILE}; expected one written by fastbert finetune")
    content = read_json(path, CheckpointError)
    task, settings = content.get("task"), content.get("settings")
    if not isinstance(task, str) or task not in TASKS:
        raise CheckpointError(f"{path}: task is {shown(task)}, expected one of {', '.join(TASKS)}")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: settings is {shown(settings)}, expected options by name")
    kinds = typing.get_type_hints(TASKS[task].__init__)
    for name, value in settings.items():
        if name not in kinds or not _is_of(value, kinds[name]):
            given = f"settings has {shown(name)} = {shown(value)}"
            raise CheckpointError(f"{path}: {given}, which does not fit the task {task}")
    tokenizer = Tokenizer.from_pretrained(folder)
    try:
        return TASKS[task](tokenizer, **settings)
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} has settings that do not fit the task {task}: {error}") from None


def _is_of(value, kind) -> bool:
    """Whether a value of JSON is of the type of an argument."""
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is Sequence:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return type(value) is kind or kind is float and type(value) is int
