"""Words and what may stand in their place: the table of similar words that MacBERT corrupts its input with.

MacBERT (Cui et al. 2020, "Revisiting Pre-Trained Models for Chinese Natural Language Processing") takes similar words
from word2vec vectors. A table is made from such vectors, from the thesaurus Cilin, or from vectors trained on the
user's own text. It is a text file to read and to edit: a first line that says what it is, then one word per line, a
tab, and its similar words, best first, with tabs between them.
"""

import codecs
import inspect
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from os import PathLike
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastbert.data.checks import check
from fastbert.data.segmenters import Segmenter, Words, segmented, segmenter
from fastbert.data.text import Tally, as_paths, read_rows
from fastbert.data.vectors import WordVectors, existing_file, nearest, read_vectors, train_vectors
from fastbert.errors import ConfigError, DataError, shown

FORMAT, VERSION = "fastbert similar words", 1
_HEADER = re.compile(rf"# {FORMAT}, version ([0-9]+): (.*)")
_CILIN = re.compile(r"[A-Z][a-z][0-9]{2}[A-Z][0-9]{2}([=#@])\s(.*)")
_NO_WORD = re.compile("[\t\r\n\ud800-\udfff]")  # what no line of a table can hold


@dataclass(frozen=True)
class SimilarWordsReport:
    """What a builder made. words: in the table; similar: those with at least one similar word; same_length: those with
    at least one of as many characters; pairs: of a word and a similar word. coverage: the share of the words with a
    similar word; of the words of the text, punctuation among them and each as often as it occurs, where the table was
    made from a text. dropped: what was left out, by reason, with the count and the first places."""

    words: int
    similar: int
    same_length: int
    pairs: int
    coverage: float
    seconds: float
    dropped: dict[str, dict]

    def __str__(self) -> str:
        lines = [
            f"{self.words:,} words, {self.pairs:,} pairs, in {self.seconds:.1f} s",
            f"  with a similar word: {self.similar:,}; with one of the same length: {self.same_length:,}",
            f"  coverage: {self.coverage:.1%}",
        ]
        for reason, entry in self.dropped.items():
            lines.append(f"  dropped: {entry['count']:,} x {reason}, first at {', '.join(entry['examples'])}")
        return "\n".join(lines)


