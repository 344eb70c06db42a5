"""Batches of masked samples, made on one core as `fastbert pretrain` makes them beside the GPU: samples gathered, words
chosen and masked, labels found; with `filled`, filled up to one of a few sizes (--compile, --cuda-graphs).

tokens_per_s is to be held against what a step takes (`fastbert bench train`): a loader that is slower starves the GPU.
The text is random words of one to three characters, in sentences; L is the longest sample, B the samples of a batch.
"""

import itertools
import random
import tempfile
from functools import cache, partial
from pathlib import Path

import torch

from fastbert.data import Corpus, MaskedLM, Tokenizer, prepare
from fastbert.errors import ConfigError
from fastbert.testing import Mismatch
from fastbert.train.feed import Buckets, MicroBatch, micro_batch
from fastbert.train.world import World

from .ceilings import Work
from .clocks import Step
from .harness import Benchmark, Case, Provider

TOKENS = 400_000
LABELLED = 0.15


class FeedBenchmark(Benchmark):
    op = "feed"
    modes = ("batch",)
    tiny = {"B": 2, "L": 32}
    graph = False

    def shapes(self, cuda: bool) -> list[dict]:
        kinds = [("whole_word", 0), ("whole_word", 1), ("token", 0)]
        return [{"B": 32, "L": 512, "masking": masking, "filled": filled} for masking, filled in kinds]

    def dtypes(self, cuda: bool):
        return ("fp32",)  # of nothing: ids are integers

    def providers(self, case: Case) -> list[Provider]:
        return [Provider("fastbert", self._batches)]

    def _batches(self, case: Case):
        """A function that makes the next batch."""
        objective, pad_id = _objective(case["L"], case["masking"])
        order, size = objective.order(0), case["B"]
        if size > len(order):
            raise ConfigError(f"--shape: got B={size}, but the text gives {len(order)} samples of L={case['L']}")
        turns = itertools.cycle(range(0, len(order) - size + 1, size))
        buckets = Buckets(size, case["L"], LABELLED, pad_id) if case["filled"] else None
        make = partial(micro_batch, objective, epoch=0, world=World(torch.device(case.device)), buckets=buckets)
        return lambda: make(order[(first := next(turns)) : first + size])

    def inputs(self, case: Case, seed: int) -> dict:
        return {}

    def check(self, provider: Provider, op, case: Case) -> str:
        batch: MicroBatch = op()
        ids, labels, places = (batch.inputs[name] for name in ("input_ids", "labels", "label_positions"))
        share = batch.labels / batch.tokens
        if not 0.5 * LABELLED < share < 1.5 * LABELLED or len(labels) != len(places) or len(ids) < batch.tokens:
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
        samples = _objective(case["L"], case["masking"])[0].samples
        return case["B"] * case["L"] * samples.fill


@cache
def _objective(length: int, masking: str) -> tuple[MaskedLM, int]:
    corpus, tokenizer = _corpus()
    return MaskedLM(corpus, tokenizer, max_length=length, masking=masking, mask_prob=LABELLED), tokenizer.pad_id


@cache
def _corpus() -> tuple[Corpus, Tokenizer]:
    """Some text of the size of a small book, always the same."""
    draw = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(3000)]
    folder = tempfile.TemporaryDirectory(prefix="fastbert-feed-")
    _KEPT.append(folder)
    text = Path(folder.name) / "text.txt"
    with text.open("w", encoding="utf-8") as file:
        left = TOKENS
        while left > 0:
            words = ["".join(draw.choices(characters, k=draw.choice((1, 2, 2, 3)))) for _ in range(draw.randint(5, 40))]
            left -= sum(map(len, words))
            file.write(" ".join(words) + ("\n\n" if draw.random() < 0.1 else "\n"))
    tokenizer = Tokenizer.train(text, 4000, progress=False)
    prepare(text, tokenizer, Path(folder.name) / "corpus", words="segmented", validation_fraction=0, progress=False)
    return Corpus.open(Path(folder.name) / "corpus"), tokenizer


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


BENCHMARK = FeedBenchmark()
