"""RoBERTa as fairseq publishes it -> a model folder."""

import argparse
import json
import shutil
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from fastbert import checkpoint
from fastbert.config import EncoderConfig
from fastbert.data import Tokenizer
from fastbert.errors import CheckpointError, ConfigError, DataError, MissingFileError
from fastbert.files import read_text
from fastbert.models import RobertaForMaskedLM
from fastbert.train import state
from fastbert.weights import plain_tensors, read_pickle

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq puts them in front of what its dictionary file has
_MASK = "<mask>"
_VOCABULARY = ("dict.txt", "encoder.json", "vocab.bpe")
# Field of the config -> argument of fairseq's training command.
_ARGUMENTS = {
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_embed_dim",
    "hidden_size": "encoder_embed_dim",
    "hidden_act": "activation_fn",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}


def from_fairseq(path: str | PathLike, out: str | PathLike) -> RobertaForMaskedLM:
    """Write to `out` the RoBERTa of a fairseq checkpoint in the transformers layout, and return it.

    path: `model.pt`, or the folder with it. Of what it pickles, tensors and the argparse.Namespace with the arguments
      of the training command are read, nothing else: checkpoints of fairseq 0.10 and later, which hold an omegaconf
      object in its place, are refused. With `dict.txt`, and `encoder.json` and `vocab.bpe` of GPT-2, beside it, the
      tokenizer is written too.

    MissingFileError, CheckpointError, DataError: a file is missing, damaged or holds something else, or `out` exists
    already. ConfigError: an architecture that RoBERTa has not.
    """
    out, path = checkpoint.new_folder(out), Path(path)
    path = path / "model.pt" if path.is_dir() else path
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; expected a fairseq checkpoint, or a folder with model.pt")
    content = read_pickle(path, [argparse.Namespace])
    if not isinstance(content, dict) or not isinstance(content.get("args"), argparse.Namespace):
        raise CheckpointError(
            f"{path} is no fairseq checkpoint; expected a dict with 'model', and a Namespace as 'args'"
        )
    tensors = plain_tensors(content.get("model"), path)
    with torch.device("meta"):
        model = RobertaForMaskedLM(_config(path, vars(content["args"]), tensors))
    checkpoint.fill(model, tensors, f"fairseq checkpoint {path}")
    tokenizer = _tokenizer(path.parent, model.config.vocab_size)
    with state.new_folder(out) as temporary:
        model.save_pretrained(temporary)
        for name, text in tokenizer.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if tokenizer:
            shutil.copyfile(path.parent / "vocab.bpe", temporary / "merges.txt")
            try:
                Tokenizer.from_pretrained(temporary)
            except DataError as error:
                raise DataError(f"{path.parent}: {', '.join(_VOCABULARY)} make no tokenizer: {error}") from None
    return model


def _config(path: Path, arguments: dict, tensors: dict[str, Tensor]) -> EncoderConfig:
    absent = [name for name in _ARGUMENTS.values() if name not in arguments]
    if absent:
        raise CheckpointError(f"{path}: the arguments lack {', '.join(absent)}; expected those of a RoBERTa")
    tables = {}
    for field, part in (("vocab_size", "embed_tokens"), ("max_position_embeddings", "embed_positions")):
        name = next((name for name in tensors if name.endswith(f"sentence_encoder.{part}.weight")), None)
        if name is None:
            raise CheckpointError(f"{path} has no sentence_encoder.{part}.weight; expected a RoBERTa")
        if tensors[name].dim() != 2:
            raise CheckpointError(f"{path}: {name} has shape {list(tensors[name].shape)}; expected two sizes")
        tables[field] = len(tensors[name])
    values = {field: arguments[name] for field, name in _ARGUMENTS.items()}
    try:
        return EncoderConfig("roberta", **values, **tables)
    except ConfigError as error:
        raise ConfigError(f"{path}: the arguments are not those of a RoBERTa: {error}") from None


def _tokenizer(folder: Path, vocab_size: int) -> dict[str, str]:
    """The files of the tokenizer by name, none if the vocabulary is not there. fairseq's dictionary lists GPT-2's ids,
    and these are byte pairs."""
    if not all((folder / name).is_file() for name in _VOCABULARY):
        return {}
    pairs = {str(index): token for token, index in checkpoint.read_config(folder / "encoder.json").items()}
    lines = read_text(folder / "dict.txt", DataError).splitlines()
    tokens = [*_SPECIAL, *(pairs.get(line.split(" ")[0], line.split(" ")[0]) for line in lines), _MASK]
    if len(tokens) != vocab_size or len(set(tokens)) != vocab_size:
        raise DataError(f"{folder / 'dict.txt'} makes {len(set(tokens))} tokens, expected {vocab_size} as in the model")
    vocab = {token: index for index, token in enumerate(tokens)}
    mask = {"__type": "AddedToken", "content": _MASK, "lstrip": True, "normalized": False, "special": True}
    config = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False, "mask_token": mask}
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
