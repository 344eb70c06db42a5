"""`embedding_layer_norm`: dropout(LayerNorm(word + token type + position)) for B sequences of L tokens; with
packed=1 in one row, where positions are no longer the index in the last dimension.

Floors: forward reads every word row that occurs, once, and writes a row per token; backward reads dy and those word
rows and writes a dense gradient of the table [V, C]. Of V words, T random tokens name about V (1 - exp(-T / V)). The
other tables are small.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .ceilings import DTYPES, Work
from .harness import Case, Provider
from .op import OpBenchmark, generator_on, normal

EPS = 1e-12


class EmbeddingLayerNormBenchmark(OpBenchmark):
    op = "embedding_layer_norm"
    tiny = {"L": 16, "C": 64, "V": 100}

    def shapes(self, cuda: bool) -> list[dict]:
        if not cuda:
            return [{"B": 2, "L": 512, "C": 384, "V": 21128, "dropout": 0.0}]
        base = {"B": 32, "L": 512, "C": 768, "V": 21128}
        large = {"B": 32, "L": 512, "C": 1024, "V": 30522}
        cases = [{**base, "dropout": 0.1}, {**base, "dropout": 0.0}, {**large, "dropout": 0.1}]
        return [*cases, {**cases[0], "packed": 1}]

    def flags(self, case: Case) -> dict:
        return {"eps": EPS, "dropout_p": case["dropout"]}

    def small(self, case: Case) -> Case:
        return case if case.cuda else case.but(B=2, L=min(case["L"], 64), V=min(case["V"], 100))

    def inputs(self, case: Case, seed: int) -> dict:
        generator = generator_on(case.device, seed)
        tokens, width = (case["B"], case["L"]), case["C"]
        ids = {"input_ids": case["V"], "token_type_ids": 2, "position_ids": case["L"]}
        tables = {"word_embeddings": case["V"], "token_type_embeddings": 2, "position_embeddings": case["L"]}
        on = {"generator": generator, "device": case.device}
        found = {name: torch.randint(rows, tokens, **on) for name, rows in ids.items()}
        found["position_ids"] = torch.arange(case["L"], device=case.device).expand(tokens)
        if case.shape.get("packed"):
            found = {name: t.flatten() for name, t in found.items()}
        found |= {name: normal((rows, width), case, generator) for name, rows in tables.items()}
        return found | {name: normal((width,), case, generator) for name in ("weight", "bias")}

    def work(self, case: Case, mode: str) -> Work:
        row = case["C"] * DTYPES[case.dtype].itemsize
        tokens = case["B"] * case["L"]
        occurring = case["V"] * -math.expm1(-tokens / case["V"])
        forward, backward = (occurring + tokens) * row, (tokens + occurring + case["V"]) * row
        return Work(bytes={"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode])

    def peers(self, case: Case) -> list[Provider]:
        return [Provider("torch", _torch)]


def _torch(case: Case) -> Callable:
    """PyTorch's own pieces: three lookups, layer_norm, dropout."""
    width, p = (case["C"],), case["dropout"]

    def run(input_ids, token_type_ids, position_ids, weight, bias, **tables):
        x = F.embedding(input_ids, tables["word_embeddings"])
        x = x + F.embedding(token_type_ids, tables["token_type_embeddings"])
        x = x + F.embedding(position_ids, tables["position_embeddings"])
        return F.dropout(F.layer_norm(x, width, weight, bias, EPS), p)

    return run


BENCHMARK = EmbeddingLayerNormBenchmark()
