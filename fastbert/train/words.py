"""From characters to words: a model with a word-level vocabulary made of one that reads characters, as WoBERT was made
of RoBERTa-wwm-ext (github.com/ZhuiyiTechnology/WoBERT)."""

import json
import re
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastbert import checkpoint
from fastbert.data import Tokenizer
from fastbert.data.backends import ROLES
from fastbert.data.checks import check
from fastbert.errors import CheckpointError, ConfigError, DataError
from fastbert.files import read_text
from fastbert.models.electra import GENERATOR

# The tensors that have a row for each token, by their published names.
_TABLE = re.compile(r"(^|\.)word_embeddings\.weight$")
_BY_TOKEN = re.compile(
    rf"{_TABLE.pattern}|(predictions|lm_head)\.(decoder\.)?bias$|(predictions|lm_head)\.decoder\.weight$"
    r"|generator_lm_head\.weight$"
)


def to_words(
    folder: str | PathLike, out: str | PathLike, *, words: Iterable[str] | str | PathLike, pad_to_multiple_of: int = 8
) -> Tokenizer:
    """Write to `out` the model of `folder` with a vocabulary of words, and return its tokenizer.

    folder: a model of any family in the transformers layout, with its tokenizer of level "char".
    words: the words to add, most frequent first, or a text file with one in each line (see
      fastbert.data.frequent_words); those that the vocabulary has are passed over (see Tokenizer.with_words).
    pad_to_multiple_of: the number of rows of the new tables is rounded up to it.

    A token that stays keeps its row of the word embeddings, of a decoder of its own and of the output bias; a new word
    gets the mean of the rows of its characters, computed in float32, and a row without a token the mean of all kept
    rows. All else is copied as it is, and an ELECTRA's generator goes along: train on from here. MissingFileError,
    CheckpointError: no folder or file, or a damaged one. ConfigError: a tokenizer of another level; a RoBERTa whose
    pad_token_id would change, from which its positions count. DataError: `out` exists already, a word is none, or none
    is new.
    """
    folder, out = Path(folder), checkpoint.new_folder(out)
    check("pad_to_multiple_of", pad_to_multiple_of, int, "an integer of at least 1", lambda multiple: multiple >= 1)
    checkpoint.config_file(folder)
    old = Tokenizer.from_pretrained(folder)
    if old.level != "char":
        raise ConfigError(f"{folder} has a tokenizer of level {old.level!r}, expected 'char'")
    reduced, new = old.reduced(), old.with_words(_listed(words))
    if new.vocab_size == reduced.vocab_size:
        raise DataError(f"no word is new to the vocabulary of {folder}, expected some of two or more characters")
    rows = -(-new.vocab_size // pad_to_multiple_of) * pad_to_multiple_of
    parts = [folder, *(part for part in (folder / GENERATOR,) if part.is_dir())]
    changed = [_changed(part, old, reduced, new, rows) for part in parts]  # all of it before anything is written
    for part, (config, tensors) in zip(parts, changed, strict=True):
        target = out / part.relative_to(folder)
        target.mkdir(parents=True, exist_ok=True)
        new.save_pretrained(target)
        save_file(tensors, target / checkpoint.WEIGHTS, {"format": "pt"})
        (target / checkpoint.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return new


def _changed(folder: Path, old: Tokenizer, reduced: Tokenizer, new: Tokenizer, rows: int) -> tuple[dict, dict]:
    """The config and the tensors of a model with the new vocabulary."""
    config = checkpoint.read_config(checkpoint.config_file(folder))
    if config.get("model_type") == "roberta" and config.get("pad_token_id", 1) != new.pad_id:
        pad_id = config.get("pad_token_id", 1)
        raise ConfigError(
            f"{folder}: pad_token_id is {pad_id}, expected {new.pad_id}: RoBERTa's positions count from it"
        )
    tensors = checkpoint.read_tensors(folder)
    if not any(map(_TABLE.search, tensors)):
        raise CheckpointError(f"{folder} has no word_embeddings.weight")
    for name, tensor in tensors.items():
        if _BY_TOKEN.search(name):
            tensor = _rows_of_words(tensor, f"{folder}: {name}", old, reduced, new, rows)
        tensors[name] = tensor.clone()
    config["vocab_size"] = rows
    config |= {f"{role}_id": new.token_to_id(new.special_tokens[role]) for role in ROLES if f"{role}_id" in config}
    if "tokenizer_class" in config:
        config["tokenizer_class"] = "RoFormerTokenizer"
    return config, tensors


def _rows_of_words(tensor: Tensor, name: str, old: Tokenizer, reduced: Tokenizer, new: Tokenizer, rows: int) -> Tensor:
    """`[V]` or `[V, E]` by the ids of `old` -> `[rows]` or `[rows, E]` by those of `new`, which are those of `reduced`
    and more."""
    if len(tensor) < old.vocab_size:
        raise CheckpointError(f"{name} has {len(tensor)} rows, expected one for each of {old.vocab_size} tokens")
    kept = tensor[[old.token_to_id(reduced.id_to_token(index)) for index in range(reduced.vocab_size)]]
    words = [new.id_to_token(index) for index in range(reduced.vocab_size, new.vocab_size)]
    encoded = reduced.encode_rows([[word] for word in words])
    lengths = torch.from_numpy(encoded.lengths)
    owner = torch.arange(len(words)).repeat_interleave(lengths)
    wide = kept.float()
    sums = wide.new_zeros(len(words), *wide.shape[1:]).index_add_(0, owner, wide[torch.from_numpy(encoded.ids).long()])
    means = sums / lengths.view(-1, *[1] * (wide.dim() - 1))
    spare = wide.mean(0, keepdim=True).expand(rows - new.vocab_size, *wide.shape[1:])
    return torch.cat([kept, means.to(kept.dtype), spare.to(kept.dtype)])


def _listed(words: Iterable[str] | str | PathLike) -> list[str]:
    if not isinstance(words, str | PathLike):
        return list(words)
    return [line.strip() for line in read_text(words, DataError).splitlines() if line.strip()]
