"""Text made into token shards on one core, as `fastbert prepare` does it: checked, cut into words, encoded, written
with their checksums. chars_per_s counts characters without spaces. The text is the feed's, several times over, with a
character-level tokenizer.
"""

import tempfile
from functools import cache
from pathlib import Path

from fastbert.data import PrepareReport, Tokenizer, prepare
from fastbert.testing import Mismatch

from .ceilings import Work
from .clocks import Step
from .feed import random_text
from .harness import Benchmark, Case, Missing, Provider

SEGMENTERS = ("none", "segmented", "rjieba")


class PrepareBenchmark(Benchmark):
    op = "prepare"
    modes = ("text",)
    tiny = {"copies": 1}
    graph = False

    def shapes(self, cuda: bool) -> list[dict]:
        return [{"words": words, "copies": 4} for words in SEGMENTERS]

    def dtypes(self, cuda: bool):
        return ("fp32",)  # of nothing: ids are integers

    def providers(self, case: Case) -> list[Provider]:
        return [Provider("fastbert", self._prepared)]

    def _prepared(self, case: Case):
        """A function that makes the corpus folder and returns the report."""
        if case["words"] not in SEGMENTERS:
            raise Missing(f"words is one of {', '.join(SEGMENTERS)}")
        path, tokenizer = _text(case["copies"], case["words"] == "segmented")
        out = path.with_name(f"{path.stem}-{case['words']}")
        return lambda: prepare(path, tokenizer, out, words=case["words"], overwrite=True, progress=False)

    def inputs(self, case: Case, seed: int) -> dict:
        return {}

    def check(self, provider: Provider, op, case: Case) -> str:
        report: PrepareReport = op()
        if report.characters != _characters(case["copies"]) or report.tokens != report.characters:
            raise Mismatch(f"{report.tokens} tokens of {report.characters} characters, expected one of each")
        return f"{report.tokens} tokens of {report.characters} characters"

    def step(self, op, inputs: dict, mode: str) -> Step:
        return op

    def work(self, case: Case, mode: str) -> Work:
        """The text, 3 bytes a character, read twice; 2 bytes of id and 1 of word border a token written, and read for
        the checksum."""
        return Work(bytes=(2 * 3 + 2 * 3) * _characters(case["copies"]))

    def figures(self, case: Case, mode: str, p50_us: float) -> dict[str, float]:
        return {"chars_per_s": 1e6 * _characters(case["copies"]) / p50_us}


@cache
def _text(copies: int, spaces: bool) -> tuple[Path, Tokenizer]:
    folder = tempfile.TemporaryDirectory(prefix="fastbert-prepare-")
    _KEPT.append(folder)
    path = Path(folder.name) / "text.txt"
    text = random_text()
    path.write_text((text if spaces else text.replace(" ", "")) * copies, encoding="utf-8")
    return path, Tokenizer.train(path, 4000, progress=False)


@cache
def _characters(copies: int) -> int:
    return copies * len("".join(random_text().split()))


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


BENCHMARK = PrepareBenchmark()
