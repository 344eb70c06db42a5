"""Tasks: samples, windows, packed batches, and back from logits to what they say of the texts."""

import json
import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer_levels import TEXT as CORPUS

from fastbert.data import LEVELS, Tokenizer
from fastbert.errors import ConfigError, DataError
from fastbert.finetune import TASKS, metrics
from fastbert.finetune.answering import QuestionAnswering
from fastbert.finetune.classification import Classification, _cut_pair
from fastbert.finetune.examples import Example
from fastbert.finetune.tagging import Tagging
from fastbert.finetune.tasks import IGNORED, windows

SIZES = {"bpe": 400, "unigram": 260, "word": 330}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(CORPUS * 3, encoding="utf-8")
    return {level: Tokenizer.train(path, SIZES.get(level, 300), level, progress=False) for level in LEVELS}


@pytest.fixture(params=LEVELS)
def tokenizer(request, trained):
    return trained[request.param]


@pytest.fixture
def char(trained):
    return trained["char"]


def one_hot(places, length, labels, high=9.0):
    rows = np.zeros((length, labels), np.float32)
    rows[np.arange(length), places] = high
    return rows


TRICKY = "Ｔhe  café\u3000of 中国人民，caf\u0301e 😀👍🏽 (1998年)\x00 ﬁn ＡＢＣ end."


# what every task has


def test_settings_make_the_task_again(char):
    tasks = [
        Classification(char, ["a", "b"], max_length=9, types=False, problem_type="regression", truncation="middle"),
        Tagging(
            char,
            ["O", "B-X"],
            max_length=9,
            types=False,
            overlap=3,
            constrained=False,
            loose=True,
            characters=True,
            filler="B-X",
        ),
        QuestionAnswering(
            char, max_length=9, types=False, stride=2, max_answer_length=3, no_answer=True, null_threshold=1.5
        ),
    ]
    assert [TASKS[task.name] for task in tasks] == [type(task) for task in tasks]
    for task in tasks:
        settings = json.loads(json.dumps(task.settings()))
        again = type(task)(char, **settings)
        assert again.settings() == settings
        hidden = ("tokenizer", "_moves", "_unseen")
        assert {k: v for k, v in vars(again).items() if k not in hidden} == {
            k: v for k, v in vars(task).items() if k not in hidden
        }
        defaults = type(task)(char, task.labels, max_length=8).settings()
        assert all(settings[name] != value for name, value in defaults.items() if name != "labels")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda t: Classification(t, ["a"], max_length=7), "max_length is 7, expected an integer of at least 8"),
        (lambda t: Classification(t, ["a"], max_length=8, problem_type="x"), "problem_type is 'x'"),
        (lambda t: Classification(t, ["a"], max_length=8, truncation="x"), "truncation is 'x'"),
        (lambda t: QuestionAnswering(t, max_length=8, max_answer_length=0), "max_answer_length is 0"),
    ],
)
def test_settings_that_make_no_task(char, make, words):
    with pytest.raises(ConfigError, match=words):
        make(char)


def test_labels_that_training_did_not_have(char):
    message = r"f:2: label 'c' is not among those of training: a, b"
    with pytest.raises(DataError, match=message):
        Classification(char, ["a", "b"], max_length=8).samples([Example("x", label="c", where="f:2")])
    with pytest.raises(DataError, match=message):
        Tagging(char, ["a", "b"], max_length=8).samples([Example(["x"], label=["c"], where="f:2")])
    for kind in ("single_label_classification", "multi_label_classification"):
        task = Classification(char, ["a", "b"], max_length=8, problem_type=kind)
        with pytest.raises(DataError, match=message):
            task.score([Example("x", label=["c"], where="f:2")], [{"label": "a", "labels": []}])
    with pytest.raises(DataError, match=message):
        Tagging(char, ["a", "b"], max_length=8).score([Example(["x"], label=["c"], where="f:2")], [{"tags": ["a"]}])


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 30))
def test_windows(length, size, overlap):
    found = list(windows(length, size, overlap))
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(0 < end - begin <= size for begin, end in found) or length == 0
    for (begin, end), (again, later) in pairwise(found):
        assert end - begin == size and again == end - min(overlap, size // 2) > begin and later > end


# classification


def berts_loop(a, b, most):
    a, b = list(a), list(b)
    while len(a) + len(b) > most:
        (a if len(a) > len(b) else b).pop()
    return a, b


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 40))
def test_pairs_are_cut_as_bert_cuts_them(a, b, most):
    first, second = list(range(a)), list(range(100, 100 + b))
    assert _cut_pair(first, second, most) == berts_loop(first, second, most)


