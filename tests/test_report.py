"""`fastbert bench report`: what the rows say and nothing else. Nothing is measured here: the rows are made up."""

import struct

import pytest

from benchmarks import cli, report, rows

H100 = "NVIDIA H100 80GB HBM3"
ATTENTION = dict(cli.load("attention").shapes(cuda=True)[0])
ON_GPU = {"device": H100, "driver": "580.95", "threads": None, "torch": "2.13.0", "triton": "3.7.1", "cuda": "13.0"}
ON_CPU = {"device": "Some CPU", "driver": None, "threads": 2, "torch": "2.13.0+cpu", "triton": None, "cuda": None}


def row(provider="fastbert-torch", p50=100.0, **columns):
    """A measured row of attention on a GPU; columns in place of its own."""
    figures = {"p20_us": 0.95 * p50, "p50_us": p50, "p80_us": 1.1 * p50, "floor_us": 50.0, "floor_by": "matmul"}
    made = {"op": "attention", "provider": provider, "shape": ATTENTION, "dtype": "bf16", "mode": "fwd"}
    made |= {"status": rows.MEASURED, "checked": "o: at most 0.50 of the bound", "comparable": True, "run": "run1"}
    made |= {"timer": "graph"}
    made |= figures | {"percent_of_floor": 5000.0 / p50} | ON_GPU | {"commit": "abc1234", "date": "2026-11-20"}
    return made | columns


def missing(provider="fastbert-triton", reason="needs an NVIDIA GPU", **columns):
    """A row of what could not run."""
    made = {"op": "attention", "provider": provider, "shape": ATTENTION, "dtype": "bf16"}
    made |= {"status": rows.MISSING, "reason": reason, "run": "run1"}
    return made | ON_GPU | {"commit": "abc1234", "date": "2026-11-20"} | columns


