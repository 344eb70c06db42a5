"""What can be set: flat, typed option classes. `--help`, YAML files and keyword arguments all read these fields."""

import contextlib
import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from fastbert.config import BASE, nearest
from fastbert.data import COUNTS, LEVELS, MASKINGS, OBJECTIVES, PACKINGS, SEPARATORS, WORDS, Masking
from fastbert.data.objectives import check_objective
from fastbert.data.segmenters import check_words
from fastbert.errors import ConfigError, shown
from fastbert.files import read_text
from fastbert.optim import OPTIMIZERS, SCHEDULES
from fastbert.train.from_tensorflow import ACTIVATIONS, VARIANTS
from fastbert.train.yaml_text import parse_yaml


def option(default, help: str, *, choices=None, least=None, below=None):
    """A dataclass field with its meaning and its legal values: one of `choices`; at least `least` and less than
    `below`.
    """
    metadata = {"help": help, "choices": choices and tuple(choices), "least": least, "below": below}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """Base of the option classes. A value of the wrong type or out of range is a ConfigError that names the field."""

    def __post_init__(self):
        for entry in fields(self):
            setattr(self, entry.name, _checked(entry, getattr(self, entry.name)))

    @classmethod
    def from_dict(cls, values: dict, source: str = "config"):
        """The options with `values` set; errors of `check`."""
        cls.check(values, source)
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def check(cls, values: dict, source: str = "config") -> None:
        """ConfigError, with their `source`, for a key that is no option, with the nearest that is one, and for a value
        that an option does not take."""
        known = {entry.name: entry for entry in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"{source}: unknown key {shown(key)} = {shown(value)}{nearest(key, known)}")
            try:
                _checked(known[key], value)
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from None

    @staticmethod
    def read_yaml(path) -> dict:
        """The keys and values of a YAML file; `MissingFileError` or `ConfigError` name the path."""
        values = parse_yaml(read_text(path, ConfigError), path)
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, expected keys and values")
        return values


@dataclass(kw_only=True)
class TextOptions(Options):
    """From text to tokens."""

    files: list[str] = option([], "text files, UTF-8: one row per line, a blank line between documents")
    words: str = option(
        "none",
        f"where word borders come from: {', '.join(WORDS)} or package.module:function; segmented: spaces in the text",
    )
    tag_separator: str | None = option(None, "with words=segmented, what stands between a word and its tag")
    segmenter_model: str | None = option(None, "with words=ltp, the folder of its model")
    tokenizer: str | None = option(None, "folder of a tokenizer; if not given, one is trained on the text")
    vocab_size: int = option(21128, "largest size of a vocabulary that is trained", least=6)
    level: str = option("char", "what a tokenizer is trained on", choices=LEVELS)
    validation_fraction: float = option(0.01, "share of the documents that is held out", least=0, below=1)
    errors: str = option("strict", "invalid UTF-8: stop, or replace and report", choices=("strict", "replace"))

    def __post_init__(self):
        super().__post_init__()
        check_words(self.words)


@dataclass(kw_only=True)
class PrepareConfig(TextOptions):
    """`fastbert prepare`: text files to a folder of memory-mapped token shards."""

    out: str = option("corpus", "folder to write")
    overwrite: bool = option(False, "replace the folder if it holds a corpus")
    shard_tokens: int = option(1 << 25, "a shard is closed once it holds this many tokens", least=1)
    unit_bytes: int = option(1 << 26, "bytes of text, about, that one process does at a time", least=1)
    processes: int | None = option(None, "processes; if not given, as many as cores that may be used", least=1)


