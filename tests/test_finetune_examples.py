"""Examples from files of every format, and what is said of files that are wrong."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.errors import ConfigError, DataError, MissingFileError
from fastbert.finetune.examples import FORMATS, Example, read_examples


@pytest.fixture
def written(tmp_path):
    """Writes bytes or text, or an object as JSON, to a file of a name."""

    def write(name, content):
        content = content if isinstance(content, str | bytes) else json.dumps(content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def squad(answers=None, *, context="Ada wrote it in 1843.", **question):
    made = {"id": 7, "question": "Who?", **({} if answers is None else {"answers": answers}), **question}
    return {"data": [{"title": "x", "paragraphs": [{"context": context, "qas": [made]}]}]}


def lines(examples):
    return [int(example.where.rpartition(":")[2]) for example in examples]


# rows of columns


def test_csv_is_read_as_spreadsheets_write_it(written):
    path = written(
        "a.csv",
        b'\xef\xbb\xbftext,label\r\n"one, ""two""",pos\r\n"a\r\nb\nc",neg\r\n\r\n\xe4\xb8\xad\xe5\x9b\xbd,pos\r\n',
    )
    assert read_examples(path, "classification") == [
        Example('one, "two"', None, "pos", None, f"{path}:2"),
        Example("a\r\nb\nc", None, "neg", None, f"{path}:3"),
        Example("中国", None, "pos", None, f"{path}:7"),
    ]


@given(st.lists(st.tuples(st.text(st.sampled_from("a \"',\n\r\t中\u2028"), min_size=1), st.text("ab,", min_size=1))))
def test_csv_gives_back_what_the_module_csv_wrote(tmp_path_factory, rows):
    rows = [(text, label) for text, label in rows if text.strip()] + [("last", "x")]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("text", "label"), *rows])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    assert [(e.text, e.label) for e in read_examples(path, "classification")] == rows


def test_quotes_in_tsv_are_text(written):
    path = written("a.tsv", 'sentence1\tsentence2\tscore\nsay "hi\t"\t0\nb\tc\t1\n')
    found = read_examples(path, "classification")
    assert [(e.text, e.text_pair, e.label) for e in found] == [('say "hi', '"', "0"), ("b", "c", "1")]
    assert lines(found) == [2, 3]


def test_json_lines(written):
    rows = [
        {"text": "line\u2028separator\x85 \x1c\x0b", "label": 2, "idx": 5},
        {"sentence": "b", "label": 0.5, "extra": []},
        {"text": "c", "text_pair": None, "label": []},
        {"text": "c", "text_pair": "", "label": ["x", "y"]},
    ]
    text = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    found = read_examples(written("a.jsonl", text), "classification")
    assert [(e.text, e.text_pair, e.label, e.id) for e in found] == [
        ("line\u2028separator\x85 \x1c\x0b", None, "2", "5"),
        ("b", None, 0.5, None),
        ("c", None, [], None),
        ("c", "", ["x", "y"], None),
    ]
    assert lines(found) == [1, 3, 5, 7]


@pytest.mark.parametrize(
    "header, columns, expected",
    [
        ("label,content,title", None, ("2", None, "1")),
        ("label,content,title", {"text_pair": "title"}, ("2", "3", "1")),
        ("a,b,c", {"text": "c", "label": "a", "text_pair": "b"}, ("3", "2", "1")),
        ("text,sentence1,label", {"text_pair": "text"}, ("2", "1", "3")),  # what is named is not taken twice
        ("sentence2,text,label", {"text": "sentence2"}, ("1", None, "3")),
        ("text,label,class", {"label": "class"}, ("1", None, "3")),
        (" text , label ,x", None, ("1", None, "2")),
    ],
)
def test_columns_are_found_by_name(written, header, columns, expected):
    (found,) = read_examples(written("a.csv", f"{header}\n1,2,3\n"), "classification", columns=columns)
    assert (found.text, found.text_pair, found.label) == expected


