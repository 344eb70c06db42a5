"""Reads a SentencePiece model file (`spiece.model`): a protocol buffer of pieces with scores, without its library."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastbert.errors import DataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_UNIGRAM = 1


class SentencePieceModel(NamedTuple):
    """pieces: text and log probability, by id; unk_id; charsmap: what the normaliser replaces, in SentencePiece's own
    format, or None."""

    pieces: list[tuple[str, float]]
    unk_id: int
    charsmap: bytes | None


def read_spiece(path: Path) -> SentencePieceModel:
    """A unigram model that puts a space before a text, as ALBERT's. DataError: a damaged file, or another model."""
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = dict(_fields(b"".join(value for number, value in fields if number == 2)))
        normalizer = dict(_fields(b"".join(value for number, value in fields if number == 3)))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a SentencePiece model: {error}") from error
    kind, prefix, unk_id = trainer.get(3, _UNIGRAM), normalizer.get(3, 1), trainer.get(40, 0)
    if kind != _UNIGRAM or trainer.get(35, 0):
        raise DataError(f"{path}: the model has type {kind}, expected 1 (unigram) without byte fallback")
    if prefix != 1:
        raise DataError(f"{path}: add_dummy_prefix is {prefix}, expected 1 (a space before a text)")
    if not isinstance(unk_id, int) or not unk_id < len(pieces):
        raise DataError(f"{path}: unk_id is {unk_id!r}, expected the id of one of {len(pieces)} pieces")
    charsmap = normalizer.get(2) or None
    if charsmap is not None and not isinstance(charsmap, bytes):
        raise DataError(f"{path}: precompiled_charsmap is {charsmap!r}, expected bytes")
    return SentencePieceModel(pieces, unk_id, charsmap)


def _piece(message: bytes) -> tuple[str, float]:
    fields = dict(_fields(message))
    text, score = fields.get(1), fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError(f"a piece is {message!r}, expected text and a 32-bit score")
    return text.decode(), struct.unpack("<f", score)[0]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message: int if it is a varint, else bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} before byte {at}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {at} reaches over the end at byte {len(message)}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError(f"it ends inside a number at byte {at}")
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError(f"a number of more than 10 bytes ends at byte {at}")
