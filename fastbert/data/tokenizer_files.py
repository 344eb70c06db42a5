"""Tokenizers in folders of the transformers layout: what is read from them, and what is written."""

import base64
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers

from fastbert.data.backends import (
    ROLES,
    SPECIAL_TOKENS,
    bert_backend,
    bpe_backend,
    level_of,
    restore,
    unigram_backend,
)
from fastbert.data.spiece import is_charsmap, read_spiece
from fastbert.errors import DataError, MissingFileError, shown
from fastbert.files import read_json, read_text

_CONFIG, _FULL = "tokenizer_config.json", "tokenizer.json"
# What a tokenizer.json may consist of, by its model: normaliser and pre-tokenizer.
_PARTS = {
    "WordPiece": ("BertNormalizer", "BertPreTokenizer"),
    "BPE": (None, "ByteLevel"),
    "Unigram": ("Sequence", ["WhitespaceSplit", "Metaspace"]),
}
_CLASSES = {"bpe": "RobertaTokenizer", "unigram": "AlbertTokenizer", "word": "RoFormerTokenizer"}


def read_folder(folder: Path) -> tuple[Path, tokenizers.Tokenizer, dict[str, str], str]:
    """The file that has the vocabulary, the backend, the names of the special tokens, and the level. Errors: see
    Tokenizer.from_pretrained."""
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder, expected one with {_FULL} or a vocabulary")
    path, model, read = _source(folder)
    word = _class_name(folder) == "RoFormerTokenizer"
    if word and model != "WordPiece":
        raise DataError(f"{path} holds a {model} model, expected WordPiece: the folder names a RoFormerTokenizer")
    level = {"WordPiece": "word" if word else "char", "BPE": "bpe", "Unigram": "unigram"}[model]
    config = _read_config(folder)
    names = _names(folder / _CONFIG, config, level)
    options = _options(folder / _CONFIG, config, model)
    if word:
        options["handle_chinese_chars"] = False  # segments are cut apart later, whatever this option says
    try:
        backend = read(path, names, options)
    except (DataError, MissingFileError):
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        raise DataError(f"{path} is not a tokenizer: {_reason(error)}") from error
    return path, backend, names, "word" if word else level_of(json.loads(backend.to_str()))


