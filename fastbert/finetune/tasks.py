"""What the tasks have in common: samples, packed batches, results by sample."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbert.data import Tokenizer
from fastbert.errors import ConfigError, DataError, shown
from fastbert.finetune.examples import Example
from fastbert.finetune.report import Scores
from fastbert.train.feed import MicroBatch

IGNORED = -100


class Sample(NamedTuple):
    """One sequence for the model: ids int32 `[n]`, between [CLS] and [SEP]; token_type_ids uint8 `[n]` or None; target:
    what is to be predicted, None if that is not known; example: the number of its example, of which a long text makes
    several samples; place: how to get back to the text.
    """

    ids: np.ndarray
    token_type_ids: np.ndarray | None
    target: object
    example: int
    place: object = None


class Task:
    """A task: how examples become samples and batches, and what a model's outputs say of the examples.

    model_task: of fastbert.model_class. metrics: the numbers that score gives, or may give; the first
    tells the best model unless another one is chosen. types: whether
    the model tells first texts from second ones by token types.
    """

    name: ClassVar[str]
    model_task: ClassVar[str]
    metrics: tuple[str, ...]
    problem_type: str | None = None

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str], *, max_length: int, types: bool = True):
        self.tokenizer, self.labels, self.max_length, self.types = tokenizer, list(labels), max_length, types
        self.number = {label: index for index, label in enumerate(self.labels)}
        if type(max_length) is not int or max_length < 8:
            raise ConfigError(f"max_length is {shown(max_length)}, expected an integer of at least 8")
        if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
            raise ConfigError(f"labels is {shown(labels)}, expected a list of names")

    @property
    def metric(self) -> str:
        return self.metrics[0]

    @classmethod
    def find_labels(cls, examples: Sequence[Example]) -> list[str]:
        """The labels of examples, sorted."""
        raise NotImplementedError

    def samples(self, examples: Sequence[Example]) -> list[Sample]:
        raise NotImplementedError

    def batch(self, samples: Sequence[Sample]) -> MicroBatch:
        """Samples packed, as a model takes them: with their targets, if they have any."""
        ids = torch.from_numpy(np.concatenate([sample.ids for sample in samples]).astype(np.int64))
        lengths = np.array([len(sample.ids) for sample in samples])
        ends = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        inputs = {"input_ids": ids, "cu_seqlens": ends}
        if samples[0].token_type_ids is not None:
            types = np.concatenate([sample.token_type_ids for sample in samples])
            inputs["token_type_ids"] = torch.from_numpy(types.astype(np.int64))
        labels = 0
        if samples[0].target is not None:
            targets = self.targets(samples)
            inputs |= targets
            labels = sum(int((target != IGNORED).sum()) for target in targets.values())
        return MicroBatch(inputs, int(lengths.max()), labels, len(ids), len(samples))

    def targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The labels of a batch by the names that the model has for them."""
        raise NotImplementedError

    def logits(self, output, batch: MicroBatch) -> list[np.ndarray]:
        """A model's output as an array for each sample, float32."""
        raise NotImplementedError

    def predictions(
        self, examples: Sequence[Example], samples: Sequence[Sample], logits: Sequence[np.ndarray]
    ) -> list[dict]:
        """What is predicted of each example, as JSON has it."""
        raise NotImplementedError

    def score(self, examples: Sequence[Example], predictions: Sequence[dict]) -> Scores:
        raise NotImplementedError

    def settings(self) -> dict:
        """What makes the task again, besides the tokenizer, as JSON has it: `type(task)(tokenizer, **settings)`."""
        return {"labels": self.labels, "max_length": self.max_length, "types": self.types}

    # -- sequences -----------------------------------------------------------------------------------------------------

    def sequence(
        self, first: Sequence[int], second: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """ids and token types of one or two texts: [CLS] a [SEP], [CLS] a [SEP] b [SEP]; in RoBERTa <s> a </s> and
        <s> a </s></s> b </s>."""
        cls, sep = self.tokenizer.cls_id, self.tokenizer.sep_id
        if second is None:
            ids, types = [cls, *first, sep], None
        else:
            ids = [cls, *first, sep, *[sep] * self._second_separators, *second, sep]
            types = np.ones(len(ids), np.uint8)
            types[: len(first) + 2 + self._second_separators] = 0
        return np.array(ids, np.int32), types if self.types else None

    @property
    def _second_separators(self) -> int:
        return int(self.tokenizer.level == "bpe")

    @property
    def pair_specials(self) -> int:
        """How many special tokens a pair has."""
        return 3 + self._second_separators

    def label_of(self, label: str, example: Example) -> int:
        if label not in self.number:
            known = ", ".join(self.labels[:20]) + (", ..." if len(self.labels) > 20 else "")
            raise DataError(f"{example.where}: label {label!r} is not among those of training: {known}")
        return self.number[label]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def split(rows: Tensor, batch: MicroBatch) -> list[np.ndarray]:
    """Rows `[T, ...]` as an array for each sequence of the batch."""
    lengths = batch.inputs["cu_seqlens"].diff().tolist()
    return [part.numpy() for part in rows.float().cpu().split(lengths)]


def windows(length: int, size: int, overlap: int) -> Iterable[tuple[int, int]]:
    """Begin and end of windows of at most `size` over `length` things; each shares `overlap` with the one before, but
    at most half of the window, so that there are not too many; the last reaches the end."""
    begin = 0
    while True:
        end = min(begin + size, length)
        yield begin, end
        if end == length:
            return
        begin = end - min(overlap, size // 2)