class SimilarWords(Mapping):
    """table[word] is the tuple of its similar words, best first; empty for a word that has none. Words keep their
    order. Two tables are equal if they say the same of the same words.

    origin: one line on where it comes from. report: a SimilarWordsReport if a builder made it, else None. DataError: no
    word at all; a word that is empty, has white space at an end or holds a tab or a line break; a similar word that is
    the word itself or stands twice.
    """

    def __init__(
        self, similar: Mapping[str, Sequence[str]], origin: str = "", report: SimilarWordsReport | None = None
    ):
        self._similar: dict[str, tuple[str, ...]] = {}
        self.origin, self.report = " ".join(origin.split()), report
        for word, others in similar.items():
            if isinstance(others, str) or not all(isinstance(name, str) for name in (word, *others)):
                raise DataError(f"the similar words of {word!r} are {others!r}, expected words as a sequence of str")
            if fault := _fault(word, others):
                raise DataError(f"the similar words of {word!r}: {fault}")
            self._similar[word] = tuple(others)
        if not self._similar:
            raise DataError("a table of similar words holds no word, expected at least one")

    def __getitem__(self, word: str) -> tuple[str, ...]:
        return self._similar[word]

    def __iter__(self) -> Iterator[str]:
        return iter(self._similar)

    def __len__(self) -> int:
        return len(self._similar)

    def __repr__(self) -> str:
        return f"SimilarWords({len(self)} words, {self.origin!r})"

    # On disk

    @classmethod
    def read(cls, path: str | PathLike) -> "SimilarWords":
        """Read a table. A byte order mark, CR LF, blank lines and tabs at the end of a line are no harm.
        MissingFileError: no such file. DataError, with file and line: another first line, invalid UTF-8, a line that is
        no entry, a word that has two."""
        path = existing_file(path, "a table of similar words, which `fastbert prepare similar-words` makes")
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        header = _HEADER.fullmatch(lines[0].decode(errors="replace").rstrip("\r"))
        if header is None:
            first = lines[0][:60].decode(errors="replace")
            raise DataError(
                f"{path}:1: {first!r} is not the first line of a table: '# {FORMAT}, version {VERSION}: ...'"
            )
        if header[1] != str(VERSION):
            raise DataError(f"{path}:1: the version of the table is {header[1][:40]}, expected {VERSION}")
        similar, line_of, names = {}, {}, {}  # names: one str for each word, however often it stands
        for number, raw in enumerate(lines[1:], 2):
            if not raw.strip():
                continue
            line = _decoded(raw, path, number).rstrip("\r\t")
            word, *others = (names.setdefault(name, name) for name in line.split("\t"))
            if fault := _fault(word, others):
                raise DataError(f"{path}:{number}: {fault}")
            if word in similar:
                raise DataError(f"{path}:{number}: {shown(word)} has an entry on line {line_of[word]}, expected one")
            similar[word], line_of[word] = others, number
        if not similar:
            raise DataError(f"{path} holds no word, expected at least one line after the first")
        return cls(similar, header[2])

    def write(self, path: str | PathLike) -> None:
        """Write the table, whole or not at all; what was at `path` is replaced."""
        path = Path(path).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
        try:
            with open(temporary, "x", encoding="utf-8", newline="\n") as file:
                file.write(f"# {FORMAT}, version {VERSION}: {self.origin}\n")
                file.writelines("\t".join((word, *others)) + "\n" for word, others in self.items())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    # Builders

    @classmethod
    def from_vectors(
        cls,
        path: str | PathLike,
        *,
        top: int = 10,
        least: float = 0.5,
        same_length: bool = True,
        limit: int | None = None,
        progress: bool = True,
    ) -> "SimilarWords":
        """From a word2vec file (see `read_vectors`, which raises what this raises): the words with a letter or CJK
        character, each with the `top` others of the highest cosine similarity, none below `least`.

        same_length: only words with as many characters count, before the best are taken. `least` is 0.5 because below
        it neighbours share little but a topic; a rare word is better replaced at random, as MacBERT does with words
        that have no similar one. limit: only so many words from the beginning of the file. ConfigError: an argument
        that makes no sense.
        """
        begin, dropped = time.perf_counter(), Tally()
        _check_search(top, least)
        if limit is not None:
            check("limit", limit, Integral, "None or an integer of at least 1", lambda x: x >= 1)
        vectors = read_vectors(path, limit=limit, dropped=dropped, progress=progress)
        similar = _neighbours(vectors, top, least, same_length, dropped, progress)
        origin = f"vectors {Path(path).name}" + (f", first {limit} words" if limit is not None else "")
        return cls._built(similar, origin + _search_note(top, least, same_length), begin, dropped)

    @classmethod
    def from_cilin(
        cls, path: str | PathLike, *, related: bool = False, same_length: bool = True, progress: bool = True
    ) -> "SimilarWords":
        """From the thesaurus Cilin as extended by HIT, in UTF-8 or GB18030: lines such as `Aa01A01= 人 士 人物 人士`.

        The words of a line with `=` are synonyms of each other; with related=True those of a line with `#` are similar
        too, after all synonyms. Words of lines with `#` or `@` have an entry in any case. Cilin does not rank: the
        order is that of the file. DataError, with file and line: another encoding, a line of another form.
        """
        begin, dropped = time.perf_counter(), Tally()
        path = existing_file(path, "a Cilin table")
        groups = []
        for number, line in enumerate(map(str.strip, _cilin_text(path).split("\n")), 1):
            if line:
                entry = _CILIN.fullmatch(line)
                if entry is None:
                    raise DataError(f"{path}:{number}: {line[:40]!r} is no line of Cilin such as 'Aa01A01= 人 士 人物'")
                words = dict.fromkeys(entry[2].split())
                groups.append((entry[1], [word for word in words if _takes(word, f"{path}:{number}", dropped)]))
        similar: dict[str, dict[str, None]] = {word: {} for _, words in groups for word in words}
        linked = [words for kind in ("=#" if related else "=") for mark, words in groups if mark == kind]
        for words in tqdm(linked, "linking synonyms", unit=" lines", delay=2, disable=not progress):
            for word in words:
                others = (other for other in words if not same_length or len(other) == len(word))
                similar[word].update((other, None) for other in others if other != word)
        origin = f"Cilin {path.name}, {'synonyms and related words' if related else 'synonyms'}"
        return cls._built(similar, origin + _length_note(same_length), begin, dropped)

    @classmethod
    def from_corpus(
        cls,
        files: str | PathLike | Sequence[str | PathLike],
        *,
        words: Words = "segmented",
        tag_separator: str | None = None,
        segmenter_model: str | PathLike | None = None,
        errors: str = "strict",
        **options,
    ) -> "SimilarWords":
        """From text files: `from_rows` of their rows, cut into words (see `segmenter`; not "none"). errors: "strict" or
        "replace", see `read_rows`. options: those of `from_rows`."""
        if words == "none":
            raise ConfigError("words is 'none', expected another one: vectors of words need word borders")
        paths = as_paths(files)
        rows = _FileRows(paths, segmenter(words, tag_separator=tag_separator, model=segmenter_model), errors)
        return cls.from_rows(rows, f"text {', '.join(path.name for path in paths)}", **options)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[list[str]],
        origin: str = "text",
        *,
        min_count: int = 5,
        dimensions: int = 100,
        window: int = 5,
        epochs: int = 5,
        seed: int = 0,
        top: int = 10,
        least: float = 0.5,
        same_length: bool = True,
        progress: bool = True,
    ) -> "SimilarWords":
        """From rows of words, which are gone through epochs + 1 times (no generator, therefore): trains vectors, see
        `train_vectors`, which raises what this raises, and looks for neighbours as `from_vectors` does. The same rows
        and seed give the same table on one machine."""
        begin, dropped = time.perf_counter(), Tally()
        _check_search(top, least)
        numbers = {"min_count": min_count, "dimensions": dimensions, "window": window, "epochs": epochs}
        for name, value in numbers.items():
            check(name, value, Integral, "an integer of at least 1", lambda x: x >= 1)
        check("seed", seed, Integral, "an integer from 0 to 2^32 - 1", lambda x: 0 <= x < 1 << 32)
        check("rows", rows, Iterable, "rows that can be gone through several times", lambda x: iter(x) is not x)
        vectors = train_vectors(rows, **numbers, seed=seed, progress=progress)
        similar = _neighbours(vectors, top, least, same_length, dropped, progress)
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in {**numbers, "seed": seed}.items())
        share = dict(zip(vectors.words, vectors.share.tolist(), strict=True))
        return cls._built(
            similar, f"{origin}, {settings}{_search_note(top, least, same_length)}", begin, dropped, share
        )

    @classmethod
    def _built(
        cls,
        similar: Mapping[str, Iterable[str]],
        origin: str,
        begin: float,
        dropped: Tally,
        share: dict[str, float] | None = None,
    ) -> "SimilarWords":
        try:
            table = cls({word: tuple(others) for word, others in similar.items()}, origin)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from None
        having = [word for word, others in table.items() if others]
        table.report = SimilarWordsReport(
            words=len(table),
            similar=len(having),
            same_length=sum(any(len(other) == len(word) for other in table[word]) for word in having),
            pairs=sum(map(len, table.values())),
            coverage=len(having) / len(table) if share is None else sum(map(share.__getitem__, having)),
            seconds=time.perf_counter() - begin,
            dropped=dropped.reasons,
        )
        return table


