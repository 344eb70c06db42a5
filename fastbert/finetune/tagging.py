"""A tag for each token: parts of speech, names, word borders."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastbert.data import Tokenizer
from fastbert.errors import DataError
from fastbert.finetune import metrics
from fastbert.finetune.examples import Example
from fastbert.finetune.report import Scores
from fastbert.finetune.tasks import IGNORED, Sample, Task, softmax, split
from fastbert.train.feed import MicroBatch


class Tagging(Task):
    """Tags for tokens, which are words or characters.

    The first piece of a token has its tag, its other pieces have none. A token of which the tokenizer leaves nothing
    has no piece, and is predicted as `filler`, the most frequent tag, where that is legal. A sentence that is too long
    is cut between tokens into windows that share `overlap` pieces, at most half of the window; each token is predicted
    where it is farther from a cut.

    Where the tags are of one scheme (BIO, BIOES, BMES, as metrics.scheme_of finds), predictions are the best sequence
    that is legal in it, and what counts are whole spans. Any sequence is legal if constrained is False, or if the tags
    of training are loose: they often break their scheme, as those of IOB1 do, where I begins a span. characters: a raw
    text is cut into single characters; else where it has spaces, or as the tokenizer cuts it.
    """

    name, model_task = "tagging", "token_classification"

    def __init__(
        self,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        *,
        max_length: int,
        types: bool = True,
        overlap: int = 32,
        constrained: bool = True,
        loose: bool = False,
        characters: bool = False,
        filler: str | None = None,
    ):
        super().__init__(tokenizer, labels, max_length=max_length, types=types)
        self.overlap, self.constrained, self.loose, self.characters = overlap, constrained, loose, characters
        self.filler = filler if filler is not None else "O" if "O" in self.number else self.labels[0]
        self.scheme = metrics.scheme_of(self.labels)
        words, names = ("accuracy", "macro_f1", "weighted_f1"), ("f1", "precision", "recall", "accuracy")
        self.metrics = words if self.scheme is None else names
        begins = [self.scheme is not None and label[0] in "BS" for label in self.labels]
        self._unseen = 1e-3 * (np.array(self.labels) == self.filler) - 1e-3 * np.array(begins)  # scores without pieces
        self._moves = self._transitions() if self.scheme and constrained and not loose else None

    @classmethod
    def find_labels(cls, examples: Sequence[Example]) -> list[str]:
        return sorted({tag for example in examples for tag in example.label})

    @classmethod
    def habits_of(cls, examples: Sequence[Example]) -> dict:
        """Settings that follow from tagged examples: whether tokens are characters, the most frequent tag, and whether
        the tags are loose: a tenth of the spans or more are not as the scheme has them."""
        tags = Counter(tag for example in examples for tag in example.label)
        single = all(len(token) == 1 for example in examples for token in example.text)
        habits = {"characters": single, "filler": min(tags, key=lambda tag: (-tags[tag], tag)), "loose": False}
        if scheme := metrics.scheme_of(tags):
            moves = Counter(move for e in examples for move in pairwise([None, *e.label, None]))
            illegal = sum(count for move, count in moves.items() if not metrics.legal(scheme, *move))
            habits["loose"] = 10 * illegal >= sum(len(metrics.spans(e.label)) for e in examples)
        return habits

    def settings(self) -> dict:
        own = ("overlap", "constrained", "loose", "characters", "filler")
        return super().settings() | {name: getattr(self, name) for name in own}

    def tokens(self, example: Example) -> list[str]:
        """The tokens of an example."""
        text = example.text
        if not isinstance(text, str):
            return text
        if self.characters:
            return [character for character in text if not character.isspace()]
        if len(words := text.split()) > 1:
            return words
        if self.tokenizer.level != "word":
            return self.tokenizer.cut(text.strip())
        places = dict.fromkeys(self.tokenizer.encode_with_offsets(text)[1])  # what `cut` finds is lowercase
        return [text[begin:end] for begin, end in places]

    def samples(self, examples: Sequence[Example]) -> list[Sample]:
        found, size = [], self.max_length - 2
        tokens = [self.tokens(example) for example in examples]
        rows = self.tokenizer.encode_rows(self._spaced(tokens))
        ends = np.cumsum(rows.lengths)
        for number, (example, end, length) in enumerate(zip(examples, ends, rows.lengths, strict=True)):
            ids, starts = rows.ids[end - length : end], np.flatnonzero(rows.word_start[end - length : end])
            owners = self._owners(tokens[number], len(starts))
            tags = None
            if example.label is not None:
                tags = np.array([self.label_of(tag, example) for tag in example.label], np.int64)
            for begin, stop in self._windows(starts, int(length), size):
                inside = (starts >= begin) & (starts < stop)
                target = np.full(stop - begin + 2, IGNORED, np.int64)
                if tags is not None:
                    target[1 + starts[inside] - begin] = tags[owners[inside]]
                types = np.zeros(stop - begin + 2, np.uint8) if self.types else None
                place = (1 + starts[inside] - begin, owners[inside])
                sequence, _ = self.sequence(ids[begin:stop])
                found.append(Sample(sequence, types, None if tags is None else target, number, place))
        return found

    def _spaced(self, tokens: list[list[str]]) -> list[list[str]]:
        """Tokens as the tokenizer wants them: at "bpe" and "unigram" with the space before them, if they have one."""
        if self.tokenizer.level not in ("bpe", "unigram"):
            return tokens
        return [[f" {token}" if _has_space(token[0]) else token for token in row] for row in tokens]

    def _owners(self, tokens: list[str], found: int) -> np.ndarray:
        """The number of the token of each first piece."""
        if found == len(tokens):
            return np.arange(found)
        (spaced,) = self._spaced([tokens])
        lengths = self.tokenizer.encode_rows([[token] for token in spaced]).lengths
        return np.flatnonzero(lengths)

    def _windows(self, starts: np.ndarray, length: int, size: int) -> list[tuple[int, int]]:
        """Begins and ends of windows over the pieces of a sentence, at the beginning of tokens where that can be."""
        if length <= size:
            return [(0, length)]
        edges, found, begin, overlap = np.append(starts, length), [], 0, min(self.overlap, size // 2)
        while begin < length:
            end = int(edges[edges <= begin + size].max(initial=0))
            end = end if end > begin else begin + size  # one token is longer than the window
            found.append((begin, min(end, length)))
            if end >= length:
                break
            again = edges[(edges > begin) & (edges >= end - overlap) & (edges <= end)]
            begin = int(again.min(initial=end))
        return found

    def truncated(self, samples: Sequence[Sample]) -> int:
        """How many samples are parts of a longer sentence."""
        parts = Counter(sample.example for sample in samples)
        return sum(parts[sample.example] > 1 for sample in samples)

    def targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {"labels": torch.from_numpy(np.concatenate([sample.target for sample in samples]))}

    def logits(self, output, batch: MicroBatch) -> list[np.ndarray]:
        return split(output.logits, batch)

    def predictions(self, examples, samples, logits) -> list[dict]:
        """tokens and tags, and, where the tags are of a scheme, spans: type, begin and end (in tokens), and text."""
        scores: list[dict[int, tuple[int, np.ndarray]]] = [{} for _ in examples]
        for sample, rows in zip(samples, logits, strict=True):
            places, owners = sample.place
            for place, owner in zip(places.tolist(), owners.tolist(), strict=True):
                room = min(place, len(sample.ids) - 1 - place)
                if owner not in scores[sample.example] or room > scores[sample.example][owner][0]:
                    scores[sample.example][owner] = room, rows[place]
        found = []
        for example, own in zip(examples, scores, strict=True):
            tokens = self.tokens(example)
            rows = np.tile(self._unseen, (len(tokens), 1))
            for owner, (_, row) in own.items():
                rows[owner] = row
            tags = [self.labels[best] for best in self._decode(rows)]
            prediction = {"tokens": tokens, "tags": tags}
            if self.scheme:
                prediction["spans"] = [
                    {"type": kind, "begin": begin, "end": end, "text": self._joined(tokens[begin:end])}
                    for kind, begin, end in metrics.spans(tags)
                ]
            found.append(prediction)
        return found

    def _joined(self, tokens: list[str]) -> str:
        """The text of some tokens."""
        text = tokens[0]
        for token in tokens[1:]:
            space = not self.characters and _has_space(text[-1]) and _has_space(token[0])
            text += f" {token}" if space else token
        return text

    def _decode(self, rows: np.ndarray) -> list[int]:
        """The likeliest tags, legal ones after another if that is asked for (Viterbi's algorithm)."""
        if self._moves is None or not len(rows):
            return rows.argmax(-1).tolist()
        moves, begins, ends = self._moves
        scores = np.log(softmax(rows.astype(np.float64)) + 1e-30)
        best, back = scores[0] + begins, []
        for row in scores[1:]:
            through = best[:, None] + moves
            back.append(through.argmax(0))
            best = through.max(0) + row
        path = [int((best + ends).argmax())]
        for sources in reversed(back):
            path.append(int(sources[path[-1]]))
        return path[::-1]

    def _transitions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """0 where a tag may follow another, begin and end, and far below where not."""
        far = np.float64(-1e6)

        def cost(first: str | None, second: str | None) -> float:
            return 0.0 if metrics.legal(self.scheme, first, second) else far

        moves = np.array([[cost(a, b) for b in self.labels] for a in self.labels])
        return moves, np.array([cost(None, b) for b in self.labels]), np.array([cost(a, None) for a in self.labels])

    def score(self, examples: Sequence[Example], predictions: Sequence[dict]) -> Scores:
        truth, found = [e.label for e in examples], [p["tags"] for p in predictions]
        for example, tags in zip(examples, found, strict=True):
            if len(example.label) != len(tags):
                raise DataError(f"{example.where}: {len(tags)} predictions for {len(example.label)} tags")
        flat = [
            (self.label_of(a, example), self.number[b])
            for example, tags in zip(examples, found, strict=True)
            for a, b in zip(example.label, tags, strict=True)
        ]
        table = metrics.confusion(*zip(*flat, strict=True), len(self.labels))
        accuracy = float(np.trace(table) / table.sum())
        if self.scheme is None:
            counts = np.diag(table).tolist(), table.sum(0).tolist(), table.sum(1).tolist()
            numbers = {"accuracy": accuracy, **metrics.averages(*counts)}
            del numbers["micro_f1"]
            return Scores(numbers, metrics.per_class(*counts, self.labels), (self.labels, table))
        right, predicted, there = metrics.count_spans(truth, found)
        kinds = sorted(set(predicted) | set(there))
        counts = [[counter[kind] for kind in kinds] for counter in (right, predicted, there)]
        precision, recall, f1 = metrics.precision_recall_f1(*map(sum, counts))
        numbers = {"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy}
        rows = metrics.per_class(*counts, [kind or "word" for kind in kinds])
        return Scores(numbers, rows, (self.labels, table))


def _has_space(character: str) -> bool:
    """Whether a word that begins with a character has a space before it: not in Chinese and Japanese, nor do the marks
    of punctuation that are not ASCII's."""
    wide = unicodedata.east_asian_width(character) in "WF" and "HANGUL" not in unicodedata.name(character, "")
    return character.isascii() or character.isalnum() and not wide
