"""What must hold, and what must be built, before the first step: everything that can be wrong is found here."""

import hashlib
import json
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

import fastbert
from fastbert import EncoderConfig, checkpoint, from_pretrained
from fastbert.data import Corpus, MaskedLM, SimilarPieces, SimilarWords, Tokenizer, prepare
from fastbert.data.preparation import check_request
from fastbert.errors import CheckpointError, ConfigError, DataError, MissingFileError
from fastbert.models import CLASSES
from fastbert.models.base import MaskedLMModel, PretrainedModel
from fastbert.models.electra import GENERATOR
from fastbert.optim import FusedLAMB, UncorrectedAdamW, param_groups
from fastbert.train import state
from fastbert.train.config import PretrainConfig, TextOptions
from fastbert.train.distillation import Distillation
from fastbert.train.feed import Buckets, Feed
from fastbert.train.journal import LOG
from fastbert.train.spikes import Spikes
from fastbert.train.step import TrainStep
from fastbert.train.world import World

CHECKPOINTS, MODEL, CORPUS, BOARD = "checkpoints", "model", "corpus", "tensorboard"

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # float32 is None: nothing is rounded
_DISTILLATION = ("distill_logits", "distill_hidden", "distill_temperature")


def has_run(folder: Path) -> bool:
    """Whether a run is in a folder, or was begun there."""
    return (folder / LOG).exists() or (folder / CHECKPOINTS).exists()


def check_no_run(config: PretrainConfig) -> None:
    """No run is in the way in the out folder."""
    if has_run(Path(config.out)) and not (config.resume or config.overwrite):
        raise ConfigError(f"out {config.out!r} contains a run; resume it, overwrite it, or choose another folder")


def check_folder(config: PretrainConfig) -> None:
    """The out folder can be written, else StorageError; and no run is in the way, or there is one to resume."""
    folder = Path(config.out)
    check_no_run(config)
    if config.resume and not has_run(folder):
        raise MissingFileError(f"out {config.out!r} contains no run to resume")
    with state.storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def check_device(config: PretrainConfig, world: World) -> None:
    """The device can do what is asked of it."""
    if config.cuda_graphs and world.device.type != "cuda":
        raise ConfigError(f"cuda_graphs is set, but device {config.device!r} is {world.device}: it needs a GPU")


def check_options(config: PretrainConfig, world: World) -> None:
    """The options go together, and there is a teacher where one is named."""
    accumulation(config, world)
    pairs = config.packing in ("pairs", "two_segments")
    for name, used, by in (
        ("short_prob", pairs, "packing 'pairs' or 'two_segments'"),
        ("generator_size", config.objective == "rtd", "objective 'rtd'"),
        *((name, config.teacher is not None, "a teacher") for name in _DISTILLATION),
    ):
        value, default = getattr(config, name), PretrainConfig.__dataclass_fields__[name].default
        if value != default and not used:
            raise ConfigError(f"{name} is {value!r}, which does nothing: it goes with {by}")
    if config.teacher is None:
        return
    if config.objective == "rtd":
        raise ConfigError(
            f"teacher is {config.teacher!r} and objective is 'rtd', expected another objective: a teacher says what "
            "masked words are"
        )
    if not (config.distill_logits or config.distill_hidden):
        raise ConfigError("distill_logits and distill_hidden are both 0, expected something to learn of the teacher")
    checkpoint.config_file(config.teacher)


def clear_folder(folder: Path) -> None:
    """Removes a run, but not the corpus that may be beside it."""
    for name in (CHECKPOINTS, MODEL, BOARD):
        state.remove_folder(folder / name)
    (folder / LOG).unlink(missing_ok=True)


