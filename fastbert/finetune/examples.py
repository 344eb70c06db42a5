"""Examples from files: CSV, TSV, JSON lines, and the forms in which tagged text and questions are published."""

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fastbert.config import nearest
from fastbert.errors import ConfigError, DataError, shown
from fastbert.files import parse_json, read_bytes

# The names under which a column is found if none is given, the first that is there.
ALIASES = {
    "text": ("text", "sentence", "sentence1", "text_a", "premise", "review", "content", "query"),
    "text_pair": ("text_pair", "sentence2", "text_b", "hypothesis"),
    "label": ("label", "labels", "target", "score", "class"),
    "tokens": ("tokens", "words", "text"),
    "tags": ("tags", "ner_tags", "pos_tags", "labels"),
    "question": ("question", "query"),
    "context": ("context", "paragraph", "passage", "text"),
    "answers": ("answers", "answer"),
    "id": ("id", "guid", "idx"),
}
ROLES = {  # of a task: what an example must have, what it may have, and what a labelled one must have too
    "classification": (("text",), ("text_pair", "id"), ("label",)),
    "tagging": (("tokens",), ("id",), ("tags",)),
    "qa": (("question", "context"), ("id",), ("answers",)),
}
FORMATS = ("csv", "tsv", "jsonl", "conll", "tagged", "json", "squad", "txt")
_SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".conll": "conll", ".bio": "conll"}
_SUFFIXES |= {".json": "json", ".txt": "txt"}
_LINE_END, _GAP = re.compile("\r\n|\n|\r"), re.compile("[ \t]+")
_LINE = re.compile("[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")  # with its end
# The People's Daily numbers its rows, and sets compounds in brackets with a tag of their own: [中央/n 电台/n]nt.
_ARTICLE = re.compile(r"\d{8}-\d{2}-\d{3}-\d{3}/m$")
_COMPOUND = re.compile(r"(?<!\S)\[([^\[\]]+/[^\[\]/\s]+)\]\w*(?!\S)")


@dataclass(frozen=True)
class Example:
    """What a file says.

    text: a text, for tagging its tokens or a raw text, for qa the context; text_pair: the second text, for qa the
    question. label: None where there is none; for classification a str, a float, or a list of str; for tagging a tag
    for each token; for qa the answers as (text, place of its first character in the context), none of them if the
    context does not have it. where: "file:line", for messages.
    """

    text: str | list[str]
    text_pair: str | None = None
    label: object = None
    id: str | None = None
    where: str = ""