def attention_rows(op="attention", dtype="bf16", **columns):
    """Several lengths and modes, several providers, as a run of `fastbert bench` leaves them."""
    providers = {
        "fastbert-triton": 1.0,
        "fastbert-torch": 1.7,
        "eager": 9.0,
        "compiled": 4.0,
        "sdpa-cudnn": 1.2,
        "sdpa-flash": 1.4,
        "flex": 1.6,
        "sdpa-plain": 0.7,
    }
    for length in (128, 256, 512, 1536, 4096):
        shape = cli.load(op).shapes(cuda=True)[0] | {"B": 16384 // length, "L": length}
        for number, mode in enumerate(("fwd", "bwd", "fwd+bwd")):
            time = (60 + 0.2 * length) * (1, 2.3, 3.4)[number]
            for provider, factor in providers.items():
                checked = {"comparable": provider != "sdpa-plain"}
                figures = {"floor_us": 0.55 * time, "percent_of_floor": 55 / factor}
                sizes = {"op": op, "shape": shape, "dtype": dtype, "mode": mode}
                yield row(provider, time * factor, **(sizes | figures | checked | columns))


def model_rows(ratios, run="run1", **columns):
    """Whole models on a CPU: (family, part, fill, provider) -> how many times as fast as the faster of the rivals."""
    for (family, part, fill, provider), ratio in ratios.items():
        shape = {"family": family, "part": part, "B": 2, "L": 512, "layers": 4, "hidden": 384, "heads": 6}
        shape |= {"vocab": 21128, "dropout": 0.0, "fill": fill}
        sizes = {"op": "model", "shape": shape, "dtype": "fp32", "mode": "fwd+bwd", "run": run}
        for name, time in ((provider, 600 / ratio), ("transformers-eager", 900.0), ("transformers-sdpa", 600.0)):
            how = {"timer": "clock", "comparable": name != "fastbert-labelled", "transformers": "5.23.0"}
            yield row(name, time, **(sizes | ON_CPU | how | columns))


def row_of_tests(file, passed, device=H100, **columns):
    counts = {"passed": passed, "failed": 0, "skipped": 2, "seconds": 31.4, "words": ""}
    return row("pytest", op="tests", shape={"file": file}, dtype=None, mode=None, device=device, **counts, **columns)


def results(*found):
    """Results as they are read from files, oldest first."""
    return report.Results(sorted(found, key=lambda row: row["date"]), plots=None)


@pytest.fixture
def folder(tmp_path):
    """Writes rows to a folder and returns it."""

    def write(*found):
        (tmp_path / "results").mkdir(exist_ok=True)
        rows.write(tmp_path / "results", found)
        return tmp_path / "results"

    return write


@pytest.fixture
def bench(capsys):
    """`fastbert bench report` with arguments: exit code, standard output, standard error."""

    def run(*arguments):
        code = cli.main(["report", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def cells(table):
    """The lines of a Markdown table, without its rule, as lists of cells."""
    lines = [line for line in table.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# What is compared.


def test_the_newest_run_counts_for_each_device_op_shape_dtype_and_mode():
    old = [row(p50=100.0), row("eager", 400.0), row(p50=300.0, mode="bwd")]
    new = [row(p50=80.0, run="run2", date="2026-11-21"), row("eager", 160.0, run="run2", date="2026-11-21")]
    forward, backward = results(*new, *old).comparisons
    assert (forward["run"], forward.ours["p50_us"], forward.ratio(forward.ours)) == ("run2", 80.0, 2.0)
    assert (backward["run"], backward.ours["p50_us"]) == ("run1", 300.0)


def test_of_two_runs_of_a_day_the_later_in_the_file_counts():
    (found,) = results(row(p50=100.0), row(p50=90.0, run="run2")).comparisons
    assert found.ours["p50_us"] == 90.0


def test_ratios_are_taken_within_one_run_only():
    (found,) = results(row("eager", 400.0), row(p50=100.0, run="run2")).comparisons
    assert found.rival is None and found.ratio(found.ours) is None
    table = report.summary([found])
    assert "eager" not in table and cells(table)[1][6:9] == ["-", "-", "-"]


def test_a_rival_that_computes_something_else_is_shown_and_never_wins():
    plain = row("sdpa-plain", 10.0, comparable=False)
    (found,) = results(row(p50=100.0), row("eager", 250.0), plain).comparisons
    assert found.rival["provider"] == "eager" and found.ratio(found.ours) == 2.5
    assert cells(report.summary([found]))[1][-1] == "sdpa-plain 10.0 us"


def test_our_fastest_provider_is_compared_and_not_with_our_own():
    (found,) = results(row(p50=100.0), row("fastbert-triton", 50.0), row("eager", 200.0)).comparisons
    assert found.ours["provider"] == "fastbert-triton" and found.ratio(found.ours) == 4.0


def test_the_heading_says_on_what_it_was_measured(folder, bench):
    code, out, _ = bench("--results", folder(row(), row("eager", 1234.0), *model_rows({})))
    heading = f"**{H100}**, driver 580.95, torch 2.13.0, triton 3.7.1, cuda 13.0, commit abc1234, 2026-11-20"
    assert code == 0 and heading in out
    assert "100 us" in out and "1.23 ms" in out and "12.34" in out


def test_runs_of_different_commits_stand_under_different_headings():
    text = report.summary(results(row(), row(mode="bwd", commit="def5678", run="run2")).comparisons)
    assert text.count("**") == 4 and "commit abc1234," in text and "commit def5678," in text


# What is refused.


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"device": "Some CPU (Triton interpreted)"}, "some-cpu-triton-interpreted.jsonl: attention, fastbert-torch"),
        ({"commit": None}, "no commit"),
        ({"date": None}, "no date"),
        ({"date": ""}, "no date"),
        ({"p50_us": None}, "no p50_us"),
        ({"checked": None}, "no checked"),
    ],
    ids=str,
)
def test_rows_that_cannot_back_a_figure_are_refused_by_name(folder, bench, columns, message):
    code, out, error = bench("--results", folder(row(), row(**columns)))
    assert code == 2 and out == "" and message in error