@dataclass(kw_only=True)
class SimilarWordsConfig(Options):
    """`fastbert prepare similar-words`: a table of the words that may stand for each other, for MacBERT."""

    vectors: str | None = option(None, "word2vec file, text or binary, as it is or gzipped")
    cilin: str | None = option(None, "file of the thesaurus Cilin, UTF-8 or GB18030")
    text: list[str] = option([], "text files, on which vectors are trained (needs the extra vectors)")
    out: str = option("similar.txt", "file to write")
    overwrite: bool = option(False, "replace the file if it is such a table")
    top: int = option(10, "with vectors and text: similar words of a word at most", least=1)
    least: float = option(0.5, "with vectors and text: the least cosine similarity", least=-1)
    same_length: bool = option(True, "only words of as many characters")
    limit: int | None = option(None, "with vectors: read so many words from the beginning of the file", least=1)
    related: bool = option(False, "with cilin: related words too, after synonyms")
    words: str | None = option(None, "with text: where word borders come from, as in fastbert prepare")
    tag_separator: str | None = option(None, "with words=segmented, what stands between a word and its tag")
    segmenter_model: str | None = option(None, "with words=ltp, the folder of its model")
    errors: str = option("strict", "with text: invalid UTF-8: stop, or replace", choices=("strict", "replace"))
    min_count: int = option(5, "with text: leave out words that are rarer", least=1)
    dimensions: int = option(100, "with text: numbers of a vector", least=1)
    window: int = option(5, "with text: words before and after that a word is learnt from", least=1)
    epochs: int = option(5, "with text: passes over it", least=1)
    seed: int = option(0, "with text: what is random follows from it", least=0)


@dataclass(kw_only=True)
class ConvertConfig(Options):
    """`fastbert convert`: one model folder to another."""

    model: str | None = option(None, "model folder to read, with its tokenizer")
    out: str | None = option(None, "model folder to write")
    from_tensorflow: bool = option(
        False, "model is a TensorFlow checkpoint, or the folder of one, with its config and vocabulary"
    )
    from_fairseq: bool = option(False, "model is fairseq's model.pt of a RoBERTa, or the folder of one")
    variant: str | None = option(
        None,
        "with from_tensorflow: what it is, where its variables do not say",
        choices=VARIANTS,
    )
    activation: str = option(
        "as-trained",
        "with from_tensorflow, where the config says gelu: what the training code computed (the tanh form in BERT, "
        "ALBERT and NEZHA), or the exact form, as written and as most ports to PyTorch have it",
        choices=ACTIVATIONS,
    )
    to_words: bool = option(
        False, "give the model a vocabulary of words, as WoBERT got it; a new word begins as the mean of its characters"
    )
    word_list: str | None = option(None, "file with the words, one a line, the most frequent first")
    files: list[str] = option([], "text files whose most frequent words are taken, in place of word_list")
    words: str = option("rjieba", "with files: where word borders come from", choices=("rjieba", "segmented"))
    tag_separator: str | None = option(None, "with words=segmented, what stands between a word and its tag")
    count: int = option(20000, "with files: how many words", least=1)
    min_frequency: int = option(2, "with files: leave out words that are rarer", least=1)
    errors: str = option("strict", "with files: invalid UTF-8: stop, or replace", choices=("strict", "replace"))
    pad_vocab_to: int = option(8, "round the number of rows of the word table up to a multiple of this", least=1)


@dataclass(kw_only=True)
class RecipeOptions(Options):
    """Published recipes."""

    recipe: str | None = option(
        None, "train by a published recipe, by its name or the path of a YAML file; other options change all its phases"
    )
    explain: bool = option(False, "with recipe: show what it does, needs and takes, and stop")
    demo: bool = option(
        False, "the demonstration on the People's Daily; with recipe: the recipe, scaled down to some dozen steps"
    )


