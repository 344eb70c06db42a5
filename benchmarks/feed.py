"""Batches of masked samples, made on one core as `fastbert pretrain` makes them beside the GPU: samples gathered, words
chosen and masked, labels found; with `filled`, filled up to one of a few sizes (--compile, --cuda-graphs); with
objective mac+sop, pairs of segments made and words replaced by similar ones.

Beside it the collator of transformers, which has samples as lists of ids and makes padded batches, for single tokens
and whole words; the spaces that it needs to find words are given to it.

tokens_per_s is to be held against what a step takes (`fastbert bench train`): a loader that is slower starves the GPU.
The text is random words of one to three characters, in sentences; L is the longest sample, B the samples of a batch.
"""

import itertools
import random
import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from fastbert.data import Corpus, MaskedLM, SimilarWords, Tokenizer, prepare
from fastbert.errors import ConfigError
from fastbert.testing import Mismatch
from fastbert.train.feed import Buckets, MicroBatch, micro_batch
from fastbert.train.world import World

from .ceilings import Work
from .clocks import Step
from .harness import Benchmark, Case, Missing, Provider

TOKENS = 400_000
LABELLED = 0.15


class FeedBenchmark(Benchmark):
    op = "feed"
    modes = ("batch",)
    tiny = {"B": 2, "L": 32}
    graph = False

    def shapes(self, cuda: bool) -> list[dict]:
        kinds = [("mlm", masking, 0) for masking in ("token", "whole_word", "ngram", "macbert")]
        kinds += [("mac+sop", "macbert", 0), ("mlm", "whole_word", 1)]
        return [
            {"B": 64, "L": 512, "objective": objective, "masking": masking, "filled": filled}
            for objective, masking, filled in kinds
        ]

    def dtypes(self, cuda: bool):
        return ("fp32",)  # of nothing: ids are integers

    def providers(self, case: Case) -> list[Provider]:
        return [Provider("fastbert", self._batches), Provider("transformers", self._collated, package="transformers")]

    def _batches(self, case: Case):
        """A function that makes the next batch."""
        objective, pad_id = _objective(case["L"], case["objective"], case["masking"])
        size, turns = case["B"], _turns(case, objective)
        buckets = Buckets(size, case["L"], LABELLED, pad_id) if case["filled"] else None
        make = partial(micro_batch, objective, epoch=0, world=World(torch.device(case.device)), buckets=buckets)
        return lambda: make(next(turns))

    def _collated(self, case: Case):
        """The same by transformers."""
        if case["filled"] or case["objective"] != "mlm" or case["masking"] not in ("token", "whole_word"):
            raise Missing("transformers masks single tokens and whole words")
        from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

        objective, _ = _objective(case["L"], "mlm", case["masking"])
        whole = case["masking"] == "whole_word"
        tokenizer = BertTokenizerFast(str(objective.corpus.folder / "tokenizer" / "vocab.txt"))
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=LABELLED, whole_word_mask=whole)
        kept = {}

        def example(index: int) -> dict:
            if index not in kept:
                kept[index] = _example(objective, index, tokenizer, whole)
            return dict(kept[index])

        turns = _turns(case, objective)
        for indices in (next(turns) for _ in range(len(objective) // case["B"])):
            for index in indices:
                example(index)

        def batch() -> MicroBatch:
            made = collate([example(index) for index in next(turns)])
            labels = int((made["labels"] != -100).sum())
            return MicroBatch(dict(made), case["L"], labels, int(made["attention_mask"].sum()))

        return batch

    def inputs(self, case: Case, seed: int) -> dict:
        return {}

    def check(self, provider: Provider, op, case: Case) -> str:
        batch: MicroBatch = op()
        share = batch.labels / batch.tokens
        if not 0.5 * LABELLED < share < 1.5 * LABELLED or batch.inputs["input_ids"].numel() < batch.tokens:
            raise Mismatch(f"{batch.labels} labels for {batch.tokens} tokens, expected about {LABELLED:.0%}")
        return f"{batch.labels} labels for {batch.tokens} tokens"

    def step(self, op, inputs: dict, mode: str) -> Step:
        return op

    def work(self, case: Case, mode: str) -> Work:
        """The ids read and written, by 8 bytes."""
        return Work(bytes=2 * 8 * self._tokens(case))

    def figures(self, case: Case, mode: str, p50_us: float) -> dict[str, float]:
        return {"tokens_per_s": 1e6 * self._tokens(case) / p50_us}

    def _tokens(self, case: Case) -> float:
        """Real tokens of a batch, on average."""
        samples = _objective(case["L"], case["objective"], case["masking"])[0].samples
        return case["B"] * case["L"] * samples.fill


def _turns(case: Case, objective: MaskedLM):
    """The indices of one batch after the other, again and again."""
    order, size = objective.order(0), case["B"]
    if size > len(order):
        raise ConfigError(f"--shape: got B={size}, but the text gives {len(order)} samples of L={case['L']}")
    return (order[first : first + size] for first in itertools.cycle(range(0, len(order) - size + 1, size)))


def _example(objective: MaskedLM, index: int, tokenizer, whole: bool) -> dict:
    """A sample as transformers keeps it: ids, which of them are special, and, to find words, their places in a text
    with a space before each word."""
    (shard, start, end), *_ = objective.samples.lay(np.array([index]), np.zeros(1, np.uint64), []).runs
    pieces = slice(start, end)
    ids = objective.corpus.shards[shard].input_ids[pieces].tolist()
    example = {
        "input_ids": [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id],
        "attention_mask": [1] * (len(ids) + 2),
        "special_tokens_mask": [1, *[0] * len(ids), 1],
    }
    if whole:
        begin = np.arange(len(ids)) + np.cumsum(objective.corpus.shards[shard].word_start[pieces])
        example["offset_mapping"] = [(0, 0), *zip(begin.tolist(), (begin + 1).tolist(), strict=True), (0, 0)]
        # These it does not fill up by itself.
        filling = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "special_tokens_mask": 1}
        for name, value in (filling | {"offset_mapping": (0, 0)}).items():
            example[name] += [value] * (objective.samples.max_length - len(example[name]))
    return example


@cache
def _objective(length: int, objective: str, masking: str) -> tuple[MaskedLM, int]:
    corpus, tokenizer = _corpus()
    similar = _similar_words(tokenizer) if masking == "macbert" else None
    made = MaskedLM(
        corpus,
        tokenizer,
        max_length=length,
        objective=objective,
        masking=masking,
        mask_prob=LABELLED,
        similar_words=similar,
    )
    return made, tokenizer.pad_id


def _similar_words(tokenizer: Tokenizer) -> SimilarWords:
    """A table of 60,000 random words, with ten others of as many characters for each."""
    draw = random.Random(1)
    characters = [token for token in map(tokenizer.id_to_token, range(5, tokenizer.vocab_size)) if len(token) == 1]
    pools = {size: {"".join(draw.choices(characters, k=size)) for _ in range(20_000)} for size in (1, 2, 3)}
    table = {}
    for pool in map(sorted, pools.values()):
        table |= {word: [other for other in dict.fromkeys(draw.choices(pool, k=10)) if other != word] for word in pool}
    return SimilarWords(table)


def random_text() -> str:
    """Some text of the size of a small book, always the same: words between spaces."""
    draw = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(3000)]
    rows, left = [], TOKENS
    while left > 0:
        words = ["".join(draw.choices(characters, k=draw.choice((1, 2, 2, 3)))) for _ in range(draw.randint(5, 40))]
        left -= sum(map(len, words))
        rows.append(" ".join(words) + ("\n\n" if draw.random() < 0.03 else "\n"))
    return "".join(rows)


@cache
def _corpus() -> tuple[Corpus, Tokenizer]:
    folder = tempfile.TemporaryDirectory(prefix="fastbert-feed-")
    _KEPT.append(folder)
    text = Path(folder.name) / "text.txt"
    text.write_text(random_text(), encoding="utf-8")
    tokenizer = Tokenizer.train(text, 4000, progress=False)
    prepare(text, tokenizer, Path(folder.name) / "corpus", words="segmented", validation_fraction=0, progress=False)
    return Corpus.open(Path(folder.name) / "corpus"), tokenizer


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


BENCHMARK = FeedBenchmark()
