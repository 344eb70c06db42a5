"""What must hold, and what must be built, before the first step: everything that can be wrong is found here."""

import dataclasses
import hashlib
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

import fastbert
from fastbert import EncoderConfig, checkpoint, model_class
from fastbert.data import Corpus, MaskedLM, Tokenizer, prepare
from fastbert.errors import CheckpointError, ConfigError, MissingFileError
from fastbert.optim import FusedLAMB, param_groups
from fastbert.train import state
from fastbert.train.config import PretrainConfig, TextOptions
from fastbert.train.feed import Buckets, Feed
from fastbert.train.journal import LOG, read_log
from fastbert.train.step import TrainStep
from fastbert.train.world import World

CHECKPOINTS, MODEL, CORPUS, BOARD = "checkpoints", "model", "corpus", "tensorboard"

# What a resumed run may be told anew: how it is written and watched, and where. That the data are the same is seen
# from their checksums, that batch_size x accumulation x processes is, from the product.
_FREE = {entry.name for entry in dataclasses.fields(TextOptions)} | set(
    "data out resume overwrite device threads compile cuda_graphs log_every validate_every validation_samples "
    "checkpoint_every keep_last tensorboard batch_size accumulation".split()
)


def check_folder(config: PretrainConfig) -> None:
    """The out folder can be written, and no run is in the way."""
    folder = Path(config.out)
    has_run = (folder / LOG).exists() or (folder / CHECKPOINTS).exists()
    if has_run and not (config.resume or config.overwrite):
        raise ConfigError(f"out {config.out!r} contains a run; resume it, overwrite it, or choose another folder")
    if config.resume and not has_run:
        raise MissingFileError(f"out {config.out!r} contains no run to resume")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_device(config: PretrainConfig, world: World) -> None:
    """The device can do what is asked of it."""
    if config.cuda_graphs and world.device.type != "cuda":
        raise ConfigError(f"cuda_graphs is set, but device {config.device!r} is {world.device}: it needs a GPU")


def clear_folder(folder: Path) -> None:
    """Removes a run, but not the corpus that may be beside it."""
    for name in (CHECKPOINTS, MODEL, BOARD):
        state.remove_folder(folder / name)
    (folder / LOG).unlink(missing_ok=True)