@dataclass(kw_only=True)
class ModelOptions(Options):
    """The model."""

    variant: str | None = option(
        None, "family; if not given, that of preset or init, else roformer", choices=(*BASE, None)
    )
    preset: str | None = option(None, "published architecture by name, see fastbert.presets()")
    model: dict = option({}, "fields of the architecture to change, such as hidden_size=384 num_hidden_layers=6")
    init: str | None = option(None, "model folder whose weights to begin from")
    generator_size: float = option(
        0.25, "with objective rtd, the width of a new generator as a share of the discriminator's", least=1e-6
    )
    # 8 elements of 16 bits are what products want to be aligned to. 64 words for 21, as text of proteins has, learn
    # visibly later: what nothing has for a label must be unlearnt first.
    pad_vocab_to: int = option(
        8,
        "round the vocabulary of a new model up to a multiple of this, for aligned matrix products; 1: not; "
        "a preset has as many words as the tokenizer, init as many as it was made with",
        least=1,
    )


@dataclass(kw_only=True)
class ObjectiveOptions(Options):
    """What is learnt."""

    objective: str = option(
        "mlm",
        "masked words; with nsp, whether a segment follows the other (BERT, NEZHA), with sop, whether two are in "
        "order (ALBERT; mac+sop with similar words for masks, MacBERT); rtd, which words a generator has replaced "
        "(ELECTRA)",
        choices=OBJECTIVES,
    )
    masking: str | None = option(
        None,
        "what is masked as one; macbert: n-grams of words, replaced by similar words; if not given, macbert for "
        "mac+sop, token for rtd, else whole_word",
        choices=(*MASKINGS, None),
    )
    mask_prob: float = option(0.15, "share of the pieces of a sample that is chosen", least=1e-6, below=1)
    mask_count: str = option(
        "rounded",
        "how many pieces that is: rounded, at least 1 (BERT); stochastic, up or down at random (RoBERTa); bernoulli, "
        "each for itself (WoBERT)",
        choices=COUNTS,
    )
    mask_actions: list[float] = option(
        [],
        "shares of the chosen that are replaced by [MASK] (macbert: a similar word), replaced by a random piece "
        "(word), and kept; if not given, 0.85 0 0.15 for rtd, else 0.8 0.1 0.1",
        least=0,
    )
    span_weights: list[float] = option(
        [], "weights of spans of 1, 2, ... words; if not given, those of the publication", least=0
    )
    max_predictions: int | None = option(None, "largest number of pieces that are chosen in a sample", least=1)
    mask_special: bool = option(False, "choose among [CLS] and [SEP] too (RoBERTa, WoBERT)")
    similar_words: str | None = option(
        None, "with masking macbert, the table of similar words, made by fastbert prepare similar-words"
    )
    static_masks: int = option(
        0, "masks and pairs are as in the first epochs again after so many; 0: other ones in every epoch", least=0
    )
    packing: str | None = option(
        None,
        "how rows are laid into samples; pairs: two segments, about which nsp and sop ask; if not given, pairs for "
        "these, else full_sentences",
        choices=(*PACKINGS, None),
    )
    separators: str = option("sample", "a [SEP] after each sample, or after each row (RoBERTa)", choices=SEPARATORS)
    short_prob: float = option(0.0, "share of the pairs that are made for a random smaller length", least=0, below=1)
    max_length: int = option(512, "longest sample in pieces, [CLS] and [SEP] included", least=3)


@dataclass(kw_only=True)
class OptimizerOptions(Options):
    """Optimization."""

    optimizer: str = option(
        "adamw",
        "adamw, or lamb: for large batches; with schedule poly as NVIDIA's BERT, nezha as NEZHA",
        choices=OPTIMIZERS,
    )
    steps: int | None = option(None, "number of updates", least=1)
    epochs: float | None = option(None, "passes over the corpus, in place of steps; 1 if neither is given", least=1e-9)
    batch_size: int = option(32, "samples per process and micro-batch", least=1)
    accumulation: int = option(1, "micro-batches per update", least=1)
    global_batch: int | None = option(
        None, "samples per update over all processes, a multiple of batch_size x processes; sets accumulation", least=1
    )
    lr: float = option(1e-4, "highest learning rate", least=0)
    schedule: str = option("linear", "course of the learning rate after the warm-up", choices=SCHEDULES)
    warmup: float = option(0.1, "warm-up: a number of steps, or a share of them if below 1", least=0)
    degree: float = option(0.5, "exponent of the schedule poly", least=1e-6)
    weight_decay: float = option(0.01, "decoupled weight decay; biases and normalisation are exempt", least=0)
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the two moments", least=0, below=1)
    eps: float = option(1e-6, "added to the root of the second moment", least=0)
    bias_correction: bool = option(
        True, "correct the moments of the first steps; not in the code of BERT, ALBERT and ELECTRA"
    )
    clip: float = option(1.0, "largest global norm of the gradient; 0: no clipping", least=0)


