"""Tokenizers of every level on Hugging Face `tokenizers`: trained or loaded, saved in the transformers layout, fast on
words."""

import hashlib
import json
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from fastbert.data.arrays import expand
from fastbert.data.backends import LEVELS, ROLES, SPECIAL_TOKENS, bert_backend, complete, level_of, restore
from fastbert.data.checks import check
from fastbert.data.offsets import WordOffsets, with_marks
from fastbert.data.pieces import PieceTable, begins_word, check_texts, cutter, unit_encoder
from fastbert.data.text import CJK
from fastbert.data.tokenizer_files import read_added_tokens, read_folder, write_folder
from fastbert.data.tokenizer_training import train_backend
from fastbert.errors import ConfigError, DataError, shown
from fastbert.hub import local_folder

# The least size of a vocabulary: something besides the special tokens, and at "bpe" all bytes, at "unigram" the space
# and, as the trainer wants it, one piece more than there are characters.
_LEAST = {"bpe": len(ROLES) + 257, "unigram": len(ROLES) + 3}

_UNUSED = re.compile(r"\[\w+\]")  # [unused1], [MASK]


class EncodedRows(NamedTuple):
    """Rows of pieces laid end to end: ids int32 [T], word_start uint8 [T] (1 where a word begins), lengths int64
    [rows], and per row how many words left no piece because the normaliser removes all their characters (int64
    [rows])."""

    ids: np.ndarray
    word_start: np.ndarray
    lengths: np.ndarray
    vanished: np.ndarray


