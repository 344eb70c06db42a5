"""BERT tokenizers on Hugging Face `tokenizers`: trained or loaded, saved in the transformers layout, fast on words."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from numbers import Integral
from os import PathLike
from pathlib import Path
from reprlib import repr as shorten
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from fastbert.data.arrays import expand, first_of
from fastbert.data.checks import check
from fastbert.data.text import CJK, as_paths, read_rows
from fastbert.errors import ConfigError, DataError, MissingFileError

LEVELS = ("char", "wordpiece")
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_MAX_UNITS = 1 << 20  # the table of known words starts afresh beyond this, so that its memory is bounded


class EncodedRows(NamedTuple):
    """Rows of pieces laid end to end: ids int32 [T], word_start uint8 [T] (1 where a word begins), lengths int64
    [rows], and per row how many words left no piece because the normaliser removes all their characters (int64
    [rows])."""

    ids: np.ndarray
    word_start: np.ndarray
    lengths: np.ndarray
    vanished: np.ndarray


class Tokenizer:
    """WordPiece behind BERT's normaliser and pre-tokenizer. Picklable; the same object in every worker.

    Ids of the special tokens: pad_id, unk_id, cls_id, sep_id, mask_id; special_ids holds all ids that are no text.
    `fingerprint` is the sha256 of all that decides ids: two tokenizers with one fingerprint give the same ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None):
        self.special_tokens = {**SPECIAL_TOKENS, **(special_tokens or {})}
        self._config = json.loads(backend.to_str())
        vocab = backend.get_vocab(with_added_tokens=True)
        for role, token in self.special_tokens.items():
            if token not in vocab:
                raise DataError(f"the vocabulary of {len(vocab)} tokens has no {role} {token!r}")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise DataError(f"the ids of the {len(vocab)} tokens are not 0 to {len(vocab) - 1}, each once")
        backend.no_truncation()
        backend.no_padding()
        known = {added.content for added in backend.get_added_tokens_decoder().values() if added.special}
        backend.add_special_tokens([token for token in self.special_tokens.values() if token not in known])
        backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        cls, sep = self.special_tokens["cls_token"], self.special_tokens["sep_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
        )
        self._backend, self.vocab_size = backend, len(vocab)
        self._tokens = sorted(vocab, key=vocab.get)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            vocab[self.special_tokens[role]] for role in SPECIAL_TOKENS
        )
        self.special_ids = sorted(index for index, added in backend.get_added_tokens_decoder().items() if added.special)
        self.fingerprint = self._fingerprint()
        self._table: _PieceTable | None = None

    # Where tokenizers come from and go to

    @classmethod
    def train(
        cls,
        files: str | PathLike | Sequence[str | PathLike],
        vocab_size: int,
        level: str = "char",
        *,
        lowercase: bool = True,
        strip_accents: bool | None = None,
        min_frequency: int = 2,
        errors: str = "strict",
        progress: bool = True,
    ) -> "Tokenizer":
        """Learn at most `vocab_size` tokens from text files.

        level="char": every CJK character and punctuation mark is a piece of its own, WordPiece for the rest, as
        Google's Chinese BERT has it. level="wordpiece": BERT's pre-tokenization without that isolation, so that pieces
        of several CJK characters are learnt between spaces and punctuation. The vocabulary: special tokens, single
        characters by falling frequency, then WordPiece merges in the order learnt; what occurs less than
        `min_frequency` times is left out. strip_accents=None follows `lowercase`, as in BERT. errors: see read_rows.
        """
        if level not in LEVELS:
            raise ConfigError(f"level is {level!r}, expected one of {', '.join(map(repr, LEVELS))}")
        expected = f"an integer, more than the {len(SPECIAL_TOKENS)} special tokens"
        check("vocab_size", vocab_size, Integral, expected, lambda size: size > len(SPECIAL_TOKENS))
        check("min_frequency", min_frequency, Integral, "an integer of at least 0", lambda count: count >= 0)
        paths = as_paths(files)
        backend = _bert_backend(
            {}, lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=level == "char"
        )
        counts = _base_pieces(backend, paths, errors, progress)
        # The trainer numbers ## forms in the random order of a hash table and settles ties by number: given as special
        # tokens they keep one order, so that the same text gives the same vocabulary. Twice the size, because the
        # characters that are left out below make room for merges.
        trainer = trainers.WordPieceTrainer(
            vocab_size=2 * vocab_size,
            min_frequency=min_frequency,
            special_tokens=sorted(piece for piece in backend.get_vocab() if piece.startswith("##")),
            show_progress=False,
        )
        rows = tqdm(read_rows(paths, errors), "learning pieces", unit=" rows", delay=2, disable=not progress)
        backend.train_from_iterator((row.text for row in rows), trainer)
        learnt = backend.get_vocab()
        vocab = _select_pieces(sorted(learnt, key=learnt.get), counts, vocab_size, min_frequency)
        if len(vocab) == len(SPECIAL_TOKENS):
            where = ", ".join(map(str, paths))
            raise DataError(f"nothing to train a tokenizer on: no character occurs {min_frequency} times in {where}")
        return cls(
            _bert_backend(vocab, lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=level == "char")
        )

    @classmethod
    def from_pretrained(cls, folder: str | PathLike) -> "Tokenizer":
        """Read `tokenizer.json`, or else `vocab.txt`, of a folder in the transformers layout.

        Options of its `tokenizer_config.json` (do_lower_case, strip_accents, tokenize_chinese_chars) win over
        tokenizer.json, as in transformers. MissingFileError: no such folder or neither file. DataError: a damaged
        file, no BERT-type WordPiece tokenizer, a special token missing, added tokens beside `vocab.txt` (only
        tokenizer.json says all of how they are found in a text).
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise MissingFileError(f"{folder} is not a folder, expected one with tokenizer.json or vocab.txt")
        names, options = _read_config(folder / "tokenizer_config.json")
        full, plain = folder / "tokenizer.json", folder / "vocab.txt"
        if full.exists():
            tokenizer = cls(_parse_backend(full, names["unk_token"], options), names)
        elif plain.exists():
            tokenizer = cls(_bert_backend(_read_vocab(plain), unk_token=names["unk_token"], **options), names)
        else:
            raise MissingFileError(f"{folder} has neither tokenizer.json nor vocab.txt")
        tokenizer._check_added_tokens(folder)
        return tokenizer

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write tokenizer.json, vocab.txt and tokenizer_config.json, which AutoTokenizer of transformers loads with
        the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        normalizer = self._config["normalizer"]
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
            **self.special_tokens,
        }
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in self._tokens), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )

    def __reduce__(self):
        return _restore, (self._backend.to_str(), self.special_tokens)

    # Text to ids and back

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of one text, between [CLS] and [SEP] unless add_special_tokens=False. The names of special tokens inside
        the text are read as such tokens. DataError: the text is no str, or not Unicode (a lone surrogate)."""
        _check_texts([text])
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        texts = list(texts)
        _check_texts(texts)
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)]

    def encode_words(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Pieces of a row given as words: ids int32 [T] and word_start uint8 [T], 1 at the first piece of each word.

        Each word is encoded alone, so pieces never reach over a word border. A word whose characters the normaliser
        all removes has no piece. No special tokens are added and none are read from the text.
        """
        rows = self.encode_rows([words])
        return rows.ids, rows.word_start

    def encode_rows(self, rows: Sequence[Sequence[str]], *, whole: bool = True) -> EncodedRows:
        """`encode_words` of many rows at once. whole=False: the items are runs of text without word borders, and
        BERT's rule finds the words in them: a piece begins one unless it continues (`##`) a word that is not written
        in CJK characters."""
        if self._table is None:
            self._table = _PieceTable(self)
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        unit = self._table.lookup(list(chain.from_iterable(rows)))
        counts = self._table.counts[unit]
        pieces = expand(self._table.first[unit], counts)
        starts = self._table.run_start if not whole else self._table.unit_start
        edges = np.concatenate([[0], np.cumsum(sizes)])
        tokens = np.concatenate([[0], np.cumsum(counts)])[edges]
        empty = np.concatenate([[0], np.cumsum(counts == 0)])[edges]
        return EncodedRows(self._table.ids[pieces], starts[pieces], np.diff(tokens), np.diff(empty))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids, with spaces only where two words written with letters or digits meet."""
        hidden = set(self.special_ids) if skip_special_tokens else ()
        text = ""
        for token in (self.id_to_token(i) for i in map(int, ids) if i not in hidden):
            if token.startswith("##") and text:
                text += token[2:]
            else:
                text += " " + token if text and _spaced(text[-1]) and _spaced(token[0]) else token
        return text

    def id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise DataError(f"the id {index} is outside of the vocabulary of {self.vocab_size} tokens")
        return self._tokens[index]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None if the vocabulary does not have it."""
        return self._backend.token_to_id(token)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, fingerprint {self.fingerprint[:12]})"

    def _check_added_tokens(self, folder: Path) -> None:
        """DataError unless this tokenizer adds all tokens that files beside the vocabulary add to it."""
        known = {added.content: index for index, added in self._backend.get_added_tokens_decoder().items()}
        for path, added in _read_added_tokens(folder):
            missing = [token for token, index in added.items() if known.get(token) != index]
            if missing:
                full, names = folder / "tokenizer.json", ", ".join(map(repr, missing))
                raise DataError(
                    f"{path} adds the tokens {names}, expected them in {full} too: load the folder with AutoTokenizer "
                    "of transformers and save it, which writes that file"
                )

    def _fingerprint(self) -> str:
        decides = {key: self._config[key] for key in ("model", "normalizer", "pre_tokenizer")}
        decides["vocabulary"], decides["special"] = self._tokens, [self.special_tokens, self.special_ids]
        decides["model"] = {key: value for key, value in decides["model"].items() if key != "vocab"}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


class _PieceTable:
    """The pieces of every word met so far, so that a row of known words costs one look-up per word and the rest is
    array indexing.

    Unit i has the pieces ids[first[i] : first[i] + counts[i]]; unit_start flags the first of them, run_start each that
    begins a word by BERT's rule.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
        self._backend.encode_special_tokens = True  # "[SEP]" in a corpus is text
        self._begins = np.array([not re.match(f"##[^{CJK}]", token) for token in tokenizer._tokens], np.uint8)
        self._clear()

    def lookup(self, units: list[str]) -> np.ndarray:
        """The number of each unit (int64), after the unknown ones are added."""
        missing = [unit for unit in dict.fromkeys(units) if unit not in self._index]
        if missing and len(self._index) + len(missing) > _MAX_UNITS:
            self._clear()
            missing = list(dict.fromkeys(units))
        if missing:
            self._add(missing)
        return np.fromiter(map(self._index.__getitem__, units), np.int64, len(units))

    def _clear(self) -> None:
        self._index: dict[str, int] = {}
        self.first = self.counts = np.zeros(0, np.int64)
        self.ids, self.unit_start, self.run_start = np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.uint8)

    def _add(self, units: list[str]) -> None:
        _check_texts(units)
        encoded = [encoding.ids for encoding in self._backend.encode_batch(units, add_special_tokens=False)]
        self._index.update(zip(units, range(len(self._index), len(self._index) + len(units)), strict=True))
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(chain.from_iterable(encoded), np.int32, counts.sum())
        unit_start, run_start = np.zeros(len(ids), np.uint8), self._begins[ids]
        heads = first_of(counts)[counts > 0]
        unit_start[heads] = run_start[heads] = 1
        self.first = np.concatenate([self.first, first_of(counts) + len(self.ids)])
        self.counts = np.concatenate([self.counts, counts])
        self.ids = np.concatenate([self.ids, ids])
        self.unit_start = np.concatenate([self.unit_start, unit_start])
        self.run_start = np.concatenate([self.run_start, run_start])