def test_sequences_stand_between_special_tokens(tokenizer):
    task = Classification(tokenizer, ["x", "y"], max_length=12)
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in ("中国人民", "hello world hello"))
    cls, sep = [tokenizer.cls_id], [tokenizer.sep_id]
    between = sep * 2 if tokenizer.level == "bpe" else sep
    single, pair, empty = task.samples(
        [Example("中国人民", label="y"), Example("中国人民", "hello world hello", "x"), Example("中国人民", "", "x")]
    )
    assert single.ids.tolist() == cls + a[:10] + sep and single.ids.dtype == np.int32
    first, second = berts_loop(a, b, 12 - len(between) - 2)
    assert pair.ids.tolist() == cls + first + between + second + sep
    assert pair.token_type_ids.tolist() == [0] * (1 + len(first) + len(between)) + [1] * (len(second) + 1)
    assert single.token_type_ids.tolist() == [0] * len(single.ids)  # beside a pair
    assert empty.ids.tolist() == cls + a[: 10 - len(between)] + between + sep
    assert [sample.target for sample in (single, pair, empty)] == [1, 0, 0]
    assert task.samples([Example("中国")])[0].token_type_ids is None
    bare = Classification(tokenizer, ["x"], max_length=12, types=False).samples([Example("a", "b", "x")])
    assert bare[0].token_type_ids is None


def test_how_many_are_cut_is_known_to_the_piece(tokenizer):
    a, b = "中国人民", "hello world"
    whole = Classification(tokenizer, ["x"], max_length=99).samples([Example(a), Example(a, b)])
    for examples, length in (([Example(a)], len(whole[0].ids)), ([Example(a, b)], len(whole[1].ids))):
        if length > 8:
            task = Classification(tokenizer, ["x"], max_length=length - 1)
            assert task.truncated(task.samples(examples)) == 1
        task = Classification(tokenizer, ["x"], max_length=max(8, length))
        assert task.truncated(task.samples(examples)) == 0


def test_a_long_text_loses_its_end_or_its_middle(char):
    ids = char.encode("中国人民银行在北京", add_special_tokens=False)
    for truncation, kept in (("end", ids[:7]), ("middle", ids[:4] + ids[-3:])):
        task = Classification(char, ["x"], max_length=9, truncation=truncation)
        assert task.samples([Example("中国人民银行在北京")])[0].ids[1:-1].tolist() == kept


def test_kinds_follow_from_labels():
    def kind(*labels):
        return Classification.kind_of([Example("a", label=label) for label in labels])

    assert kind("a", "1") == "single_label_classification"
    assert kind(1.0, 0.5) == kind("5", 4.5) == "regression"  # JSON's 5 is a whole number among numbers
    assert kind([], ["a"]) == kind("b", ["a"]) == "multi_label_classification"
    assert Classification.find_labels([Example("a", label="y"), Example("b", label=["z", "x"])]) == ["x", "y", "z"]


