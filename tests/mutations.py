"""What disks, transfers, editors and programs do to files, drawn from a seed: to bytes of any file, to lines of text,
to values of JSON and YAML.
"""

import json
import random
import re
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import yaml

DEEP = 20_000  # nested lists
LONG = 50_000  # characters of a very long line
MANY = 8_000  # characters of very many lines or words


class Mutation(NamedTuple):
    """A mutated file. data: its content, None where a folder stands in its place; fields: the keys that lead to a value
    that was changed, where the file is still one of its format."""

    name: str
    data: bytes | None
    fields: tuple[str, ...] = ()


def mutate(data: bytes, kind: str, rng: random.Random) -> Mutation:
    """One mutation of a file of the kind "bytes", "text", "json", "lines" (of JSON) or "yaml"."""
    draw = rng.random()
    if draw < 0.03:
        return Mutation("a folder in its place", None)
    if kind in _VALUES and draw < 0.6:
        return _VALUES[kind](data, rng)
    of_text = kind != "bytes" and draw < 0.8
    change = rng.choice(_OF_TEXT if of_text else _OF_BYTES)
    return Mutation(change.__name__.strip("_").replace("_", " "), change(data, rng))


# -- bytes -------------------------------------------------------------------------------------------------------------


def _place(data: bytes, rng: random.Random) -> int:
    """Anywhere, and as often near an end, where headers and footers are."""
    near = rng.randrange(0, 64)
    return min(len(data), rng.choice([rng.randrange(0, len(data) + 1), near, max(0, len(data) - near)]))