def find_checkpoint(config: PretrainConfig, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, the same in all processes, and what was found to be damaged; None to begin."""
    if not config.resume:
        return None, []
    root, damaged = Path(config.out) / CHECKPOINTS, []
    found = state.latest(root, damaged.append).name if world.is_main else ""
    (number,) = world.max(float(found.rpartition("-")[2] or 0))
    return root / state.name_of(int(number)), damaged


def check_resumable(config: PretrainConfig, content: dict, global_batch: int, data: str) -> None:
    """ConfigError for a setting that would make another run of it, with the old and the new value."""
    begun, advice = content["config"], "to train on with other settings, begin a new run with init=<model folder>"
    # A run may have been begun before an option was there: it has the option's default.
    begun = _plain(PretrainConfig()) | begun
    pairs = [(name, begun[name], value) for name, value in _plain(config).items() if name not in _FREE]
    pairs.append(("batch_size x accumulation x processes", content["global_batch"], global_batch))
    pairs.append(("data (checksum)", content["data"], data))
    for name, old, new in pairs:
        if old != new:
            raise ConfigError(f"{name} is {new!r}, but the run in {config.out} was begun with {old!r}; {advice}")


def loss_scale_of(content: dict) -> dict | None:
    """That of a checkpoint's state, or None; before 0.1 was out it was kept as torch.amp.GradScaler keeps it."""
    if old := content.get("scaler"):
        return {"scale": old["scale"], "good": old["_growth_tracker"]}
    return content.get("loss_scale")


def begun_config(folder: Path) -> dict:
    """The settings that the run in `folder` was begun with; empty if there is none."""
    begun = read_log(folder, "begin") if (folder / LOG).exists() else []
    return {name: value for name, value in begun[0]["config"].items() if name != "overwrite"} if begun else {}


def open_data(config: PretrainConfig, world: World) -> tuple[Tokenizer, Corpus, Corpus | None]:
    """The tokenizer and the splits: from the folder `data`, or made of `files` by the first process."""
    folder = Path(config.data or Path(config.out) / CORPUS)
    if not (config.data or config.files):
        raise ConfigError("neither data nor files is set, expected a folder of fastbert prepare or text files")
    if config.files and world.is_main and not (config.resume and folder.exists()):
        print(prepare_text(config, folder, overwrite=True), flush=True)
    world.barrier()
    corpus = Corpus.open(folder, verify=world.is_main, progress=world.is_main)
    tokenizer = corpus.load_tokenizer()
    if not config.validation_samples or "validation" not in corpus.manifest["splits"]:
        return tokenizer, corpus, None
    return tokenizer, corpus, Corpus.open(folder, "validation", verify=world.is_main, progress=world.is_main)


def prepare_text(options: TextOptions, folder: Path, **more):
    """The corpus folder of text files; trains a tokenizer on them unless one is named. Returns the PrepareReport."""
    if not options.files:
        raise ConfigError("files is empty, expected at least one text file")
    if options.tokenizer is not None:
        tokenizer = Tokenizer.from_pretrained(options.tokenizer)
    else:
        tokenizer = Tokenizer.train(options.files, options.vocab_size, options.level, errors=options.errors)
    return prepare(
        options.files,
        tokenizer,
        folder,
        words=options.words,
        tag_separator=options.tag_separator,
        validation_fraction=options.validation_fraction,
        errors=options.errors,
        **more,
    )


def objective(config: PretrainConfig, corpus: Corpus, tokenizer: Tokenizer) -> MaskedLM:
    return MaskedLM(
        corpus,
        tokenizer,
        max_length=config.max_length,
        packing=config.packing,
        masking=config.masking,
        mask_prob=config.mask_prob,
        seed=config.seed,
    )


def architecture(config: PretrainConfig, vocab_size: int | None = None, pad_id: int | None = None) -> EncoderConfig:
    """The architecture that `config` asks for, with the vocabulary of the tokenizer (if it is known already), or some
    words more that nothing has for a label.
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
    return result


def build_model(config: PretrainConfig, tokenizer: Tokenizer, resumed: Path | None) -> torch.nn.Module:
    """The model: from the checkpoint, from the folder `init`, or new."""
    wanted = architecture(config, tokenizer.vocab_size, tokenizer.pad_id)
    build = model_class(wanted.model_type, "masked_lm")
    folder = resumed or config.init
    if resumed is None and config.init is not None:
        _check_same_tokenizer(Path(config.init), tokenizer)
    return build(wanted) if folder is None else build.from_pretrained(folder, dtype=torch.float32)


def optimizer(config: PretrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` asks for, over the model's parameters."""
    groups = param_groups(model, config.weight_decay)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.optimizer == "lamb":
        return FusedLAMB(groups, max_grad_norm=config.clip or None, **settings)
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, fused=True, capturable=on_gpu, **settings)


def train_step(config: PretrainConfig, model: torch.nn.Module, rate: Callable[[int], float], world: World) -> TrainStep:
    """The updates that `config` asks for."""
    return TrainStep(
        model,
        optimizer(config, model),
        rate,
        world=world,
        dtype=working_dtype(config.precision, world.device),
        clip=config.clip,
        compile=config.compile,
        graphs=config.cuda_graphs,
    )


def feed(config: PretrainConfig, objective: MaskedLM, tokenizer: Tokenizer, world: World) -> Feed:
    """The batches that `config` asks for: in few shapes where they are compiled or captured."""
    buckets = None
    if config.compile or config.cuda_graphs:
        buckets = Buckets(config.batch_size, config.max_length, config.mask_prob, tokenizer.pad_id)
    return Feed(objective, config.batch_size, config.accumulation, world, buckets)


def working_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What the model runs in; None: in float32, as its weights are."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def digest(corpus: Corpus) -> str:
    """A checksum over the checksums of all shards."""
    return hashlib.sha256(json.dumps(corpus.manifest["splits"], sort_keys=True).encode()).hexdigest()


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


def _plain(config: PretrainConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _check_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    try:
        own = Tokenizer.from_pretrained(folder)
    except MissingFileError:
        return  # model folders without a tokenizer are common; the size of the vocabulary was checked
    if own.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"init {folder} was trained with the tokenizer {own.fingerprint}, but the data were made with "
            f"{tokenizer.fingerprint}"
        )
