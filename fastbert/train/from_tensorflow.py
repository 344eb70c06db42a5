"""Published TensorFlow checkpoints -> model folders: those of BERT and its Chinese relatives, ALBERT, NEZHA, ELECTRA,
and of bert4keras (WoBERT, WoNEZHA, RoFormer).
"""

import json
import re
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert import checkpoint
from fastbert.config import EncoderConfig, nearest
from fastbert.data import Tokenizer
from fastbert.data.spiece import read_spiece
from fastbert.errors import CheckpointError, ConfigError, DataError, MissingFileError
from fastbert.files import read_text
from fastbert.models import model_class
from fastbert.models.electra import GENERATOR
from fastbert.tensorflow_checkpoint import Entry, TensorflowCheckpoint
from fastbert.train import state

# Variant -> its family, and what its training code computed where the config says "gelu": the code of BERT, ALBERT and
# NEZHA has the tanh form, that of ELECTRA and bert4keras the exact one.
_TANH, _EXACT = "gelu_new", "gelu"
_VARIANTS = {
    "bert": ("bert", _TANH),
    "wobert": ("bert", _EXACT),
    "albert": ("albert", _TANH),
    "nezha": ("nezha", _TANH),
    "wonezha": ("nezha", _EXACT),
    "electra": ("electra", _EXACT),
    "roformer": ("roformer", _EXACT),
}
VARIANTS = tuple(_VARIANTS)
ACTIVATIONS = ("as-trained", "as-written")

_WORD_LEVEL = ("wobert", "wonezha", "roformer")
_LEAVES = {"kernel": "weight", "gamma": "weight", "output_weights": "weight", "beta": "bias", "output_bias": "bias"}
_RENAMED = [
    (r"layer_(\d+)", r"layer/\1"),
    (r"_embeddings$", "_embeddings/weight"),
    (r"^discriminator_predictions/dense_1/", "discriminator_predictions/dense_prediction/"),
    (r"^generator_predictions/output_bias", "generator_lm_head/output_bias"),
]
_RENAMED_ALBERT = [
    (r"/transformer/group_(\d+)/inner_group_(\d+)/", r"/albert_layer_groups/\1/albert_layers/\2/"),
    (r"/attention_1/self/", "/attention/"),
    (r"/attention_1/output/dense/", "/attention/dense/"),
    (r"(/albert_layers/\d+)/LayerNorm/", r"\1/attention/LayerNorm/"),
    (r"/LayerNorm_1/", "/full_layer_layer_norm/"),
    (r"/ffn_1/intermediate/dense/", "/ffn/"),
    (r"/ffn_1/intermediate/output/dense/", "/ffn_output/"),
    (r"^bert/pooler/dense/", "bert/pooler/"),
    (r"^bert/", "albert/"),
    (r"^cls/predictions/(transform/)?", "predictions/"),
    (r"^cls/seq_relationship/", "sop_classifier/classifier/"),
]
_CONFIGS = ("bert_config.json", "albert_config.json", "electra_config.json", "config.json")


class Converted(NamedTuple):
    """A model that was written: its folder, its class, its config, and the activation that the checkpoint's own config
    names, None if there is none."""

    folder: Path
    kind: type
    config: EncoderConfig
    written_act: str | None