def test_labels_are_read_as_asked(written):
    bare, mixed = written("bare.csv", "text\na\n"), written("mixed.csv", "text,label\na,\nb, x \n")
    assert [
        e.label for labelled in (False, None) for e in read_examples(bare, "classification", labelled=labelled)
    ] == [
        None,
        None,
    ]
    assert [e.label for e in read_examples(mixed, "classification", labelled=None)] == [None, "x"]
    assert [e.label for e in read_examples(mixed, "classification", labelled=False)] == [None, None]


def test_several_files_in_order_and_by_suffix(written):
    paths = [written("a.CSV", "text,label\na,x\n"), written("b.jsonl", '{"text": "b", "label": "y"}')]
    assert [e.text for e in read_examples(map(str, paths), "classification")] == ["a", "b"]
    other = written("c.data", "text\tlabel\nc\tz\n")
    assert read_examples(other, "classification", format="tsv")[0].label == "z"


def test_invalid_utf_8_is_replaced_if_asked(written):
    path = written("a.csv", b"text,label\nr\xff,x\n")
    assert read_examples(path, "classification", errors="replace")[0].text == "r\ufffd"


def test_texts_a_line(written):
    path = written("a.txt", "\ufeffone\r\n\n two\u2028 \rthree")
    found = read_examples(path, "classification", labelled=False)
    assert [e.text for e in found] == ["one", "two", "three"] and lines(found) == [1, 3, 4]
    assert all(e.label is None for e in found)


# tagged text


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_conll(written, end):
    rows = ["-DOCSTART- -X- O", "", "EU NNP B-ORG", "rejects\tVBZ  O", " ", "", "\u3000 X O", "# NN O"]
    path = written("a.conll", end.join(rows))
    found = read_examples(path, "tagging")
    assert [(e.text, e.label) for e in found] == [
        (["EU", "rejects"], ["B-ORG", "O"]),
        (["\u3000", "#"], ["O", "O"]),
    ]
    assert lines(found) == [3, 7]
    assert [e.label for e in read_examples(path, "tagging", labelled=False)] == [None, None]


def test_columns_of_conll_by_number(written):
    path = written("a.conll", "EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n")
    (found,) = read_examples(path, "tagging", columns={"tags": "2"})
    assert (found.text, found.label) == (["EU", "rejects"], ["NNP", "VBZ"])
    (found,) = read_examples(path, "tagging", columns={"tokens": "2", "tags": "3"})
    assert (found.text, found.label) == (["NNP", "VBZ"], ["B-NP", "B-VP"])
    with pytest.raises(DataError, match=r"a\.conll:1: 4 columns, expected at least 5"):
        read_examples(path, "tagging", columns={"tags": "5"})
    for columns in ({"tags": "pos"}, {"tags": "0"}, {"id": "1"}):
        with pytest.raises(ConfigError, match="expected tokens and tags by their numbers, from 1 on"):
            read_examples(path, "tagging", columns=columns)
    with pytest.raises(ConfigError, match="format 'tagged' has none"):
        read_examples(written("a.txt", "a/b\n"), "tagging", format="tagged", columns={"tags": "2"})


def test_words_with_tags(written):
    found = read_examples(written("a.txt", "1/2/m  //w\n\n中国/ns 人/n\n"), "tagging", format="tagged")
    assert [(e.text, e.label) for e in found] == [(["1/2", "/"], ["m", "w"]), (["中国", "人"], ["ns", "n"])]
    assert lines(found) == [1, 3]


def test_numbers_and_brackets_of_the_peoples_daily_are_no_words(written):
    line = "19980101-01-001-001/m [中央/n 人民/n 电台/n]nt [/w 二/m ]/w [1]/m [《/w 人/n 》/w]nz 19980101-01/m\n"
    (found,) = read_examples(written("a.txt", line), "tagging", format="tagged")
    assert found.text == ["中央", "人民", "电台", "[", "二", "]", "[1]", "《", "人", "》", "19980101-01"]
    assert found.label == ["n", "n", "n", "w", "m", "w", "m", "w", "n", "w", "m"]