def build_similar_words(
    out: str | PathLike,
    *,
    vectors: str | PathLike | None = None,
    cilin: str | PathLike | None = None,
    text: str | PathLike | Sequence[str | PathLike] | None = None,
    overwrite: bool = False,
    **options,
) -> SimilarWordsReport:
    """The work behind `fastbert prepare similar-words`: make a table from one of `vectors` (see
    `SimilarWords.from_vectors`), `cilin` (`from_cilin`) or `text` (`from_corpus`, `from_rows`) and write it to `out`.

    options: those of the builder. overwrite: replace `out` if it is a table. ConfigError: none or several of the three,
    an option that the builder does not take. DataError: `out` exists; what the builder raises.
    """
    given = {"vectors": vectors, "cilin": cilin, "text": text}
    given = {name: source for name, source in given.items() if source is not None}
    if len(given) != 1:
        raise ConfigError(f"the sources of similar words are {given}, expected one of vectors, cilin and text")
    (name, source), out = *given.items(), Path(out)
    build, taken = _BUILDERS[name]
    for option in options:
        if option not in taken:
            raise ConfigError(f"{name} takes no option {option!r}, expected some of {', '.join(taken)}")
    _check_target(out, overwrite)
    table = build(source, **options)
    table.write(out)
    return table.report


