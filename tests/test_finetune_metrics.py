"""Metrics against scikit-learn, scipy, and what the scripts of SQuAD, CMRC 2018 and CoNLL say."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn

from fastbert.finetune import metrics

PAIRS = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), min_size=1, max_size=40)
    )
)
COARSE = st.integers(-3, 3).map(lambda n: n / 4)  # many ties
NUMBERS = st.lists(st.tuples(*2 * [COARSE | st.floats(-1e6, 1e6).map(lambda x: round(x, 3))]), min_size=2, max_size=30)


# labels


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(PAIRS)
def test_labels_against_scikit_learn(drawn):
    count, pairs = drawn
    truth, found = map(list, zip(*pairs, strict=True))
    table = metrics.confusion(truth, found, count)
    assert table.dtype == np.int64 and (table == sklearn.confusion_matrix(truth, found, labels=range(count))).all()
    counts = np.diag(table).tolist(), table.sum(0).tolist(), table.sum(1).tolist()
    averages = metrics.averages(*counts)
    for average in ("macro", "micro", "weighted"):
        expected = sklearn.f1_score(truth, found, average=average, zero_division=0)
        assert averages[f"{average}_f1"] == pytest.approx(expected)
    expected = sklearn.precision_recall_fscore_support(truth, found, labels=range(count), zero_division=0)
    rows = metrics.per_class(*counts, [f"l{i}" for i in range(count)])
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in rows] == pytest.approx(column.tolist())
    assert [row["label"] for row in rows] == [f"l{i}" for i in range(count)]
    assert metrics.matthews(table) == pytest.approx(sklearn.matthews_corrcoef(truth, found), abs=1e-12)


@given(st.lists(st.tuples(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3))), min_size=1, max_size=20))
def test_several_labels_against_scikit_learn(pairs):
    truth, found = (np.array([[i in row for i in range(4)] for row in side]) for side in zip(*pairs, strict=True))
    counts = [t.sum(0).tolist() for t in (truth & found, found, truth)]
    expected = sklearn.f1_score(truth, found, average="micro", zero_division=0)
    assert metrics.averages(*counts)["micro_f1"] == pytest.approx(expected)


def test_nothing_found_is_zero_and_not_an_error():
    assert metrics.precision_recall_f1(0, 0, 0) == (0, 0, 0)
    assert metrics.precision_recall_f1(0, 3, 0) == metrics.precision_recall_f1(0, 0, 3) == (0, 0, 0)
    assert metrics.averages([0], [0], [0]) == {"macro_f1": 0, "micro_f1": 0, "weighted_f1": 0}
    assert metrics.matthews(np.zeros((3, 3), np.int64)) == 0
    assert metrics.matthews(np.array([[5, 0], [0, 0]])) == metrics.matthews(np.array([[2, 3], [0, 0]])) == 0
    assert metrics.matthews(np.eye(4, dtype=np.int64) * 10**8) == metrics.matthews(np.diag([30, 31])) == 1


# quantities


@given(NUMBERS)
def test_correlations_against_scipy(pairs):
    x, y = zip(*pairs, strict=True)
    for own, theirs in ((metrics.pearson, stats.pearsonr), (metrics.spearman, stats.spearmanr)):
        if min(len(set(x)), len(set(y))) == 1:
            assert math.isnan(own(x, y))
        else:
            assert own(x, y) == pytest.approx(theirs(x, y).statistic, abs=1e-9)
            assert own(x, [-value for value in y]) == pytest.approx(-own(x, y), abs=1e-9)


def test_correlations_of_what_does_not_vary():
    for own in (metrics.pearson, metrics.spearman):
        assert math.isnan(own([0.1] * 3, [1, 2, 3])) and math.isnan(own([1, 2, 3], [0.1] * 3))
        assert math.isnan(own([1.0], [1.0]))
    assert metrics.spearman([1, 2, 2, 3], [1, 5, 5, 9]) == pytest.approx(1)
    assert metrics.pearson([1e-200, 2e-200], [1, 2]) == pytest.approx(1)


# spans of tags


def slow_spans(tags):
    """conlleval's rules of what begins and what ends a span, one by one."""
    parts = [("O", "")] + [(tag[0].replace("M", "I"), tag[2:]) for tag in tags] + [("O", "")]
    found, begin = [], None
    for place, ((last, before), (here, own)) in enumerate(zip(parts, parts[1:], strict=False)):
        ends = last + here in ("BB", "BO", "BS", "IB", "IO", "IS", "EB", "EI", "EE", "ES", "EO", "SB", "SI", "SE")
        ends |= last + here in ("SS", "SO") or last != "O" and before != own
        begins = here in "BS" or last + here in ("EE", "EI", "SE", "SI", "OE", "OI")
        begins |= here != "O" and last != "O" and before != own
        if begin is not None and ends:
            found.append((before, begin, place))
            begin = None
        if begins:
            begin = place
    return found


SCHEMES = {"BIO": "BIO", "BIOES": "BIOES", "BMES": "BMES", "BMESO": "BMESO"}


def tags_of(scheme, kinds):
    return ["O" if c == "O" else f"{c}-{kind}" if kind else c for c in SCHEMES[scheme] for kind in kinds]