def test_tokens_in_columns(written):
    rows = [{"tokens": ["a b", "c"], "ner_tags": ["O", "B-X"]}, {"words": "a b", "tags": "X Y"}]
    found = read_examples(written("a.jsonl", "\n".join(map(json.dumps, rows))), "tagging")
    assert [(e.text, e.label) for e in found] == [(["a b", "c"], ["O", "B-X"]), (["a", "b"], ["X", "Y"])]
    found = read_examples(written("a.csv", "text,labels\na b,X Y\n"), "tagging")
    assert (found[0].text, found[0].label) == (["a", "b"], ["X", "Y"])
    raw = read_examples(written("b.csv", "text\na b\n"), "tagging", labelled=None)
    assert (raw[0].text, raw[0].label) == ("a b", None)


# questions


@pytest.mark.parametrize(
    "answers, expected",
    [
        ([{"text": "Ada", "answer_start": 0}, {"text": "1843", "answer_start": 16}], [("Ada", 0), ("1843", 16)]),
        ({"text": ["1843"], "answer_start": [16]}, [("1843", 16)]),
        ({"text": [], "answer_start": []}, []),
        ([], []),
    ],
)
def test_answers(written, answers, expected):
    row = {"question": "Who?", "context": "Ada wrote it in 1843.", "answers": answers, "id": 7}
    made = [written("a.jsonl", row), written("a.json", squad(answers))]
    for found in (read_examples(path, "qa") for path in made):
        assert [(e.text, e.text_pair, e.label, e.id) for e in found] == [(row["context"], "Who?", expected, "7")]


def test_answers_in_columns_and_none(written):
    path = written("a.csv", "question,context,answer\nq,abcbc,bc\nq,abc,\n")
    assert [e.label for e in read_examples(path, "qa")] == [[("bc", 1)], []]
    assert [e.label for e in read_examples(path, "qa", labelled=False)] == [None, None]
    for labelled in (None, False):
        (found,) = read_examples(written("a.json", squad()), "qa", labelled=labelled)
        assert found.label is None and found.where.endswith("a.json: question 7")
    (found,) = read_examples(written("b.json", squad([], is_impossible=True)), "qa", labelled=None)
    assert found.label == []


# what is wrong

