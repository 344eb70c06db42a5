"""What a recipe will do, what it needs, and how long it will take at the speed that is measured here."""

import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastbert import EncoderConfig
from fastbert.data import MASKINGS, OBJECTIVES, Corpus
from fastbert.errors import ConfigError
from fastbert.train import setup
from fastbert.train.config import PretrainConfig
from fastbert.train.feed import micro_batch
from fastbert.train.recipes import Recipe
from fastbert.train.world import World

_SECONDS = 1.0  # a measurement takes at least, unless a whole micro-batch takes less
_GIB = 1 << 30
_STATE_BYTES = 16  # of a parameter: float32 weight, gradient and two moments
_CHECKPOINT_BYTES = 12  # weight and two moments
_INDENT = 25  # of the texts of a plan


@dataclass(frozen=True)
class Speed:
    """What an update takes in one process: tokens per second of forward and backward passes of so
    many samples at once, seconds of all else; and the samples that the corpus gives."""

    tokens_per_second: float
    update_seconds: float
    samples: int
    tokens_per_sample: float
    samples_there: int

    def seconds(self, updates: int, samples: int, world: World) -> float:
        """Time of some updates of so many samples each, over all processes."""
        tokens = samples * self.tokens_per_sample / world.size
        return updates * (tokens / self.tokens_per_second + self.update_seconds)


def measure(config: PretrainConfig, world: World) -> Speed:
    """The speed of a run on the device, measured with its own model and samples for about a second, or for a few
    micro-batches where they take longer; as it is without compilation and CUDA graphs."""
    alone = World(world.device)
    tokenizer, corpus, _ = setup.open_data(replace(config, validation_samples=0), alone)
    objective = setup.objective(config, corpus, tokenizer, setup.similar_pieces(config, tokenizer))
    model = setup.build_model(config, tokenizer, None).to(world.device).train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    teacher = setup.distillation(config, model, tokenizer, alone)
    plain = replace(config, compile=False, cuda_graphs=False)
    updates = setup.train_step(plain, model, lambda step: 0.0, alone, teacher)
    order, size, seconds = objective.order(0), 1, 0.0
    largest = min(config.batch_size, len(objective))
    while True:
        batch = micro_batch(objective, order[:size], 0, alone)
        for _ in range(1 if seconds else 2):  # the first one of all allocates and compiles
            begin = time.perf_counter()
            updates.accumulate(batch, **_whole(batch), seed=0)
            _wait(world)
            seconds = time.perf_counter() - begin
        if size == largest or seconds >= _SECONDS:
            break
        size = min(2 * size, largest)
    for _ in range(2):
        begin = time.perf_counter()
        updates.apply()
        _wait(world)
        rest = time.perf_counter() - begin
    length = objective.samples.fill * config.max_length
    return Speed(batch.tokens / seconds, rest, size, length, len(objective))


def _whole(batch) -> dict[str, int]:
    """The counts of an update that is one micro-batch."""
    return {f"{per}s": count for per, count in batch.counts.items()}


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


@dataclass(frozen=True)
class Plan:
    """What a recipe is, what it needs, what it does, and how long it takes here, as text; speeds by the length of
    samples, None where something that the run needs is not there."""

    text: str
    configs: list[PretrainConfig]
    world: World
    speeds: dict[int, Speed] | None

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, recipe: Recipe, configs: list[PretrainConfig], world: World) -> "Plan":
        """The plan of a run; measures its speed."""
        corpus, speeds = _corpus(configs[0]), None
        if corpus is not None and lacking(configs[0]) is None:
            lengths = dict.fromkeys(config.max_length for config in configs)
            print(f"measuring the speed at length {', '.join(map(str, lengths))} ...", file=sys.stderr, flush=True)
            speeds = {length: measure(replace(configs[0], max_length=length), world) for length in lengths}
        parts = [_about(recipe), "What it needs", *_needs(recipe, configs, corpus, world)]
        parts += ["", "What it does", *_does(configs), "", *_phases(recipe, configs, corpus, world, speeds)]
        return cls("\n".join(parts), configs, world, speeds)

    def check(self) -> None:
        """ConfigError if the corpus does not give the samples of a single update of a phase."""
        for config in self.configs:
            samples, there = _global_batch(config, self.world), self.speeds[config.max_length].samples_there
            if samples > there:
                raise ConfigError(
                    f"an update of the phase {Path(config.out).name} has {samples:,} samples, but the corpus gives "
                    f"{there:,} of max_length {config.max_length}: use a larger corpus, or a smaller global_batch"
                )


