"""A published recipe in small: its objective, tokenizer, optimizer and phases, on the demonstration corpus."""

from dataclasses import replace
from pathlib import Path

from fastbert.config import BASE
from fastbert.data import (
    MASKINGS,
    Corpus,
    Tokenizer,
    build_similar_words,
    demo_corpus,
    prepare,
    unigram_entropy,
)
from fastbert.errors import FastBertError
from fastbert.train import setup
from fastbert.train.config import PretrainConfig, TextOptions
from fastbert.train.demo import OUT, PREPARATION, VOCABULARY, plot
from fastbert.train.journal import read_log
from fastbert.train.phases import phase_configs, run_phases
from fastbert.train.pretrain import PretrainResult
from fastbert.train.recipes import Recipe
from fastbert.train.world import World

STEPS = 60  # over all phases
TEXT, SIMILAR = "people_daily.txt", "similar.txt"
VECTORS = {"dimensions": 32, "epochs": 1, "min_count": 10, "least": 0.3}  # a few seconds
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "embedding_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SETTINGS = {
    "batch_size": 16,
    "global_batch": None,
    "max_predictions": None,
    "warmup": 0.1,
    "validate_every": 0,
    "validation_samples": 256,
    "checkpoint_every": 0,
    "keep_last": 1,
}
_LR = {"adamw": 3e-3, "lamb": 2e-2}


def recipe_demo(recipe: Recipe | str, settings: dict) -> PretrainResult | None:
    """Trains a recipe scaled down: a model of 2 layers of 64, 60 steps over all phases, lengths of at most 64, batches
    of 16. Says what its losses were and whether they fell.

    settings: fields of PretrainConfig to change; `out` is the folder of the corpora, the run goes into `out`/<recipe>.
    Raises what `pretrain` raises; MissingDependencyError names the extras that the corpus and what is made of it need.
    """
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    out = Path(settings.get("out", OUT))
    with World.join(settings.get("device", "auto")) as world:
        configs = demo_configs(recipe, out, settings)
        if world.is_main:
            prepare_level(out, TextOptions(**recipe.text).level)
            if configs[0].similar_words is not None and not (out / SIMILAR).exists():
                print(build_similar_words(out / SIMILAR, text=out / TEXT, **VECTORS), flush=True)
            print(f"{recipe.title}, scaled down: {len(configs)} phases of {configs[0].steps} steps")
        world.barrier()
        result = run_phases(configs, world)
        if world.is_main and result is not None and not result.interrupted:
            entropy = unigram_entropy(Corpus.open(configs[0].data))
            curves = [str(plot(Path(config.out), entropy)) for config in configs]
            print("\n".join(["", *losses(configs), "", f"Loss curves: {', '.join(curves)}", f"Model: {result.model}"]))
    return result


def demo_configs(recipe: Recipe, out: Path, settings: dict) -> list[PretrainConfig]:
    """The options of all phases, scaled down."""
    family, first = recipe.family, recipe.phase(0, {})
    length = min(64, *(recipe.phase(number, {}).max_length for number in range(len(recipe.phases))))
    steps = STEPS // len(recipe.phases)
    sizes = {name: value for name, value in _SIZES.items() if name in BASE[family]}
    changes = _SETTINGS | {"steps": steps, "max_length": length, "log_every": max(1, steps // 6)}
    changes |= {"lr": _LR[first.optimizer], "data": str(out / f"{setup.CORPUS}-{TextOptions(**recipe.text).level}")}
    changes |= {"preset": None, "variant": family, "model": sizes | _positions(family, length)}
    if not MASKINGS[first.masking].masks:
        changes["similar_words"] = str(out / SIMILAR)
    changes |= recipe.demo | settings | {"out": str(out / recipe.name)}
    changes["overwrite"] = not changes.get("resume", False)
    configs = phase_configs(recipe, changes)
    if "lr" not in settings:  # later phases go on from where the loss is low already
        configs = [replace(config, lr=config.lr / 3**number) for number, config in enumerate(configs)]
    return configs


def _positions(family: str, length: int) -> dict:
    return {"max_position_embeddings": length + 2} if family == "roberta" else {"max_position_embeddings": length}


def prepare_level(out: Path, level: str) -> Path:
    """The corpus for a kind of tokenizer, made unless it is there and whole; returns its folder."""
    folder, text = out / f"{setup.CORPUS}-{level}", out / TEXT
    out.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        demo_corpus(text)
    try:
        Corpus.open(folder).load_tokenizer()
    except FastBertError:
        tokenizer = Tokenizer.train(text, VOCABULARY, level, words="segmented")
        print(prepare(text, tokenizer, folder, overwrite=True, **PREPARATION), flush=True)
    return folder


def losses(configs: list[PretrainConfig]) -> list[str]:
    """How each loss went, a line for each; phases stand between bars."""
    courses, lines = [read_log(config.out, "train") for config in configs], []
    for name in courses[0][0]:
        if name == "loss" or name.endswith("_loss"):
            values = [[record[name] for record in course] for course in courses]
            verdict = "falls" if values[-1][-1] < values[0][0] else "does NOT fall"
            shown = " | ".join(" ".join(f"{value:.3f}" for value in phase) for phase in values)
            lines.append(f"  {name:<20} {verdict:<14} {shown}")
    return lines
