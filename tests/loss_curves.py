"""Loss curves: a tiny model of each family, trained for 100 steps on a made-up language, and the golden curves.

    python tests/loss_curves.py                                   # how far the default backends are from the goldens
    python tests/loss_curves.py --dtype bfloat16 --device cuda    # the same in 16 bits, on a GPU
    python tests/loss_curves.py --write                           # tests/goldens/loss_curves.json, anew

A golden curve is that of fastbert.reference in float64. Nothing is drawn by PyTorch: parameters and batches are made of
the raw numbers of numpy's PCG64, which do not change with the version. Parameters are small integers times a power of
two, exact in 16 bits, so that runs in every dtype begin at the same point. There is no dropout.

The language: a sentence walks around the cycle of words of its topic, in either direction. 40 % of its words are
hidden; which they are follows from the topic and the positions of the others. The same few batches come again and
again, which is as much as 100 steps can learn. Learning rates are such that bfloat16, rounding by rounding, is not led
to another curve; larger ones magnify every difference.
"""

import argparse
import json
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastbert
from fastbert.optim import FusedLAMB, param_groups, schedule
from fastbert.train.feed import MicroBatch, labelled
from fastbert.train.step import TrainStep
from fastbert.train.world import World

GOLDEN = Path(__file__).parent / "goldens" / "loss_curves.json"
STEPS, WARMUP, WEIGHT_DECAY = 100, 10, 0.01
BATCHES, SENTENCES, SHORTEST, LONGEST = 4, 12, 9, 40  # lengths with [CLS] and [SEP]
CLS, SEP, MASK, WORDS = 2, 3, 4, 5  # ids; those of words begin at WORDS
TOPICS, CYCLE, HIDDEN = 13, 15, 40  # HIDDEN: per cent of the words
MODEL = {
    "vocab_size": WORDS + TOPICS * CYCLE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
OWN = {
    "albert": {"embedding_size": 32},
    "electra": {"embedding_size": 32},
    "nezha": {"max_relative_position": 8},
}
# As the families were published: LAMB for NVIDIA's BERT, ALBERT and NEZHA, Adam for the others.
TRAINING = {
    "bert": {"optimizer": "lamb", "lr": 0.008},
    "roberta": {"optimizer": "adamw", "lr": 0.002},
    "albert": {"optimizer": "lamb", "lr": 0.007},
    "nezha": {"optimizer": "lamb", "lr": 0.005},
    "electra": {"optimizer": "adamw", "lr": 0.0015},
    "roformer": {"optimizer": "adamw", "lr": 0.0015},
}
FAMILIES = tuple(TRAINING)
DTYPES = ("float64", "float32", "bfloat16", "float16")
ADAM = {"betas": [0.9, 0.98], "eps": 1e-6}


def curve(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
    graphs: bool = False,
    steps: int = STEPS,
) -> list[float]:
    """The losses of the first `steps` of a run of STEPS steps; on the default backends, or on the one that is named.

    It is TrainStep that trains, as in `fastbert pretrain`: weights in float32, a working copy in 16 bits.
    """
    training = TRAINING[family]
    with nullcontext() if backend is None else fastbert.use_backend(backend):
        model = build(family).to(device, torch.promote_types(dtype, torch.float32))
        groups = param_groups(model, WEIGHT_DECAY)
        if training["optimizer"] == "lamb":
            optimizer = FusedLAMB(groups, **ADAM)
        else:
            optimizer = torch.optim.AdamW(groups, **ADAM, fused=True, capturable=device != "cpu")
        factor = schedule("linear", steps=STEPS, warmup=WARMUP)
        rate = lambda step: training["lr"] * factor(step)  # noqa: E731
        narrow = dtype if dtype.itemsize == 2 else None
        step = TrainStep(model, optimizer, rate, world=World(torch.device(device)), dtype=narrow, graphs=graphs)
        if step.loss_scale is not None:
            step.loss_scale.load({"scale": 2.0**10, "good": 0})
        return train(step, [make_batch(number) for number in range(BATCHES)], steps)


def train(step: TrainStep, batches: Sequence[MicroBatch], steps: int) -> list[float]:
    """The loss of every step, as it is before the update."""
    losses = []
    for number in range(steps):
        batch = batches[number % len(batches)]
        step.accumulate(batch, batch.labels, seed=number)
        losses.append(step.progress.losses[0] / batch.labels)
        step.progress.losses.zero_()
        step.apply()
    return torch.stack(losses).tolist()


def build(family: str) -> nn.Module:
    """A model in float32: normalisations at identity, all else from bytes."""
    model = fastbert.model_class(family, "masked_lm")(fastbert.EncoderConfig(family, **MODEL | OWN.get(family, {})))
    published = model.published_names()
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.LayerNorm):
            draws = _draws(parameter.numel(), zlib.crc32(published[name].encode())) % 256 - 128
            unit = 2.0**-10 if isinstance(module, nn.Linear) else 2.0**-11
            parameter.data = torch.tensor(draws.reshape(parameter.shape) * unit, dtype=torch.float32)
    return model