def _bert_backend(
    vocab: dict[str, int],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    handle_chinese_chars: bool = True,
    unk_token: str = "[UNK]",
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk_token))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=handle_chinese_chars, strip_accents=strip_accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _restore(serialized: str, special_tokens: dict[str, str]) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(serialized), special_tokens)


def _base_pieces(backend: tokenizers.Tokenizer, paths: list[Path], errors: str, progress: bool) -> Counter[str]:
    """Leave in the backend a vocabulary of all single characters, with ## where they continue a word, and return how
    often each character occurs."""
    raw, counts = Counter(), Counter()

    def counted() -> Iterator[str]:
        for row in tqdm(read_rows(paths, errors), "counting characters", unit=" rows", delay=2, disable=not progress):
            raw.update(row.text)
            yield row.text

    backend.train_from_iterator(counted(), trainers.WordPieceTrainer(vocab_size=0, show_progress=False))
    for char, count in raw.items():  # the normaliser works character by character
        counts.update(dict.fromkeys(backend.normalizer.normalize_str(char).strip(), count))
    return counts


def _select_pieces(pieces: list[str], counts: Counter[str], vocab_size: int, min_frequency: int) -> dict[str, int]:
    """Special tokens, then single characters by falling frequency (as themselves before as `##`), then the merges in
    the order learnt."""
    single = [piece for piece in pieces if len(piece.removeprefix("##")) == 1]
    frequent = [piece for piece in single if counts[piece[-1]] >= min_frequency]
    frequent.sort(key=lambda piece: (-counts[piece[-1]], piece[-1], len(piece)))
    merges = [piece for piece in pieces if len(piece.removeprefix("##")) > 1]
    return {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *frequent, *merges][:vocab_size])}