def from_tensorflow(
    path: str | PathLike, out: str | PathLike, *, variant: str | None = None, activation: str = "as-trained"
) -> list[Converted]:
    """Write to `out` the model of a TensorFlow checkpoint in the transformers layout, with its tokenizer.

    path: a folder with one checkpoint, or its prefix, such as `folder/bert_model.ckpt`. Beside it are its config
      (`bert_config.json`, `albert_config.json`, `config.json`; ELECTRA's sizes can also be read off its tensors, with
      heads of 64 as its code has them) and `vocab.txt` or `spiece.model`.
    variant: one of `VARIANTS`; needed for NEZHA and RoFormer, which have the same names, and for WoBERT and WoNEZHA,
      which have those of BERT and NEZHA.
    activation: "as-trained", what the training code of the variant computed where the config says "gelu", or
      "as-written", what the config says (as most PyTorch ports do).

    The class is the one that has most of what is there: both heads, the masked-language-model head, or the bare
    encoder; ELECTRA's discriminator comes to `out`, its generator to the folder "generator" in it. State of optimizers
    is left out. Whether the tokenizer turns to lower case is read off the vocabulary: it does if no token but special
    ones has a capital. MissingFileError, CheckpointError, ConfigError, DataError: a file is missing or damaged, the
    variant does not fit, or `out` exists already.
    """
    out = checkpoint.new_folder(out)
    source = TensorflowCheckpoint(path)
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    entries = _weights(source.entries)
    written = _config_file(source.prefix.parent, "discriminator")
    variant = _variant(source, entries, {} if written is None else checkpoint.read_config(written), variant)
    family, _ = _VARIANTS[variant]
    tensors = {name: source.read(name) for name in entries}
    parts = _parts(tensors) if family == "electra" else [(out.name, tensors)]
    with state.new_folder(out) as temporary:
        done = list(_written(temporary, source, variant, activation, written, parts))
        _copy_tokenizer(source.prefix.parent, temporary, variant, done[0].config)
    return [one._replace(folder=out / one.folder.relative_to(temporary)) for one in done]


def _written(
    out: Path,
    source: TensorflowCheckpoint,
    variant: str,
    activation: str,
    written: Path | None,
    parts: list[tuple[str, dict[str, Tensor]]],
) -> Iterator["Converted"]:
    """Writes the models of a checkpoint into a folder."""
    family, trained_act = _VARIANTS[variant]
    for part, own in parts:
        folder = out / GENERATOR if part == GENERATOR else out
        path = _config_file(source.prefix.parent, GENERATOR) if part == GENERATOR else written
        if path is None and family != "electra":
            raise MissingFileError(
                f"there is no config beside the TensorFlow checkpoint {source.prefix}; expected one of "
                f"{', '.join(_CONFIGS)}"
            )
        values = _sizes(own) if path is None else checkpoint.read_config(path)
        act = None if path is None else values.get("hidden_act")
        values |= {"model_type": family}
        if activation == "as-trained" and values.get("hidden_act", "gelu") == "gelu":
            values["hidden_act"] = trained_act
        try:
            config = EncoderConfig.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path or source.prefix}: {error}") from None
        where = f"TensorFlow checkpoint {source.prefix}" + ("" if path is None else f" ({path.name})")
        model = _model(config, {_renamed(name, family): _turned(name, own[name]) for name in own}, where)
        model.save_pretrained(folder)
        yield Converted(folder, type(model), config, act)


def _weights(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Without counters, which are scalars, and the state of optimizers, which is named after the variable it is of."""
    return {name: entry for name, entry in entries.items() if entry.shape and name.rpartition("/")[0] not in entries}


def _variant(source: TensorflowCheckpoint, entries: dict, values: dict, asked: str | None) -> str:
    if asked is not None and asked not in VARIANTS:
        raise ConfigError(f"variant is {asked!r}, expected one of {', '.join(VARIANTS)}{nearest(asked, VARIANTS)}")
    if "electra/embeddings/word_embeddings" in entries:
        families = ["electra"]
    elif "bert/embeddings/word_embeddings" not in entries:
        raise CheckpointError(
            f"TensorFlow checkpoint {source.prefix} has the variables {checkpoint.listed(list(entries))}; expected "
            "those of BERT, ALBERT, NEZHA, ELECTRA or RoFormer, such as bert/embeddings/word_embeddings"
        )
    elif any("/transformer/group_" in name for name in entries):
        families = ["albert"]
    elif "bert/embeddings/position_embeddings" in entries:
        families = ["bert"]
    else:
        families = ["nezha"] if values.get("use_relative_position") else ["nezha", "roformer"]
    fitting = [variant for variant, (family, _) in _VARIANTS.items() if family in families]
    if asked is not None and asked not in fitting:
        raise ConfigError(
            f"variant is {asked!r}, but the variables of TensorFlow checkpoint {source.prefix} are those of "
            f"{' or '.join(fitting)}"
        )
    if asked is None and len(families) > 1:
        raise ConfigError(
            f"TensorFlow checkpoint {source.prefix} has no position embeddings: give the variant, "
            f"{', '.join(fitting)}; their variables have the same names"
        )
    return asked or families[0]


def _parts(tensors: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
    """ELECTRA's two models, each with the embeddings that they share, as if it were the only one."""
    shared = {name: tensor for name, tensor in tensors.items() if name.startswith("electra/embeddings/")}
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("generator")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in own}
    renamed = {re.sub(r"^generator/", "electra/", name): tensor for name, tensor in own.items()}
    return [("discriminator", rest), *([(GENERATOR, shared | renamed)] if own else [])]