def _global_batch(config: PretrainConfig, world: World) -> int:
    return setup.accumulation(config, world) * config.batch_size * world.size


def _corpus(config: PretrainConfig) -> Corpus | None:
    """The corpus of a run, None if it is not there yet."""
    there = config.data is not None and Path(config.data).exists()
    return Corpus.open(config.data, verify=False) if there else None


def _about(recipe: Recipe) -> str:
    lines = [f"{recipe.title} [{recipe.name}]"]
    entries = [("paper", [recipe.paper] if recipe.paper else []), ("numbers from", recipe.sources)]
    entries += [("published run read", [recipe.corpus] if recipe.corpus else [])]
    entries += [("and began with", [recipe.begins] if recipe.begins else [])]
    entries += [("not seen in a source", recipe.unverified), ("decided here", recipe.choices)]
    for title, texts in entries:
        lines += [_entry(title if not number else "", text) for number, text in enumerate(texts)]
    return "\n".join([*lines, ""])


def _entry(title: str, text: str) -> str:
    """A title and a text beside it, in lines of no more than 120 characters."""
    lines = textwrap.wrap(text, 120 - _INDENT, break_long_words=False, break_on_hyphens=False)
    head = f"  {title + ':' if title else '':<{_INDENT - 3}} "
    return head + f"\n{' ' * _INDENT}".join(lines)


def _needs(recipe: Recipe, configs: list[PretrainConfig], corpus: Corpus | None, world: World) -> list[str]:
    first = configs[0]
    if corpus is not None:
        size = f"{corpus.tokens:,} tokens in {len(corpus):,} rows, {corpus.vocab_size:,} in the vocabulary"
        data = f"{first.data}: {size}"
    else:
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in recipe.text.items())
        data = f"{first.data or ', '.join(first.files) or 'not given'}; to prepare text: fastbert prepare --files "
        data += f"YOUR.txt {options} --out corpus, then --data corpus"
    lines = [_entry("data", " ".join(data.split())), *_misfits(recipe, corpus)]
    if not MASKINGS[first.masking].masks:
        table = "not given: fastbert prepare similar-words --vectors|--cilin|--text FILE --out similar.txt, then "
        lines.append(_entry("similar words", first.similar_words or table + "--similar-words similar.txt"))
    begins = f"from {first.init}" if first.init else "from random weights"
    if recipe.begins and not first.init:
        begins += f" (the published run began with {recipe.begins}; --init FOLDER does)"
    count = _parameters(first, corpus)
    copy = 0 if setup.working_dtype(first.precision, world.device) is None else 2
    states = (
        f"{count * (_STATE_BYTES + copy) / _GIB:.2f} GiB for weights, gradients and moments of {count:,} parameters"
    )
    folder = f"{count * _CHECKPOINT_BYTES * (first.keep_last + 1) / _GIB:.2f} GiB in each of {len(configs)} phases"
    return [
        *lines,
        _entry("weights", begins),
        _entry("memory", f"{states}; activations come on top"),
        _entry("disk", folder),
    ]


def _misfits(recipe: Recipe, corpus: Corpus | None) -> list[str]:
    """In what a corpus is not as the recipe would have it."""
    if corpus is None:
        return []
    level, words = recipe.text.get("level", "char"), recipe.text.get("words", "none")
    own, found = corpus.load_tokenizer().level, corpus.manifest["settings"].get("words")
    notes = []
    if own != level:
        notes.append(f"its tokenizer is of level {own}, the recipe's of level {level}")
    if found == "none" != words:
        notes.append(f"it was prepared without words, the recipe has those of {words}: only BERT's rule finds some")
    return [_entry("but", note) for note in notes]