@given(st.data())
def test_spans_are_those_of_conlleval(data):
    scheme = data.draw(st.sampled_from(sorted(SCHEMES)))
    tags = data.draw(st.lists(st.sampled_from(tags_of(scheme, data.draw(st.sampled_from([["X", "Y"], [""]]))))))
    assert metrics.spans(tags) == slow_spans(tags)


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("", []),
        ("O O", []),
        ("B-X I-X O B-Y", [("X", 0, 2), ("Y", 3, 4)]),
        ("I-X I-X O I-Y I-X", [("X", 0, 2), ("Y", 3, 4), ("X", 4, 5)]),
        ("B-X B-X I-Y", [("X", 0, 1), ("X", 1, 2), ("Y", 2, 3)]),
        ("S-X B-X I-X E-X I-X", [("X", 0, 1), ("X", 1, 4), ("X", 4, 5)]),
        ("S-X I-X S-X E-X E-X", [("X", 0, 1), ("X", 1, 2), ("X", 2, 3), ("X", 3, 4), ("X", 4, 5)]),
        ("B M E S B E", [("", 0, 3), ("", 3, 4), ("", 4, 6)]),
        ("B-a-b I-a-b I-a", [("a-b", 0, 2), ("a", 2, 3)]),
    ],
)
def test_spans_by_hand(tags, expected):
    assert metrics.spans(tags.split()) == expected


def test_spans_are_counted_by_type_place_and_sequence():
    truth = [["B-X", "I-X", "O"], ["B-Y", "O"], ["O"]]
    found = [["B-X", "I-X", "B-X"], ["B-X", "O"], ["O"]]
    right, predicted, there = metrics.count_spans(truth, found)
    assert (right, predicted, there) == ({"X": 1}, {"X": 3}, {"X": 1, "Y": 1})
    assert metrics.count_spans([["B-X"], ["O"]], [["O"], ["B-X"]])[0] == {}


@pytest.mark.parametrize(
    "tags, scheme",
    [
        ("O B-X I-X", "BIO"),
        ("O I-X", "BIO"),
        ("B I", "BIO"),
        ("B-X I-X E-X S-X O", "BIOES"),
        ("B M E S", "BMES"),
        ("B-X M-X E-X S-X O", "BMESO"),
        ("n v ns w", None),
        ("O", None),
        ("O S-X", None),
        ("O B-", None),
        ("O-X B-X", None),
        ("B-X L-X", None),
        ("B-X I-X M-X", None),
        ("", None),
    ],
)
def test_schemes_are_known_by_their_tags(tags, scheme):
    assert metrics.scheme_of(tags.split()) == scheme


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_legal_sequences_are_those_that_spans_write(scheme):
    """Of all short sequences, those are legal that come from writing some spans down."""
    tags, legal, written = tags_of(scheme, ["X", "Y"]), set(), set()
    inside = "I" if "I" in scheme else "M"

    def write(length, kind):
        if scheme == "BIO":
            return (f"B-{kind}",) + (f"I-{kind}",) * (length - 1)
        if length == 1:
            return (f"S-{kind}",)
        return (f"B-{kind}", *[f"{inside}-{kind}"] * (length - 2), f"E-{kind}")

    units = [write(length, kind) for length in (1, 2, 3) for kind in "XY"] + [("O",)] * ("O" in scheme)
    for parts in (row for count in (1, 2, 3) for row in product(units, repeat=count)):
        if len(row := sum(parts, ())) <= 3:
            written.add(row)
    for row in (row for length in (1, 2, 3) for row in product(sorted(set(tags)), repeat=length)):
        ends = [None, *row, None]
        if all(metrics.legal(scheme, a, b) for a, b in zip(ends, ends[1:], strict=False)):
            legal.add(row)
    assert legal == written


# answers


@pytest.mark.parametrize(
    "answer, truths, exact, f1",
    [
        ("the Normans", ["Normans"], 1, 1),
        ("THE  Normans!", ["the normans."], 1, 1),
        ("in Paris, France", ["Paris", "Lyon"], 0, 0.5),
        ("Denver Broncos", ["Carolina Panthers", "The Denver Broncos"], 1, 1),
        ("a b b", ["b b b"], 0, 0.8),  # the article is gone
        ("1914–1918", ["19141918"], 0, 0),  # SQuAD's script takes only ASCII's punctuation away
        ("$5", ["5"], 1, 1),
        ("U.S.", ["us"], 1, 1),
        ("cafés", ["cafe\u0301s"], 0, 0),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("...", ["something"], 0, 0),
        ("北京市", ["北京市"], 1, 1),
        ("“北京”市。", ["北京市"], 1, 1),
        ("在北京市", ["北京市"], 0, 6 / 7),
        ("北京的城市", ["北京城市"], 0, 4 / 9),  # the longest part in common, not all words in common
        ("1998 年", ["1998年"], 1, 1),
        ("2号", ["在第2号楼"], 0, 4 / 7),
        ("A座", ["A座"], 1, 1),
        ("3+5元", ["35元"], 1, 1),
        ("在" + "中国" * 200, ["中国" * 200], 0, 800 / 801),  # not even common characters are passed over
        ("维生素 A", ["维生素"], 0, 6 / 7),  # no article
        ("维生素", ["维生素 A"], 0, 6 / 7),
        ("", ["北京"], 0, 0),
        ("Paris", ["北京"], 0, 0),
    ],
)
def test_answers(answer, truths, exact, f1):
    assert metrics.exact_match(answer, truths) == exact
    assert metrics.answer_f1(answer, truths) == pytest.approx(f1)


@given(st.text(st.sampled_from("ab 中国，.!")), st.text(st.sampled_from("ab 中国，.!")))
def test_answers_that_match_have_f1_of_one(answer, truth):
    assert metrics.exact_match(truth, [truth]) == metrics.answer_f1(truth, [truth]) == 1
    value = metrics.answer_f1(answer, [truth])
    assert 0 <= value <= 1 and (metrics.exact_match(answer, [truth]) <= value)
    assert metrics.answer_f1(answer, [truth, answer]) == 1