@dataclass(kw_only=True)
class DistillationOptions(Options):
    """Distillation."""

    teacher: str | None = option(
        None, "folder of a masked language model with the same vocabulary, from which to learn too"
    )
    distill_logits: float = option(1.0, "weight of the divergence from what the teacher says of masked words", least=0)
    distill_hidden: float = option(
        0.0, "weight of the squared difference from its last hidden states of masked words, of the same size", least=0
    )
    distill_temperature: float = option(1.0, "what the logits of both are divided by", least=1e-6)


@dataclass(kw_only=True)
class RunOptions(Options):
    """The run."""

    data: str | None = option(None, "folder written by fastbert prepare; in place of files")
    out: str = option("runs/pretrain", "folder for log, checkpoints and model")
    resume: bool = option(False, "go on from the newest complete checkpoint in out")
    overwrite: bool = option(False, "remove the run that is in out")
    seed: int = option(0, "everything random follows from it", least=0)
    precision: str = option(
        "auto",
        "what the model runs in, beside weights in fp32; auto: fp32 on CPU, bf16 on GPUs that have it, else fp16",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device: str = option("auto", "auto: a GPU if there is one, else the CPU")
    threads: int | None = option(None, "CPU threads; if not given, as torch decides", least=1)
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory, a third more arithmetic"
    )
    compile: bool = option(
        False,
        "run the model through torch.compile, which takes a while for each of the few sizes that batches are filled "
        "up to",
    )
    cuda_graphs: bool = option(
        False,
        "replay CUDA graphs, which pays where launches take longer than the work; batches are filled up to a few sizes",
    )
    parallel: str = option(
        "ddp",
        "with several processes: ddp, each has the whole model; fsdp, each has a part of weights, gradients and "
        "moments (torch fully_shard)",
        choices=("ddp", "fsdp"),
    )
    reduce_dtype: str = option(
        "fp32", "with several processes, what gradients are summed over them in", choices=("fp32", "bf16", "fp16")
    )
    timeout: float = option(
        1800.0, "with several processes, seconds after which one that does not answer ends the run", least=1.0
    )
    log_every: int = option(50, "steps between records in the log", least=1)
    validate_every: int = option(500, "steps between validations; 0: only at the end", least=0)
    validation_samples: int = option(2048, "validate on at most this many samples; 0: no validation", least=0)
    checkpoint_every: int = option(1000, "steps between checkpoints; 0: only at the end", least=0)
    keep_last: int = option(3, "checkpoints to keep", least=1)
    keep_best: bool = option(
        True, "keep besides the checkpoint with the lowest validation loss, of those that are validated in their step"
    )
    async_checkpoints: bool = option(
        True, "write checkpoints while training goes on, from a copy in memory: 12 bytes a parameter"
    )
    spikes: str = option(
        "ignore",
        "an update whose loss or gradient norm stands out from the 128 before: make it; skip it; stop before it, with "
        "a checkpoint",
        choices=("ignore", "skip", "stop"),
    )
    spike_sigmas: float = option(6.0, "by how many standard deviations above their mean it must stand out", least=1.0)
    tensorboard: bool = option(False, "write TensorBoard files too")


