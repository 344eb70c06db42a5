"""What `fastbert finetune` and `fastbert predict` can be told."""

from dataclasses import dataclass

from fastbert.errors import ConfigError
from fastbert.finetune.classification import KINDS
from fastbert.finetune.examples import FORMATS, ROLES
from fastbert.optim import SCHEDULES
from fastbert.train.config import Options, option


@dataclass(kw_only=True)
class DemoOptions(Options):
    """Worked examples."""

    demo: str | None = option(
        None,
        "fine-tune the demonstration's model on real data, beside a random start; other options change both runs",
        choices=("sentiment", "ner", "pos", None),
    )
    limit: int | None = option(
        None, "with demo: so many training examples; if not given, sentiment all, ner 1000, pos 500", least=1
    )


@dataclass(kw_only=True)
class DataOptions(Options):
    """The data."""

    task: str | None = option(
        None, "classification: of texts or pairs; tagging: of tokens; qa: answers in a context", choices=(*ROLES, None)
    )
    train: list[str] = option([], "files of labelled examples: CSV, TSV, JSON lines, CoNLL, word/tag, SQuAD's JSON")
    validation: list[str] = option([], "files that tell the best model; if none, a share of train is")
    test: list[str] = option([], "files on which the best model is tested at the end")
    validation_fraction: float = option(
        0.1,
        "without validation, the share of train, by a hash of the text: equal texts stay together",
        least=0,
        below=1,
    )
    columns: dict = option({}, "names of columns by role, such as text=review label=stars")
    format: str | None = option(
        None, f"format of the files ({', '.join(FORMATS)}); if not given, by their suffixes", choices=(*FORMATS, None)
    )
    errors: str = option("strict", "invalid UTF-8: stop, or replace", choices=("strict", "replace"))


@dataclass(kw_only=True)
class StartOptions(Options):
    """The model."""

    model: str | None = option(None, "pretrained model folder of any family, with its tokenizer")
    random: bool = option(False, "begin from random weights of the same architecture, to see what pretraining gives")
    max_length: int = option(128, "longest sample in pieces, [CLS] and [SEP] included", least=8)
    problem_type: str | None = option(
        None,
        "with task classification; if not given, by the labels: texts, lists of texts, numbers",
        choices=(*KINDS, None),
    )
    truncation: str = option(
        "end",
        "with task classification, what is cut from a long text: its end, or its middle",
        choices=("end", "middle"),
    )
    stride: int = option(
        32, "with tasks tagging and qa, how many pieces the windows over a long text have in common", least=0
    )
    constrained: bool = option(
        True, "with task tagging, predict only sequences that are legal in the scheme of the tags"
    )
    max_answer_length: int = option(64, "with task qa, longest answer in pieces", least=1)
    null_threshold: float = option(0.0, "with task qa, by how much no answer must win over the best one")
    classifier_dropout: float | None = option(
        None, "dropout before the classifier; if not given, as in the model's config", least=0, below=1
    )


@dataclass(kw_only=True)
class TuningOptions(Options):
    """Optimization."""

    epochs: float | None = option(None, "passes over train, in place of steps; 3 if neither is given", least=1e-9)
    steps: int | None = option(None, "number of updates", least=1)
    batch_size: int = option(32, "samples per process and micro-batch", least=1)
    accumulation: int = option(1, "micro-batches per update", least=1)
    lr: float = option(
        3e-5, "highest learning rate; base models 2e-5 to 5e-5, ELECTRA base 1e-4, small 3e-4, tiny ones 1e-3", least=0
    )
    schedule: str = option("linear", "course of the learning rate after the warm-up", choices=SCHEDULES)
    warmup: float = option(0.1, "warm-up: a number of steps, or a share of them if below 1", least=0)
    weight_decay: float = option(0.01, "decoupled weight decay; biases and normalisation are exempt", least=0)
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the two moments", least=0, below=1)
    eps: float = option(1e-6, "added to the root of the second moment", least=0)
    clip: float = option(1.0, "largest global norm of the gradient; 0: no clipping", least=0)
    layer_decay: float = option(
        1.0,
        "what the learning rate of each layer is multiplied by once more than that of the layer above it",
        least=1e-6,
    )
    metric: str | None = option(None, "number that tells the best model; if not given, the task's own")
    validate_every: int = option(0, "steps between validations; 0: at the end of each epoch", least=0)
    patience: int = option(0, "stop after so many validations without a better one; 0: never", least=0)


@dataclass(kw_only=True)
class FinetuneRunOptions(Options):
    """The run."""

    out: str = option("runs/finetune", "folder for log, model, reports")
    overwrite: bool = option(False, "remove the run that is in out")
    seeds: list[int] = option([0], "everything random follows from it; several: as many runs, and their mean", least=0)
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
    log_every: int = option(20, "steps between records in the log", least=1)
    tensorboard: bool = option(False, "write TensorBoard files too")


@dataclass(kw_only=True)
class FinetuneConfig(FinetuneRunOptions, TuningOptions, StartOptions, DataOptions):
    """Everything `fastbert finetune` can be told; the classes it is made of say what belongs together."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("task", "model"):
            if getattr(self, name) is None:
                raise ConfigError(f"{name} is not set, expected {_WANTED[name]}")
        if not self.train:
            raise ConfigError("train is empty, expected at least one file of labelled examples")
        if self.steps and self.epochs:
            raise ConfigError(f"steps is {self.steps} and epochs is {self.epochs}, expected one of the two")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {self.seeds}, expected at least one, and each once")
        if self.layer_decay > 1:
            raise ConfigError(f"layer_decay is {self.layer_decay}, expected at most 1")
        for name, task in (
            *((name, "classification") for name in ("problem_type", "truncation")),
            ("constrained", "tagging"),
            *((name, "qa") for name in ("max_answer_length", "null_threshold")),
        ):
            if self.task != task and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                value = getattr(self, name)
                raise ConfigError(f"{name} is {value!r}, which does nothing: it goes with task {task!r}")


_WANTED = {"task": f"one of {', '.join(ROLES)}", "model": "a pretrained model folder"}


@dataclass(kw_only=True)
class PredictConfig(Options):
    """`fastbert predict`: what a fine-tuned model says of texts."""

    model: str | None = option(None, "model folder written by fastbert finetune")
    files: list[str] = option([], "files to predict, in the formats of finetune, or plain text, one a line; else stdin")
    text: list[str] = option([], "one text to predict, in place of files; a pair or question and context: two")
    out: str | None = option(None, "file to write, one JSON object a line; if not given, stdout")
    columns: dict = option({}, "names of columns by role, such as text=review")
    format: str | None = option(
        None, f"format of the files ({', '.join(FORMATS)}); if not given, by their suffixes", choices=(*FORMATS, None)
    )
    errors: str = option("strict", "invalid UTF-8: stop, or replace", choices=("strict", "replace"))
    labelled: bool = option(False, "the files have labels: score the predictions too")
    batch_size: int = option(64, "samples at a time", least=1)
    precision: str = option("auto", "as in finetune", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "auto: a GPU if there is one, else the CPU")
    threads: int | None = option(None, "CPU threads; if not given, as torch decides", least=1)
    overwrite: bool = option(False, "replace the file out")

    def __post_init__(self):
        super().__post_init__()
        if self.model is None:
            raise ConfigError("model is not set, expected a folder written by fastbert finetune")
        if self.files and self.text:
            raise ConfigError("files and text are both set, expected one of the two")
        if len(self.text) > 2:
            raise ConfigError(f"text has {len(self.text)} texts, expected one, or two that belong together")