GOOD = '{"text": "a", "label": "x"}\n'
BAD = [  # name of the file, content, task, words of the message
    ("a.csv", "", "classification", ":1: no column for text; it has none; expected one of text, sentence"),
    ("a.csv", "text,label\n", "classification", "a.csv has no examples"),
    ("a.csv", "words,label\na,x\n", "classification", "columns text=NAME"),
    ("a.csv", "text,what\na,x\n", "classification", ":1: no column for label; it has text, what"),
    ("a.csv", "text,label,text\na,x,b\n", "classification", ":1: the column 'text' is there twice"),
    ("a.csv", 'text,label\n"a\nb",x\na,b,c\n', "classification", ":4: 3 columns, expected 2: text, label"),
    ("a.csv", "text,label\na\n", "classification", ":2: 1 columns, expected 2"),
    ("a.csv", 'text,label\na,x\n"b,x\nc,x\nd,x\n', "classification", ":3: unexpected end of data"),
    ("a.csv", 'text,label\n"a"b,x\n', "classification", ":2: "),
    ("a.csv", "text,label\na,x\nb,\n", "classification", ":3: label is empty"),
    ("a.csv", "text,label\na,x\nb, \n", "classification", ":3: label is empty"),
    ("a.csv", "text,label\n \u3000,x\n", "classification", ":2: text is empty"),
    ("a.csv", b"text,label\r\na,x\r\nb\xff,x\r\n", "classification", ":3: invalid UTF-8 at byte 18; errors='replace'"),
    ("a.csv", b"text,label\ra,x\rb\xff,x\r", "classification", ":3: invalid UTF-8"),
    ("a.csv", "text,label\na,x\n".encode("utf-16"), "classification", ":1: invalid UTF-8 at byte 0"),
    ("a.tsv", "text\tlabel\na,x\n", "classification", ":2: 1 columns, expected 2"),
    ("a.jsonl", GOOD + "\n{", "classification", ":3: not valid JSON"),
    ("a.jsonl", GOOD + "[]", "classification", ":2: a JSON list, expected an object"),
    ("a.jsonl", GOOD + "[" * 100_000, "classification", ":2: not valid JSON"),
    (
        "a.jsonl",
        r'{"text": "\ud83d", "label": "x"}',
        "classification",
        ":1: not valid JSON: 'utf-8' codec can't encode",
    ),
    ("a.jsonl", GOOD + '{"text": 3, "label": "x"}', "classification", ":2: text is a int, expected a text"),
    ("a.jsonl", '{"text": "a", "text_pair": 1, "label": "x"}', "classification", ":1: text_pair is a int"),
    ("a.jsonl", GOOD + '{"text": "a"}', "classification", ":2: no column for label"),
    ("a.jsonl", '{"text": "a", "label": null}', "classification", ":1: label is empty"),
    ("a.jsonl", '{"text": "a", "label": true}', "classification", ":1: label is True, expected a text, a number"),
    ("a.jsonl", '{"text": "a", "label": [1]}', "classification", ":1: label is [1]"),
    ("a.jsonl", '{"text": "a", "label": ["x", ""]}', "classification", ":1: label is ['x', '']"),
    ("a.jsonl", '{"text": "a", "label": NaN}', "classification", ":1: label is nan"),
    ("a.jsonl", '{"text": "a", "label": 1e999}', "classification", ":1: label is inf"),
    ("a.txt", "a\n", "classification", "format 'txt' cannot hold what classification needs"),
    ("a.conll", "a O\n", "classification", "format 'conll' cannot hold what classification needs"),
    ("a.conll", "a O\n\nb O\nc\n", "tagging", ":4: 'c', expected a token and its tag"),
    ("a.conll", "a X O\n\nb O\n", "tagging", ":3: 2 columns, expected 3"),
    ("a.conll", "\n\n", "tagging", "a.conll has no examples"),
    ("a.json", squad([]), "tagging", "format 'squad' cannot hold what tagging needs"),
    ("a.jsonl", '{"tokens": ["a"], "tags": []}', "tagging", ":1: 1 tokens but 0 tags, expected one for each"),
    ("a.jsonl", '{"tokens": [], "tags": []}', "tagging", ":1: no tokens"),
    ("a.jsonl", '{"tokens": ["a", ""], "tags": ["O", "O"]}', "tagging", ":1: tokens is ['a', '']"),
    ("a.jsonl", '{"tokens": ["a"], "tags": [3]}', "tagging", ":1: tags is [3], expected a list of texts"),
    ("a.jsonl", '{"text": "a b", "tags": null}', "tagging", ":1: tags is None, expected a list of texts"),
    ("a.jsonl", '{"tokens": ["a"]}', "tagging", ":1: no column for tags"),
    ("a.csv", "tokens,tags\na b,O\n", "tagging", ":2: 2 tokens but 1 tags"),
    ("a.json", "{", "qa", "a.json: not valid JSON"),
    ("a.json", "[1]", "qa", "a.json: object 1: a JSON int, expected an object"),
    ("a.json", '[{"text": "a"}]', "classification", "a.json: object 1: no column for label"),
    ("a.json", GOOD + '{"text": "a"}', "classification", "a.json:2: no column for label"),
    ("a.json", "1", "qa", "a.json: not in the form of SQuAD"),
    (
        "a.json",
        '{"data": [{"paragraphs": [{"qas": [{"id": 1}]}]}]}',
        "qa",
        "not in the form of SQuAD: no question in data[0].paragraphs[0].qas[0], {'id': 1}",
    ),
    ("a.json", '{"data": []}', "qa", "a.json has no examples"),
    ("a.json", squad(), "qa", "question 7: answers is None, expected a list"),
    ("a.json", squad(question=3), "qa", "question 7: question is a int, expected a text"),
    ("a.json", squad([], context=" "), "qa", "question 7: context is empty"),
    ("a.json", squad([{"text": "Ada", "answer_start": 1}]), "qa", "at 1 the context says 'da ', the answer is 'Ada'"),
    ("a.json", squad([{"text": ".", "answer_start": -1}]), "qa", "at -1 the context says 'A', the answer is '.'"),
    ("a.json", squad([{"text": "wrote", "answer_start": -17}]), "qa", "at -17 the context says 'Ada w'"),
    ("a.json", squad([{"text": "x", "answer_start": 99}]), "qa", "at 99 the context says '', the answer is 'x'"),
    ("a.json", squad([{"text": "", "answer_start": 0}]), "qa", "an answer is {'text': '', 'answer_start': 0}"),
    (
        "a.json",
        squad([{"text": "A", "answer_start": False}]),
        "qa",
        "an answer is {'text': 'A', 'answer_start': False}",
    ),
    ("a.json", squad(["Ada"]), "qa", "an answer is 'Ada', expected text and answer_start"),
    ("a.json", squad({"text": ["Ada"], "answer_start": []}), "qa", "expected as many texts as answer_start"),
    ("a.csv", "question,context,answer\nq,abc,x\n", "qa", ":2: the answer 'x' is not in the context"),
    ("a.txt", "a\n", "qa", "format 'txt' cannot hold what qa needs"),
]


