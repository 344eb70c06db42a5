"""Questions whose answer is a part of a context, or whose context does not have it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastbert.data import Tokenizer
from fastbert.errors import ConfigError
from fastbert.finetune import metrics
from fastbert.finetune.examples import Example
from fastbert.finetune.report import Scores
from fastbert.finetune.tasks import Sample, Task, softmax, split, windows
from fastbert.train.feed import MicroBatch


class QuestionAnswering(Task):
    """Extractive question answering as in SQuAD and CMRC 2018: [CLS] question [SEP] context [SEP], and the place of the
    answer in the context, or [CLS] where it is not there.

    A context that is too long is cut into windows that share `stride` pieces; a question is cut at half of the room.
    The answer is the span with the largest sum of its two logits, of at most max_answer_length pieces, of all windows;
    with no_answer it is empty where that of [CLS], the least over the windows, is larger by more than null_threshold
    (Devlin et al. 2019, arXiv 1810.04805, section 4.3).
    """

    name, model_task = "qa", "question_answering"
    metrics = ("f1", "exact_match", "answerable_f1", "no_answer_accuracy")

    def __init__(
        self,
        tokenizer: Tokenizer,
        labels: Sequence[str] = (),
        *,
        max_length: int,
        types: bool = True,
        stride: int = 64,
        max_answer_length: int = 64,
        no_answer: bool = False,
        null_threshold: float = 0.0,
    ):
        super().__init__(tokenizer, labels, max_length=max_length, types=types)
        if max_answer_length < 1:
            raise ConfigError(f"max_answer_length is {max_answer_length}, expected at least 1")
        self.stride, self.max_answer_length = stride, max_answer_length
        self.no_answer, self.null_threshold = no_answer, null_threshold
        self.metrics = type(self).metrics if no_answer else ("f1", "exact_match")

    @classmethod
    def find_labels(cls, examples: Sequence[Example]) -> list[str]:
        return []

    @classmethod
    def habits_of(cls, examples: Sequence[Example]) -> dict:
        """Settings that follow from examples with answers: whether there may be none."""
        return {"no_answer": any(not example.label for example in examples)}

    def settings(self) -> dict:
        own = ("stride", "max_answer_length", "no_answer", "null_threshold")
        return super().settings() | {name: getattr(self, name) for name in own}

    def samples(self, examples: Sequence[Example]) -> list[Sample]:
        found = []
        for number, example in enumerate(examples):
            most = (self.max_length - self.pair_specials) // 2
            question = self.tokenizer.encode(example.text_pair, add_special_tokens=False)[:most]
            ids, offsets = self.tokenizer.encode_with_offsets(example.text)
            room = self.max_length - self.pair_specials - len(question)
            answer = None if example.label is None else _pieces_of(example, offsets)
            for begin, end in windows(len(ids), room, self.stride):
                sequence, types = self.sequence(question, ids[begin:end])
                first = len(sequence) - 1 - (end - begin)  # where the context begins
                target = None
                if example.label is not None:
                    inside = answer is not None and begin <= answer[0] and answer[1] < end
                    target = (answer[0] - begin + first, answer[1] - begin + first) if inside else (0, 0)
                found.append(Sample(sequence, types, target, number, (first, offsets[begin:end])))
        return found

    def truncated(self, samples: Sequence[Sample]) -> int:
        """How many samples are parts of a longer context."""
        _, counts = np.unique([sample.example for sample in samples], return_counts=True)
        return int(counts[counts > 1].sum())

    def targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        places = torch.tensor([sample.target for sample in samples], dtype=torch.int64)
        return {"start_positions": places[:, 0], "end_positions": places[:, 1]}

    def logits(self, output, batch: MicroBatch) -> list[np.ndarray]:
        return split(torch.stack([output.start_logits, output.end_logits], dim=-1), batch)

    def predictions(self, examples, samples, logits) -> list[dict]:
        """answer, its begin and end in the context, and its score: its share among all spans of its window that were
        looked at; an empty answer stands for none."""
        best: list[tuple | None] = [None] * len(examples)
        null = [np.inf] * len(examples)
        for sample, rows in zip(samples, logits, strict=True):
            null[sample.example] = min(null[sample.example], float(rows[0].sum()))
            found = self._best_span(rows, sample.place[0], len(sample.place[1]))
            if found is not None and (best[sample.example] is None or found[0] > best[sample.example][0]):
                value, share, start, stop = found
                offsets = sample.place[1]
                best[sample.example] = value, share, offsets[start][0], offsets[stop][1]
        predictions = []
        for example, found, without in zip(examples, best, null, strict=True):
            if found is None or self.no_answer and without - found[0] > self.null_threshold:
                predictions.append({"answer": "", "begin": None, "end": None, "score": 0.0 if found is None else 1.0})
            else:
                _, share, begin, end = found
                predictions.append({"answer": example.text[begin:end], "begin": begin, "end": end, "score": share})
        return predictions

    def _best_span(self, rows: np.ndarray, first: int, length: int) -> tuple[float, float, int, int] | None:
        """The best span's value, its share, and its first and last piece in the window's context."""
        if length == 0:
            return None
        begins, ends = rows[first : first + length].astype(np.float64).T
        sums = np.where(_near(length, self.max_answer_length), begins[:, None] + ends[None], -np.inf)
        place = int(sums.argmax())
        return float(sums.flat[place]), float(softmax(sums.ravel())[place]), *divmod(place, length)

    def score(self, examples: Sequence[Example], predictions: Sequence[dict]) -> Scores:
        pairs = [(p["answer"], [text for text, _ in e.label]) for e, p in zip(examples, predictions, strict=True)]
        exact = [metrics.exact_match(answer, truths) for answer, truths in pairs]
        f1 = [metrics.answer_f1(answer, truths) for answer, truths in pairs]
        numbers = {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}
        there = [bool(truths) for _, truths in pairs]
        if not all(there) and any(there):
            numbers["answerable_f1"] = float(np.mean([value for value, has in zip(f1, there, strict=True) if has]))
            numbers["no_answer_accuracy"] = float(np.mean([v for v, has in zip(exact, there, strict=True) if not has]))
        return Scores(numbers)


def _near(length: int, most: int) -> np.ndarray:
    """Which spans, by first and last piece, are not empty and not too long."""
    span = np.arange(length)[None] - np.arange(length)[:, None]
    return (span >= 0) & (span < most)


def _pieces_of(example: Example, offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The first and the last piece of the first answer; None where there is none, or no piece of it is left."""
    if not example.label:
        return None
    text, begin = example.label[0]
    inside = [i for i, (a, b) in enumerate(offsets) if a < begin + len(text) and b > begin]
    return (inside[0], inside[-1]) if inside else None
