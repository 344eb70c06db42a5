"""Corpora larger than memory: units of text, several processes, what an interrupted run leaves, malformed text."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import Corpus, Tokenizer, prepare
from fastbert.data import text as text_module
from fastbert.data.histogram import Lengths, bars, draw
from fastbert.data.text import Span, Tally, as_paths, cut_units, merge_scans, read_rows, scan_unit, spread_documents
from fastbert.data.workfolder import locked
from fastbert.errors import ConfigError, DataError, FastBertError, MissingFileError
from fastbert.train import setup
from fastbert.train.config import TextOptions

ROOT = Path(__file__).parent.parent
GIVEN = {"words": "segmented", "validation_fraction": 0.3, "unit_bytes": 500, "progress": False}
LINES = ["中国 人民 银行 发布 报告", "hello worlds 在 北京", "一 二 三", "新年 讲话", "1998 年 ， 3.14 ＡＢ"]


def write_documents(path, count, seed=0, end="\n"):
    """Documents of 1 to 5 rows, one of 30."""
    generator = np.random.default_rng(seed)
    sizes = np.where(np.arange(count) == count // 2, 30, generator.integers(1, 6, count))
    documents = [end.join(LINES[i] for i in generator.integers(0, len(LINES), size)) for size in sizes]
    path.write_bytes((end * 2).join(documents).encode() + end.encode())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "empty.txt").touch()
    return [
        write_documents(folder / "a.txt", 60),
        folder / "empty.txt",
        write_documents(folder / "b.txt", 25, 1, "\r\n"),
    ]


@pytest.fixture(scope="module")
def tokenizer(files):
    return Tokenizer.train(files, 200, min_frequency=1, progress=False)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(folder, split="train"):
    """(document, ids) of every row, whatever the shards."""
    return [
        (document, tuple(shard.input_ids[a:b].tolist()))
        for shard in Corpus.open(folder, split).shards
        for document, a, b in zip(
            shard.documents.tolist(), shard.row_offsets.tolist(), shard.row_offsets[1:].tolist(), strict=False
        )
    ]


# units


@given(
    data=st.lists(st.sampled_from([b"a", b"\xe4\xb8\xad", b"\n", b"\r", b"\r\n", b" ", b"\n\n", b"\0"]), max_size=60),
    size=st.integers(1, 30),
    block=st.integers(1, 9),
)
def test_units_give_the_rows_documents_and_hashes_of_the_whole(tmp_path_factory, data, size, block):
    folder = tmp_path_factory.mktemp("units")
    paths = [folder / "a", folder / "b"]
    paths[0].write_bytes(b"".join(data))
    paths[1].write_bytes(b"x\n\ny" + b"".join(reversed(data)))
    whole = [tuple(Span(path, 0, path.stat().st_size) for path in paths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "_check_utf8_likely", lambda *args: None)
        expected = list(read_rows(paths))
        (scan,) = [scan_unit(unit, "strict", lambda size: None) for unit in whole]
        patch.setattr(text_module, "_BLOCK", block)
        units = cut_units(paths, size)
        spans = [span for unit in units for span in unit]
        assert [b"".join(p.read_bytes()[s.start : s.end] for s in spans if s.path == p) for p in paths] == [
            path.read_bytes() for path in paths
        ]
        found = merge_scans(paths, units, [scan_unit(unit, "strict", lambda size: None) for unit in units])
        for document, first, end in spread_documents(found):
            local = found.documents[first][1] - found.documents[first][0] - 1
            found.hashes[document] = text_module.hash_document(units[first:end], local, "strict", lambda size: None)
        rows = [
            row
            for unit, lines, (document, _) in zip(units, found.lines, found.documents, strict=True)
            for part in text_module.read_unit(unit, lines, document, "strict", None)
            for row in part
        ]
    assert rows == expected
    assert found.hashes.tolist() == scan.hashes.tolist() and len(scan.hashes) == expected[-1].document + 1
    assert sum(source["rows"] for source in found.sources) == len(expected)


def test_units_end_at_documents_or_else_at_lines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"aaaa\nbbbb\n\ncc\n" + b"d" * 30 + b"\n" + b"e\n" * 5 + b"\nf\n")
    ends = [[span.end for span in unit] for unit in cut_units([path], 8)]
    assert ends == [[11], [45], [56], [58]]
    content = path.read_bytes()
    assert content[:11].endswith(b"\n\n") and content[11:45].endswith(b"d\n") and content[45:56].endswith(b"e\n\n")


def test_no_unit_ends_between_cr_and_lf_and_lines_are_counted_once(tmp_path, monkeypatch):
    content = b"a\r\nbb\r\n\r\ncc\rd\r\n\re\n\r\n"
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    ends = len(re.findall(rb"\r\n|\r|\n", content))
    for block in range(1, 8):
        monkeypatch.setattr(text_module, "_BLOCK", block)
        for size in range(1, 20):
            for unit in cut_units([path], size):
                assert content[unit[0].end - 1 : unit[0].end] in (b"\r", b"\n")
                assert content[unit[0].end - 1 : unit[0].end + 1] != b"\r\n"
        assert text_module._line_number(path, len(content)) == ends + 1
        assert scan_unit((Span(path, 0, len(content)),), "strict", lambda size: None).lines == [ends]


def test_short_files_share_a_unit(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("abc\n")
    units = cut_units([tmp_path / f"{i}.txt" for i in range(10)], 12)
    assert [len(unit) for unit in units] == [3, 3, 3, 1]


def test_units_do_not_change_rows_documents_or_splits(files, tokenizer, tmp_path):
    reports = {}
    for size in (1 << 26, 300, 80):
        reports[size] = prepare(
            files, tokenizer, tmp_path / str(size), words="segmented", validation_fraction=0.3, unit_bytes=size,
            progress=False,
        )  # fmt: skip
    assert len(Corpus.open(tmp_path / "80").shards) > len(Corpus.open(tmp_path / "300").shards) > 5
    for size in (300, 80):
        assert reports[size].splits == reports[1 << 26].splits and reports[size].lengths == reports[1 << 26].lengths
        for split in ("train", "validation"):
            assert rows_of(tmp_path / str(size), split) == rows_of(tmp_path / str(1 << 26), split)


def test_any_number_of_processes_gives_the_same_bytes(files, tokenizer, tmp_path):
    for count in (1, 2):
        prepare(files, tokenizer, tmp_path / str(count), processes=count, **GIVEN)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_none_is_a_process_per_core_but_no_more_than_there_are_units(files, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)))
    counts, workers = [], prepare.__globals__["workers"]
    monkeypatch.setattr("fastbert.data.preparation.workers", lambda n, job: counts.append(n) or workers(1, job))
    prepare(files, tokenizer, tmp_path / "many", processes=None, unit_bytes=100, progress=False)
    prepare(files, tokenizer, tmp_path / "one", processes=None, progress=False)
    assert counts == [7, 1]


def test_the_first_error_of_the_text_is_told_with_its_line(files, tokenizer, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(files[0].read_bytes() + b"ok\n\xff\n" + b"fine\n\n" * 500 + b"\xfe\n")
    line = files[0].read_bytes().count(b"\n") + 2
    with pytest.raises(DataError, match=rf"bad.txt: invalid UTF-8 at byte offset \d+ \(line {line}\): ff;"):
        prepare([*files, bad], tokenizer, tmp_path / "out", unit_bytes=400, progress=False)
    assert os.listdir(tmp_path) == ["bad.txt"]


def test_an_error_in_a_worker_arrives_as_it_is(files, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"a.txt:1: '\S+' has no tag, expected word/tag"):
        prepare(files, tokenizer, tmp_path / "out", processes=2, tag_separator="/", **GIVEN)
    assert os.listdir(tmp_path) == []


def die_in_a_worker(text):
    if os.getpid() != int(os.environ["FASTBERT_TEST_PARENT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return text.split()


def test_a_killed_worker_is_an_error_that_says_so(files, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_TEST_PARENT", str(os.getpid()))
    with pytest.raises(FastBertError, match="a worker process ended before its work was done: it was killed"):
        prepare(files, tokenizer, tmp_path / "out", words=die_in_a_worker, unit_bytes=400, processes=2, progress=False)


# what an interrupted run leaves

KILLED = """
import os, signal, sys, time
from fastbert.data import Tokenizer, encoding, prepare
if __name__ == "__main__":
    folder, stop, *files = sys.argv[1:]
    encode = encoding.encode_unit
    def slowly(job, task, advance):
        if task.folder.name == stop:
            print("waiting", flush=True)
            time.sleep(60)
        return encode(job, task, advance)
    encoding.encode_unit = slowly
    prepare(files, Tokenizer.from_pretrained(folder + "/tokenizer"), folder + "/out", words="segmented",
            validation_fraction=0.3, unit_bytes=500, progress=False)
