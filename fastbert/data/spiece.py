"""Reads a SentencePiece model file (`spiece.model`): a protocol buffer of pieces with scores, without its library."""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastbert.errors import DataError, shown
from fastbert.files import read_bytes
from fastbert.wire import fields

_UNIGRAM = 1
_BLOCK = 256


class SentencePieceModel(NamedTuple):
    """pieces: text and log probability, by id; unk_id; charsmap: what the normaliser replaces, in SentencePiece's own
    format, or None."""

    pieces: list[tuple[str, float]]
    unk_id: int
    charsmap: bytes | None


def read_spiece(path: Path) -> SentencePieceModel:
    """A unigram model that puts a space before a text, as ALBERT's. DataError: a damaged file, or another model."""
    try:
        parts = list(fields(read_bytes(path, DataError)))
        pieces = [_piece(value) for number, value in parts if number == 1]
        trainer = dict(fields(b"".join(value for number, value in parts if number == 2)))
        normalizer = dict(fields(b"".join(value for number, value in parts if number == 3)))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a SentencePiece model: {error}") from error
    kind, prefix, unk_id = trainer.get(3, _UNIGRAM), normalizer.get(3, 1), trainer.get(40, 0)
    if kind != _UNIGRAM or trainer.get(35, 0):
        raise DataError(f"{path}: the model has type {kind}, expected 1 (unigram) without byte fallback")
    if prefix != 1:
        raise DataError(f"{path}: add_dummy_prefix is {prefix}, expected 1 (a space before a text)")
    if not isinstance(unk_id, int) or not unk_id < len(pieces):
        raise DataError(f"{path}: unk_id is {shown(unk_id)}, expected the id of one of {len(pieces)} pieces")
    charsmap = normalizer.get(2) or None
    if charsmap is not None and not is_charsmap(charsmap):
        raise DataError(f"{path}: precompiled_charsmap is {shown(charsmap)}, expected a trie and its texts")
    return SentencePieceModel(pieces, unk_id, charsmap)


def is_charsmap(data) -> bool:
    """Whether each look-up in what a normaliser replaces ends at a text: else tokenizers would look outside, and panic.

    It is the size of the trie in bytes, the trie, and the texts, each with a NUL behind it. The trie is a double array
    of Darts-clone: 32-bit units in blocks of 256. Bit 31 of a unit: it is the place of a text; bits 0 to 7: the byte
    that leads to it; 8: at its base is the place of a text; 9: the offset, bits 10 to 30, counts 256 times. The base is
    where the unit is, exclusive or the offset; its children are in the block of it.
    """
    size = int.from_bytes(data[:4], "little") if isinstance(data, bytes) else 0
    if not size or size % (4 * _BLOCK) or size + 4 >= len(data):
        return False
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(data, np.uint8, offset=4 + size)
    inner = units >> 31 == 0
    base = np.arange(len(units)) ^ units >> 10 << ((units & 1 << 9) >> 6)
    if not inner[0] or (base[inner] >= len(units)).any():
        return False
    begin = units[base[inner & (units >> 8 & 1 == 1)]] & (1 << 31) - 1
    return bool((begin < len(texts)).all() and (texts[begin] >> 6 != 0b10).all())  # at no later byte of a character


def _piece(message: bytes) -> tuple[str, float]:
    parts = dict(fields(message))
    text, score = parts.get(1), parts.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError(f"a piece is {shown(message)}, expected text and a 32-bit score")
    number = struct.unpack("<f", score)[0]
    if not math.isfinite(number):
        raise ValueError(f"the score of {shown(text)} is {number}, expected a finite number")
    return text.decode(), number
