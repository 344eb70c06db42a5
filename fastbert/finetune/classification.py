"""Texts, or pairs of texts, with a label, several labels, or a number."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastbert.data import Tokenizer
from fastbert.errors import ConfigError, DataError, shown
from fastbert.finetune import metrics
from fastbert.finetune.examples import Example
from fastbert.finetune.report import Scores
from fastbert.finetune.tasks import Sample, Task, softmax
from fastbert.train.feed import MicroBatch

KINDS = ("single_label_classification", "multi_label_classification", "regression")


_METRICS = {
    "single_label_classification": ("accuracy", "macro_f1", "weighted_f1", "matthews"),
    "multi_label_classification": ("micro_f1", "macro_f1", "weighted_f1", "exact"),
    "regression": ("spearman", "pearson", "mean_squared_error"),
}


class Classification(Task):
    """One label for a text or a pair (problem_type "single_label_classification"), any number of labels
    ("multi_label_classification"), or a number ("regression").

    What is too long for max_length is cut: of a pair the longer text piece by piece, as BERT does; of a text the end,
    or its middle with truncation="middle", which keeps as much of the beginning as of the end.
    """

    name, model_task = "classification", "sequence_classification"

    def __init__(
        self,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        *,
        max_length: int,
        types: bool = True,
        problem_type: str = KINDS[0],
        truncation: str = "end",
    ):
        super().__init__(tokenizer, labels, max_length=max_length, types=types)
        if problem_type not in KINDS:
            raise ConfigError(f"problem_type is {shown(problem_type)}, expected one of {', '.join(KINDS)}")
        if truncation not in ("end", "middle"):
            raise ConfigError(f"truncation is {shown(truncation)}, expected 'end' or 'middle'")
        self.problem_type, self.truncation = problem_type, truncation
        self.metrics = _METRICS[problem_type]

    @classmethod
    def find_labels(cls, examples: Sequence[Example]) -> list[str]:
        return sorted({one for example in examples for one in _labels(example)})

    @classmethod
    def kind_of(cls, examples: Sequence[Example]) -> str:
        """The problem type that the labels of examples speak of."""
        kinds = {type(example.label) for example in examples}
        if list in kinds:
            return "multi_label_classification"
        return "regression" if float in kinds else "single_label_classification"

    def settings(self) -> dict:
        return super().settings() | {"problem_type": self.problem_type, "truncation": self.truncation}

    def samples(self, examples: Sequence[Example]) -> list[Sample]:
        encode = self.tokenizer.encode_batch
        first = encode([example.text for example in examples], add_special_tokens=False)
        pairs = [example.text_pair for example in examples]
        second = encode([pair or "" for pair in pairs], add_special_tokens=False)
        found = []
        for number, (example, a, b, pair) in enumerate(zip(examples, first, second, pairs, strict=True)):
            if pair is None:
                ids, types = self.sequence(self._cut(a, self.max_length - 2))
            else:
                ids, types = self.sequence(*_cut_pair(a, b, self.max_length - self.pair_specials))
            specials = 2 if pair is None else self.pair_specials
            found.append(Sample(ids, types, self._target(example), number, len(a) + len(b) + specials - len(ids)))
        if any(pair is not None for pair in pairs) and self.types:  # a single text among pairs
            found = [
                sample._replace(token_type_ids=np.zeros(len(sample.ids), np.uint8))
                if sample.token_type_ids is None
                else sample
                for sample in found
            ]
        return found

    def truncated(self, samples: Sequence[Sample]) -> int:
        """How many samples are shorter than their texts: `place` says by how many pieces."""
        return sum(sample.place > 0 for sample in samples)

    def _cut(self, ids: list[int], most: int) -> list[int]:
        if len(ids) <= most or self.truncation == "end":
            return ids[:most]
        tail = most // 2
        return ids[: most - tail] + ids[len(ids) - tail :]

    def _target(self, example: Example):
        if example.label is None:
            return None
        if self.problem_type == "regression":
            return _number(example)
        numbers = [self.label_of(label, example) for label in _labels(example)]
        if self.problem_type == "single_label_classification":
            if len(numbers) != 1:
                raise DataError(f"{example.where}: {len(numbers)} labels, expected one")
            return numbers[0]
        return np.isin(np.arange(len(self.labels)), numbers).astype(np.float32)

    def targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        dtype = torch.int64 if self.problem_type == "single_label_classification" else torch.float32
        return {"labels": torch.from_numpy(np.array([sample.target for sample in samples])).to(dtype)}

    def logits(self, output, batch: MicroBatch) -> list[np.ndarray]:
        return list(output.logits.float().cpu().numpy())

    def predictions(self, examples, samples, logits) -> list[dict]:
        """label and score, and the scores of all labels; labels for several; value for a number."""
        found = []
        for row in np.stack(logits).astype(np.float64):
            if self.problem_type == "regression":
                found.append({"value": float(row[0])})
                continue
            single = self.problem_type == "single_label_classification"
            scores = softmax(row) if single else 1 / (1 + np.exp(-row))
            all_scores = {label: float(score) for label, score in zip(self.labels, scores, strict=True)}
            if single:
                best = int(scores.argmax())
                found.append({"label": self.labels[best], "score": float(scores[best]), "scores": all_scores})
            else:
                held = [label for label, score in all_scores.items() if score > 0.5]
                found.append({"labels": held, "scores": all_scores})
        return found

    def score(self, examples: Sequence[Example], predictions: Sequence[dict]) -> Scores:
        if self.problem_type == "regression":
            truth, found = [_number(example) for example in examples], [p["value"] for p in predictions]
            error = float(np.mean((np.array(truth) - np.array(found)) ** 2))
            pearson, spearman = metrics.pearson(truth, found), metrics.spearman(truth, found)
            return Scores({"pearson": pearson, "spearman": spearman, "mean_squared_error": error})
        if self.problem_type == "multi_label_classification":
            return self._score_several(examples, predictions)
        truth = [self.label_of(*_labels(example), example) for example in examples]
        table = metrics.confusion(truth, [self.number[p["label"]] for p in predictions], len(self.labels))
        counts = np.diag(table).tolist(), table.sum(0).tolist(), table.sum(1).tolist()
        numbers = {"accuracy": float(np.trace(table) / table.sum()), **metrics.averages(*counts)}
        del numbers["micro_f1"]  # the accuracy
        numbers["matthews"] = metrics.matthews(table)
        return Scores(numbers, metrics.per_class(*counts, self.labels), (self.labels, table))

    def _score_several(self, examples: Sequence[Example], predictions: Sequence[dict]) -> Scores:
        truth = np.array([self._target(example) for example in examples], bool)
        found = np.array([[label in p["labels"] for label in self.labels] for p in predictions])
        counts = [t.sum(0).tolist() for t in (truth & found, found, truth)]
        numbers = {"exact": float((truth == found).all(1).mean()), **metrics.averages(*counts)}
        return Scores(numbers, metrics.per_class(*counts, self.labels))


def _labels(example: Example) -> list[str]:
    label = example.label
    return label if isinstance(label, list) else [str(label)]


def _number(example: Example) -> float:
    try:
        value = float(example.label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{example.where}: label is {example.label!r}, expected a number")
    return value


def _cut_pair(a: list[int], b: list[int], most: int) -> tuple[list[int], list[int]]:
    """The longer one gives way, the second where they are equal."""
    if len(a) + len(b) > most:
        half = most // 2
        if len(a) <= most - half:
            b = b[: most - len(a)]
        elif len(b) <= half:
            a = a[: most - len(b)]
        else:
            a, b = a[: most - half], b[:half]
    return a, b