def read_examples(
    files: str | PathLike | Sequence[str | PathLike],
    task: str,
    *,
    columns: dict[str, str] | None = None,
    format: str | None = None,
    errors: str = "strict",
    labelled: bool | None = True,
) -> list[Example]:
    """All examples of some files.

    task: "classification", "tagging" or "qa". format: one of FORMATS; None: by the suffix of each file.

    "csv", "tsv": a header row, then one example a row, as the module csv reads them (in a TSV, quotes are text).
    "jsonl": an object a line. "conll": for tagging, a token and its tag a line, between spaces or tabs (of more columns
    the first and the last, or those that `columns` numbers from 1 on), a blank line after each sentence. "tagged": for
    tagging, a sentence a line, word/tag with spaces between, as the People's Daily has it, whose numbers of rows and
    brackets around compounds are left out. "squad": for qa, the JSON of SQuAD and CMRC 2018. "json": that, or
    objects, one a line or in a list, whichever it is. "txt": a text a line, without labels.

    columns: the names of columns by role: text, text_pair, label; tokens, tags (in CSV with spaces between); question,
      context, answers (in JSON a list of {"text", "answer_start"}, or SQuAD's {"text": [...], "answer_start": [...]};
      in CSV the text of the answer, whose first occurrence is meant); id. What is not named is looked for under the
      usual names (ALIASES). labelled: True: each example must have a label; False: labels are not read; None: if there.

    MissingFileError, ConfigError for what is asked; DataError, with file and line, for what is in the files.
    """
    files = [files] if isinstance(files, str | PathLike) else list(files)
    if task not in ROLES:
        raise ConfigError(f"task is {task!r}, expected one of {', '.join(ROLES)}")
    if format not in (None, *FORMATS):
        raise ConfigError(f"format is {format!r}, expected one of {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    roles = [role for part in ROLES[task] for role in part]
    for role in columns or {}:
        if role not in roles:
            raise ConfigError(f"columns names {role!r}, expected {', '.join(roles)} for {task}{nearest(role, roles)}")
    found = []
    for path in map(Path, files):
        text = _text_of(path, errors)
        kind = format or _SUFFIXES.get(path.suffix.lower())
        if kind is None:
            raise ConfigError(f"{path}: the suffix {path.suffix!r} names no format; set format to one of {FORMATS}")
        reader = _Reader(path, task, columns or {}, labelled)
        rows = len(found)
        found += reader.read(kind, text)
        if len(found) == rows:
            raise DataError(f"{path} has no examples{', its data is an empty list' if kind == 'json' else ''}")
    return found


def _text_of(path: Path, errors: str) -> str:
    if errors not in ("strict", "replace"):
        raise ConfigError(f"errors is {errors!r}, expected 'strict' or 'replace'")
    data = read_bytes(path, DataError)
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = len(re.split(_LINE_END.pattern.encode(), data[: error.start]))
        raise DataError(f"{path}:{line}: invalid UTF-8 at byte {error.start}; errors='replace' reads on") from None


class _Reader:
    """The examples of one file."""

    def __init__(self, path: Path, task: str, columns: dict[str, str], labelled: bool | None):
        self._path, self._task, self._columns, self._labelled = path, task, columns, labelled
        self._needed, self._possible, self._labels = ROLES[task]

    def read(self, kind: str, text: str) -> Iterator[Example]:
        kind = _json_kind(text) if kind == "json" else kind
        only = {"conll": "tagging", "tagged": "tagging", "squad": "qa"}.get(kind, self._task)
        if only != self._task or kind == "txt" and (self._task == "qa" or self._labelled):
            raise ConfigError(f"{self._path}: format {kind!r} cannot hold what {self._task} needs")
        if self._columns and kind in ("tagged", "json", "squad", "txt"):
            raise ConfigError(f"{self._path}: columns is {self._columns}, but format {kind!r} has none, expected None")
        if kind in ("csv", "tsv"):
            return self._table(text, kind)
        return getattr(self, f"_{kind}")(text)

    def _where(self, line: int) -> str:
        return f"{self._path}:{line}"

    # -- rows of named columns -----------------------------------------------------------------------------------------

    def _table(self, text: str, kind: str) -> Iterator[Example]:
        plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"strict": True}
        rows = csv.reader((line[0] for line in _LINE.finditer(text)), **plain)
        csv.field_size_limit(1 << 30)
        begin = 1
        try:
            header = [name.strip() for name in next(rows, [])]
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{self._where(1)}: the column {shown(twice[0])} is there twice")
            names = self._names(header, self._where(1))
            begin = rows.line_num + 1
            for row in rows:
                where, begin = self._where(begin), rows.line_num + 1
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(f"{where}: {len(row)} columns, expected {len(header)}: {_listed(header)}")
                record = dict(zip(header, row, strict=True))
                yield self._example({role: record[name] for role, name in names.items()}, where, kind)
        except csv.Error as error:
            raise DataError(f"{self._where(begin)}: {error}") from None

    def _jsonl(self, text: str) -> Iterator[Example]:
        for number, line in enumerate(_LINE_END.split(text), start=1):
            if not line.strip():
                continue
            yield self._object(parse_json(line, self._where(number), DataError), self._where(number))

    def _objects(self, text: str) -> Iterator[Example]:
        for number, record in enumerate(parse_json(text, self._path, DataError), start=1):
            yield self._object(record, f"{self._path}: object {number}")

    def _object(self, record, where: str) -> Example:
        if not isinstance(record, dict):
            raise DataError(f"{where}: a JSON {type(record).__name__}, expected an object")
        names = self._names(list(record), where)
        return self._example({role: record[name] for role, name in names.items()}, where, "jsonl")

    def _names(self, given: list[str], where: str) -> dict[str, str]:
        """The column of each role."""
        names, asked = {}, self._needed + self._possible + (self._labels if self._labelled is not False else ())
        for role in asked:
            if role in self._columns:
                if self._columns[role] not in given:
                    name = self._columns[role]
                    raise DataError(f"{where}: no column {name!r} for {role}; it has {_listed(given)}")
                names[role] = self._columns[role]
            else:
                taken = {*names.values(), *self._columns.values()}
                free = [name for name in ALIASES[role] if name in given and name not in taken]
                if free:
                    names[role] = free[0]
        for role in self._needed + (self._labels if self._labelled else ()):
            if role not in names:
                raise DataError(
                    f"{where}: no column for {role}; it has {_listed(given)}; expected one of "
                    f"{', '.join(ALIASES[role])}, or name it: columns {role}=NAME"
                )
        return names

    def _example(self, values: dict, where: str, kind: str) -> Example:
        identity = None if values.get("id") is None else str(values["id"])
        main = "tokens" if self._task == "tagging" else "context" if self._task == "qa" else "text"
        text, pair = values[main], values.get("question" if self._task == "qa" else "text_pair")
        label = values.get(self._labels[0])
        if self._task == "tagging":
            if label is None and not self._labelled and isinstance(text, str) and text.strip():
                return Example(text, id=identity, where=where)  # raw text, to be cut into tokens
            text, label = (value.split() if isinstance(value, str) else value for value in (text, label))
            return self.tagged(text, label, where, identity)
        for role, value in ((main, text), ("question" if self._task == "qa" else "text_pair", pair)):
            if not isinstance(value, str) and not (value is None and role == "text_pair"):
                raise DataError(f"{where}: {role} is a {type(value).__name__}, expected a text")
            if value is not None and not value.strip() and role != "text_pair":
                raise DataError(f"{where}: {role} is empty")
        if self._task == "qa":
            answers = None if "answers" not in values else _answers(label, text, where, kind)
            return Example(text, pair, answers, identity, where)
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        label = label.strip() if isinstance(label, str) else label
        if label is None or label == "":
            if self._labelled:
                raise DataError(f"{where}: label is empty")
            label = None
        elif isinstance(label, list) and all(isinstance(one, str) and one for one in label):
            pass
        elif not isinstance(label, str) and not (isinstance(label, float) and math.isfinite(label)):
            raise DataError(f"{where}: label is {shown(label)}, expected a text, a number, or a list of texts")
        return Example(text, pair, label, identity, where)

    # -- tagged text ---------------------------------------------------------------------------------------------------

    def tagged(self, tokens, tags, where: str, identity: str | None = None) -> Example:
        """An example of tokens and their tags, checked."""
        for name, values in (("tokens", tokens), ("tags", tags)):
            if values is None and name == "tags" and not self._labelled:
                continue
            if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
                raise DataError(f"{where}: {name} is {shown(values)}, expected a list of texts, none of them empty")
        if not tokens:
            raise DataError(f"{where}: no tokens")
        if tags is not None and len(tags) != len(tokens):
            raise DataError(f"{where}: {len(tokens)} tokens but {len(tags)} tags, expected one for each")
        return Example(tokens, None, tags, identity, where)

    def _conll(self, text: str) -> Iterator[Example]:
        places = {"tokens": 1, "tags": 0} | {role: self._number(role) for role in self._columns}
        tokens, tags, begin, columns = [], [], 1, None
        for number, line in enumerate([*_LINE_END.split(text), ""], start=1):
            parts = _cut(line)
            if not parts or parts[0] == "-DOCSTART-":
                if tokens:
                    yield self.tagged(tokens, None if self._labelled is False else tags, self._where(begin))
                tokens, tags = [], []
                continue
            if not tokens:
                begin = number
            if len(parts) < 2 and self._labelled is not False:
                raise DataError(f"{self._where(number)}: {shown(line.strip())}, expected a token and its tag")
            columns = columns or len(parts)
            if len(parts) != columns:
                raise DataError(
                    f"{self._where(number)}: {len(parts)} columns, expected {columns} as before: {shown(line)}"
                )
            if max(places.values()) > columns:
                raise DataError(f"{self._where(number)}: {columns} columns, expected at least {max(places.values())}")
            tokens.append(parts[places["tokens"] - 1])
            tags.append(parts[places["tags"] - 1])

    def _number(self, role: str) -> int:
        """The number of a column that has no name, from 1 on."""
        name = str(self._columns[role])
        if role == "id" or not name.isdecimal() or int(name) == 0:
            raise ConfigError(
                f"{self._path}: columns has {role}={name}, expected tokens and tags by their numbers, from 1 on"
            )
        return int(name)

    def _tagged(self, text: str) -> Iterator[Example]:
        for number, line in enumerate(_LINE_END.split(text), start=1):
            units = _cut(_COMPOUND.sub(r"\1", line))
            pairs = [unit.rpartition("/") for unit in units if not _ARTICLE.match(unit)]
            if not all(word and tag for word, _, tag in pairs):
                raise DataError(f"{self._where(number)}: {shown(line)}, expected words with their tags, word/tag")
            if pairs:
                tags = None if self._labelled is False else [tag for _, _, tag in pairs]
                yield self.tagged([word for word, _, _ in pairs], tags, self._where(number))

    # -- texts and questions -------------------------------------------------------------------------------------------

    def _txt(self, text: str) -> Iterator[Example]:
        for number, line in enumerate(_LINE_END.split(text), start=1):
            if line.strip():
                yield Example(line.strip(), where=self._where(number))

    def _squad(self, text: str) -> Iterator[Example]:
        tree = parse_json(text, self._path, DataError)
        for at, article in self._branches(tree, "data"):
            for there, paragraph in self._branches(article, "paragraphs", f"{at}."):
                for here, question in self._branches(paragraph, "qas", f"{there}."):
                    yield self._asked(question, here, paragraph, there)

    def _branches(self, tree, name: str, above: str = "") -> Iterator[tuple[str, dict]]:
        """What SQuAD's tree has under a name, each with its place."""
        found = tree.get(name) if isinstance(tree, dict) else None
        if not isinstance(found, list):
            given = f"{above}{name} is {shown(found)}"
            raise DataError(f"{self._path}: not in the form of SQuAD: {given}, expected a list of objects")
        return ((f"{above}{name}[{number}]", branch) for number, branch in enumerate(found))

    def _asked(self, question, here: str, paragraph: dict, there: str) -> Example:
        parts = (("id", question, here), ("question", question, here), ("context", paragraph, there))
        for name, given, place in parts:
            if not isinstance(given, dict) or name not in given:
                raise DataError(f"{self._path}: not in the form of SQuAD: no {name} in {place}, {shown(given)}")
        values = {"question": question["question"], "context": paragraph["context"], "id": question["id"]}
        if self._labelled or self._labelled is None and "answers" in question:
            values["answers"] = question.get("answers")
        return self._example(values, f"{self._path}: question {shown(question['id'])}", "jsonl")