def _sizes(tensors: dict[str, Tensor]) -> dict:
    """ELECTRA's sizes as its tensors have them, and heads of 64."""
    layers = {match[1] for name in tensors if (match := re.match(r"electra/encoder/layer_(\d+)/", name))}
    wanted = {
        ("vocab_size", "embedding_size"): "electra/embeddings/word_embeddings",
        ("max_position_embeddings", ""): "electra/embeddings/position_embeddings",
        ("type_vocab_size", ""): "electra/embeddings/token_type_embeddings",
        ("hidden_size", "intermediate_size"): "electra/encoder/layer_0/intermediate/dense/kernel",
    }
    sizes = {}
    for keys, name in wanted.items():
        if name not in tensors or tensors[name].dim() != 2:
            raise CheckpointError(f"there is no config, and no matrix {name} to read its sizes off")
        sizes |= dict(zip(keys, tensors[name].shape, strict=True))
    del sizes[""]
    return sizes | {"num_hidden_layers": len(layers), "num_attention_heads": max(1, sizes["hidden_size"] // 64)}


def _renamed(name: str, family: str) -> str:
    for pattern, new in _RENAMED + (_RENAMED_ALBERT if family == "albert" else []):
        name = re.sub(pattern, new, name)
    stem, _, leaf = name.replace("/", ".").rpartition(".")
    return f"{stem}.{_LEAVES.get(leaf, leaf)}"


def _turned(name: str, tensor: Tensor) -> Tensor:
    """TensorFlow multiplies from the right: kernels are `[in, out]`."""
    return tensor.t().contiguous() if name.endswith("/kernel") and tensor.dim() == 2 else tensor


def _model(config: EncoderConfig, tensors: dict[str, Tensor], source: str):
    def there(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in tensors)

    sentences = there("cls.seq_relationship.", "sop_classifier.") and config.model_type in ("bert", "nezha", "albert")
    task = "masked_lm" if there("cls.predictions.", "predictions.", "generator_lm_head.") else "model"
    if sentences and task == "masked_lm" or there("discriminator_predictions."):
        task = "pretraining"
    with torch.device("meta"):
        model = model_class(config.model_type, task)(config)
    checkpoint.fill(model, tensors, source)
    return model


def _config_file(folder: Path, part: str) -> Path | None:
    """The config beside a checkpoint, None if there is none; that of ELECTRA's generator must be called so."""
    found = [folder / name for name in _CONFIGS if part != GENERATOR and (folder / name).is_file()][:1]
    found = found or sorted(folder.glob(f"*{part}*config*.json"))
    if len(found) > 1:
        raise CheckpointError(
            f"folder {folder} has {', '.join(one.name for one in found)}; expected one {part}'s config"
        )
    return found[0] if found else None


def _copy_tokenizer(folder: Path, out: Path, variant: str, config: EncoderConfig) -> None:
    names = {"vocab.txt": "vocab.txt", "spiece.model": "spiece.model", "30k-clean.model": "spiece.model"}
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        return
    copied = Path(shutil.copyfile(folder / name, out / names[name]))
    if copied.suffix == ".model":
        tokens, kind = [piece for piece, _ in read_spiece(copied).pieces], "AlbertTokenizer"
    else:
        tokens = read_text(folder / name, DataError).splitlines()
        kind = "RoFormerTokenizer" if variant in _WORD_LEVEL else "BertTokenizer"
    capitals = any(re.search(r"[A-Z]", token) for token in tokens if not re.fullmatch(r"[\[<].*[\]>]", token))
    values = {"tokenizer_class": kind, "do_lower_case": not capitals}
    (out / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    try:
        size = Tokenizer.from_pretrained(out).vocab_size
    except DataError as error:
        raise DataError(f"{folder / name} makes no tokenizer: {error}") from None
    if size > config.vocab_size:
        raise CheckpointError(f"{folder / name} has {size} tokens; expected at most vocab_size = {config.vocab_size}")