def test_a_batch_is_packed_as_models_take_it(char):
    task = Classification(char, ["x", "y"], max_length=12)
    samples = task.samples([Example("中国", "人", "y"), Example("hello", None, "x"), Example("中", "国人民", "y")])
    batch = task.batch(samples)
    inputs = batch.inputs
    assert inputs["input_ids"].tolist() == np.concatenate([s.ids for s in samples]).tolist()
    assert inputs["token_type_ids"].tolist() == np.concatenate([s.token_type_ids for s in samples]).tolist()
    assert inputs["cu_seqlens"].tolist() == [0, 6, 9, 16] and inputs["cu_seqlens"].dtype == torch.int32
    assert inputs["labels"].tolist() == [1, 0, 1]
    assert {t.dtype for name, t in inputs.items() if name != "cu_seqlens"} == {torch.int64}
    assert (batch.max_seqlen, batch.labels, batch.tokens, batch.samples) == (7, 3, 16, 3)
    assert set(task.batch(task.samples([Example("中国")])).inputs) == {"input_ids", "cu_seqlens"}


@pytest.mark.parametrize("label", ["x", "nan", "inf", ["1"], None])
def test_numbers_that_are_none(char, label):
    task = Classification(char, ["value"], max_length=8, problem_type="regression")
    if label is None:
        assert task.samples([Example("a")])[0].target is None
        return
    with pytest.raises(DataError, match="f:1: label is .*, expected a number"):
        task.samples([Example("a", label=label, where="f:1")])


def test_classes_are_predicted_and_scored(char):
    task = Classification(char, ["x", "y", "z"], max_length=8)
    examples = [Example("a", label=label) for label in "xyyz"]
    logits = [np.array(row, np.float32) for row in ([2, 1, 0], [0, 3, 0], [1, 0, 0], [-900, 0, 900])]
    found = task.predictions(examples, task.samples(examples), logits)
    assert [p["label"] for p in found] == ["x", "y", "x", "z"]
    shares = torch.softmax(torch.tensor([2.0, 1, 0]), 0).tolist()
    assert found[0]["scores"] == pytest.approx(dict(zip("xyz", shares, strict=True)))
    assert found[0]["score"] == found[0]["scores"]["x"] and found[3]["score"] == 1
    json.dumps(found, allow_nan=False)
    scores = task.score(examples, found)
    assert task.metric in scores.metrics and scores.metrics["accuracy"] == 0.75
    assert scores.confusion[0] == ["x", "y", "z"] and scores.confusion[1].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert [row["label"] for row in scores.per_class] == ["x", "y", "z"]


def test_several_labels_are_predicted_and_scored(char):
    task = Classification(char, ["x", "y"], max_length=8, problem_type="multi_label_classification")
    examples = [Example("a", label=label) for label in (["y", "x"], [], "y")]
    samples = task.samples(examples)
    assert task.batch(samples).inputs["labels"].tolist() == [[1, 1], [0, 0], [0, 1]]
    assert task.batch(samples).inputs["labels"].dtype == torch.float32
    found = task.predictions(examples, samples, [np.array(row, np.float32) for row in ([1, -1], [-1, -1], [-2, 0.1])])
    assert [p["labels"] for p in found] == [["x"], [], ["y"]]
    scores = task.score(examples, found)
    assert scores.metrics["exact"] == pytest.approx(2 / 3) and scores.metrics["micro_f1"] == pytest.approx(0.8)
    assert task.metric in scores.metrics and scores.confusion is None


def test_numbers_are_predicted_and_scored(char):
    task = Classification(char, ["value"], max_length=8, problem_type="regression")
    examples = [Example("a", label=label) for label in (1.0, "2", 3.5)]
    samples = task.samples(examples)
    assert task.batch(samples).inputs["labels"].tolist() == [1, 2, 3.5]
    found = task.predictions(examples, samples, [np.array([v], np.float32) for v in (0, 1, 3.5)])
    assert found == [{"value": 0.0}, {"value": 1.0}, {"value": 3.5}]
    scores = task.score(examples, found).metrics
    assert scores["mean_squared_error"] == pytest.approx(2 / 3) and scores["spearman"] == pytest.approx(1)
    assert task.metric in scores


def test_two_labels_where_one_is_wanted(char):
    with pytest.raises(DataError, match="f:3: 2 labels, expected one"):
        Classification(char, ["x", "y"], max_length=8).samples([Example("a", label=["x", "y"], where="f:3")])


# tagging