def make_batch(number: int) -> MicroBatch:
    """Packed sentences of unequal length."""
    ids, labels, ends = [], [], [0]
    for sentence in range(SENTENCES):
        topic, start, way, more, *draws = _draws(4 + LONGEST, number, sentence).tolist()
        step = 1 if way % 2 else -1
        words = [WORDS + topic % TOPICS * CYCLE + (start + step * i) % CYCLE for i in range(LONGEST)]
        words = words[: SHORTEST - 2 + more % (LONGEST - SHORTEST + 1)]
        hidden = [draw % 100 < HIDDEN for draw in draws[: len(words)]]
        ids += [CLS, *(MASK if hides else word for word, hides in zip(words, hidden, strict=True)), SEP]
        labels += [-100, *(word if hides else -100 for word, hides in zip(words, hidden, strict=True)), -100]
        ends.append(len(ids))
    return labelled(torch.tensor(ids), torch.tensor(labels), torch.tensor(ends, dtype=torch.int32), LONGEST)


def _draws(count: int, *seed: int) -> np.ndarray:
    """`count` integers from 0 to 2^32 - 1: the upper halves of the generator's numbers."""
    return (np.random.PCG64(seed).random_raw(count) >> np.uint64(32)).astype(np.int64)


def settings(family: str) -> dict:
    """What the golden file says of a curve besides its losses."""
    run = {"steps": STEPS, "schedule": "linear", "warmup": WARMUP, "weight_decay": WEIGHT_DECAY}
    return TRAINING[family] | ADAM | run | {"model": MODEL | OWN.get(family, {})}


def golden() -> dict[str, dict]:
    """By family: its `settings` and its `losses`."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["curves"]


def write() -> None:
    """The golden file, all families anew."""
    about = "losses of fastbert.reference in float64; made by python tests/loss_curves.py --write"
    lines = []
    for family in FAMILIES:
        losses = [round(loss, 6) for loss in curve(family, dtype=torch.float64, backend="reference")]
        lines.append(f"  {json.dumps(family)}: {json.dumps({'settings': settings(family), 'losses': losses})}")
        print(f"{family}: from {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
    facts = {"about": about, "torch": torch.__version__, "numpy": np.__version__}
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in facts.items())
    GOLDEN.write_text("{\n" + head + ' "curves": {\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


def main() -> None:
    """Write the golden curves, or say how far others are from them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the golden curves instead of comparing with them")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--backend", help="default: as fastbert chooses")
    arguments = parser.parse_args()
    if arguments.write:
        return write()
    dtype, where = getattr(torch, arguments.dtype), {"device": arguments.device, "backend": arguments.backend}
    for family in arguments.only:
        right, losses = golden()[family]["losses"], curve(family, dtype=dtype, **where)
        distances = [abs(a - b) for a, b in zip(losses, right, strict=True)]
        worst = max(range(STEPS), key=distances.__getitem__)
        print(f"{family}: {losses[0]:.3f} to {losses[-1]:.3f}, off by {distances[worst]:.1e} in step {worst}")


if __name__ == "__main__":
    main()
