"""Learning a vocabulary from text files: one function for each kind of model, and the most frequent words."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm

from fastbert.data.backends import ROLES, SPACE, SPECIAL_TOKENS, bert_backend, bpe_backend, unigram_backend
from fastbert.data.segmenters import segmented, segmenter
from fastbert.data.text import CJK, as_paths, read_rows
from fastbert.errors import DataError

_BORDER = "\ue000"  # between words that are given, in text to learn from
Texts = Callable[[str], Iterator[str]]  # what the pass over the text is for -> its rows


def train_backend(
    level: str,
    files: str | PathLike | Sequence[str | PathLike],
    vocab_size: int,
    *,
    lowercase: bool,
    strip_accents: bool | None,
    min_frequency: int,
    words: str | None,
    tag_separator: str | None,
    segmenter_model: str | PathLike | None,
    errors: str,
    progress: bool,
) -> tokenizers.Tokenizer:
    """The backend that Tokenizer.train makes a tokenizer of."""
    paths = as_paths(files)
    by_word = words is not None and level in ("bpe", "unigram")
    cut = None
    if by_word or words == "segmented":
        cut = segmenter(words, tag_separator=tag_separator, model=segmenter_model)

    def texts(purpose: str) -> Iterator[str]:
        rows = tqdm(read_rows(paths, errors), purpose, unit=" rows", delay=2, disable=not progress)
        if cut is None:
            yield from (row.text for row in rows)
        else:
            # To these models a space is text, where it is part of a word; nothing is learnt across a border.
            between = _BORDER if by_word else " "
            yield from (between.join(row) for row in segmented(rows, cut))

    if level == "bpe":
        backend = _train_bpe(texts, vocab_size, min_frequency)
    elif level == "unigram":
        keep_accents = strip_accents is False
        backend = _train_unigram(texts, vocab_size, min_frequency, lowercase, keep_accents, by_word, progress)
    else:
        options = dict(lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=level != "wordpiece")
        tokens = _train_wordpiece(texts, vocab_size, min_frequency, options)
        if level == "word":
            counts = _count_words(paths, words, tag_separator, errors, progress)
            tokens = _with_words(tokens, _most_frequent(counts, vocab_size, min_frequency), vocab_size)
            options["handle_chinese_chars"] = False
        backend = bert_backend({token: index for index, token in enumerate(tokens)}, **options)
    if backend.get_vocab_size() == len(ROLES):
        where = ", ".join(map(str, paths))
        raise DataError(f"nothing to train a tokenizer on: no character occurs {min_frequency} times in {where}")
    return backend


def frequent_words(
    files: str | PathLike | Sequence[str | PathLike],
    count: int,
    *,
    words: str = "rjieba",
    tag_separator: str | None = None,
    min_frequency: int = 2,
    errors: str = "strict",
    progress: bool = True,
) -> list[str]:
    """The `count` most frequent words of two or more CJK characters in text files, most frequent first, those with
    less than `min_frequency` occurrences left out. words, tag_separator: see segmenter ("rjieba" or "segmented");
    errors: see read_rows."""
    counts = _count_words(as_paths(files), words, tag_separator, errors, progress)
    return _most_frequent(counts, count, min_frequency)


def _count_words(paths: list[Path], words: str, tag_separator: str | None, errors: str, progress: bool) -> Counter[str]:
    cut = segmenter(words, tag_separator=tag_separator)
    counts, fits = Counter(), re.compile(f"[{CJK}]{{2,}}").fullmatch
    rows = tqdm(read_rows(paths, errors), "counting words", unit=" rows", delay=2, disable=not progress)
    for row in segmented(rows, cut):
        counts.update(filter(fits, (word.strip() for word in row)))
    return counts


def _most_frequent(counts: Counter[str], count: int, min_frequency: int) -> list[str]:
    frequent = [word for word in counts if counts[word] >= min_frequency]
    return sorted(frequent, key=lambda word: (-counts[word], word))[:count]


def _with_words(tokens: list[str], words: list[str], vocab_size: int) -> list[str]:
    """Special tokens and characters, then words; pieces of several characters only in the half of the vocabulary that
    comes first, or where there are too few words."""
    single = sum(len(token.removeprefix("##")) == 1 for token in tokens) + len(ROLES)
    base = tokens[: max(single, vocab_size // 2, vocab_size - len(words))]
    known = set(base)
    return [*base, *(word for word in words if word not in known)][:vocab_size]


def _train_wordpiece(texts: Texts, vocab_size: int, min_frequency: int, options: dict) -> list[str]:
    backend = bert_backend({}, **options)
    counts = _base_pieces(backend, texts)
    # The trainer numbers ## forms in the random order of a hash table and settles ties by number: given as special
    # tokens they keep one order, so that the same text gives the same vocabulary. Twice the size, because the
    # characters that are left out below make room for merges.
    trainer = trainers.WordPieceTrainer(
        vocab_size=2 * vocab_size,
        min_frequency=min_frequency,
        special_tokens=sorted(piece for piece in backend.get_vocab() if piece.startswith("##")),
        show_progress=False,
    )
    backend.train_from_iterator(texts("learning pieces"), trainer)
    learnt = backend.get_vocab()
    return _select_pieces(sorted(learnt, key=learnt.get), counts, vocab_size, min_frequency)


def _base_pieces(backend: tokenizers.Tokenizer, texts: Texts) -> Counter[str]:
    """Leave in the backend a vocabulary of all single characters, with ## where they continue a word, and return how
    often each character occurs."""
    raw = Counter()

    def counted() -> Iterator[str]:
        for text in texts("counting characters"):
            raw.update(text)
            yield text

    backend.train_from_iterator(counted(), trainers.WordPieceTrainer(vocab_size=0, show_progress=False))
    return _normalized(raw, backend)


def _normalized(raw: Counter[str], backend: tokenizers.Tokenizer) -> Counter[str]:
    counts = Counter()
    for char, count in raw.items():  # the normalisers work character by character
        counts.update(dict.fromkeys(backend.normalizer.normalize_str(char).strip(), count))
    return counts


def _select_pieces(pieces: list[str], counts: Counter[str], vocab_size: int, min_frequency: int) -> list[str]:
    """Special tokens, then single characters by falling frequency (as themselves before as `##`), then the merges in
    the order learnt."""
    single = [piece for piece in pieces if len(piece.removeprefix("##")) == 1]
    frequent = [piece for piece in single if counts[piece[-1]] >= min_frequency]
    frequent.sort(key=lambda piece: (-counts[piece[-1]], piece[-1], len(piece)))
    merges = [piece for piece in pieces if len(piece.removeprefix("##")) > 1]
    return [*SPECIAL_TOKENS["char"].values(), *frequent, *merges][:vocab_size]


def _train_bpe(texts: Texts, vocab_size: int, min_frequency: int) -> tokenizers.Tokenizer:
    """The special tokens have the ids that fairseq gives them: four come first, the mask comes last."""
    names = SPECIAL_TOKENS["bpe"]
    backend = bpe_backend({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        special_tokens=[names[role] for role in ("cls_token", "pad_token", "sep_token", "unk_token")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    borders = pre_tokenizers.Split(_BORDER, "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([borders, backend.pre_tokenizer])
    backend.train_from_iterator(texts("learning pieces"), trainer)
    learnt = json.loads(backend.to_str())["model"]
    vocab = {**learnt["vocab"], names["mask_token"]: len(learnt["vocab"])}
    return bpe_backend(vocab, [tuple(merge) for merge in learnt["merges"]])


def _train_unigram(
    texts: Texts,
    vocab_size: int,
    min_frequency: int,
    lowercase: bool,
    keep_accents: bool,
    by_word: bool,
    progress: bool,
) -> tokenizers.Tokenizer:
    """Rare characters are left out of the text that is learnt from: the trainer would keep each as a piece. by_word:
    the pieces of a word are learnt for itself, with a space before it only where the text has one."""
    names = SPECIAL_TOKENS["unigram"]
    special = [names[role] for role in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")]
    options = dict(lowercase=lowercase, keep_accents=keep_accents)
    backend = unigram_backend([(token, 0.0) for token in special], **options)
    raw = Counter()
    for text in texts("counting characters"):
        raw.update(text)
    counts = _normalized(raw, backend)
    del counts[SPACE], counts[_BORDER]
    kept = {char for char in counts if counts[char] >= min_frequency and not char.isspace()}
    room = vocab_size - len(special) - 2  # one for the space; filled with characters, the trainer would not stop
    kept = set(sorted(kept, key=lambda char: (-counts[char], char))[:room])
    if not kept:
        return backend
    gap = _BORDER if by_word else " "
    rare = {ord(char): gap for char in counts if char not in kept}
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        unk_token=names["unk_token"],
        show_progress=progress and sys.stderr.isatty(),
    )
    normalize, names_in_text = backend.normalizer.normalize_str, re.compile("|".join(map(re.escape, special)))
    rows = (names_in_text.sub(gap, normalize(text)).translate(rare) for text in texts("learning pieces"))
    usual = backend.pre_tokenizer
    if by_word:
        backend.pre_tokenizer = pre_tokenizers.Split(_BORDER, "removed")
        rows = (SPACE + row.replace(" ", SPACE) for row in rows)
    backend.train_from_iterator(rows, trainer)
    backend.pre_tokenizer = usual
    return backend