GONE = ["\x00", "\u0301", " ", "\u200b"]


def test_the_first_piece_of_each_token_has_its_tag(tokenizer):
    tokens = ["Hello", "中国人民", "世界", "worlds", "，", "école", "１９９８年"]
    tags = list("abcdefg")
    (sample,) = Tagging(tokenizer, tags, max_length=99).samples([Example(tokens, label=tags)])
    places, owners = sample.place
    assert owners.tolist() == list(range(7)) and sample.target[places].tolist() == list(range(7))
    assert (np.delete(sample.target, places) == IGNORED).all() and sample.target.dtype == np.int64
    assert (sample.ids[0], sample.ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    spaced = tokenizer.level in ("bpe", "unigram")
    rows = [(" " if spaced and token in ("Hello", "worlds", "école") else "") + token for token in tokens]
    assert sample.ids[1:-1].tolist() == tokenizer.encode_words(rows)[0].tolist()
    assert sample.token_type_ids.tolist() == [0] * len(sample.ids)


@pytest.mark.parametrize("level", LEVELS)
@given(data=st.data())
def test_tokens_that_vanish_move_no_tag(trained, level, data):
    tokenizer = trained[level]
    tokens = data.draw(st.lists(st.sampled_from(["中", "hello", "Ａ", "é"] + GONE), min_size=1, max_size=8))
    tags = [f"t{number}" for number in range(len(tokens))]
    task = Tagging(tokenizer, tags, max_length=200)
    example = Example(tokens, label=tags)
    (sample,) = task.samples([example])
    places, owners = sample.place
    assert sample.target[places].tolist() == owners.tolist()
    assert {owner for owner, token in enumerate(tokens) if token not in GONE} <= set(owners.tolist())
    for place, owner in zip(places, owners, strict=True):  # each stands where its own pieces are
        space = " " * (level in ("bpe", "unigram") and (tokens[owner].isascii() or tokens[owner] == "é"))
        alone = tokenizer.encode_rows([["中", space + tokens[owner]]]).ids
        head = len(tokenizer.encode_rows([["中"]]).ids)
        if owner:
            assert sample.ids[place : place + len(alone) - head].tolist() == alone[head:].tolist()
    logits = [one_hot(np.maximum(sample.target, 0), len(sample.ids), len(tags))]
    (found,) = task.predictions([example], [sample], logits)
    filler = task.filler
    assert found["tokens"] == tokens
    assert found["tags"] == [tags[i] if i in owners else filler for i in range(len(tokens))]


@pytest.mark.parametrize("level", LEVELS)
@given(data=st.data())
def test_windows_of_tokens(trained, level, data):
    """Every token is in a window and predicted from the one that shows the most of what is around it."""
    words = st.sampled_from(["中", "中国人民", "hello", "worldly", "😀", "x" * 12, "\x00"])
    tokens = data.draw(st.lists(words, min_size=1, max_size=40))
    size, overlap = data.draw(st.integers(8, 24)), data.draw(st.integers(0, 30))
    tags = [f"t{number}" for number in range(len(tokens))]
    task = Tagging(trained[level], tags, max_length=size, overlap=overlap)
    example = Example(tokens, label=tags)
    (whole,) = Tagging(trained[level], tags, max_length=9999).samples([example])
    samples = task.samples([example])
    assert task.truncated(samples) == (len(samples) if len(whole.ids) > size else 0)
    assert all(3 <= len(sample.ids) <= size or len(whole.ids) == 2 for sample in samples)
    assert len(samples) <= 1 + 3 * math.ceil(len(whole.ids) / (size - 2))
    views = {owner: [] for owner in whole.place[1].tolist()}
    for number, sample in enumerate(samples):
        for place, owner in zip(*(part.tolist() for part in sample.place), strict=True):
            assert sample.target[place] == owner
            views[owner].append((min(place - 1, len(sample.ids) - 2 - place), number))
    assert all(views.values())
    # Logits that say in which window they were: the best one wins.
    logits = [np.full((len(sample.ids), len(tags)), 0.0) for sample in samples]
    task = Tagging(trained[level], [f"w{n}" for n in range(max(len(samples), 2))], max_length=size, overlap=overlap)
    logits = [one_hot(number, len(sample.ids), len(task.labels)) for number, sample in enumerate(samples)]
    (found,) = task.predictions([example], samples, logits)
    for owner, seen in views.items():
        best = max(room for room, _ in seen)
        assert found["tags"][owner] in {f"w{number}" for room, number in seen if room == best}


def test_windows_share_at_most_half(char):
    task = Tagging(char, ["O"], max_length=12, overlap=30)
    samples = task.samples([Example(["中"] * 60)])
    assert [sample.place[1][0] for sample in samples] == list(range(0, 51, 5))


def slow_decode(task, rows):
    """The best of all sequences, legal ones before others."""
    logs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    names = task.labels

    def value(path):
        ends = [None, *(names[i] for i in path), None]
        return sum(metrics.legal(task.scheme, a, b) for a, b in pairwise(ends)), sum(
            row[i] for row, i in zip(logs, path, strict=True)
        )

    return value, max(value(path) for path in product(range(len(names)), repeat=len(rows)))


@given(st.data())
def test_viterbi_finds_the_best_legal_sequence(trained, data):
    names = data.draw(
        st.sampled_from(["O B-X I-X B-Y I-Y", "O B-X I-X E-X S-X", "B M E S", "B-X M-X E-X S-X O", "B E"])
    )
    task = Tagging(trained["char"], names.split(), max_length=8)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rows = rng.normal(size=(data.draw(st.integers(1, 5)), len(task.labels))) * 3
    value, best = slow_decode(task, rows)
    found = value(task._decode(rows))
    assert found[0] == best[0] and found[1] == pytest.approx(best[1])
    free = Tagging(trained["char"], names.split(), max_length=8, constrained=False)
    assert free._decode(rows) == rows.argmax(-1).tolist()


def test_a_token_that_vanished_does_not_break_a_span(char):
    task = Tagging(char, ["O", "B-X", "I-X"], max_length=20)
    example = Example(["a", "中", "\x00", "国", "\x00"], label=["O"] * 5)
    (sample,) = task.samples([example])
    rows = one_hot(0, len(sample.ids), 3)
    rows[sample.place[0][1:]] = [[0, 9, 0], [0, 0, 9]]
    (found,) = task.predictions([example], [sample], [rows])
    assert found["tags"] == ["O", "B-X", "I-X", "I-X", "O"]
    assert found["spans"] == [{"type": "X", "begin": 1, "end": 4, "text": "中\x00国"}]


def test_texts_of_which_nothing_is_left(tokenizer):
    task = Tagging(tokenizer, ["O", "B-X", "I-X"], max_length=20)
    for text in (["\u0301"], "\u0301"):
        samples = task.samples([Example(text)])
        logits = [np.zeros((len(sample.ids), 3), np.float32) for sample in samples]
        (found,) = task.predictions([Example(text)], samples, logits)
        assert set(found["tags"]) <= {"O"} and found["spans"] == []


def test_raw_texts_become_tokens(trained):
    def tokens(level, text, **settings):
        return Tagging(trained[level], ["O", "B"], max_length=8, **settings).tokens(Example(text))

    assert tokens("char", " ab 中国 ", characters=True) == ["a", "b", "中", "国"]
    assert tokens("char", "ab 中国") == ["ab", "中国"] and tokens("char", " ab中国 ") == ["ab", "中", "国"]
    assert tokens("word", "中国人民银行,Hello") == ["中国人民银行", ",", "Hello"]
    for level in ("wordpiece", "bpe", "unigram"):
        assert tokens(level, " hello\n") == ["hello"]


def test_texts_of_spans(char):
    task = Tagging(char, ["O", "B-X", "I-X"], max_length=40)

    def text(tokens, **settings):
        task = Tagging(char, ["O", "B-X", "I-X"], max_length=40, **settings)
        samples = task.samples([Example(tokens)])
        tags = np.full(len(samples[0].ids), 2)
        tags[1] = 1
        return task.predictions([Example(tokens)], samples, [one_hot(tags, len(tags), 3)])[0]["spans"][0]["text"]

    assert text(["New", "York"]) == "New York" and text(["中国", "人民"]) == "中国人民"
    assert text(["北京", "Hyatt", "酒店"]) == "北京Hyatt酒店" and text(["한국", "은행"]) == "한국 은행"
    assert text(list("NYC"), characters=True) == "NYC"
    assert task.metric == "f1"


@pytest.mark.parametrize(
    "tags, loose",
    [
        ("O B-X I-X O", False),
        ("O I-X I-X O", True),  # IOB1
        ("I-X B-X I-X O I-X", True),
        ("B-X O " * 9 + "I-X", True),
        ("B-X O " * 20 + "I-X", False),  # a slip
        ("B M E S", False),
        ("n v n", False),
    ],
)
def test_tags_that_break_their_scheme_are_not_forced_into_it(char, tags, loose):
    tags = tags.split()
    habits = Tagging.habits_of([Example(["x"] * len(tags), label=tags)])
    assert habits["loose"] == loose
    task = Tagging(char, sorted(set(tags)), max_length=80, **habits)
    example = Example(["x"] * len(tags), label=tags)
    (sample,) = task.samples([example])
    logits = [one_hot(np.maximum(sample.target, 0), len(sample.ids), len(task.labels))]
    (found,) = task.predictions([example], [sample], logits)
    if loose:
        assert found["tags"] == tags


def test_habits_of_tagged_examples():
    habits = Tagging.habits_of([Example(list("ab"), label=["v", "n"]), Example(["c"], label=["v"])])
    assert habits == {"characters": True, "filler": "v", "loose": False}
    assert not Tagging.habits_of([Example(["ab"], label=["v"])])["characters"]
    assert Tagging.find_labels([Example(["a", "b"], label=["v", "n"]), Example(["c"], label=["v"])]) == ["n", "v"]


def test_tags_are_scored_by_span_or_by_token(char):
    examples = [Example(["a"] * 3, label=["B-X", "I-X", "O"]), Example(["a"], label=["B-Y"], where="f:2")]
    task = Tagging(char, ["O", "B-X", "I-X", "B-Y"], max_length=8)
    found = [{"tags": ["B-X", "O", "O"]}, {"tags": ["B-Y"]}]
    scores = task.score(examples, found)
    assert scores.metrics == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.75}
    assert [(row["label"], row["f1"]) for row in scores.per_class] == [("X", 0), ("Y", 1)]
    assert scores.confusion[0] == task.labels and scores.confusion[1].sum() == 4
    words = Tagging(char, ["n", "v"], max_length=8)
    assert words.metric == "accuracy"
    scores = words.score([Example(["a", "b"], label=["n", "v"])], [{"tags": ["n", "n"]}])
    assert scores.metrics["accuracy"] == 0.5 and "micro_f1" not in scores.metrics
    with pytest.raises(DataError, match="f:2: 2 predictions for 1 tags"):
        task.score(examples[1:], [{"tags": ["O", "O"]}])