def test_a_folder_that_is_not_there_is_an_error(tmp_path, bench):
    code, _, error = bench("--results", tmp_path / "none")
    assert code == 2 and "no such folder" in error


def test_nothing_measured_is_said(folder, bench):
    where = folder(missing())
    assert bench("--results", where)[:2] == (0, "Not yet measured: `fastbert bench --out benchmarks/results`\n")
    code, out, error = bench("--results", where, "--device", "H100")
    assert code == 2 and out == "" and "nothing measured for H100" in error


def test_filters_choose_devices_and_ops(folder, bench):
    where = folder(row(), row(op="bias_gelu", shape={"T": 1, "I": 2, "form": "none"}), row(**ON_CPU))
    _, out, _ = bench("--results", where, "--device", "h100", "--ops", "bias_gelu")
    assert "bias_gelu" in out and "attention" not in out and "Some CPU" not in out
    code, _, error = bench("--results", where, "--ops", "lamb")
    assert code == 2 and f"nothing measured for lamb; measured: attention on {H100}" in error
    assert bench("--results", where, "--ops", "lamb", "--table", "status")[0] == 2


# Tables.


def test_ops_has_the_first_shape_of_each_op_only():
    other = row(shape=ATTENTION | {"L": 128, "B": 128})
    assert len(cells(report.ops(results(row(), other)))) == 2


def test_models_on_the_cpu_in_the_layout_of_the_readme():
    ratios = {
        ("bert", "masked_lm", 1.0, "fastbert"): 1.39,
        ("bert", "masked_lm", 0.5, "fastbert-labelled"): 3.48,
        ("albert", "encoder", 1.0, "fastbert"): 1.11,
    }
    nezha = {("nezha", "encoder", 0.5, "fastbert"): 2.68}
    found = [*model_rows(ratios), *model_rows(nezha, run="run2", transformers="4.40.2")]
    text = report.models_cpu(results(*found, *model_rows(ratios, device=H100, threads=None)))
    assert text.startswith("**Some CPU**, 2 threads, torch 2.13.0+cpu, transformers 5.23.0 and 4.40.2, commit abc1234")
    assert cells(text) == [
        ["times as fast as transformers", "BERT", "ALBERT", "RoFormer", "NEZHA"],
        ["all logits, no padding", "1.39", "-", "-", "-"],
        ["all logits, half of the batch padding", "-", "-", "-", "-"],
        ["labelled logits only, no padding", "-", "-", "-", "-"],
        ["labelled logits only, half of the batch padding", "3.48", "-", "-", "-"],
        ["encoder without head, no padding", "-", "1.11", "-", "-"],
        ["encoder without head, half of the batch padding", "-", "-", "-", "2.68"],
    ]


def test_masking_and_preparing_are_told_in_millions():
    token, words = cli.load("feed").shapes(False)[0], cli.load("prepare").shapes(False)[1]
    fast = {"op": "feed", "mode": "batch", "dtype": "fp32", "shape": token}
    found = [
        row(**fast, provider="fastbert", p50_us=1000.0, tokens_per_s=20.04e6),
        row(**fast, provider="transformers", p50_us=8000.0, transformers="5.23.0"),
        row(**fast | {"shape": token | {"B": 2}}, provider="fastbert", p50_us=1.0, tokens_per_s=1.0),
        row(op="prepare", mode="text", dtype="fp32", shape=words, provider="fastbert", p50_us=1.0, chars_per_s=1.5e6),
    ]
    found = [each | {"device": "Some CPU", "threads": 1} for each in found]
    assert cells(report.data(results(*found))) == [
        ["on one core", "speed", "times transformers"],
        ["masked batches 64 x 512: token, mlm", "20.0 M tokens/s", "8.00"],
        ["text to shards, words segmented", "1.5 M characters/s", "-"],
    ]


def test_models_without_rivals_are_no_figures():
    found = model_rows({("bert", "encoder", 1.0, "fastbert"): 2.0})
    assert report.models_cpu(results(*(row for row in found if row["provider"] == "fastbert"))) == ""