@dataclass(kw_only=True)
class PretrainConfig(RunOptions, OptimizerOptions, DistillationOptions, ObjectiveOptions, ModelOptions, TextOptions):
    """Everything `fastbert pretrain` can be told; the classes it is made of say what belongs together."""

    def __post_init__(self):
        super().__post_init__()
        what = OBJECTIVES[self.objective]
        self.masking, self.packing = self.masking or what.masking, self.packing or what.packing
        self.mask_actions = self.mask_actions or list(what.actions)
        self.masks()
        check_objective(self.objective, self.masking, self.packing, self.separators)
        if self.data and self.files:
            raise ConfigError(f"data is {self.data!r} and files is {self.files!r}, expected one of the two")
        if self.steps and self.epochs:
            raise ConfigError(f"steps is {self.steps} and epochs is {self.epochs}, expected one of the two")
        if self.gradient_checkpointing and self.cuda_graphs:
            raise ConfigError(
                "gradient_checkpointing and cuda_graphs are both set, expected at most one of the two: to compute "
                "activations again, the state of the generator is read, which a graph does not allow"
            )
        for name in ("compile", "cuda_graphs"):
            if self.parallel == "fsdp" and getattr(self, name):
                raise ConfigError(f"{name} is set and parallel is 'fsdp', expected 'ddp': no graph holds both")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite are both set, expected at most one of the two")

    def masks(self) -> Masking:
        """How pieces are chosen and replaced."""
        return Masking(
            self.masking,
            self.mask_prob,
            self.mask_count,
            tuple(self.mask_actions),
            tuple(self.span_weights) or None,
            self.max_predictions,
            self.mask_special,
        )


def grouped_fields(cls) -> list[tuple[str, list]]:
    """The fields of an option class under the first line of the docstring of the class that brings each."""
    groups = []
    for part in reversed(cls.__mro__[:-1]):
        own = [entry for entry in fields(cls) if entry.name in part.__dict__.get("__annotations__", {})]
        if own:
            groups.append((part.__doc__.splitlines()[0], own))
    return groups


def default_of(entry):
    """The default value of a dataclass field."""
    return entry.default if entry.default is not MISSING else entry.default_factory()


def scalar_type(entry) -> tuple[type, bool]:
    """The type of a field or of what it is a list of, and whether None is legal."""
    kinds = typing.get_args(entry.type) if isinstance(entry.type, types.UnionType) else (entry.type,)
    kind = kinds[0]
    return (typing.get_args(kind) or (kind,))[0], types.NoneType in kinds


def _checked(entry, value):
    kind, optional = scalar_type(entry)
    if value is None and optional:
        return value
    many = typing.get_origin(entry.type)
    if many in (list, tuple):
        if isinstance(value, str | dict) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{entry.name} is {shown(value)}, expected a list")
        values = many(_checked_scalar(entry, kind, part) for part in value)
        if many is tuple and len(values) != len(default_of(entry)):
            raise ConfigError(f"{entry.name} is {shown(value)}, expected {len(default_of(entry))} values")
        return values
    return _checked_scalar(entry, kind, value)


def _checked_scalar(entry, kind: type, value):
    limits, name = entry.metadata, entry.name
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-4 as a string
    if kind is str and isinstance(value, Path):
        value = str(value)
    named = kind is not dict or type(value) is dict and all(isinstance(key, str) for key in value)
    if type(value) is not kind or kind is float and not math.isfinite(value) or not named:
        raise ConfigError(f"{name} is {shown(value)} ({type(value).__name__}), expected {kind.__name__}")
    if limits["choices"] and value not in limits["choices"]:
        known = [choice for choice in limits["choices"] if choice is not None]
        raise ConfigError(f"{name} is {shown(value)}, expected one of {', '.join(known)}{nearest(value, known)}")
    if limits["least"] is not None and not value >= limits["least"]:
        raise ConfigError(f"{name} is {value}, expected at least {limits['least']}")
    if limits["below"] is not None and not value < limits["below"]:
        raise ConfigError(f"{name} is {value}, expected less than {limits['below']}")
    return value