def test_a_batch_of_tags(char):
    task = Tagging(char, ["n", "v"], max_length=8)
    samples = task.samples([Example(["hello", "中国"], label=["v", "n"]), Example(["人"], label=["v"])])
    batch = task.batch(samples)
    assert batch.inputs["labels"].tolist() == [-100, 1, 0, -100, -100, -100, 1, -100]
    assert (batch.labels, batch.samples) == (3, 2)

    class Output:
        logits = torch.arange(16.0, dtype=torch.bfloat16).view(8, 2)

    parts = task.logits(Output, batch)
    assert [part.shape for part in parts] == [(5, 2), (3, 2)] and parts[1][0].tolist() == [10, 11]
    assert parts[0].dtype == np.float32


# questions

ANSWERS = [
    "café",
    "中国人民",
    "caf\u0301e",
    "😀",
    "👍🏽",
    "1998",
    "1998年",
    "ﬁn",
    "ＡＢＣ",
    "of 中国",
    "(1998年)",
    "Ｔhe",
]


COARSE = {  # what is not bounded by the borders of pieces
    *product(("char", "wordpiece", "word"), ["😀", "👍🏽"]),
    *product(("wordpiece", "word"), ["中国人民", "1998", "of 中国"]),
    ("bpe", "of 中国"),
    *product(["unigram"], ANSWERS),  # whose training is not the same each time
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_comes_back_from_its_pieces(tokenizer, answer):
    """The target of training, given back as a prediction, is the answer and what else its first and last piece hold."""
    task = QuestionAnswering(tokenizer, max_length=200)
    example = Example(TRICKY, "中国?", [(answer, TRICKY.index(answer))])
    (sample,) = task.samples([example])
    assert sample.target != (0, 0)
    rows = np.zeros((len(sample.ids), 2), np.float32)
    rows[sample.target[0], 0] = rows[sample.target[1], 1] = 9
    (found,) = task.predictions([example], [sample], [rows])
    assert found["answer"] == TRICKY[found["begin"] : found["end"]]
    begin, end = TRICKY.index(answer), TRICKY.index(answer) + len(answer)
    own = [place for place in tokenizer.encode_with_offsets(TRICKY)[1] if place[0] < end and place[1] > begin]
    assert (found["begin"], found["end"]) == (min(own)[0], own[-1][1])
    assert found["begin"] <= begin and end <= found["end"] and found["answer"] == found["answer"].strip()
    assert found["answer"] == answer or (tokenizer.level, answer) in COARSE


@pytest.mark.parametrize("level", LEVELS)
@given(data=st.data())
def test_windows_of_a_context(trained, level, data):
    tokenizer = trained[level]
    context = data.draw(st.text(st.sampled_from("中国人民hello , １é😀"), min_size=1, max_size=40)) + "end"
    begin = data.draw(st.integers(0, len(context) - 1))
    text = context[begin : data.draw(st.integers(begin + 1, len(context)))]
    size, stride = data.draw(st.integers(8, 30)), data.draw(st.integers(0, 40))
    task = QuestionAnswering(tokenizer, max_length=size, stride=stride)
    example = Example(context, "中国人民 hello?" * data.draw(st.integers(1, 3)), [(text, begin)])
    samples = task.samples([example])
    ids, offsets = tokenizer.encode_with_offsets(context)
    question = tokenizer.encode(example.text_pair, add_special_tokens=False)[: (size - task.pair_specials) // 2]
    seen = set()
    for sample in samples:
        first, own = sample.place
        assert len(sample.ids) <= size and len(sample.ids) == first + len(own) + 1
        assert sample.ids[1 : 1 + len(question)].tolist() == question
        start = offsets.index(own[0])
        assert any(
            sample.ids[first:-1].tolist() == ids[at : at + len(own)] and offsets[at : at + len(own)] == own
            for at in range(start, len(ids))
        )
        assert (sample.token_type_ids[first:] == 1).all() and (sample.token_type_ids[:first] == 0).all()
        seen |= set(own)
        if sample.target != (0, 0):
            covered = own[sample.target[0] - first : sample.target[1] - first + 1]
            inside = [o for o in offsets if o[0] < begin + len(text) and o[1] > begin]
            assert covered == inside and first <= sample.target[0] <= sample.target[1] < len(sample.ids) - 1
    assert seen == set(offsets)
    assert task.truncated(samples) == (len(samples) if len(samples) > 1 else 0)


def test_the_best_span_of_all_windows(char):
    task = QuestionAnswering(char, max_length=12, stride=2, max_answer_length=2)
    example = Example("中国人民银行在北京发布了", "中国", [("北京", 7)])
    samples = task.samples([example])
    assert len(samples) > 1
    assert sum(sample.target != (0, 0) for sample in samples) >= 1
    logits = [np.zeros((len(sample.ids), 2), np.float32) for sample in samples]
    for sample, rows in zip(samples, logits, strict=True):
        rows[:3] = 50  # [CLS] and the question are no answer
        rows[-1] = 50
        if sample.target != (0, 0):
            rows[sample.target[0], 0] = rows[sample.target[1], 1] = 5
            rows[sample.target[0] - 1, 1] = 9  # an end before the begin
    (found,) = task.predictions([example], samples, logits)
    assert (found["answer"], found["begin"], found["end"]) == ("北京", 7, 9) and 0.5 < found["score"] <= 1
    scores = task.score([example], [found])
    assert scores.metrics == {"f1": 1, "exact_match": 1}


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6))
def test_the_best_span_of_a_window(trained, length, most, seed):
    task = QuestionAnswering(trained["char"], max_length=20, max_answer_length=most)
    rows = np.random.default_rng(seed).normal(size=(length + 4, 2)).astype(np.float32)
    value, share, begin, end = task._best_span(rows, 3, length)
    own = rows[3 : 3 + length].astype(np.float64)
    sums = {(a, b): own[a, 0] + own[b, 1] for a in range(length) for b in range(a, min(length, a + most))}
    assert value == pytest.approx(max(sums.values())) and sums[begin, end] == pytest.approx(value)
    assert share == pytest.approx(np.exp(value) / sum(map(np.exp, sums.values())))