@pytest.mark.parametrize("name", ["ops", "data", "models-cpu", "plots", "plots-floor"])
def test_a_table_without_rows_names_the_command_that_measures_it(folder, bench, name):
    code, out, _ = bench("--results", folder(), "--table", name)
    assert code == 2 and out.startswith("Not yet measured: `fastbert bench ")


def test_an_unknown_table_suggests_known_ones(folder, bench):
    code, _, error = bench("--results", folder(), "--table", "models_cpu")
    assert code == 2 and "did you mean 'models-cpu'?" in error and "status" in error


def status_of(*found):
    """(op, provider, dtypes) -> what the status says, by device."""
    head, *lines = cells(report.status(results(*found)))
    return {tuple(line[:3]): dict(zip(head[3:], line[3:], strict=True)) for line in lines}


def test_the_status_has_every_benchmark_and_the_gpus_to_come():
    found = status_of()
    assert {op for op, _, _ in found} == {*cli.OPS, *cli.MODELS}
    backends = {"fastbert-triton", "fastbert-torch", "fastbert-cuda"}
    models = {"fastbert", "fastbert-labelled", "fastbert-latency", "fastbert-compile", "fastbert-cuda-graphs"}
    models.add("fastbert-accelerated")
    assert {provider for _, provider, _ in found} == backends | models
    for line in found.values():
        assert line["NVIDIA H100"] == line["NVIDIA H200"]
        assert line["NVIDIA H100"] in ("not yet measured", "-")  # -: fp32 is for models on a CPU
        if line["NVIDIA H100"] == "not yet measured":
            assert line["command"].startswith("`fastbert bench ") and "--out benchmarks/results" in line["command"]
    assert found["bias_gelu", "fastbert-triton", "fp16, bf16, fp32"]["NVIDIA H100"] == "not yet measured"


def in_every_mode(*found):
    return [made | {"mode": mode} for made in found for mode in ("fwd", "bwd", "fwd+bwd")]


def test_the_status_says_what_was_measured_where():
    cpu = ON_CPU | {"dtype": "fp32", "shape": dict(cli.load("attention").shapes(cuda=False)[0])}
    newer = row(run="run2", date="2026-11-21", commit="def5678")
    found = status_of(*in_every_mode(row(), newer, row("fastbert-torch", **cpu)))
    assert found["attention", "fastbert-torch", "bf16"][H100] == "measured 2026-11-21, def5678"
    assert found["attention", "fastbert-torch", "bf16"]["Some CPU"] == "-"
    assert found["attention", "fastbert-torch", "fp32"]["Some CPU"] == "measured 2026-11-20, abc1234"
    assert found["bias_gelu", "fastbert-triton", "fp16, bf16, fp32"]["Some CPU"] == "needs a GPU"
    assert "NVIDIA H100" not in next(iter(found.values())) and "NVIDIA H200" in next(iter(found.values()))


def test_a_row_that_is_wrong_does_not_count_as_measured():
    """At any shape, whatever was measured since at another one."""
    wrong = missing("fastbert-torch", status=rows.WRONG, reason="o differs", shape=ATTENTION | {"L": 9})
    found = [wrong, *in_every_mode(row(run="run2", date="2026-11-22"))]
    assert status_of(*found)["attention", "fastbert-torch", "bf16"][H100] == "wrong 2026-11-20, abc1234"
    mended = in_every_mode(row(run="run3", date="2026-11-23", shape=ATTENTION | {"L": 9}))
    assert status_of(*found, *mended)["attention", "fastbert-torch", "bf16"][H100] == "measured 2026-11-22, abc1234"


def test_another_shape_or_one_mode_is_not_yet_the_kernel():
    elsewhere = in_every_mode(row(shape=ATTENTION | {"B": 1, "L": 8}))
    assert status_of(*elsewhere)["attention", "fastbert-torch", "fp16, bf16, fp32"][H100] == "not yet measured"
    found = status_of(row())["attention", "fastbert-torch", "bf16"]
    assert found[H100] == "measured but for bwd, fwd+bwd 2026-11-20, abc1234"