def read_added_tokens(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """The files, and places in them, that name tokens added to a vocabulary, and these with their ids."""
    path = folder / "added_tokens.json"
    if path.exists():
        yield str(path), read_json(path, DataError)
    path, added = folder / _CONFIG, _read_config(folder).get("added_tokens_decoder", {})
    try:
        tokens = {token["content"]: int(index) for index, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: added_tokens_decoder is {shown(added)}, expected tokens by their ids") from error
    yield f"{path}: added_tokens_decoder", tokens


def write_folder(
    folder: Path, backend: tokenizers.Tokenizer, level: str, tokens: list[str], special_tokens: dict[str, str]
) -> None:
    """Write tokenizer.json, tokenizer_config.json and the plain vocabulary of the level, if transformers has one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(backend.to_str())
    config = {"tokenizer_class": _CLASSES.get(level, "BertTokenizer"), **special_tokens}
    if level in ("bpe", "unigram"):
        frame = {"bos_token": special_tokens["cls_token"], "eos_token": special_tokens["sep_token"]}
        added = next(one for one in content["added_tokens"] if one["content"] == special_tokens["mask_token"])
        mask = {"__type": "AddedToken", **{key: value for key, value in added.items() if key != "id"}}
        config |= frame | {"mask_token": mask}
    if level == "bpe":
        config["add_prefix_space"] = content["pre_tokenizer"]["add_prefix_space"]
        merges = ["#version: 0.2", *map(" ".join, content["model"]["merges"])]
        _write(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
        _write(folder / "merges.txt", "".join(f"{line}\n" for line in merges))
    elif level == "unigram":
        options = _unigram_options(content["normalizer"])
        config |= {"do_lower_case": options["lowercase"], "keep_accents": options["keep_accents"], "remove_space": True}
    else:
        normalizer = content["normalizer"]
        config["do_lower_case"], config["strip_accents"] = normalizer["lowercase"], normalizer["strip_accents"]
        config["tokenize_chinese_chars"] = level == "word" or normalizer["handle_chinese_chars"]
        _write(folder / "vocab.txt", "".join(f"{token}\n" for token in tokens))
    _write(folder / _FULL, backend.to_str(pretty=True))
    _write(folder / _CONFIG, json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _source(folder: Path) -> tuple[Path, str, Callable]:
    """The file to read a tokenizer from, the type of its model, and the function that reads it."""
    path = folder / _FULL
    if path.exists():
        kind = _read_full(path)["model"]["type"]
        return path, kind, _READERS[kind]
    for names, kind, read in (
        (["vocab.txt"], "WordPiece", _from_vocab),
        (["vocab.json", "merges.txt"], "BPE", _from_merges),
        (["spiece.model"], "Unigram", _from_spiece),
    ):
        if all((folder / name).exists() for name in names):
            return folder / names[0], kind, read
    raise MissingFileError(f"{folder} has neither {_FULL} nor vocab.txt, vocab.json with merges.txt, or spiece.model")


def _class_name(folder: Path) -> str | None:
    """The tokenizer class that the folder names, in either of its configs, as transformers looks for it."""
    path = folder / "config.json"
    model = read_json(path, DataError) if path.exists() else {}
    name = _read_config(folder).get("tokenizer_class") or model.get("tokenizer_class")
    if name is None and model.get("model_type") == "roformer":
        return "RoFormerTokenizer"
    return name.removesuffix("Fast") if isinstance(name, str) else None


def _read_config(folder: Path) -> dict:
    path = folder / _CONFIG
    return read_json(path, DataError) if path.exists() else {}


def _names(path: Path, config: dict, level: str) -> dict[str, str]:
    names = {}
    for role in ROLES:
        token = config.get(role, SPECIAL_TOKENS[level][role])
        names[role] = token.get("content") if isinstance(token, dict) else token
        if not isinstance(names[role], str):
            raise DataError(f"{path}: {role} is {shown(token)}, expected a string")
    return names


_OPTIONS = {
    "WordPiece": {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    },
    "BPE": {"add_prefix_space": "add_prefix_space"},
    "Unigram": {"do_lower_case": "lowercase", "keep_accents": "keep_accents"},
}


def _options(path: Path, config: dict, model: str) -> dict:
    """Those options of the backend that tokenizer_config.json states."""
    options = {}
    for field, option in _OPTIONS[model].items():
        if field in config:
            if not (isinstance(config[field], bool) or field == "strip_accents" and config[field] is None):
                raise DataError(f"{path}: {field} is {shown(config[field])}, expected true or false")
            options[option] = config[field]
    return options


def _from_vocab(path: Path, names: dict[str, str], options: dict) -> tokenizers.Tokenizer:
    return bert_backend(_read_vocab(path), unk_token=names["unk_token"], **options)


def _from_merges(path: Path, names: dict[str, str], options: dict) -> tokenizers.Tokenizer:
    vocab, source = read_json(path, DataError), path.with_name("merges.txt")
    _check_ids(path, vocab)
    merges = []
    for number, line in enumerate(_read_lines(source), 1):
        if not line or number == 1 and line.startswith("#version"):
            continue
        merge = tuple(line.split(" "))
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise DataError(f"{source}:{number}: {shown(line)} is no merge, expected two pieces of {path.name}")
        merges.append(merge)
    return bpe_backend(vocab, merges, unk_token=names["unk_token"], **options)


def _from_spiece(path: Path, names: dict[str, str], options: dict) -> tokenizers.Tokenizer:
    model = read_spiece(path)
    # ALBERT sets a comma after a digit apart; a piece that joins them shall never win.
    pieces = [(piece, score - 100 * (piece[-1:] == "," and piece[-2:-1].isdigit())) for piece, score in model.pieces]
    _check_unknown(path, pieces, model.unk_id, names)
    return unigram_backend(pieces, charsmap=model.charsmap, unk_id=model.unk_id, **options)


def _from_wordpiece(path: Path, names: dict[str, str], options: dict) -> tokenizers.Tokenizer:
    config = _parts(path)
    prefix, unknown = config["model"].get("continuing_subword_prefix"), config["model"].get("unk_token")
    if (prefix, unknown) != ("##", names["unk_token"]):
        given = f"continuing_subword_prefix {shown(prefix)} and unk_token {shown(unknown)}"
        raise DataError(f"{path}: the model has {given}, expected '##' and {names['unk_token']!r}")
    config["normalizer"].update(options)
    return _restored(path, config)


def _from_bpe(path: Path, names: dict[str, str], options: dict) -> tokenizers.Tokenizer:
    config = _parts(path)
    model, bytes_of = config["model"], config["pre_tokenizer"]
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(field):
            raise DataError(f"{path}: {field} of the model is {shown(model[field])}, expected none")
    if not bytes_of.get("use_regex", True):
        raise DataError(f"{path}: use_regex of the pre_tokenizer is false, expected true")
    merges = [_merge(path, merge) for merge in model["merges"]]
    options = {"add_prefix_space": bytes_of["add_prefix_space"], **options}
    rebuilt = json.loads(bpe_backend(model["vocab"], merges, unk_token=names["unk_token"], **options).to_str())
    return _restored(path, rebuilt | {"added_tokens": config.get("added_tokens", [])})


def _merge(path: Path, merge) -> tuple[str, str]:
    pieces = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pieces, list) or len(pieces) != 2 or not all(isinstance(piece, str) for piece in pieces):
        raise DataError(f"{path}: merges of the model has {shown(merge)}, expected two pieces")
    return pieces[0], pieces[1]


def _from_unigram(path: Path, names: dict[str, str], options: dict) -> tokenizers.Tokenizer:
    config = _parts(path)
    metaspace, model = config["pre_tokenizer"]["pretokenizers"][1], config["model"]
    scheme = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space") else "never")
    if scheme != "always" or model.get("byte_fallback"):
        raise DataError(
            f"{path}: the Metaspace has prepend_scheme {scheme!r} and the model byte_fallback "
            f"{model.get('byte_fallback')!r}, expected 'always' and false"
        )
    pieces = [(piece, score) for piece, score in model["vocab"]]
    _check_unknown(path, pieces, model["unk_id"], names)
    steps = config["normalizer"].get("normalizers")
    if not isinstance(steps, list) or not all(isinstance(step, dict) and "type" in step for step in steps):
        raise DataError(f"{path}: normalizers of the normalizer is {shown(steps)}, expected steps with their type")
    try:
        options = {**_unigram_options(config["normalizer"]), **options}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: precompiled_charsmap of the normalizer: {error}") from error
    if options["charsmap"] is not None and not is_charsmap(options["charsmap"]):
        raise DataError(f"{path}: precompiled_charsmap of the normalizer is not a trie and its texts")
    rebuilt = json.loads(unigram_backend(pieces, unk_id=model["unk_id"], **options).to_str())
    usual = json.loads(unigram_backend([("", 0.0)], unk_id=0).to_str())["normalizer"]["normalizers"]
    for step in config["normalizer"]["normalizers"]:
        if step not in usual and step["type"] != "Precompiled":
            raise DataError(f"{path}: the normalizer has the step {shown(step)}, which ALBERT's has not")
    return _restored(path, rebuilt | {"added_tokens": config.get("added_tokens", [])})


def _restored(path: Path, config: dict) -> tokenizers.Tokenizer:
    """The backend of the content of a tokenizer.json. DataError, with the part without which there would be one."""
    try:
        return restore(json.dumps(config))
    except Exception as error:
        nothing = {"version": "1.0", "added_tokens": []}
        nothing |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
        for part in nothing:
            if _restores(config | {part: nothing[part]}):
                raise DataError(f"{path}: {part} is {shown(config.get(part))}: {_reason(error)}") from error
        raise


def _restores(config: dict) -> bool:
    try:
        restore(json.dumps(config))
    except Exception:
        return False
    return True


def _reason(error: Exception) -> str:
    return str(error)[:300]


_READERS = {"WordPiece": _from_wordpiece, "BPE": _from_bpe, "Unigram": _from_unigram}


def _unigram_options(normalizer: dict) -> dict:
    """The options of unigram_backend that a serialised normaliser of ALBERT's says."""
    steps = {step["type"]: step for step in normalizer["normalizers"]}
    charsmap = base64.b64decode(steps["Precompiled"]["precompiled_charsmap"]) if "Precompiled" in steps else None
    return {"lowercase": "Lowercase" in steps, "keep_accents": "StripAccents" not in steps, "charsmap": charsmap}


def _check_ids(path: Path, vocab: dict) -> None:
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < 1 << 32:
            raise DataError(f"{path}: the id of {shown(token)} is {shown(index)}, expected a number from 0 on")


def _check_model(path: Path, model: dict) -> None:
    """DataError unless the vocabulary of a model in a tokenizer.json is of the kind of the model."""
    longest = model.get("max_input_chars_per_word", 100)
    if type(longest) is not int or longest < 0:
        raise DataError(f"{path}: max_input_chars_per_word of the model is {shown(longest)}, expected a count")
    vocab, scored = model.get("vocab"), model["type"] == "Unigram"
    if not isinstance(vocab, list if scored else dict):
        kind = "pieces with their scores" if scored else "ids by token"
        raise DataError(f"{path}: vocab of the model is {shown(vocab)}, expected {kind}")
    if model["type"] == "BPE" and not isinstance(model.get("merges"), list):
        raise DataError(f"{path}: merges of the model is {shown(model.get('merges'))}, expected pairs of pieces")
    if not scored:
        return _check_ids(path, vocab)
    for piece in vocab:
        number = isinstance(piece, list) and len(piece) == 2 and type(piece[1]) in (float, int)
        if not number or not isinstance(piece[0], str) or not math.isfinite(piece[1]):
            raise DataError(f"{path}: vocab of the model has {shown(piece)}, expected a piece and its score")


def _check_unknown(path: Path, pieces: list[tuple[str, float]], unk_id: int, names: dict[str, str]) -> None:
    if not isinstance(unk_id, int) or not 0 <= unk_id < len(pieces) or pieces[unk_id][0] != names["unk_token"]:
        raise DataError(f"{path}: unk_id is {shown(unk_id)}, expected the id of unk_token {names['unk_token']!r}")


def _parts(path: Path) -> dict:
    """The content of a tokenizer.json that is made of known parts."""
    config = _read_full(path)
    for part, expected in zip(("normalizer", "pre_tokenizer"), _PARTS[config["model"]["type"]], strict=True):
        value = config.get(part)
        kind = value.get("type") if isinstance(value, dict) else value
        if isinstance(expected, list) and kind == "Sequence":
            steps = value.get("pretokenizers")
            kind = [one.get("type") for one in steps if isinstance(one, dict)] if isinstance(steps, list) else steps
        if kind != expected:
            raise DataError(
                f"{path}: the {part} is {shown(kind)}, expected {expected!r}: only tokenizers of BERT, RoBERTa, "
                "ALBERT and RoFormer are supported"
            )
    return config


def _read_full(path: Path) -> dict:
    """The content of a tokenizer.json with a model of a known type; files of 2020 leave the type to be guessed."""
    config = read_json(path, DataError)
    model = config.get("model")
    if isinstance(model, dict) and "type" not in model:
        vocab = model.get("vocab")
        guessed = "BPE" if "merges" in model else {dict: "WordPiece", list: "Unigram"}.get(type(vocab))
        config["model"] = model = {"type": guessed, **model}
    kind = model.get("type") if isinstance(model, dict) else model
    if kind not in tuple(_PARTS):
        raise DataError(f"{path}: the model is {shown(kind)}, expected one of {', '.join(map(repr, _PARTS))}")
    _check_model(path, model)
    return config


def _read_lines(path: Path) -> list[str]:
    lines = [line.removesuffix("\r") for line in read_text(path, DataError).split("\n")]
    return lines if lines[-1] else lines[:-1]


def _read_vocab(path: Path) -> dict[str, int]:
    tokens = _read_lines(path)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        line, token = next((i, token) for i, token in enumerate(tokens) if vocab[token] != i)
        raise DataError(
            f"{path}:{line + 1}: the token {token!r} stands again on line {vocab[token] + 1}, expected each once"
        )
    return vocab