"""


def begin_and_stop(tmp_path, files, tokenizer, number, unit="unit-00004"):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", KILLED, str(tmp_path), unit, *map(str, files)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n", process.stderr.read()
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_was(files, tokenizer, tmp_path, monkeypatch, capsys, number):
    told = begin_and_stop(tmp_path, files, tokenizer, number)
    assert not (tmp_path / "out").exists()
    if number == signal.SIGINT:
        assert "stopped; the same call goes on from 4 finished units in" in told and told.endswith(
            "KeyboardInterrupt\n"
        )
    done = []
    encode = prepare.__globals__["encoding"].encode_unit
    monkeypatch.setattr(
        "fastbert.data.encoding.encode_unit",
        lambda job, task, advance: done.append(task.folder.name) or encode(job, task, advance),
    )
    again = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    report = prepare(files, again, tmp_path / "out", **GIVEN)
    assert "going on from 4 finished units" in capsys.readouterr().err
    assert done[0] == "unit-00004" and report.speed * report.seconds < report.characters
    prepare(files, tokenizer, tmp_path / "whole", **GIVEN)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "tokenizer", "whole"]


SLEEPER = """
import os, sys, time
from fastbert.data import Tokenizer, prepare
def sleep(text):
    os.write(1, b"%d\\n" % os.getpid())  # at once: two processes share the pipe
    time.sleep(60)