def test_no_answer(char):
    examples = [Example("中国人民", "国?", []), Example("中国人民", "国?", [("人民", 2)])]
    assert QuestionAnswering.habits_of(examples) == {"no_answer": True}
    assert QuestionAnswering.habits_of(examples[1:]) == {"no_answer": False}
    found = {}
    for threshold in (0.0, 3.0):
        task = QuestionAnswering(char, max_length=20, no_answer=True, null_threshold=threshold)
        samples = task.samples(examples)
        assert [sample.target for sample in samples] == [(0, 0), (6, 7)]
        rows = np.zeros((len(samples[0].ids), 2), np.float32)
        rows[0], rows[6, 0], rows[7, 1] = 2, 1, 1  # no answer wins by two
        found[threshold] = task.predictions(examples, samples, [rows, rows])
    assert [p["answer"] for p in found[0.0]] == ["", ""] and [p["answer"] for p in found[3.0]] == ["人民", "人民"]
    assert found[0.0][0]["begin"] is None
    scores = task.score(examples, [found[0.0][0], found[3.0][0]])
    assert scores.metrics == {"f1": 1, "exact_match": 1, "answerable_f1": 1, "no_answer_accuracy": 1}
    assert task.score(examples, found[3.0]).metrics["no_answer_accuracy"] == 0
    answering = QuestionAnswering(char, max_length=20)
    assert answering.predictions(examples, samples, [rows, rows])[0]["answer"] == "人民"


def test_a_context_of_which_nothing_is_left(char):
    task = QuestionAnswering(char, max_length=20)
    example = Example("\x00\u0301", "国?", [("\u0301", 1)])
    samples = task.samples([example])
    (found,) = task.predictions([example], samples, [np.zeros((len(s.ids), 2), np.float32) for s in samples])
    assert found == {"answer": "", "begin": None, "end": None, "score": 0.0}
    assert samples[0].target == (0, 0)


def test_a_batch_of_questions(tokenizer):
    task = QuestionAnswering(tokenizer, max_length=30)
    samples = task.samples([Example("中国人民", "国?", [("人民", 2)]), Example("hello", "?", [])])
    batch = task.batch(samples)
    assert batch.inputs["start_positions"].tolist() == [sample.target[0] for sample in samples]
    assert batch.inputs["end_positions"].tolist() == [sample.target[1] for sample in samples]
    total = len(batch.inputs["input_ids"])

    class Output:
        start_logits, end_logits = torch.arange(total), -torch.arange(total)

    parts = task.logits(Output, batch)
    assert [len(part) for part in parts] == [len(sample.ids) for sample in samples]
    assert parts[1][0].tolist() == [len(samples[0].ids), -len(samples[0].ids)]