def _parameters(config: PretrainConfig, corpus: Corpus | None) -> int:
    """Of the model that is trained, shared ones counted once."""
    wanted = setup.architecture(config, None if corpus is None else corpus.vocab_size, None if corpus is None else 0)
    with torch.device("meta"):
        build = setup.trained_class(wanted.model_type, config.objective)
        own = {"generator_size": config.generator_size} if config.objective == "rtd" else {}
        return build(EncoderConfig(**wanted.to_dict()), **own).num_parameters()


def _does(configs: list[PretrainConfig]) -> list[str]:
    first = configs[0]
    asked = {None: "", "nsp": ": next sentences", "sop": ": sentence order"}
    masks = "one for each epoch" if not first.static_masks else f"{first.static_masks} in turn"
    shown = "/".join(f"{100 * share:g}" for share in first.mask_actions)
    what = "similar word/random word/kept" if not MASKINGS[first.masking].masks else "[MASK]/random/kept"
    family = setup.architecture(first)
    size = f"{family.num_hidden_layers} layers of {family.hidden_size}, {family.num_attention_heads} heads"
    decay = f"weight decay {first.weight_decay:g}, clip {first.clip:g}"
    return [
        f"  model:                 {family.model_type}, {size}",
        f"  objective:             {first.objective}{asked[OBJECTIVES[first.objective].sentences]}",
        f"  masking:               {first.masking}, {first.mask_prob:.0%} ({first.mask_count}), {masks}",
        f"  shown as:              {what} {shown}",
        f"  samples:               {first.packing}, a separator after each {first.separators}",
        f"  optimizer:             {first.optimizer}, {decay}, schedule {first.schedule}",
    ]


def _phases(
    recipe: Recipe, configs: list[PretrainConfig], corpus: Corpus | None, world: World, speeds: dict[int, Speed] | None
) -> list[str]:
    names = ("length", "updates", "samples", "lr", "tokens", "epochs", "time")
    head = f"  {'phase':<18}" + "".join(
        f" {name:>{width}}" for name, width in zip(names, (6, 10, 8, 8, 9, 8, 12), strict=True)
    )
    lines, total = [head], 0.0
    for phase, config in zip(recipe.phases, configs, strict=True):
        samples = _global_batch(config, world)
        epoch = 0 if speeds is None else speeds[config.max_length].samples_there // samples
        steps = config.steps or int((config.epochs or 1) * epoch)
        row = f"  {phase['name']:<18} {config.max_length:>6} {steps:>10,} {samples:>8,} {config.lr:>8.2g}"
        if speeds is None:
            lines.append(f"{row} {_short(steps * samples * config.max_length):>9} {'-':>8} {'-':>12}")
            continue
        speed = speeds[config.max_length]
        tokens, seconds = steps * samples * speed.tokens_per_sample, speed.seconds(steps, samples, world)
        total += seconds
        lines.append(f"{row} {_short(tokens):>9} {tokens / corpus.tokens:>8,.1f} {_duration(seconds):>12}")
    if speeds is None:
        return [*lines, "", "How long it takes is measured once all that it needs is there."]
    device = setup.device_name(world.device)
    lines += ["", f"{_duration(total)} on {world.size} x {device}, as measured just now:"]
    for length, speed in speeds.items():
        rate = f"{speed.tokens_per_second:,.0f} tokens/s at length {length} ({speed.samples} samples at once)"
        lines.append(f"  {rate}, and {1000 * speed.update_seconds:,.0f} ms an update")
    return lines


def _short(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"


def _duration(seconds: float) -> str:
    for unit, name in ((365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} seconds"


def lacking(config: PretrainConfig) -> str | None:
    """The first thing that a run needs and that is not there, as text."""
    if not config.data and not config.files:
        return "neither data nor files is set, expected a folder of fastbert prepare or text files"
    if config.data and not Path(config.data).exists():
        return f"data {config.data!r} does not exist, expected a folder of fastbert prepare"
    if not MASKINGS[config.masking].masks and not (config.similar_words and Path(config.similar_words).exists()):
        return f"similar_words is {config.similar_words!r}, expected a table of fastbert prepare similar-words"
    return None