def _listed(names: list[str]) -> str:
    text = ", ".join(names)
    return (text if len(text) <= 400 else f"{text[:397]}...") or "none"


def _json_kind(text: str) -> str:
    """What a JSON file holds: "objects", a list of them; "jsonl", one a line; or "squad", a tree."""
    if text.lstrip().startswith("["):
        return "objects"
    try:
        first = json.loads(_LINE_END.split(text.lstrip(), 1)[0])
    except (ValueError, RecursionError):
        return "squad"
    return "jsonl" if isinstance(first, dict) and "data" not in first else "squad"


def _answers(given, context: str, where: str, kind: str) -> list[tuple[str, int]]:
    """Answers and their places, which must be right."""
    if kind in ("csv", "tsv"):
        place = context.find(given)
        if place < 0:
            raise DataError(f"{where}: the answer {shown(given)} is not in the context")
        return [(given, place)] if given else []
    if isinstance(given, dict) and given.keys() >= {"text", "answer_start"}:
        texts, places = given["text"], given["answer_start"]
        if not (isinstance(texts, list) and isinstance(places, list) and len(texts) == len(places)):
            raise DataError(f"{where}: answers is {shown(given)}, expected as many texts as answer_start")
        given = [{"text": one, "answer_start": place} for one, place in zip(texts, places, strict=True)]
    if not isinstance(given, list):
        raise DataError(f"{where}: answers is {shown(given)}, expected a list of text and answer_start")
    found = []
    for answer in given:
        text, place = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not text or type(place) is not int:
            raise DataError(f"{where}: an answer is {shown(answer)}, expected text and answer_start")
        if place < 0 or context[place : place + len(text)] != text:
            there = context[max(place, 0) : max(place, 0) + len(text)]
            raise DataError(f"{where}: at {place} the context says {shown(there)}, the answer is {shown(text)}")
        found.append((text, place))
    return found


def _cut(line: str) -> list[str]:
    """What stands between spaces and tabs; other white space may be a token."""
    return [part for part in _GAP.split(line) if part]
