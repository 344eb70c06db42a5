"""How good predictions are: numbers for labels, for spans of tags, for answers, for quantities."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from string import punctuation

import numpy as np

from fastbert.data.text import CJK


def confusion(truth: Sequence[int], found: Sequence[int], count: int) -> np.ndarray:
    """How often each of `count` labels (rows: the truth) was taken for each (columns), int64 `[count, count]`."""
    table = np.zeros((count, count), np.int64)
    np.add.at(table, (np.asarray(truth, np.int64), np.asarray(found, np.int64)), 1)
    return table


def precision_recall_f1(right: float, found: float, there: float) -> tuple[float, float, float]:
    """Of what was found and of what is there, the share that is right, and their harmonic mean; 0 where nothing is."""
    precision, recall = right / found if found else 0.0, right / there if there else 0.0
    return precision, recall, 2 * right / (found + there) if found + there else 0.0


def per_class(right: Sequence[int], found: Sequence[int], there: Sequence[int], names: Sequence[str]) -> list[dict]:
    """A row for each label: precision, recall, F1 and support."""
    rows = []
    for name, *counts in zip(names, right, found, there, strict=True):
        precision, recall, f1 = precision_recall_f1(*counts)
        rows.append({"label": name, "precision": precision, "recall": recall, "f1": f1, "support": int(counts[2])})
    return rows


def averages(right: Sequence[int], found: Sequence[int], there: Sequence[int]) -> dict[str, float]:
    """F1 by label averaged over the labels that are there or were found (macro), that of all together (micro), and
    weighted by support, as scikit-learn has them."""
    scores = [precision_recall_f1(*counts)[2] for counts in zip(right, found, there, strict=True)]
    used = [score for score, a, b in zip(scores, found, there, strict=True) if a or b]
    weighted = sum(score * n for score, n in zip(scores, there, strict=True))
    return {
        "macro_f1": sum(used) / len(used) if used else 0.0,
        "micro_f1": precision_recall_f1(sum(right), sum(found), sum(there))[2],
        "weighted_f1": weighted / sum(there) if sum(there) else 0.0,
    }


def matthews(table: np.ndarray) -> float:
    """Matthews's correlation coefficient of a confusion table, for any number of labels (Gorodkin 2004); 0 where one
    side has a single label."""
    table = table.astype(np.float64)
    total, right = table.sum(), np.trace(table)
    there, found = table.sum(1), table.sum(0)
    spread = math.sqrt((total**2 - (there**2).sum()) * (total**2 - (found**2).sum()))
    return float((right * total - (there * found).sum()) / spread) if spread else 0.0


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """The correlation of two quantities; nan where one does not vary."""
    x, y = (np.asarray(values, np.float64) for values in (x, y))
    if any((values == values[0]).all() for values in (x, y)):
        return math.nan  # the mean of equal numbers need not be that number
    x, y = (values - values.mean() for values in (x, y))
    x, y = (values / abs(values).max() for values in (x, y))  # squares of tiny numbers are zero
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """The correlation of ranks; equal values share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


# -- spans of tags -----------------------------------------------------------------------------------------------------

_PREFIXES = {"BIO": set("BIO"), "BIOES": set("BIOES"), "BMES": set("BMES"), "BMESO": set("BMESO")}


def scheme_of(tags: Iterable[str]) -> str | None:
    """ "BIO", "BIOES", "BMES" or "BMESO" if all tags are of one, each a letter and, except O, perhaps a type after a
    hyphen; None for tags that stand for themselves, such as parts of speech."""
    letters = set()
    for tag in set(tags):
        letter, hyphen, kind = tag.partition("-")
        if letter not in "BIOEMS" or len(letter) != 1 or hyphen and not kind or letter == "O" and kind:
            return None
        letters.add(letter)
    if not letters & set("BIM"):
        return None
    return next((name for name, allowed in _PREFIXES.items() if letters <= allowed), None)


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans of a sequence of tags as (type, begin, end), as conlleval reads them: a span also begins where its
    type changes or after O, and also ends before what does not go on with it."""
    found, begin, kind = [], None, ""
    last = "O"
    for place, tag in enumerate([*tags, "O"]):
        letter, _, own = tag.partition("-")
        if begin is not None and (letter in "BSO" or own != kind or last in "ES"):
            found.append((kind, begin, place))
            begin = None
        if letter != "O" and begin is None:
            begin, kind = place, own
        last = letter
    return found


def count_spans(
    truth: Iterable[Sequence[str]], found: Iterable[Sequence[str]]
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Over all sequences and by type, how many spans were right, found, and there."""
    right, predicted, there = Counter(), Counter(), Counter()
    for gold, mine in zip(truth, found, strict=True):
        a, b = set(spans(gold)), set(spans(mine))
        for counter, group in ((right, a & b), (predicted, b), (there, a)):
            counter.update(kind for kind, _, _ in group)
    return right, predicted, there


def legal(scheme: str, first: str | None, second: str | None) -> bool:
    """Whether one tag may follow another; None stands for the end on either side."""
    if scheme == "BIO":
        if second is None or second[0] != "I":
            return True
        return first is not None and first[0] in "BI" and first[2:] == second[2:]
    inside = {"BIOES": "I", "BMES": "M", "BMESO": "M"}[scheme]
    is_open = first is not None and first[0] in ("B", inside)
    goes_on = second is not None and second[0] in (inside, "E")
    return is_open == goes_on and (not is_open or first[2:] == second[2:])


# -- answers -----------------------------------------------------------------------------------------------------------

_ARTICLES, _CJK = re.compile(r"\b(a|an|the)\b"), re.compile(f"[{CJK}]")
_PIECES = re.compile(rf"[{CJK}]|[^\s{CJK}]+")


def _answer_words(text: str, chinese: bool) -> list[str]:
    """The form in which SQuAD's script compares answers: words, lowercase, without ASCII's punctuation and without
    articles; or CMRC 2018's: Chinese characters alone, without any punctuation."""
    if chinese:
        text = "".join(c for c in text.lower() if not unicodedata.category(c).startswith(("P", "S")))
        return _PIECES.findall(text)
    return _ARTICLES.sub(" ", "".join(c for c in text.lower() if c not in punctuation)).split()


def _compared(answer: str, truths: Sequence[str]) -> Iterator[tuple[list[str], list[str], bool]]:
    """An answer and each of the true ones in words, and whether that one is Chinese; no truth means no answer."""
    for truth in truths or [""]:
        chinese = _CJK.search(truth) is not None
        yield _answer_words(answer, chinese), _answer_words(truth, chinese), chinese


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if an answer is one of the true ones but for case, punctuation and articles; no truth means no answer."""
    return float(any(mine == words for mine, words, _ in _compared(answer, truths)))


def answer_f1(answer: str, truths: Sequence[str]) -> float:
    """The best F1 of the words of an answer with those of a true one (Rajpurkar et al. 2016, arXiv 1606.05250); where
    a true answer has CJK characters, of its longest part in common with it, as CMRC 2018's script has it (Cui et al.
    2019, arXiv 1810.07366)."""
    return max(_pair_f1(*compared) for compared in _compared(answer, truths))


def _pair_f1(mine: list[str], truth: list[str], chinese: bool) -> float:
    if not mine or not truth:
        return float(mine == truth)
    if chinese:
        common = SequenceMatcher(None, mine, truth, autojunk=False).find_longest_match().size
    else:
        common = (Counter(mine) & Counter(truth)).total()
    return precision_recall_f1(common, len(mine), len(truth))[2]