def _check_texts(texts: Sequence[str]) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"the text {shorten(text)} is a {type(text).__name__}, expected a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"{text[error.start]!r} at index {error.start}"
            raise DataError(f"the text {shorten(text)} has the lone surrogate {where}, expected Unicode") from error


def _spaced(char: str) -> bool:
    return char.isalnum() and not re.match(f"[{CJK}]", char)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def _read_config(path: Path) -> tuple[dict[str, str], dict]:
    """The names of the special tokens, and those options of the normaliser that tokenizer_config.json states."""
    config = _read_json(path) if path.exists() else {}
    names, options = {}, {}
    for role, default in SPECIAL_TOKENS.items():
        token = config.get(role, default)
        names[role] = token.get("content") if isinstance(token, dict) else token
        if not isinstance(names[role], str):
            raise DataError(f"{path}: {role} is {token!r}, expected a string")
    for field, option in (
        ("do_lower_case", "lowercase"),
        ("strip_accents", "strip_accents"),
        ("tokenize_chinese_chars", "handle_chinese_chars"),
    ):
        if field in config:
            if not (isinstance(config[field], bool) or field == "strip_accents" and config[field] is None):
                raise DataError(f"{path}: {field} is {config[field]!r}, expected true or false")
            options[option] = config[field]
    return names, options