def test_the_tests_that_ran_on_each_gpu():
    old, new = (
        row_of_tests("tests/test_lamb.py", passed, date=date) for passed, date in ((1, "2026-11-20"), (9, "2026-11-21"))
    )
    watched = row_of_tests("tests/test_lamb.py", 2) | {"provider": "racecheck", "words": "-k view"}
    killed = row_of_tests("tests/test_x.py", 0) | {"status": rows.FAILED, "reason": "out of time"}
    del killed["passed"], killed["failed"], killed["skipped"], killed["seconds"]
    lines = cells(report.tests(results(old, new, watched, killed)))[1:]
    assert lines == [
        [H100, "pytest", "tests/test_lamb.py", "ended well", "9", "0", "2", "abc1234, 2026-11-21"],
        [H100, "racecheck", "tests/test_lamb.py -k view", "ended well", "2", "0", "2", "abc1234, 2026-11-20"],
        [H100, "pytest", "tests/test_x.py", "failed: out of time", "-", "-", "-", "abc1234, 2026-11-20"],
        ["NVIDIA H200", "-", "-", "not yet run", "-", "-", "-", "-"],
    ]


def test_times_taken_in_different_ways_are_not_compared():
    [found] = results(row(), row("eager", 300.0, timer="events"), row("sdpa-flash", 400.0)).comparisons
    assert found.rival["provider"] == "sdpa-flash" and found.ratio(found.ours) == 4
    [found] = results(row(), row("eager", 300.0, timer="events")).comparisons
    assert found.rival is None and found.ratio(found.ours) is None


# Markers.


@pytest.fixture
def readme(tmp_path):
    def write(text):
        path = tmp_path / "README.md"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_readmes_hold_what_the_rows_say(bench):
    """No figure without a row: what stands between the markers is what `fastbert bench report --update` writes."""
    code, out, error = bench("--check")
    assert code == 0, f"run: fastbert bench report --plots --update\n{out}{error}"
    assert "<!-- report: models-cpu -->" in report.FILES[0].read_text(encoding="utf-8")


def test_rows_of_the_project_need_a_clean_commit(tmp_path, monkeypatch, bench, folder):
    where = folder(row(commit="abc1234+"))
    assert bench("--results", where)[0] == 0
    monkeypatch.setattr(rows, "RESULTS", where.resolve())
    code, _, error = bench("--results", where)
    assert code == 2 and "changes that were not committed (abc1234+)" in error


def test_check_fails_after_a_figure_was_edited_by_hand(folder, readme, bench):
    path = readme("# Title\n<!-- report: ops -->\n<!-- end -->\nThe rest\nstays.\n")
    where = folder(row(), row("eager", 250.0))
    assert bench("--results", where, "--check", "--update", path)[0] == 1
    assert bench("--results", where, "--update", path)[0] == 0
    text = path.read_text()
    assert "2.50" in text and text.startswith("# Title\n<!-- report: ops -->\n\n**NVIDIA")
    assert text.endswith("|\n\n<!-- end -->\nThe rest\nstays.\n")
    assert bench("--results", where, "--check", "--update", path) == (0, "", "")
    path.write_text(text.replace("2.50", "3.50"))
    code, out, _ = bench("--results", where, "--check", "--update", path)
    assert code == 1 and out.startswith(f"--- {path}\n") and "3.50" in out
    assert "3.50" in path.read_text()


def test_a_marker_without_rows_says_so(folder, readme, bench):
    path = readme("<!-- report: models-cpu -->\n| 1.39 |\n<!-- end -->\n")
    assert bench("--results", folder(), "--update", path)[0] == 0
    assert "1.39" not in path.read_text() and "Not yet measured: `fastbert bench models" in path.read_text()