if __name__ == "__main__":
    folder, *files = sys.argv[1:]
    prepare(files, Tokenizer.from_pretrained(folder + "/tokenizer"), folder + "/out", words=sleep, unit_bytes=500,
            processes=2, progress=False)
"""


def test_workers_end_with_a_parent_that_is_killed(files, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "sleeper.py"), str(tmp_path), *map(str, files)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    pids = {int(process.stdout.readline()) for _ in range(2)}
    assert len(pids) == 2 and process.pid not in pids
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def stopped(files, tokenizer, tmp_path, monkeypatch):
    """A work folder in which all units are finished, and nothing more."""
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save_pretrained", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(files, tokenizer, tmp_path / "out", **GIVEN)
    return tmp_path / ".out.work"


@pytest.fixture(scope="module")
def whole(files, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    prepare(files, tokenizer, folder, **GIVEN)
    return contents(folder)


def test_a_damaged_unit_is_made_anew(stopped, files, tokenizer, tmp_path, whole):
    shard = next(stopped.glob("unit-00002/*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (next(stopped.glob("unit-00003/*.arrow"))).unlink()
    (stopped / ".unit-00001-77").mkdir()
    prepare(files, tokenizer, tmp_path / "out", **GIVEN)
    assert contents(tmp_path / "out") == whole and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("change", "names"),
    [({"words": "none"}, "settings"), ({"unit_bytes": 600}, "settings"), ({"tokenizer": None}, "tokenizer"),
     ({"files": None}, "files")],
)  # fmt: skip
def test_another_plan_begins_anew_and_says_so(stopped, files, tokenizer, tmp_path, capsys, change, names):
    if "tokenizer" in change:
        change = {"tokenizer": Tokenizer.train(files, 30, progress=False)}
    if "files" in change:
        os.utime(files[2])
        change = {}
    given = {"files": files, "tokenizer": tokenizer, **GIVEN, **change}
    prepare(out=tmp_path / "out", **given)
    message = f"an interrupted run was begun with other {names}; its work is removed and begun anew"
    assert message in capsys.readouterr().err
    prepare(out=tmp_path / "fresh", **given)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "out"]


def test_a_plug_in_that_was_changed_is_another_plan(files, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    for body in ("text.split()", "list(text)"):
        (tmp_path / "cutter_of_a_test.py").write_text(f"def cut(text):\n    return {body}\n")
        sys.modules.pop("cutter_of_a_test", None)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(Tokenizer, "save_pretrained", lambda *args: 1 / 0)
            prepare(files, tokenizer, tmp_path / "out", words="cutter_of_a_test:cut", progress=False)
    assert "begun with other segmenter;" in capsys.readouterr().err


def test_a_second_run_on_the_same_folder_is_refused(files, tokenizer, tmp_path):
    with locked(tmp_path / "out"):
        with pytest.raises(DataError, match="out is being prepared by another process, which has locked .*/.out.work"):
            prepare(files, tokenizer, tmp_path / "out", progress=False)
    prepare(files, tokenizer, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("after", ["first", "second"])
def test_a_replacement_that_is_killed_loses_neither_corpus(files, tokenizer, tmp_path, monkeypatch, after, whole):
    out = tmp_path / "out"
    prepare(files[0], tokenizer, out, progress=False)
    before, calls, rename = contents(out), [], Path.rename

    def killed(path, target):
        if Path(target).name in ("replaced", "out"):
            calls.append(path)
            if len(calls) == 2 and after == "first":
                raise MemoryError
        rename(path, target)
        if len(calls) == 2 and after == "second":
            raise MemoryError

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(MemoryError):
        prepare(files, tokenizer, out, overwrite=True, **GIVEN)
    monkeypatch.undo()
    if after == "first":
        with pytest.raises(DataError, match="exists already"):
            prepare(files, tokenizer, out, **GIVEN)
        assert contents(out) == before
    else:
        assert contents(out) == whole
    prepare(files, tokenizer, out, overwrite=True, **GIVEN)
    assert contents(out) == whole and os.listdir(tmp_path) == ["out"]


def test_a_disk_that_fails_costs_no_finished_unit(files, tokenizer, tmp_path, monkeypatch, whole):
    read, calls = text_module._raw_blocks, []

    def fail(span):
        calls.append(span)
        if len(calls) == 20:
            raise FastBertError("a.txt cannot be read: Input/output error")
        return read(span)

    monkeypatch.setattr(text_module, "_raw_blocks", fail)
    with pytest.raises(FastBertError, match="Input/output error"):
        prepare(files, tokenizer, tmp_path / "out", **GIVEN)
    assert list((tmp_path / ".out.work").glob("unit-*"))
    prepare(files, tokenizer, tmp_path / "out", **GIVEN)
    assert contents(tmp_path / "out") == whole


# malformed text


def test_text_that_is_not_utf8_says_what_it_is(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    for content, message in (
        ("中国\n人民\n".encode("utf-16"), "t.txt begins with the byte order mark of UTF-16 or UTF-32, expected UTF-8"),
        (
            "hello\n".encode("utf-16-le"),
            r"t.txt is no text: 50% of the 12 bytes from offset 0 are NUL characters.*iconv",
        ),
        ("中国\n".encode("utf-32-be"), r"t.txt is no text: \d+% of"),
    ):
        path.write_bytes(content)
        for errors in ("strict", "replace"):
            with pytest.raises(DataError, match=message):
                prepare(path, tokenizer, tmp_path / "out", errors=errors, progress=False)


def test_a_hole_in_a_file_is_found_before_it_is_read_as_a_line(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    with open(path, "wb") as file:
        file.write(b"hello\n" * 10)
        file.truncate(1 << 24)
    with pytest.raises(DataError, match="100% of the 1,048,576 bytes from offset 0 are NUL"):
        prepare(path, tokenizer, tmp_path / "out", progress=False)


def test_nul_characters_are_removed_and_reported(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("中国\0人民 hello worlds\n银行 hello\n\0\0 银行 hello worlds 新年\n".encode())
    (tmp_path / "clean.txt").write_bytes(path.read_bytes().replace(b"\0", b""))
    report = prepare(path, tokenizer, tmp_path / "out", progress=False)
    assert report.repaired == {"NUL character, removed": {"count": 3, "examples": [f"{path}:1", f"{path}:3"]}}
    assert not report.dropped
    prepare(tmp_path / "clean.txt", tokenizer, tmp_path / "clean", progress=False)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "clean")


def test_places_are_those_of_the_file_whatever_the_unit(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("".join(f"银行 hello {chr(0) * (i % 9 == 0)}\r\n\r\n" for i in range(100)).encode())
    reports = [
        prepare(path, tokenizer, tmp_path / str(size), unit_bytes=size, progress=False) for size in (50, 200, 1 << 26)
    ]
    expected = {"count": 12, "examples": [f"{path}:{18 * i + 1}" for i in range(5)]}
    assert all(report.repaired == {"NUL character, removed": expected} for report in reports)


@pytest.mark.parametrize("text", ["中国人民", "hello worlds ", "a"])
def test_a_line_of_megabytes(tokenizer, tmp_path, text):
    path = tmp_path / "t.txt"
    size = 1_000_000 if text == "a" else 10_000_000  # the normaliser takes its time for a word of megabytes
    path.write_text("一\n" + text * (size // len(text.encode())) + "\n二\n", encoding="utf-8")
    report = prepare(path, tokenizer, tmp_path / "out", unit_bytes=1 << 20, progress=False)
    assert report.splits["train"]["rows"] == 3
    assert report.lengths["rows"]["longest"] >= (1 if text == "a" else 1_500_000)


def test_a_long_line_is_read_in_linear_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "_BLOCK", 1 << 10)
    (tmp_path / "t.txt").write_bytes(b"x" * 10_000_000)
    begin = time.perf_counter()
    (row,) = read_rows([tmp_path / "t.txt"])
    assert len(row.text) == 10_000_000 and time.perf_counter() - begin < 5


def test_pipes_and_unreadable_files_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is a pipe or a device, expected a text file"):
        as_paths(tmp_path / "pipe")
    (tmp_path / "t.txt").write_text("a\n")

    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(text_module, "open", refuse, raising=False)
    with pytest.raises(DataError, match="t.txt cannot be read: Permission denied"):
        as_paths(tmp_path / "t.txt")
    with pytest.raises(FastBertError, match="t.txt cannot be read: Permission denied"):
        list(read_rows([tmp_path / "t.txt"]))


def test_text_that_changes_on_the_way_is_refused(files, tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(files[0].read_bytes())
    content = path.read_bytes()
    for changed in (content + b"\nmore\n", content[:-40], content.replace("一".encode(), b"\n\n\n")):
        path.write_bytes(content)

        def change(text, changed=changed):
            path.write_bytes(changed)
            return text.split()

        with pytest.raises(DataError, match="changed while it was read"):
            prepare(path, tokenizer, tmp_path / "out", words=change, unit_bytes=400, progress=False)
    assert os.listdir(tmp_path) == ["t.txt"]


def test_files_without_text_are_sources_without_rows(files, tokenizer, tmp_path):
    (tmp_path / "blank.txt").write_bytes("\ufeff\n \r\n\u3000\n".encode())
    prepare([*files, tmp_path / "blank.txt"], tokenizer, tmp_path / "out", progress=False)
    sources = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert [source["rows"] > 0 for source in sources] == [True, False, True, False]
    with pytest.raises(DataError, match="the corpus is empty: no line of text in"):
        prepare([files[1], tmp_path / "blank.txt"], tokenizer, tmp_path / "none", progress=False)
    with pytest.raises(MissingFileError):
        prepare([files[1], tmp_path / "absent.txt"], tokenizer, tmp_path / "none", progress=False)


# the report


@given(lengths=st.lists(st.integers(1, 3000), min_size=1), cut=st.integers(0, 50))
def test_lengths_are_summed_up(lengths, cut):
    found = Lengths()
    for part in (lengths[:cut], lengths[cut:]):
        found.add(np.array(part, np.int64))
    summary, ordered = found.summary(), sorted(lengths)
    assert summary["number"] == len(lengths) and summary["longest"] == ordered[-1]
    assert summary["mean"] == pytest.approx(np.mean(lengths), abs=0.006)
    assert summary["median"] == ordered[(len(lengths) - 1) // 2]
    assert summary["percentile_90"] == ordered[-(-9 * len(lengths) // 10) - 1]
    for low, high, count in summary["bins"]:
        assert high == 2 * low - 1 and count == sum(low <= length <= high for length in lengths)
    assert sum(count for _, _, count in summary["bins"]) == len(lengths)
    assert summary["bins"][0][2] and summary["bins"][-1][2]


def test_bars_are_as_long_as_the_counts():
    lines = bars("tokens", Lengths({1: 10, 5: 40, 9: 1, 100: 20, 2000: 1000}).summary())
    assert lines[0].startswith("tokens: mean 1,869.5, median 2,000, 90 % up to 2,000")
    assert [line.count("█") for line in lines[1:]] == [0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 40]
    assert ["▏" in line for line in lines[1:5]] == [True, False, False, True]
    assert lines[-1].startswith("  1,024–2,047 ") and lines[1].startswith("            1 ")


def test_the_report_has_lengths_speed_and_rates(files, tokenizer, tmp_path):
    report = prepare(files, tokenizer, tmp_path / "out", words="segmented", unit_bytes=500, progress=False)
    rows = rows_of(tmp_path / "out")
    documents = np.bincount([document for document, _ in rows], [len(ids) for _, ids in rows])
    assert report.lengths["rows"]["number"] == len(rows) and report.lengths["documents"]["number"] == len(documents)
    assert report.lengths["documents"]["longest"] == documents.max()
    assert report.lengths["rows"]["longest"] == max(len(ids) for _, ids in rows)
    assert report.characters_per_token == report.characters / report.tokens and report.unknown_percent == 0
    text = str(report)
    for part in (
        "words: segmented",
        "characters per token, 0.000 % unknown",
        "tokens per row: mean",
        "█",
        "per second",
    ):
        assert part in text
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["lengths"] == report.lengths and manifest["version"] == 1
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(files, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert.data.preparation.find_spec", lambda name: None)
    prepare(files, tokenizer, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "lengths.png").exists()


def test_a_picture_of_one_length_can_be_drawn(tmp_path):
    draw(tmp_path / "x.png", {"rows": Lengths({1: 1}).summary()})
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_tallies_keep_the_first_places():
    tally, other = Tally(), Tally()
    for i in range(4):
        tally.add("a", f"t:{i}")
        other.add("a", f"u:{i}", 2)
    other.add("b", "u:9")
    tally.merge(other.reasons)
    assert tally.reasons["a"] == {"count": 12, "examples": ["t:0", "t:1", "t:2", "t:3", "u:0"]}
    assert tally.reasons["b"] == {"count": 1, "examples": ["u:9"]} and len(other.reasons["a"]["examples"]) == 4


def test_a_trained_tokenizer_outlives_an_interrupted_run(tmp_path, monkeypatch, capsys):
    """Training one again would take its time, and at level "unigram" give another one."""
    (tmp_path / "t.txt").write_text("中国 人民 银行\n" * 50, encoding="utf-8")
    options = TextOptions(files=[str(tmp_path / "t.txt")], words="segmented", level="unigram", vocab_size=30)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(setup, "prepare", stop)
        setup.prepare_text(options, tmp_path / "out")
    kept = Tokenizer.from_pretrained(tmp_path / ".out.tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(setup.Tokenizer, "train", stop)
        setup.prepare_text(options, tmp_path / "out")
    assert "going on with the tokenizer that an interrupted run has trained" in capsys.readouterr().err
    assert Corpus.open(tmp_path / "out").fingerprint == kept.fingerprint
    assert not (tmp_path / ".out.tokenizer").exists()
    with pytest.raises(DataError, match="exists already"):
        setup.prepare_text(options, tmp_path / "out")
    assert not (tmp_path / ".out.tokenizer").exists()  # nothing was trained for nothing


def test_a_function_that_other_processes_cannot_find_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("中国 人民\n", encoding="utf-8")
    tokenizer = Tokenizer.train(tmp_path / "t.txt", 30, min_frequency=1, progress=False)
    with pytest.raises(ConfigError, match="words is .*<lambda>, expected a function at the level of its module"):
        prepare(tmp_path / "t.txt", tokenizer, tmp_path / "out", words=lambda text: text.split(), processes=2)