def _read_added_tokens(folder: Path) -> Iterator[tuple[Path, dict[str, int]]]:
    """The files that name tokens added to a vocabulary, and these with their ids."""
    path = folder / "added_tokens.json"
    if path.exists():
        yield path, _read_json(path)
    path = folder / "tokenizer_config.json"
    added = _read_json(path).get("added_tokens_decoder", {}) if path.exists() else {}
    try:
        tokens = {token["content"]: int(index) for index, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: added_tokens_decoder is {added!r}, expected tokens by their ids") from error
    yield path, tokens


def _parse_backend(path: Path, unk_token: str, options: dict) -> tokenizers.Tokenizer:
    config = _read_json(path)
    for part, expected in (
        ("model", "WordPiece"),
        ("normalizer", "BertNormalizer"),
        ("pre_tokenizer", "BertPreTokenizer"),
    ):
        kind = config[part].get("type") if isinstance(config.get(part), dict) else config.get(part)
        if kind != expected:
            raise DataError(
                f"{path}: the {part} is {kind!r}, expected {expected!r}: only BERT-type tokenizers are supported"
            )
    prefix, unknown = config["model"].get("continuing_subword_prefix"), config["model"].get("unk_token")
    if (prefix, unknown) != ("##", unk_token):
        raise DataError(
            f"{path}: the model has prefix {prefix!r} and unknown token {unknown!r}, expected '##', {unk_token!r}"
        )
    config["normalizer"].update(options)
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(config))
    except Exception as error:  # tokenizers raises nothing more specific
        raise DataError(f"{path} is not a tokenizer: {error}") from error


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        tokens = path.read_bytes().decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 at byte offset {error.start}") from error
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        line, token = next((i, token) for i, token in enumerate(tokens) if vocab[token] != i)
        raise DataError(
            f"{path}:{line + 1}: the token {token!r} stands again on line {vocab[token] + 1}, expected each once"
        )
    return vocab