def _block(data: bytes, rng: random.Random) -> tuple[int, int]:
    begin = _place(data, rng)
    return begin, min(len(data), begin + rng.choice([1, 2, 8, 64, 512, 4096, len(data) // 2 + 1]))


def _flipped_bits(data, rng):
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64]) if data else 0):
        changed[min(len(data) - 1, _place(data, rng))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut_short(data, rng):
    return data[: _place(data, rng)]


def _cut_at_the_beginning(data, rng):
    return data[_place(data, rng) :]


def _removed_block(data, rng):
    begin, end = _block(data, rng)
    return data[:begin] + data[end:]


def _doubled_block(data, rng):
    begin, end = _block(data, rng)
    return data[:end] + data[begin:end] * rng.choice([1, 1, 3]) + data[end:]


def _exchanged_blocks(data, rng):
    a, b, c = sorted(_place(data, rng) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _random_bytes_within(data, rng):
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.choice([1, 2, 16, 1000])) + data[at:]


def _random_bytes_over(data, rng):
    begin, end = _block(data, rng)
    return data[:begin] + rng.randbytes(end - begin) + data[end:]


def _one_byte_over(data, rng):
    begin, end = _block(data, rng)
    return data[:begin] + rng.choice([b"\0", b"\xff", b"\x80", b"\x7f", b" "]) * (end - begin) + data[end:]


def _number_over(data, rng):
    at, size = _place(data, rng), rng.choice([1, 2, 4, 8])
    number = rng.choice(
        [0, 1, -1, 1 << 8 * size - 1, (1 << 8 * size - 1) - 1, 1 << 4 * size, rng.getrandbits(8 * size)]
    )
    return data[:at] + (number % (1 << 8 * size)).to_bytes(size, rng.choice(["little", "big"])) + data[at + size :]


def _other_file(data, rng):
    heads = [
        b"PK\x03\x04",
        b"\x1f\x8b\x08\x00",
        b"\x80\x02}q\x00.",
        b"\x93NUMPY\x01\x00",
        b"ARROW1\0\0",
        b"\x89HDF\r\n\x1a\n",
    ]
    return rng.choice(heads) + (data if rng.random() < 0.5 else rng.randbytes(300))


def _empty(data, rng):
    return rng.choice([b"", b"\n", b"\0", b" \t\r\n"])


_OF_BYTES = [
    *(_flipped_bits, _cut_short, _cut_at_the_beginning, _removed_block, _doubled_block, _exchanged_blocks),
    *(_random_bytes_within, _random_bytes_over, _one_byte_over, _number_over, _other_file, _empty),
]


# -- text --------------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?")
_NUMBERS = [
    *(
        b"0",
        b"-1",
        b"1",
        b"1e999",
        b"-1e999",
        b"1e400",
        b"nan",
        b"NaN",
        b"inf",
        b"-Infinity",
        b"0x10",
        b"1_000",
        b"1.5",
    ),
    *(
        b"",
        b"007",
        b"4294967296",
        b"9223372036854775808",
        b"-9223372036854775809",
        b"9" * 400,
        b"9" * 5000,
        "１２".encode(),
    ),
]


def _byte_order_mark(data, rng):
    return b"\xef\xbb\xbf" + data


def _windows_line_ends(data, rng):
    return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\r\r\n", b"\n\n"]))


def _other_encoding(data, rng):
    return data.decode(errors="replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "gb18030", "utf-7"]))


def _inserted_character(data, rng):
    text, at = data.decode(errors="replace"), rng.random()
    at = int(at * len(text))
    odd = [
        "\0",
        "\x1a",
        "\x1b[2J",
        "\x85",
        "\u2028",
        "\u200b",
        "\ufeff",
        "\xa0",
        "\t",
        "\n",
        '"',
        "'",
        "\\",
        "{",
        "]",
        "/",
    ]
    inserted = rng.choice([*odd, "\udcff", "\ud83d"])
    return (text[:at] + inserted + text[at:]).encode(errors="surrogatepass")


def _invalid_utf8(data, rng):
    at = _place(data, rng)
    return (
        data[:at]
        + rng.choice([b"\xff", b"\xc0\x80", b"\xe4\xb8", b"\xf8\x88\x80\x80\x80", b"\xed\xa0\x80"])
        + data[at:]
    )


def _long_line(data, rng):
    at, character = _place(data, rng), rng.choice([b"a", b"1", b"-", "中".encode(), "👍".encode(), b'"'])
    return data[:at] + character * (LONG // len(character)) + data[at:]


def _many_words(data, rng):
    at = _place(data, rng)
    return (
        data[:at] + rng.choice([b" ", b"\t", b"a ", b"a/", b"a,", b"a\t", b",", b"[", b"1 "]) * (MANY // 2) + data[at:]
    )


def _exchanged_number(data, rng):
    found = list(_NUMBER.finditer(data))
    if not found:
        return data + rng.choice(_NUMBERS)
    begin, end = rng.choice(found).span()
    return data[:begin] + rng.choice(_NUMBERS) + data[end:]


def _moved_lines(data, rng):
    lines = data.splitlines(keepends=True) or [b""]
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    change = rng.randrange(4)
    if change == 0:
        lines[a], lines[b] = lines[b], lines[a]
    elif change == 1:
        lines.insert(b, lines[a])
    elif change == 2:
        del lines[a]
    else:
        lines[a] = lines[a].rstrip(b"\r\n")
    return b"".join(lines)


def _very_many_lines(data, rng):
    lines = data.splitlines(keepends=True) or [b""]
    line = rng.choice(lines)
    return data + line * (1 + MANY // max(1, len(line)))


_OF_TEXT = [
    *(_byte_order_mark, _windows_line_ends, _other_encoding, _inserted_character, _invalid_utf8, _long_line),
    _many_words,
    *(_exchanged_number, _moved_lines, _very_many_lines),
]


# -- values of JSON and YAML -------------------------------------------------------------------------------------------

# What is put in the place of a value, as text. Python's modules cannot write all of it.
_OF_JSON = [
    *"null true 0 -1 1.5 1e308 1e999 NaN -Infinity [] {} [[]] [null] [1,2]".split(),
    *("1" + "0" * 30, "-" + "9" * 25, "[" * 50 + "]" * 50, "[" + "0, " * 2000 + "0]", '{"x": {"x": [1]}}', '{"": 1}'),
    *(
        '""',
        '"x"',
        '"-1"',
        '"../x"',
        '"/x"',
        '"."',
        '".."',
        '" "',
        '"\\n"',
        '"\\u0000"',
        f'"{"x" * LONG}"',
        '["x", "x"]',
    ),
]
_BEYOND_JSON = [
    *("[" * DEEP + "]" * DEEP, '{"x":' * DEEP + "1" + "}" * DEEP, "9" * 5000, '"\\ud800"'),
    *("undefined", "'x'", "[1,]", "01", "{1: 2}"),
]
_OF_YAML = [
    *"null yes 0 -1 1.5 1e308 .nan -.inf '' x '1' '../x' /x [] {} [[]] [null] 2020-02-02 12:30:00 0o17".split(),
    *(
        "1" + "0" * 30,
        "' '",
        "'\\0'",
        '"\\0"',
        '"\\uD800"',
        "x" * MANY,
        "[" * 20 + "]" * 20,
        "[x, x]",
        "{x: 1}",
        "{1: 2}",
    ),
    *("!!binary eHg=", "!!set {x}"),
]
_MANY_TIMES = ", ".join(f"&{b} [*{a}, *{a}, *{a}]" for a, b in pairwise("abcdefghijklmnopqrstuvwx"))
_BEYOND_YAML = [
    *("[" * DEEP, "9" * 5000, "0b_", "._", "2020-99-99", f"[&a [1], {_MANY_TIMES}]", "&a [*a]", "*nothing"),
    *("@", "`", "%", "\t- x", "[a, b", "{a: b", "'", '"\\z"', "{<<: 3}", "{<<: [1]}", "{? [1] : 2}", "{? {} : 2}"),
    *(
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!null x",
        "!!map [1]",
        "!!seq {}",
        "!!pairs [1]",
        "!!omap [x]",
        "!x y",
    ),
    *("!!python/none ''", "!!python/object/apply:os.getcwd []"),
]
_HOLE = "the hole of a value"


def _changed_json(data: bytes, rng: random.Random) -> Mutation:
    return _changed(json.loads(data), rng, partial(json.dumps, ensure_ascii=False), _OF_JSON, _BEYOND_JSON)


def _changed_yaml(data: bytes, rng: random.Random) -> Mutation:
    dump = partial(yaml.safe_dump, allow_unicode=True, sort_keys=False)
    return _changed(yaml.safe_load(data), rng, dump, _OF_YAML, _BEYOND_YAML)


def _changed_line(data: bytes, rng: random.Random) -> Mutation:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    name, line, fields = _changed_json(lines[at], rng)
    return Mutation(name, b"".join([*lines[:at], line + b"\n", *lines[at + 1 :]]), fields)


_VALUES = {"json": _changed_json, "lines": _changed_line, "yaml": _changed_yaml}


def _changed(content, rng: random.Random, dump, values: list[str], beyond: list[str]) -> Mutation:
    """The text of a tree with one value replaced, removed, renamed, or given twice."""
    path = _path(content, rng)
    fields = tuple(key for key in path if isinstance(key, str))
    where = ".".join(map(str, path)) or "everything"
    if not path:
        text, is_one = _drawn(rng, values, beyond)
        return Mutation(f"{where} = {text[:40]}", text.encode())
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    change = rng.random()
    if change < 0.1:
        del parent[path[-1]]
        return Mutation(f"{where} removed", dump(content).encode())
    if change < 0.16 and isinstance(parent, dict):
        renamed = rng.choice([f"{path[-1]}_", str(path[-1])[:-1], str(path[-1]).upper(), "x" * LONG])
        parent[renamed] = parent.pop(path[-1])
        return Mutation(f"{where} renamed to {renamed[:40]!r}", dump(content).encode())
    text, is_one = _drawn(rng, values, beyond)
    if change < 0.24 and isinstance(parent, dict):
        parent[_HOLE] = "value"
        written = dump(content).replace(f'"{_HOLE}"', json.dumps(path[-1])).replace(_HOLE, json.dumps(path[-1]))
        return Mutation(f"{where} there twice", written.encode())
    parent[path[-1]] = _HOLE
    written = dump(content).replace(f'"{_HOLE}"', text).replace(_HOLE, text)
    return Mutation(f"{where} = {text[:40]}", written.encode(errors="surrogatepass"), fields if is_one else ())


def _drawn(rng: random.Random, values: list[str], beyond: list[str]) -> tuple[str, bool]:
    """A text to put in the place of a value, and whether it is a value."""
    is_one = rng.random() < 0.75
    return rng.choice(values if is_one else beyond), is_one


def _path(content, rng: random.Random) -> list:
    """The way to a value: upper ones of a large tree are as likely as all below them."""
    path = []
    while isinstance(content, dict | list) and content and rng.random() < (0.7 if path else 0.97):
        path.append(rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content)))
        content = content[path[-1]]
    return path