def open_data(config: PretrainConfig, world: World) -> tuple[Tokenizer, Corpus, Corpus | None]:
    """The tokenizer and the splits: from the folder `data`, or made of `files` by the first process."""
    folder = Path(config.data or Path(config.out) / CORPUS)
    if not (config.data or config.files):
        raise ConfigError("neither data nor files is set, expected a folder of fastbert prepare or text files")
    if config.files and world.is_main and not (config.resume and folder.exists()):
        print(prepare_text(config, folder, overwrite=True), flush=True)
    world.wait_for_main("making the corpus")
    corpus = Corpus.open(folder, verify=world.is_main, progress=world.is_main)
    tokenizer = corpus.load_tokenizer()
    if not config.validation_samples or "validation" not in corpus.manifest["splits"]:
        return tokenizer, corpus, None
    return tokenizer, corpus, Corpus.open(folder, "validation", verify=world.is_main, progress=world.is_main)


def prepare_text(options: TextOptions, folder: Path, **more):
    """The corpus folder of text files; trains a tokenizer on them unless one is named. Returns the PrepareReport."""
    if not options.files:
        raise ConfigError("files is empty, expected at least one text file")
    segmentation = (options.words, options.tag_separator, options.segmenter_model)
    check_request(options.files, folder, *segmentation, more.get("overwrite", False))
    kept = folder.with_name(f".{folder.name}.tokenizer")
    if options.tokenizer is not None:
        tokenizer = Tokenizer.from_pretrained(options.tokenizer)
    else:
        tokenizer = _trained_tokenizer(options, kept)
    report = prepare(
        options.files,
        tokenizer,
        folder,
        words=options.words,
        tag_separator=options.tag_separator,
        segmenter_model=options.segmenter_model,
        validation_fraction=options.validation_fraction,
        errors=options.errors,
        **more,
    )
    shutil.rmtree(kept, ignore_errors=True)
    return report


def _trained_tokenizer(options: TextOptions, kept: Path) -> Tokenizer:
    """A tokenizer trained on the text, or the one that an interrupted run has trained and left in the folder `kept`."""
    asked = {"vocab_size": options.vocab_size, "level": options.level, "errors": options.errors}
    if options.words == "segmented" or options.words != "none" and options.level in ("bpe", "unigram"):
        asked |= {name: getattr(options, name) for name in ("words", "tag_separator", "segmenter_model")}
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in map(Path, options.files)]
    made_of, note = json.dumps([files, asked]), kept / "made-of.json"
    if note.is_file() and note.read_bytes() == made_of.encode():
        print(f"{kept}: going on with the tokenizer that an interrupted run has trained", file=sys.stderr, flush=True)
        return Tokenizer.from_pretrained(kept)
    tokenizer = Tokenizer.train(options.files, **asked)
    shutil.rmtree(kept, ignore_errors=True)
    tokenizer.save_pretrained(kept)
    note.write_text(made_of, encoding="utf-8")
    return tokenizer


def check_labels(objective: MaskedLM) -> None:
    """DataError if of the first samples nothing is chosen, a warning if far less than was asked for: words that are
    longer than what may be chosen of a sample are passed over."""
    count = min(len(objective), 64)
    batch = objective.batch(range(count), 0)
    found, wanted = int((batch.labels >= 0).sum()), objective.masking.prob * len(batch.labels)
    if wanted < 20 or objective.masking.most is not None or found >= 0.3 * wanted:
        return
    told = f"of {len(batch.labels):,} pieces {found} are chosen, expected about {wanted:.0f}: "
    told += "their words are longer than what may be chosen of a sample. Was the corpus prepared with the right words?"
    if not found:
        raise DataError(told)
    warnings.warn(told, stacklevel=2)


def similar_pieces(config: PretrainConfig, tokenizer: Tokenizer) -> SimilarPieces | None:
    """The table that `config` names, as the tokenizer sees it, if it names one."""
    return SimilarPieces(SimilarWords.read(config.similar_words), tokenizer) if config.similar_words else None


def objective(
    config: PretrainConfig, corpus: Corpus, tokenizer: Tokenizer, similar: SimilarPieces | None = None
) -> MaskedLM:
    """What `config` asks to be learnt of a split."""
    return MaskedLM(
        corpus,
        tokenizer,
        max_length=config.max_length,
        objective=config.objective,
        packing=config.packing,
        separators=config.separators,
        short_prob=config.short_prob,
        masking=config.masks(),
        similar_words=similar,
        static_masks=config.static_masks,
        seed=config.seed,
    )


