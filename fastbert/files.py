"""Files as bytes, text and JSON. Each function takes the type of the error for a file that is there and cannot be read,
or is not what it should be; MissingFileError: there is none.
"""

import json
import os
import re
from collections import Counter
from os import PathLike
from pathlib import Path

from fastbert.errors import FastBertError, MissingFileError, shown

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_NAME = 255  # bytes


def read_bytes(path: str | PathLike, error: type[FastBertError]) -> bytes:
    """The bytes of a file."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise MissingFileError(f"{path} is a folder, expected a file") from None
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}") from None


def read_text(path: str | PathLike, error: type[FastBertError]) -> str:
    """The text of a UTF-8 file, with its line ends, without a byte order mark."""
    data = read_bytes(path, error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(f"{path}: invalid UTF-8 at byte offset {fault.start}") from None


def read_json(path: str | PathLike, error: type[FastBertError]) -> dict:
    """The object of a JSON file."""
    content = parse_json(read_text(path, error), path, error)
    if not isinstance(content, dict):
        raise error(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def parse_json(text: str, where: str | PathLike, error: type[FastBertError]):
    """What a JSON text says. Errors, with `where` it stands, are also a key that is there twice and half of a surrogate
    pair, which no file can hold.
    """
    try:
        content = json.loads(text, object_pairs_hook=_once)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as fault:
        raise error(f"{where}: not valid JSON: {fault}") from None
    return content


def is_plain_name(name: str) -> bool:
    """Whether a file in a folder can have this name."""
    return Path(name).name == name not in ("", "..") and "\0" not in name and len(os.fsencode(name)) <= _LONGEST_NAME


def _once(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return content