def test_json_is_read_by_what_it_holds(written):
    rows = [{"sentence": "a b", "label": "x"}, {"sentence": "c", "label": 1}]
    lines_, listed = written("a.json", "\n".join(map(json.dumps, rows))), written("b.json", json.dumps(rows, indent=1))
    for path in (lines_, listed):
        assert [(e.text, e.label) for e in read_examples(path, "classification")] == [("a b", "x"), ("c", "1")]
    assert lines(read_examples(lines_, "classification")) == [1, 2]
    tree = squad([{"text": "Ada", "answer_start": 0}])
    for path in (written("c.json", json.dumps(tree)), written("d.json", json.dumps(tree, indent=1))):
        assert read_examples(path, "qa") == read_examples(path, "qa", format="squad")


@pytest.mark.parametrize("name, content, task, words", BAD)
def test_what_is_wrong_is_said_with_its_place(written, name, content, task, words):
    path = written(name, content)
    with pytest.raises((DataError, ConfigError)) as caught:
        read_examples(path, task)
    assert isinstance(caught.value, ConfigError) == ("cannot hold" in words)
    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"task": "ner"}, "task is 'ner', expected one of classification, tagging, qa"),
        ({"format": "xls"}, "format is 'xls', expected one of csv, tsv"),
        ({"columns": {"tags": "x"}}, "columns names 'tags', expected text, text_pair, id, label for classification"),
        ({"errors": "ignore"}, "errors is 'ignore', expected 'strict' or 'replace'"),
        ({"files": "b.xml"}, "the suffix '.xml' names no format; set format"),
    ],
)
def test_what_is_asked_wrongly(written, change, words):
    written("b.xml", "<a>")
    path = written("a.csv", "text,label\na,x\n")
    if "files" in change:
        change["files"] = path.with_name(change["files"])
    with pytest.raises(ConfigError) as caught:
        read_examples(**{"files": path, "task": "classification", **change})
    assert words in str(caught.value)


def test_columns_that_are_not_there(written, tmp_path):
    path = written("a.csv", "text,label\na,x\n")
    with pytest.raises(DataError, match=r"a.csv:1: no column 'x' for text; it has text, label"):
        read_examples(path, "classification", columns={"text": "x"})
    for missing in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(MissingFileError, match=str(missing)):
            read_examples([path, missing], "classification")
    with pytest.raises(DataError, match="no examples"):
        read_examples([path, written("b.csv", "text,label\n")], "classification")


@given(st.binary(max_size=60) | st.text(st.sampled_from('{}[]":,\n\r\t texlab/O-')).map(str.encode))
def test_no_file_gives_another_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    for kind in FORMATS:
        for task in ("classification", "tagging", "qa"):
            try:
                found = read_examples(path, task, format=kind, labelled=None)
                assert found and all(isinstance(example, Example) for example in found)
            except (DataError, ConfigError) as error:
                assert str(path) in str(error)