@pytest.mark.parametrize(
    "text, line, message",
    [
        (
            "one\n<!-- report: speed -->\n<!-- end -->\n",
            2,
            "got 'speed', expected one of ops, data, models-cpu, status",
        ),
        ("<!-- report: ops -->\ntwo\n", 1, "no line <!-- end --> follows"),
        ("<!-- report: ops -->\n<!-- report: status -->\n<!-- end -->\n", 2, "inside"),
        ("one\n\n<!-- end -->\n", 3, "without"),
    ],
    ids=["unknown", "unclosed", "nested", "unopened"],
)
def test_markers_that_make_no_sense_are_errors_with_file_and_line(folder, readme, bench, text, line, message):
    path = readme(text)
    code, _, error = bench("--results", folder(row()), "--update", path)
    assert code == 2 and f"{path}, line {line}" in error and message in error
    assert path.read_text() == text


# Plots.


def size_of(png):
    """Width and height of a PNG file, from its header."""
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_plots_are_written_and_linked(folder, readme, bench):
    pytest.importorskip("matplotlib")
    where = folder(*attention_rows("rotary_attention"), row(op="lamb", shape={"preset": "other"}, mode="step"))
    names = [f"nvidia-h100-80gb-hbm3-{what}-bf16.png" for what in ("floor", "rotary_attention")]
    code, out, _ = bench("--results", where, "--plots")
    assert code == 0 and out.splitlines() == [str(where / "plots" / name) for name in names]
    for name in names:
        width, height = size_of(where / "plots" / name)
        assert 500 < width < 2500 and 200 < height < 2500
    path = readme("<!-- report: plots -->\n<!-- end -->\n")
    assert bench("--results", where, "--update", path)[0] == 0
    assert all(f"](results/plots/{name})" in path.read_text() for name in names)


def test_a_plot_of_other_rows_is_not_linked(folder, readme, bench):
    pytest.importorskip("matplotlib")
    path = readme("<!-- report: plots-floor -->\n<!-- end -->\n")
    where = folder(row())
    assert "was not drawn from these rows" in bench("--results", where, "--update", path)[2]
    assert bench("--results", where, "--plots", "--update", path)[0] == 0
    folder(row(p50=70.0, run="run2"))
    code, _, error = bench("--results", where, "--check", "--update", path)
    assert code == 2 and "fastbert bench report --plots" in error


def test_lengths_are_drawn_from_one_run_and_equal_sizes():
    dropped = row(shape=ATTENTION | {"B": 128, "L": 128, "dropout": 0.1})
    fewer = row(shape=ATTENTION | {"B": 8, "L": 256})
    later = row(p50=1.0, run="run2", date="2026-11-22")
    (plot,) = report.planned(results(*attention_rows(), dropped, fewer, later), ["lengths"])
    found = {(f["shape"]["L"], f["shape"]["B"], f["shape"]["dropout"]) for f in plot.comparisons}
    assert found == {(length, 16384 // length, 0.0) for length in (128, 256, 512, 1536, 4096)}
    assert {found["run"] for found in plot.comparisons} == {"run1"} and len(plot.comparisons) == 15


def test_lengths_are_drawn_from_the_newest_run_that_has_several():
    newer = attention_rows(run="run2", date="2026-11-22")
    (plot,) = report.planned(results(*attention_rows(), *newer), ["lengths"])
    assert {found["run"] for found in plot.comparisons} == {"run2"} and "2026-11-22" in plot.title
    assert report.planned(results(row()), ["lengths"]) == []


def test_plots_without_matplotlib_name_the_extra(folder, bench, monkeypatch):
    monkeypatch.setattr("benchmarks.plots.find_spec", lambda name: None)
    code, _, error = bench("--results", folder(row()), "--plots")
    assert code == 2 and "fastbert-kernels[plot]" in error


@pytest.mark.parametrize(
    "us, text", [(0.5, "0.50 us"), (12.34, "12.3 us"), (999.4, "999 us"), (1000, "1.00 ms"), (2.5e6, "2.50 s")]
)
def test_durations_have_three_digits_and_a_unit(us, text):
    assert report.duration(us) == text