def architecture(config: PretrainConfig, vocab_size: int | None = None, pad_id: int | None = None) -> EncoderConfig:
    """The architecture that `config` asks for, with the vocabulary of the tokenizer (if it is known already), or some
    words more that nothing has for a label. ConfigError too if its family cannot be trained for the objective.
    """
    if config.init is not None:
        if config.preset or config.model:
            raise ConfigError("init is set, and so is preset or model: the folder decides the architecture")
        result = EncoderConfig.from_json_file(checkpoint.config_file(config.init))
    else:
        changes = {}
        if vocab_size is not None:
            multiple = 1 if config.preset else config.pad_vocab_to
            changes = {"vocab_size": -(-vocab_size // multiple) * multiple, "pad_token_id": pad_id}
        changes |= config.model
        if config.preset is not None:
            result = EncoderConfig.from_preset(config.preset, **changes)
        else:
            result = EncoderConfig(config.variant or "roformer", **changes)
    if config.variant not in (None, result.model_type):
        raise ConfigError(f"variant is {config.variant!r}, but {config.init or config.preset} is {result.model_type!r}")
    if result.max_length is not None and config.max_length > result.max_length:
        raise ConfigError(f"max_length is {config.max_length}, but the model has {result.max_length} positions")
    if vocab_size is not None and result.vocab_size < vocab_size:
        raise ConfigError(f"vocab_size of the model is {result.vocab_size}, but the tokenizer has {vocab_size} tokens")
    trained_class(result.model_type, config.objective)
    return result


def trained_class(model_type: str, objective: str) -> type[PretrainedModel]:
    """The class of a family that has the heads of an objective: one that states its loss terms."""
    task = {"mlm": "masked_lm", "rtd": "joint_pretraining"}.get(objective, "pretraining")
    found = {candidate.model_type: candidate for candidate in CLASSES[task] if hasattr(candidate, "terms")}
    if model_type not in found:
        raise ConfigError(
            f"objective is {objective!r}, but variant {model_type!r} has no heads for it; it can be one of "
            f"{', '.join(found)}"
        )
    return found[model_type]


def build_model(config: PretrainConfig, tokenizer: Tokenizer, resumed: Path | None) -> torch.nn.Module:
    """The model: from the checkpoint, from the folder `init`, or new."""
    wanted = architecture(config, tokenizer.vocab_size, tokenizer.pad_id)
    build = trained_class(wanted.model_type, config.objective)
    folder = resumed or config.init
    if resumed is None and config.init is not None:
        _check_same_tokenizer("init", Path(config.init), tokenizer)
    own = {"generator_size": config.generator_size} if config.objective == "rtd" else {}
    model = build(wanted, **own) if folder is None else build.from_pretrained(folder, dtype=torch.float32)
    _, _, pairs = config.objective.partition("+")
    if pairs:  # one head, two things to learn
        name = f"{pairs}_loss"
        model.terms = tuple(term._replace(name=name) if term.per == "sample" else term for term in model.terms)
    return model


def distillation(
    config: PretrainConfig, model: torch.nn.Module, tokenizer: Tokenizer, world: World
) -> Distillation | None:
    """What the model learns from the teacher that `config` names, if any. ConfigError or CheckpointError for a teacher
    that does not fit."""
    if config.teacher is None:
        return None
    folder = Path(config.teacher)
    _check_same_tokenizer("teacher", folder, tokenizer)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*: drawn anew")
            dtype = working_dtype(config.precision, world.device) or torch.float32
            teacher = from_pretrained(folder, dtype=dtype, device=world.device)
    except UserWarning as incomplete:
        raise CheckpointError(f"teacher {folder} is not complete: {incomplete}") from None
    if not isinstance(teacher, MaskedLMModel):
        raise ConfigError(
            f"teacher {folder} is a {type(teacher).__name__}, expected one with a masked-language-model head"
        )
    if config.packing in ("pairs", "two_segments") and teacher.config.type_vocab_size < 2:
        raise ConfigError(
            f"packing is {config.packing!r}, but the teacher {folder} has {teacher.config.type_vocab_size} token type, "
            "expected 2: one for each segment"
        )
    longest = teacher.config.max_length
    if longest is not None and config.max_length > longest:
        raise ConfigError(f"max_length is {config.max_length}, but the teacher has {longest} positions")
    return Distillation(
        teacher,
        model,
        logits=config.distill_logits,
        hidden=config.distill_hidden,
        temperature=config.distill_temperature,
    )


def write_model(model: torch.nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """A model folder with its tokenizer."""
    model.save_pretrained(folder)
    for part in {folder, word_model(folder)}:
        tokenizer.save_pretrained(part)


def word_model(folder: Path) -> Path:
    """Where in a model folder the model is that fills in blanks: ELECTRA's generator, or the model itself."""
    return folder / GENERATOR if (folder / GENERATOR).is_dir() else folder


def optimizer(config: PretrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` asks for, over the model's parameters."""
    groups = param_groups(model, config.weight_decay)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.optimizer == "lamb":
        clip = config.clip or None
        return FusedLAMB(groups, max_grad_norm=clip, bias_correction=config.bias_correction, **settings)
    on_gpu = next(model.parameters()).is_cuda
    if not config.bias_correction:
        return UncorrectedAdamW(groups, capturable=on_gpu, **settings)
    return torch.optim.AdamW(groups, fused=True, capturable=on_gpu, **settings)


def train_step(
    config: PretrainConfig,
    model: torch.nn.Module,
    rate: Callable[[int], float],
    world: World,
    distillation: Distillation | None = None,
) -> TrainStep:
    """The updates that `config` asks for."""
    spikes = None if config.spikes == "ignore" else Spikes(config.spikes, config.spike_sigmas, world.device)
    return TrainStep(
        model,
        optimizer(config, model),
        rate,
        world=world,
        dtype=working_dtype(config.precision, world.device),
        clip=config.clip,
        compile=config.compile,
        graphs=config.cuda_graphs,
        distillation=distillation,
        reduce_dtype=DTYPES.get(config.reduce_dtype),
        spikes=spikes,
    )


def accumulation(config: PretrainConfig, world: World) -> int:
    """Micro-batches per update and process, of which global_batch decides if it is given."""
    if config.global_batch is None:
        return config.accumulation
    together = config.batch_size * world.size
    count, rest = divmod(config.global_batch, together)
    if rest:
        raise ConfigError(
            f"global_batch is {config.global_batch}, expected a multiple of batch_size {config.batch_size} x "
            f"{world.size} processes = {together}"
        )
    if config.accumulation not in (1, count):
        raise ConfigError(
            f"accumulation is {config.accumulation}, but global_batch {config.global_batch} asks for {count} "
            "micro-batches; expected one of the two options"
        )
    return count


def feed(config: PretrainConfig, objective: MaskedLM, tokenizer: Tokenizer, world: World) -> Feed:
    """The batches that `config` asks for: in few shapes where they are compiled or captured."""
    buckets = None
    if config.compile or config.cuda_graphs:
        buckets = Buckets(config.batch_size, config.max_length, config.mask_prob, tokenizer.pad_id)
    return Feed(objective, config.batch_size, accumulation(config, world), world, buckets)


def working_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What the model runs in; None: in float32, as its weights are."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return DTYPES.get(precision)


def digest(corpus: Corpus, similar: SimilarPieces | None = None) -> str:
    """A checksum over the checksums of all shards, and what words are replaced by."""
    text = json.dumps(corpus.manifest["splits"], sort_keys=True) + ("" if similar is None else similar.fingerprint)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """What decides the numbers besides the settings."""
    return {
        "fastbert": fastbert.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The name of a GPU, or what kind of processor it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def _check_same_tokenizer(option: str, folder: Path, tokenizer: Tokenizer) -> None:
    try:
        own = Tokenizer.from_pretrained(folder)
    except MissingFileError:
        return  # model folders without a tokenizer are common; the size of the vocabulary was checked
    if own.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{option} {folder} was trained with the tokenizer {own.fingerprint}, but the data were made with "
            f"{tokenizer.fingerprint}"
        )