def _options(*builders: Callable) -> list[str]:
    parameters = [p for build in builders for p in inspect.signature(build).parameters.values()]
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


_BUILDERS = {
    "vectors": (SimilarWords.from_vectors, _options(SimilarWords.from_vectors)),
    "cilin": (SimilarWords.from_cilin, _options(SimilarWords.from_cilin)),
    "text": (SimilarWords.from_corpus, _options(SimilarWords.from_corpus, SimilarWords.from_rows)),
}


@dataclass(frozen=True)
class _FileRows:
    """The rows of text files as words, from the beginning each time."""

    paths: list[Path]
    cut: Segmenter
    errors: str

    def __iter__(self) -> Iterator[list[str]]:
        words = segmented(read_rows(self.paths, self.errors), self.cut)
        return ([word.lstrip(" ") for word in row] for row in words)


def _fault(word: str, similar: Sequence[str]) -> str | None:
    """What is wrong with an entry."""
    seen = {word}
    for name in (word, *similar):
        if not name or name != name.strip() or _NO_WORD.search(name):
            return f"{shown(name)} is no word: it is empty, or has white space at an end or a tab or line break within"
    for name in similar:
        if name in seen:
            how = "its own similar word" if name == word else "there twice"
            return f"{shown(name)} is {how}, expected other words, once"
        seen.add(name)
    return None


def _takes(word: str, place: str, dropped: Tally) -> bool:
    """Whether a table is made with this word; if not, it is counted."""
    if not any(map(str.isalpha, word)):
        dropped.add("word without a letter or CJK character", place)
    elif _fault(word, ()):
        dropped.add("word with white space at an end or a tab or line break within", place)
    else:
        return True
    return False


def _neighbours(
    vectors: WordVectors, top: int, least: float, same_length: bool, dropped: Tally, progress: bool
) -> dict[str, list[str]]:
    keep = [i for i, word in enumerate(vectors.words) if _takes(word, repr(word), dropped)]
    words = [vectors.words[i] for i in keep]
    groups = np.array([len(word) if same_length else 0 for word in words], np.int64)
    found = nearest(vectors.matrix[keep], groups, top=top, least=least, progress=progress)
    return {word: [words[i] for i in row if i >= 0] for word, row in zip(words, found.tolist(), strict=True)}


def _check_search(top: int, least: float) -> None:
    check("top", top, Integral, "an integer of at least 1", lambda x: x >= 1)
    check("least", least, Real, "a number from -1 to 1", lambda x: -1 <= x <= 1)


def _search_note(top: int, least: float, same_length: bool) -> str:
    return f", top {top}, cosine at least {least}{_length_note(same_length)}"


def _length_note(same_length: bool) -> str:
    return ", same length" if same_length else ", any length"


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        bad = raw[error.start : error.end].hex(" ")
        raise DataError(f"{path}:{number}: invalid UTF-8 at byte {error.start} of the line: {bad}") from error


def _cilin_text(path: Path) -> str:
    raw, faults = path.read_bytes(), []
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as error:
            faults.append(error)
    fault = max(faults, key=lambda error: error.start)  # of the encoding that the file is rather in
    line = raw.count(b"\n", 0, fault.start) + 1
    raise DataError(f"{path}:{line}: neither UTF-8 nor GB18030, expected one of the two: {fault}") from fault


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out} exists already; overwrite=True replaces it")
    if out.is_dir():
        raise DataError(f"{out} is a folder, expected the path of a table of similar words")
    with open(out, "rb") as file:
        if not file.read(64).removeprefix(codecs.BOM_UTF8).startswith(f"# {FORMAT}".encode()):
            raise DataError(f"{out} exists and is not a table of similar words: it is not replaced")
