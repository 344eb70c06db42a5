"""Reports of an evaluation: the table for the terminal, JSON, the picture of what was taken for what."""

import json
import math
import struct
import warnings

import numpy as np
import pytest

from fastbert.errors import MissingDependencyError
from fastbert.finetune import Scores, metrics, report


def scores(labels, table=None):
    table = np.arange(len(labels) ** 2).reshape(len(labels), -1) * 1000 if table is None else table
    counts = np.diag(table).tolist(), table.sum(0).tolist(), table.sum(1).tolist()
    return Scores({"accuracy": 0.5, "pearson": math.nan}, metrics.per_class(*counts, labels), (labels, table))


def test_the_table_is_in_columns():
    text = str(scores(["正面", "negative", "x"]))
    head, _, columns, *rows, _, numbers = text.splitlines()
    assert head == "accuracy 0.5000  pearson nan"
    assert columns == "label     precision  recall      f1   support"
    assert rows[0] == "正面         0.0000  0.0000  0.0000     3,000"  # wide characters take two columns
    assert rows[1] == "negative     0.3333  0.3333  0.3333    12,000"
    assert numbers == "labels by number: 1 正面, 2 negative, 3 x"
    assert "number" not in str(scores(["a", "b"])) and str(Scores({"f1": 1.0})) == "f1 1.0000"


def test_json_has_no_nan():
    made = json.loads(json.dumps(scores(["a", "b"]).to_json(), allow_nan=False))
    assert made["metrics"] == {"accuracy": 0.5, "pearson": None}
    assert made["confusion"] == {"labels": ["a", "b"], "counts": [[0, 1000], [2000, 3000]]}
    assert made["per_class"][1]["support"] == 5000
    assert Scores({"f1": 1.0}).to_json() == {"metrics": {"f1": 1.0}, "per_class": None, "confusion": None}


@pytest.mark.parametrize(
    "labels",
    [["negative", "$a$ of $", "é" * 60], ["正面", "负面"], ["ชื่อ"], [f"l{n}" for n in range(17)], ["O"] + ["नाम"] * 2],
)
def test_a_picture_of_any_labels(tmp_path, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a glyph that is missing
        path = scores(labels).plot(tmp_path / "a.png")
    head = path.read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:])
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and 400 < height <= width < 1200


def test_a_picture_of_nothing(tmp_path):
    assert scores(["a", "b"], np.zeros((2, 2), np.int64)).plot(tmp_path / "a.png").stat().st_size > 1000


def test_labels_that_no_font_can_write_are_numbered(monkeypatch):
    assert report._written(["é", "x" * 30]) == (["é", "x" * 23 + "…"], {"fontfamily": "DejaVu Sans"})
    monkeypatch.setattr(report, "_FONTS", ("No Such Font", "DejaVu Sans"))
    assert report._written(["é", "正面"]) == (["1", "2"], {})


def test_what_the_picture_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"matplotlib: pip install fastbert-kernels\[plot\]"):
        scores(["a", "b"]).plot(tmp_path / "a.png")