class Tokenizer:
    """From text to ids and back, at one of five levels. Picklable; the same object in every worker.

    level: "char": BERT's WordPiece with every CJK character and punctuation mark a piece of its own (arXiv 1810.04805);
      "wordpiece": the same without that isolation of CJK characters; "bpe": RoBERTa's byte-level pairs; "unigram":
      ALBERT's SentencePiece model; "word": WoBERT's and RoFormer's, for which rjieba (without its hidden Markov model)
      cuts the normalised text into words: one that is in the vocabulary is one token, another is encoded as at "char".
    Ids of the special tokens: pad_id, unk_id, cls_id, sep_id, mask_id; special_ids lists all ids that are no text,
    ordinary_ids (int64 [vocab_size - len(special_ids)], rising) holds the others. RoBERTa's cls is <s>, its sep </s>.
    `fingerprint` is the sha256 of all that decides ids: two tokenizers with one fingerprint give the same ids (at level
    "word", to the same words: rjieba's dictionary is not part of it).
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None, level: str | None = None
    ):
        self._config = json.loads(backend.to_str())
        self.level = level or level_of(self._config)
        self.special_tokens = {**SPECIAL_TOKENS[self.level], **(special_tokens or {})}
        complete(backend, self.level, self.special_tokens)
        vocab = backend.get_vocab(with_added_tokens=True)
        if sorted(vocab.values()) != list(range(len(vocab))):
            wrong = f"the ids of the {len(vocab)} tokens are not 0 to {len(vocab) - 1}, each once"
            raise DataError(f"{wrong}: {_misnumbered(vocab)}")
        self._backend, self.vocab_size = backend, len(vocab)
        self._tokens = sorted(vocab, key=vocab.get)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            vocab[self.special_tokens[role]] for role in ROLES
        )
        added = backend.get_added_tokens_decoder()
        self.special_ids = sorted(index for index, token in added.items() if token.special)
        self.ordinary_ids = np.setdiff1d(np.arange(self.vocab_size, dtype=np.int64), self.special_ids)
        self.fingerprint = self._fingerprint()
        self._table = self._cut = self._word_offsets = None  # made when first needed

    # Where tokenizers come from and go to

    @classmethod
    def train(
        cls,
        files: str | PathLike | Sequence[str | PathLike],
        vocab_size: int,
        level: str = "char",
        *,
        lowercase: bool | None = None,
        strip_accents: bool | None = None,
        min_frequency: int = 2,
        words: str | None = None,
        tag_separator: str | None = None,
        segmenter_model: str | PathLike | None = None,
        errors: str = "strict",
        progress: bool = True,
    ) -> "Tokenizer":
        """Learn at most `vocab_size` tokens from text files.

        What occurs less than `min_frequency` times is left out. By level, the vocabulary is: "char" and "wordpiece":
        special tokens, single characters by falling frequency, then WordPiece merges in the order learnt, at
        "wordpiece" those of several CJK characters too, between spaces and punctuation. "word": the same as "char",
        its merges up to half of the vocabulary, then the most frequent words of two or more CJK characters. "bpe":
        <s> <pad> </s> <unk>, all bytes, merges in the order learnt, <mask>. "unigram": <pad> <unk> [CLS] [SEP] [MASK],
        pieces by falling probability; the trainer of tokenizers adds up in random order, so that the scores, and with
        them the fingerprint, differ from one training to the next.

        lowercase=None: True but at "bpe", which keeps all text as it is. strip_accents=None follows `lowercase` as in
        BERT, and is True at "unigram" as in ALBERT. words: "segmented", with tag_separator, for text in which spaces
        stand between all words (see segmenter): neither these nor tags are learnt then; at "bpe" and "unigram" any
        segmenter (with segmenter_model), so that no piece is learnt across words, as preparing text gives none; at
        "word", where words are counted, "rjieba" (as None) or "segmented". errors: see read_rows.
        """
        if level not in LEVELS:
            raise ConfigError(f"level is {level!r}, expected one of {', '.join(map(repr, LEVELS))}")
        least, expected = len(ROLES) + 1, f"an integer, more than the {len(ROLES)} special tokens"
        if level in _LEAST:
            least, expected = _LEAST[level], f"an integer of at least {_LEAST[level]} at level {level!r}"
        check("vocab_size", vocab_size, Integral, expected, lambda size: size >= least)
        check("min_frequency", min_frequency, Integral, "an integer of at least 0", lambda count: count >= 0)
        if level == "bpe" and (lowercase or strip_accents):
            name = "lowercase" if lowercase else "strip_accents"
            raise ConfigError(f"{name} is True, expected None or False at level 'bpe', which keeps text as it is")
        words = words or ("rjieba" if level == "word" else None)
        known = ("segmented", "rjieba") if level == "word" else ("segmented", None)
        fits = words in known or level in ("bpe", "unigram") and words != "none"
        if not fits or words is None and tag_separator is not None:
            given = f"words is {words!r} and tag_separator {tag_separator!r}"
            raise ConfigError(f"{given}, expected one of {known} at level {level!r}, and tags only with 'segmented'")
        backend = train_backend(
            level,
            files,
            vocab_size,
            lowercase=level != "bpe" if lowercase is None else lowercase,
            strip_accents=strip_accents,
            min_frequency=min_frequency,
            words=words,
            tag_separator=tag_separator,
            segmenter_model=segmenter_model,
            errors=errors,
            progress=progress,
        )
        return cls(backend, level=level)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike, revision: str | None = None) -> "Tokenizer":
        """Read `tokenizer.json` of a folder in the transformers layout, or else the plain vocabulary: `vocab.txt`,
        `vocab.json` with `merges.txt`, or `spiece.model`. A string that names no folder may be the name of a model on
        the Hugging Face hub, `revision` a branch, tag or commit of it (see fastbert.hub).

        The model in it decides the level; of WordPiece, "word" if a config names RoFormerTokenizer (or names none and
        is RoFormer's), else "char" or "wordpiece" by tokenize_chinese_chars. Options of `tokenizer_config.json`
        (do_lower_case, strip_accents, tokenize_chinese_chars; add_prefix_space; do_lower_case, keep_accents) win over
        tokenizer.json, as in transformers. MissingFileError: no such folder or no such file. DataError: a damaged
        file, parts that BERT, RoBERTa, ALBERT and RoFormer do not have, a special token missing, added tokens beside
        a plain vocabulary (only tokenizer.json says all of how they are found in a text).
        """
        folder = local_folder(folder, revision, weights=False)
        path, backend, names, level = read_folder(folder)
        try:
            tokenizer = cls(backend, names, level)
        except DataError as error:
            config = Path(folder) / "tokenizer_config.json"
            raise DataError(f"{path}{f', with {config}' if config.is_file() else ''}: {error}") from error
        tokenizer._check_added_tokens(path)
        return tokenizer

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write tokenizer.json, tokenizer_config.json and, but at level "unigram", the plain vocabulary (vocab.txt, or
        vocab.json with merges.txt), which AutoTokenizer of transformers loads with the same ids.

        At level "word" it becomes a RoFormerTokenizer, which leaves punctuation inside of a word that it does not know
        (3.14 of a segmented text) to WordPiece, where WoBERT, and this tokenizer, set it apart.
        """
        write_folder(Path(folder), self._backend, self.level, self._tokens, self.special_tokens)

    def reduced(self) -> "Tokenizer":
        """The tokenizer of level "char" that WoBERT's vocabulary is built on: special tokens at 0 to 4, then, in the
        old order, every token that can be found in a text of which CJK characters and punctuation are set apart.
        ConfigError: not of level "char" or "word". DataError: it has added tokens, which would lose their meaning."""
        if self.level not in ("char", "word"):
            raise ConfigError(f"level is {self.level!r}, expected 'char' or 'word'")
        roles = list(self.special_tokens.values())
        extra = [token.content for token in self._backend.get_added_tokens_decoder().values()]
        if extra := [token for token in extra if token not in roles]:
            raise DataError(f"the tokenizer has the added tokens {', '.join(map(repr, extra))}, expected none")
        kept = [token for token in self._tokens if token not in roles and not _redundant(token)]
        return self._of_tokens([*roles, *kept], "char")

    def with_words(self, words: Iterable[str]) -> "Tokenizer":
        """A tokenizer of level "word": `reduced`, and those of `words`, normalised, that are not in it, in their order
        (WoBERT's rule). What a vocabulary of pieces has besides words, `##` forms and names in brackets, is passed
        over: no text leads to it. DataError: a word that the normaliser removes, or that has a space in it. Errors of
        `reduced`."""
        base = self.reduced()
        words = list(words)
        check_texts(words)
        normal = [base._backend.normalizer.normalize_str(word).replace(" ", "") for word in words]
        for word, text in zip(words, normal, strict=True):
            if not text or len(word.split()) != 1:
                raise DataError(f"the word {word!r} is {text!r} when normalised, expected text without spaces")
        found = [text for text in normal if not text.startswith("##") and not _UNUSED.fullmatch(text)]
        return self._of_tokens(list(dict.fromkeys([*base._tokens, *found])), "word")

    def _of_tokens(self, tokens: list[str], level: str) -> "Tokenizer":
        normalizer, vocab = self._config["normalizer"], {token: index for index, token in enumerate(tokens)}
        backend = bert_backend(
            vocab,
            lowercase=normalizer["lowercase"],
            strip_accents=normalizer["strip_accents"],
            handle_chinese_chars=level == "char",
            unk_token=self.special_tokens["unk_token"],
        )
        return type(self)(backend, self.special_tokens, level)

    def __reduce__(self):
        return _restore, (self._backend.to_str(), self.special_tokens, self.level)

    # Text to ids and back

    def cut(self, text: str) -> list[str]:
        """The units of a text where no segmentation is given, for encode_rows(..., whole=False), which then gives the
        ids of `encode`: at "char" each CJK character and each run of others between spaces; at "wordpiece" runs between
        spaces; at "bpe" and "unigram" these with the space before them; at "word" the words that rjieba finds in the
        normalised text. Names of special tokens are text. MissingDependencyError: level "word" without rjieba."""
        check_texts([text])
        if self._cut is None:
            self._cut = cutter(self.level, self._backend.normalizer)
        return self._cut(text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of one text, between cls and sep unless add_special_tokens=False. The names of special tokens inside
        the text are read as such tokens. DataError: the text is no str, or not Unicode (a lone surrogate)."""
        check_texts([text])
        if self.level != "word":
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        ids = self._encode_words_of(text)
        return [self.cls_id, *ids, self.sep_id] if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all cores (but at level "word" on one)."""
        texts = list(texts)
        if self.level == "word":
            return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        check_texts(texts)
        encoded = self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encoded]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode` without special tokens around, and per id the characters that it is made of, text[begin:end], in
        whatever form the normaliser leaves them; accents that it removes belong to the piece before. Several ids can be
        made of one character (bytes of it, its compatibility form), and that of a space of none (begin = end). Begins
        and ends never fall."""
        check_texts([text])
        if self.level != "word":
            encoding = self._backend.encode(text, add_special_tokens=False)
            return encoding.ids, with_marks(text, encoding.offsets)
        if self._word_offsets is None:
            self._word_offsets = WordOffsets(self._backend)
        ids, offsets = [], []
        for begin, part, special in self._named_parts(text):
            if special is not None:
                ids.append(special)
                offsets.append((begin, begin + len(part)))
                continue
            words = self.cut(part)
            rows = self.encode_rows([[word] for word in words], whole=False)
            ids += rows.ids.tolist()
            offsets += [(begin + a, begin + b) for a, b in self._word_offsets.of(part, words, rows.lengths.tolist())]
        return ids, with_marks(text, offsets)

    def _encode_words_of(self, text: str) -> list[int]:
        ids = []
        for _, part, special in self._named_parts(text):
            ids += [special] if special is not None else self.encode_rows([self.cut(part)], whole=False).ids.tolist()
        return ids

    def _named_parts(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """A text in parts: where each begins, what it says, and the id of an added token if it is the name of one."""
        added = {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}
        names, begin = "|".join(map(re.escape, sorted(added, key=len, reverse=True))), 0
        for i, part in enumerate(re.split(f"({names})", text)):  # a name stands at every odd place
            yield begin, part, added[part] if i % 2 else None
            begin += len(part)

    def encode_words(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Pieces of a row given as words: ids int32 [T] and word_start uint8 [T], 1 at the first piece of each word.

        Each word is encoded alone, so pieces never reach over a word border. A word whose characters the normaliser
        all removes has no piece. No special tokens are added and none are read from the text.
        """
        rows = self.encode_rows([words])
        return rows.ids, rows.word_start

    def encode_rows(self, rows: Sequence[Sequence[str]], *, whole: bool = True) -> EncodedRows:
        """`encode_words` of many rows at once. A word that has a space before it in the text begins with one (" word"),
        which "bpe" and "unigram" heed. The first of a row counts as if it had one at "unigram", and at "bpe" with
        add_prefix_space.

        whole=True: each item is a word, of any level. whole=False: the items are units of `cut`, without word borders,
        and the level's rule finds the words in them. The first piece of an item begins one, and so does, at levels
        "char", "wordpiece" and "word" (BERT's rule), a piece unless it continues (`##`) a word that is not written in
        CJK characters; at "unigram" (ALBERT's rule), a piece that begins with a space, is one mark of punctuation, or
        has a character in it that is neither an ASCII letter nor such a mark; at "bpe" (RoBERTa's rule, and one for
        text without spaces), a piece that begins with a space or with a byte from which a CJK character may begin.
        """
        if self._table is None:
            encoder = unit_encoder(self._backend, self.level, self._tokens, self.special_ids)
            self._table = PieceTable(encoder, begins_word(self._tokens, self._config["model"]["type"]))
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        if self.level == "unigram" or self.level == "bpe" and self._config["pre_tokenizer"]["add_prefix_space"]:
            check_texts([row[0] for row in rows if row])
            rows = [[" " * (row[0][:1] != " ") + row[0], *row[1:]] if row else row for row in rows]
        unit = self._table.lookup(list(chain.from_iterable(rows)))
        counts = self._table.counts[unit]
        pieces = expand(self._table.first[unit], counts)
        starts = self._table.run_start if not whole else self._table.unit_start
        edges = np.concatenate([[0], np.cumsum(sizes)])
        tokens = np.concatenate([[0], np.cumsum(counts)])[edges]
        empty = np.concatenate([[0], np.cumsum(counts == 0)])[edges]
        return EncodedRows(self._table.ids[pieces], starts[pieces], np.diff(tokens), np.diff(empty))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids. WordPiece keeps no spaces: they stand where two words written with letters or digits meet."""
        ids = list(map(int, ids))
        if self.level in ("bpe", "unigram"):
            for index in ids:
                self.id_to_token(index)
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        hidden = set(self.special_ids) if skip_special_tokens else ()
        text = ""
        for token in (self.id_to_token(i) for i in ids if i not in hidden):
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
        return f"Tokenizer(level {self.level!r}, {self.vocab_size} tokens, fingerprint {self.fingerprint[:12]})"

    def _check_added_tokens(self, source: Path) -> None:
        """DataError unless this tokenizer adds all tokens that files beside its vocabulary, in `source`, add to it."""
        known = {added.content: index for index, added in self._backend.get_added_tokens_decoder().items()}
        for where, added in read_added_tokens(source.parent):
            missing = [token for token, index in added.items() if known.get(token) != index]
            if missing:
                full, names = source.parent / "tokenizer.json", ", ".join(map(shown, missing[:8]))
                raise DataError(
                    f"{where} adds the tokens {names}, which {source.name} has not under these ids; expected them in "
                    f"{full}: load the folder with AutoTokenizer of transformers and save it, which writes that file"
                )

    def _fingerprint(self) -> str:
        decides = {key: self._config[key] for key in ("model", "normalizer", "pre_tokenizer")}
        decides["vocabulary"], decides["special"] = self._tokens, [self.special_tokens, self.special_ids]
        scored = self.level == "unigram"
        decides["model"] = {key: value for key, value in decides["model"].items() if key != "vocab" or scored}
        if self.level == "word":
            decides["level"] = self.level
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _restore(serialized: str, special_tokens: dict[str, str], level: str) -> Tokenizer:
    return Tokenizer(restore(serialized), special_tokens, level)


def _misnumbered(vocab: dict[str, int]) -> str:
    """The first id that two tokens have or none has."""
    seen = {}
    for token, index in vocab.items():
        if index in seen:
            return f"{shown(seen[index])} and {shown(token)} have {index}"
        seen[index] = token
    return f"none has {next(index for index in range(len(vocab)) if index not in seen)}"


def _spaced(char: str) -> bool:
    return char.isalnum() and not re.match(f"[{CJK}]", char)


def _redundant(token: str) -> bool:
    """Can no text give this token, in which CJK characters and punctuation are set apart?"""
    stem = token.removeprefix("##")
    return len(token) > 1 and any(re.match(f"[{CJK}]", char) or _is_punctuation(char) for char in stem)


def _is_punctuation(char: str) -> bool:
    """BERT's meaning of it: the marks of ASCII, and Unicode's categories P."""
    return char in string.punctuation or unicodedata.category(char).startswith("P")
