"""`fastbert bench`: what is counted and compared, what becomes a row, and every benchmark once, small, on the CPU."""

import contextlib
import gc
import itertools
import json
import subprocess
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor

import fastbert.cli
from benchmarks import attention, ceilings, cli, clocks, harness, relative_attention, rows
from benchmarks.ceilings import Ceilings, Work
from benchmarks.harness import Case, Provider, Runner, Settings
from benchmarks.op import OpBenchmark, imported, normal
from fastbert import ops, reference
from fastbert.errors import DataError
from fastbert.testing import Mismatch, compare

HEADLINE = Case({"B": 32, "L": 512, "H": 12, "D": 64, "dropout": 0.0, "fill": 1.0}, "bf16")
CEILINGS = Ceilings(bytes=3e12, flops={"fp32": 50e12, "bf16": 800e12}, exps=3.7e12)


@pytest.fixture
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda clock, device, dtypes, graphs: CEILINGS)


class Gelu(OpBenchmark):
    """bias_gelu among providers of every kind."""

    op = "bias_gelu"
    tiny = {"T": 4}

    def shapes(self, cuda):
        return [{"T": 8, "I": 16, "form": "none"}]

    def flags(self, case):
        return {"approximate": case["form"]}

    def inputs(self, case, seed):
        generator = torch.Generator().manual_seed(seed)
        return {name: normal(shape, case, generator) for name, shape in {"x": (8, 16), "bias": (16,)}.items()}

    def work(self, case, mode):
        return Work(bytes=3e6)

    def providers(self, case):
        half_right = lambda x, bias: reference.bias_gelu(x, bias) * 1.01  # noqa: E731
        return [
            Provider("fastbert-torch", partial(self._ours, "torch")),
            Provider("fastbert-none", partial(self._ours, "none")),
            Provider("eager", self._eager, package="torch"),
            Provider("wrong", lambda case: half_right),
            Provider("other", lambda case: half_right, comparable=False, checked=False),
            Provider("broken", lambda case: broken),
            Provider("absent", lambda case: imported("no_such_package.functional", "gelu", "no-such-package")),
            Provider("late", lambda case: late),
            Provider("gpu", self._eager, gpu=True),
        ]


def broken(x: Tensor, bias: Tensor):
    raise RuntimeError("no kernel\n   for this")


def late(x: Tensor, bias: Tensor):
    """Right while it is checked, on the check's seed, and broken when it is timed."""
    if torch.is_grad_enabled():
        return reference.bias_gelu(x, bias)
    raise RuntimeError("only with gradients")


def run(benchmark, **settings):
    runner = Runner(Settings(rounds=4, **settings), ["fp32"])
    cases = [Case(shape, "fp32") for shape in benchmark.shapes(False)]
    return list(runner.ceiling_rows()), list(runner.rows(benchmark, cases))


# What becomes a row.


def test_a_row_says_everything(quick_ceilings):
    limits, found = run(Gelu())
    assert {(r["op"], r["dtype"]): r["ceilings"]["matmul_tflops"] for r in limits} == {
        ("ceilings", "fp32"): 50,
        ("ceilings", "bf16"): 800,
    }
    [row] = (r for r in found if r["provider"] == "eager" and r["mode"] == "bwd")
    assert list(row)[:6] == ["op", "provider", "package", "shape", "dtype", "mode"]
    assert row["package"] == f"torch {rows.package_version('torch')}" and row["timer"] == "clock"
    assert row["p20_us"] <= row["p50_us"] <= row["p80_us"] and row["rounds"] == 4
    assert row["floor_us"] == 1 and row["floor_by"] == "memory" and row["peak_mib"] is None
    assert row["percent_of_floor"] == pytest.approx(100 / row["p50_us"], rel=1e-3)
    assert row["gb_per_s"] == pytest.approx(3e6 / row["p50_us"] / 1e3, rel=1e-3)
    assert row["checked"].startswith("output, grad x, grad bias: at most ")
    described = {"device", "driver", "threads", "python", "torch", "triton", "cuda", "transformers", "commit", "date"}
    assert described | {"run", "ceilings"} <= set(row) and json.loads(json.dumps(row)) == row


def test_what_a_provider_cannot_do_is_a_row_and_not_the_end(quick_ceilings):
    _, found = run(Gelu())
    failures = {r["provider"]: (r["status"], r["reason"]) for r in found if r["status"] != "measured"}
    assert failures.pop("wrong")[0] == "wrong" and "too large" in next(
        r["reason"] for r in found if r["provider"] == "wrong"
    )
    assert failures == {
        "fastbert-none": ("missing", failures["fastbert-none"][1]),
        "broken": ("failed", "RuntimeError: no kernel for this"),
        "absent": ("missing", "no-such-package cannot be imported: there is no module no_such_package"),
        "late": ("failed", "RuntimeError: only with gradients"),
        "gpu": ("missing", "needs an NVIDIA GPU"),
    }
    measured = {(r["provider"], r["mode"]) for r in found if r["status"] == "measured"}
    timed = {"fastbert-torch", "eager", "other"}
    assert measured == {*itertools.product(timed, Gelu.modes), ("late", "bwd"), ("late", "fwd+bwd")}


def test_ratios_count_only_who_computes_the_same(quick_ceilings):
    """fastbert and eager against each other; `other` computes something else, so it is nobody's rival."""
    _, found = run(Gelu(), providers=["fastbert", "eager", "other"], modes=["fwd"])
    time = {r["provider"]: r["p50_us"] for r in found if r["status"] == "measured"}
    ratio = {r["provider"]: r["ratio"] for r in found if r["status"] == "measured"}
    assert ratio["fastbert-torch"] == pytest.approx(time["eager"] / time["fastbert-torch"], rel=1e-3)
    assert ratio["eager"] == pytest.approx(time["fastbert-torch"] / time["eager"], rel=1e-3)
    assert ratio["other"] == pytest.approx(min(time["eager"], time["fastbert-torch"]) / time["other"], rel=1e-3)
    a, b = (Provider(f"fastbert-{name}", None) for name in "ab")
    assert not a.rivals(b) and not a.rivals(a)


def test_no_case_is_begun_when_time_is_up(quick_ceilings):
    _, [row] = run(Gelu(), deadline=0)
    assert row["status"] == "missing" and row["reason"] == "out of time: T=8 I=16 form=none fp32"


def clock(time, sound=True):
    return type("Clock", (), {"time": lambda self, step: time(step), "sound": lambda self: sound})()


def test_providers_take_turns_in_rotating_order():
    calls = []
    steps = {name: [partial(calls.append, f"{name}{i}") for i in range(2)] for name in "abc"}
    times, failures = clocks.time_in_turns(steps, 3, clock(lambda step: (step(), float(len(calls)))[1]))
    turns = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert turns == ["c0a0b0", "a1b1c1", "b0c0a0", "c1a1b1"]  # the first warms up
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3} and failures == {}


def test_a_provider_that_fails_in_its_turn_leaves_the_others_theirs():
    turns = iter(range(100))

    def fails_late():
        if next(turns) == 2:
            raise RuntimeError("out of memory")

    steps = {"a": [fails_late], "b": [lambda: None]}
    times, failures = clocks.time_in_turns(steps, 4, clock(lambda step: step() or 1.0))
    assert {name: str(error) for name, error in failures.items()} == {"a": "out of memory"}
    assert times == {"b": [1.0] * 4}


def test_after_a_failure_that_spoils_the_process_nobody_else_is_blamed():
    def breaks():
        raise RuntimeError("an illegal memory access")

    steps = {"a": [lambda: None], "b": [breaks], "c": [breaks]}
    times, failures = clocks.time_in_turns(steps, 4, clock(lambda step: step() or 1.0, sound=False))
    assert times == {} and len(failures) == 1


@pytest.mark.parametrize("times, expected", [([7.0], [7, 7, 7]), ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3.5, 5])])
def test_percentiles(times, expected):
    assert list(clocks.percentiles(times).values()) == expected


# The clock of a GPU, on a GPU of straw.


class Straw:
    """torch.cuda as far as GpuClock goes: time passes by 10 in every step, 1000 in a flush."""

    def __init__(self, monkeypatch, capturable=True, waits=False):
        self.now, self.capturing, self.log, self.waits, self.forbidden = 0.0, False, [], waits, "default"
        straw = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = straw.now

            def synchronize(self):
                straw.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at or 1.0

        class Graph:
            def replay(self):
                straw.log.append("replay")
                straw.now += 10

        @contextlib.contextmanager
        def graph(captured, pool, stream):
            if not capturable:
                raise RuntimeError("cannot capture")
            straw.capturing = True
            yield
            straw.capturing = False

        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        for name, fake in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph_pool_handle": lambda: (0, 1),
            "graph": graph,
            "Stream": lambda device: stream(),
            "stream": lambda _: contextlib.nullcontext(),
            "current_stream": stream,
            "synchronize": lambda: None,
            "memory_allocated": lambda: 2**20,
            "set_sync_debug_mode": lambda mode: setattr(straw, "forbidden", mode),
            "max_memory_allocated": lambda: 4 * 2**20,
            "reset_peak_memory_stats": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(clocks, "FLUSH", 4)
        self.clock = clocks.GpuClock("cpu")
        self.clock.buffer = type("Buffer", (), {"sum": lambda _: straw.log.append("flush")})()

    def step(self):
        if self.waits and self.forbidden == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.log.append("captured" if self.capturing else "step")
        self.now += 10

    def prepare(self, graph=True):
        return self.clock.prepare(lambda: self.step, graph, lambda: self.log.append("rest"))


def test_on_a_gpu_a_step_is_captured_flushed_for_and_replayed(monkeypatch):
    straw = Straw(monkeypatch)
    prepared = straw.prepare()
    assert straw.log == ["step", "rest", "step", "step", "captured"] and straw.forbidden == "default"
    assert (prepared.timer, prepared.peak_mib, prepared.no_graph) == ("graph", 3, None)
    assert straw.clock.time(prepared.step) == 10_000 and straw.log[5:] == ["flush", "replay", "wait"]


def test_on_a_gpu_what_a_graph_was_captured_from_lives_as_long_as_it(monkeypatch):
    """A replay reads the tensors of the step: freed, they would be somebody else's memory."""
    straw = Straw(monkeypatch)

    class Saved:
        """A tensor that only the step holds."""

    def make():
        saved = Saved()
        alive.append(weakref.ref(saved))
        return lambda: saved

    alive = []
    prepared = straw.clock.prepare(make, True, lambda: None)
    gc.collect()
    assert prepared.timer == "graph" and alive[0]() is not None
    del prepared
    gc.collect()
    assert alive[0]() is None


def test_on_a_gpu_a_broken_device_is_noticed(monkeypatch):
    straw = Straw(monkeypatch)
    assert straw.clock.sound()

    def broken_device():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken_device)
    assert not straw.clock.sound()


def test_a_backward_alone_is_no_graph_if_its_forward_dropped():
    dropped = HEADLINE.but(dropout=0.1)
    graphs = {
        (case["dropout"], mode): attention.BENCHMARK.graphs(case, mode)
        for case in (HEADLINE, dropped)
        for mode in Gelu.modes
    }
    assert [key for key, may in graphs.items() if not may] == [(0.1, "bwd")]


def test_on_a_gpu_what_waits_for_the_device_is_launched_and_said_to_be(monkeypatch):
    """And no capture is begun, which would fail and could not be undone."""
    straw = Straw(monkeypatch, waits=True)
    prepared = straw.prepare()
    assert "captured" not in straw.log and straw.forbidden == "default"
    assert clocks.timer([prepared]) == {"timer": "events", "no_graph": "called a synchronizing CUDA operation"}
    assert straw.clock.time(prepared.step) == 10_000 and straw.log[-3:] == ["flush", "step", "wait"]
    assert clocks.timer([straw.prepare(graph=False)]) == {"timer": "events"}


def test_on_a_gpu_a_capture_that_fails_ends_the_process(monkeypatch, quick_ceilings, tmp_path, capsys):
    """With a row that says who; what is left can be measured by another process."""
    straw = Straw(monkeypatch, capturable=False)
    monkeypatch.setattr(harness, "CpuClock", lambda: straw.clock)
    argv = ["bias_gelu", "--device", "cpu", "--tiny", "--rounds", "2", "--providers", "fastbert-torch"]
    argv += ["--out", str(tmp_path), "--skip-measured"]
    assert cli.main(argv) == cli.SPOILT
    assert "the GPU needs a new process" in capsys.readouterr().err
    [failed] = (row for row in rows.read(tmp_path) if row["op"] == "bias_gelu")
    assert (failed["provider"], failed["mode"], failed["status"]) == ("fastbert-torch", "fwd", "failed")
    assert failed["reason"] == "RuntimeError: cannot capture"
    straw.clock.capture_failed = False  # the other process
    assert cli.main([*argv, "--events"]) == 0
    measured = [row for row in rows.read(tmp_path) if row["status"] == "measured" and row["op"] == "bias_gelu"]
    assert {row["timer"] for row in measured} == {"events"} and len(measured) == 3
    assert cli.main([*argv, "--events"]) == 0  # nothing is left
    assert len([row for row in rows.read(tmp_path) if row["op"] == "bias_gelu"]) == 4


# Floors, by hand.


def test_the_floor_of_attention_is_that_of_the_specification():
    """B=32 H=12 L=512 D=64: 25.8 and 64.4 GFLOP, 101 and 201 MB, 101 M exponentials."""
    forward, backward = (attention.BENCHMARK.work(HEADLINE, mode) for mode in ("fwd", "bwd"))
    assert (round(forward.flops / 1e9, 1), round(backward.flops / 1e9, 1)) == (25.8, 64.4)
    assert (round(forward.bytes / 1e6), round(backward.bytes / 1e6)) == (101, 201)
    assert round(forward.exps / 1e6) == round(backward.exps / 1e6) == 101
    floor, by = CEILINGS.floor_us(forward, "bf16")
    assert by == "memory" and floor == pytest.approx(100.66 / 3, rel=1e-3)
    assert Ceilings(3e12, {"bf16": 8e14}, None).floor_us(Work(exps=1e12), "bf16") == (0, "memory")


@pytest.mark.parametrize("length, reach", [(1, 1), (5, 1), (5, 3), (5, 5), (5, 64), (130, 64)])
def test_the_band_of_relative_attention(length, reach):
    pairs = sum(abs(i - j) < reach for i in range(length) for j in range(length))
    assert relative_attention.band(length, reach) == pairs


def test_relative_attention_pays_for_the_band_besides():
    case = HEADLINE.but(R=64)
    extra = relative_attention.BENCHMARK.work(case, "fwd").flops - attention.BENCHMARK.work(HEADLINE, "fwd").flops
    assert extra == 2 * 2 * 64 * 32 * 12 * relative_attention.band(512, 64)


def test_ragged_lengths_have_the_mean_that_is_said():
    for fill in (1.0, 0.75, 0.5):
        found = attention.lengths(HEADLINE.but(fill=fill))
        assert abs(sum(found) / 32 - 512 * fill) <= 1 and found == sorted(found, reverse=True)
        assert max(found) <= 512 and min(found) >= 512 * (2 * fill - 1)
    assert attention.lengths(HEADLINE.but(B=2, fill=0.5)) == [384, 128]


def test_the_padded_batch_holds_the_packed_one():
    case = Case({"B": 3, "L": 8, "H": 1, "D": 4, "dropout": 0.0, "fill": 0.6}, "fp32")
    packed = attention.BENCHMARK.inputs(case, seed=0)
    padded = attention.padded(packed)
    ours, theirs = ops.attention(**packed), ops.attention(**padded)
    torch.testing.assert_close(theirs[padded["key_padding_mask"]], ours)
    assert padded["q"].requires_grad and padded["q"].shape == (3, 8, 1, 4)


def test_the_separate_rotation_is_the_reference():
    from benchmarks.rotary_attention import BENCHMARK

    for fill in (1.0, 0.6):
        case = Case({"B": 3, "L": 8, "H": 2, "D": 6, "dropout": 0.0, "fill": fill}, "fp32")
        inputs = BENCHMARK.inputs(case, seed=0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("benchmarks.rotary_attention.compiled", lambda function: function)
            prepare = BENCHMARK.operands(case, dense=fill == 1)

        def op(q, k, v, prepare=prepare, **ends):
            return ops.attention(*prepare(q, k, v), **ends)

        compare(op, reference.rotary_attention, inputs)


# Every benchmark, once.


@pytest.mark.parametrize("name", [name for name in (*cli.OPS, *cli.MODELS) if name not in ("feed", "prepare")])
def test_every_benchmark_measures_ours_and_theirs(name, quick_ceilings, tmp_path, capsys):
    """All providers that need neither a compiler nor a GPU, on the tiny shape, with dropout and padding where the op
    has them."""
    benchmark = cli.load(name)
    slow = ("compiled", "flex", "transformers-compiled")
    shapes = [benchmark.shapes(False)[0] | benchmark.tiny]
    if "fill" in shapes[0]:
        shapes.append(shapes[0] | {"B": 3, "fill": 0.6, "dropout": 0.1})
    for shape in shapes:
        sizes = [f"{key}={value}" for key, value in shape.items()]
        argv = [name, "--device", "cpu", "--rounds", "2", "--shape", *sizes, "--out", str(tmp_path), "--providers"]
        names = [p.name for p in benchmark.providers(Case(shape, "fp32")) if p.name not in slow]
        assert cli.main([*argv, *names]) == 0, capsys.readouterr()
    found = [row for row in rows.read(tmp_path) if row["op"] == benchmark.op]
    measured = {row["provider"] for row in found if row["status"] == "measured"}
    for row in found:
        assert row["status"] in ("measured", "missing") or row["provider"].startswith("sdpa"), row
        if row["status"] == "measured":
            assert row["comparable"] is False or " of the bound" in row["checked"]
    assert any(provider.startswith("fastbert") for provider in measured)
    assert any(not provider.startswith("fastbert") for provider in measured)
    assert {row["mode"] for row in found if row["status"] == "measured"} == set(benchmark.modes)


def test_our_dropout_is_checked_exactly_and_theirs_without_it(monkeypatch):
    """A provider of ours that ignores the seed is caught; a peer with a generator of its own is not asked."""
    case = Case({"B": 1, "L": 32, "H": 1, "D": 8, "dropout": 0.5, "fill": 1.0}, "fp32")
    forgetful = lambda case: lambda q, k, v, seed=None: ops.attention(q, k, v, dropout_p=case["dropout"])  # noqa: E731
    attention.BENCHMARK.check(Provider("peer", forgetful), forgetful(case), case)
    with pytest.raises(Mismatch, match="too large"):
        attention.BENCHMARK.check(Provider("fastbert-x", forgetful), forgetful(case), case)


def test_a_mean_loss_does_not_hide_wrong_gradients():
    """The gradients of a mean over many rows are smaller than the rounding of 1."""
    benchmark = cli.load("linear_cross_entropy")
    case = Case(benchmark.shapes(False)[0], "bf16")
    right = reference.linear_cross_entropy
    wrong = lambda hidden, weight, bias, labels: right(hidden.detach(), weight, bias, labels)  # noqa: E731
    benchmark.check(Provider("right", lambda case: right), right, case)
    with pytest.raises(Mismatch, match="grad hidden: error .*too large"):
        benchmark.check(Provider("wrong", lambda case: wrong), wrong, case)


def test_an_assertion_of_a_peer_is_its_failure_and_no_wrong_result(quick_ceilings):
    class Asserts(Gelu):
        def providers(self, case):
            def op(x, bias):
                raise AssertionError("inputs must be half")

            return [Provider("peer", lambda case: op)]

    _, [row, *_] = run(Asserts())
    assert (row["status"], row["reason"]) == ("failed", "AssertionError: inputs must be half")


def test_a_model_with_other_weights_is_wrong(quick_ceilings):
    benchmark = cli.load("models")
    case = Case(benchmark.shapes(False)[0] | benchmark.tiny, "fp32")

    def other(case):
        found = benchmark._theirs("eager", case)
        with torch.no_grad():
            next(found.model.parameters()).mul_(1.01)
        return found

    with pytest.raises(Mismatch, match="norm of gradients: error .*too large"):
        benchmark.check(Provider("other", other), other(case), case)


# The command.


@pytest.mark.parametrize(
    "argv, message",
    [
        (["atention"], "benchmark: got 'atention', expected one of attention, rotary_attention"),
        (["lamb", "--shape", "L=3"], "--shape: lamb has no L, but preset"),
        (["lamb", "--device", "tpu"], "--device: got 'tpu', expected cpu or cuda"),
        (["lamb", "--sweep"], "--sweep: lamb has no launch configurations to choose from"),
        (["models", "--shape", "family=gpt"], "family: got 'gpt', expected one of bert, roberta"),
        (["train", "--shape", "optimizer=sgd"], "optimizer: got 'sgd', expected adamw or lamb"),
        (["train", "--shape", "part=encoder"], "part: got 'encoder', expected masked_lm"),
        (["feed", "--shape", "filled=2"], "--shape: got filled=2, expected a whole number of at least 0"),
        (["latency", "--shape", "part=head"], "part: got 'head', expected masked_lm or encoder"),
        (["lamb", "--shape", "preset=bert-hug"], "bert-hug"),
        (["attention", "--shape", "B=1.5"], "--shape: got B=1.5, expected a whole number of at least 1"),
        (["attention", "--shape", "L=0"], "--shape: got L=0, expected a whole number of at least 1"),
        (["attention", "--shape", "fill=2"], "--shape: got fill=2, expected a number from 0.5 to 1"),
        (["attention", "--shape", "dropout=much"], "--shape: got dropout=much, expected a number from 0 to 0.99"),
        (["attention", "--providers", "sdpa", "nobody"], "--providers: got 'nobody', expected one of fastbert-triton,"),
        (["attention", "--cases", "99:"], "--cases: no case is left"),
        (["bias_gelu", "--modes", "step"], "--modes: got step, but bias_gelu: bwd, fwd, fwd+bwd"),
    ],
)
def test_says_what_is_wrong(argv, message, capsys, quick_ceilings):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", ["--shape 512", "--cases x", "--dtypes fp8", "--roundz 3", "--rounds 0", "--rounds -5", "--threads -1"]
)
def test_options_that_make_no_sense(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv.split())
    assert error.value.code == 2 and "error" in capsys.readouterr().err


def test_a_failure_of_ours_is_the_exit_code(monkeypatch, quick_ceilings, capsys):
    monkeypatch.setattr(ops, "bias_gelu", broken)
    assert cli.main(["bias_gelu", "--device", "cpu", "--tiny", "--rounds", "2", "--providers", "fastbert-torch"]) == 1
    assert "fastbert's own rows are wrong or failed" in capsys.readouterr().err


def test_what_is_measured_is_skipped_mode_by_mode(quick_ceilings, tmp_path):
    argv = ["bias_gelu", "--device", "cpu", "--tiny", "--rounds", "2", "--providers", "fastbert-torch"]
    argv += ["--out", str(tmp_path), "--skip-measured"]
    count = lambda: sum(row["op"] == "bias_gelu" for row in rows.read(tmp_path))  # noqa: E731
    for modes, rows_so_far in ((["--modes", "fwd"], 1), (["--modes", "fwd"], 1), ([], 4), ([], 4)):
        assert cli.main([*argv, *modes]) == 0
        assert count() == rows_so_far
    assert cli.main(argv[:-3] + ["--skip-measured"]) == 2  # without --out there is nothing to look at


def test_a_list_of_cases_measures_nothing(capsys):
    assert cli.main(["attention", "--list", "--cases", ":1", "--device", "cpu"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("  B=2 L=512 H=6 D=64 dropout=0.0 fill=1.0 fp32: fastbert-triton, ")


def test_a_sweep_launches_every_configuration(monkeypatch, quick_ceilings, tmp_path, capsys):
    triton = pytest.importorskip("triton")
    from benchmarks import bias_gelu
    from fastbert.kernels import gelu

    assert triton
    configurations = [{"BLOCK_M": m, "BLOCK_N": 64, "num_warps": 2} for m in (1, 2)]
    monkeypatch.setattr(bias_gelu.BENCHMARK, "sweep", ("gelu", configurations), raising=False)
    before, launched = gelu.launch_config, []
    cdiv = gelu.triton.cdiv
    monkeypatch.setattr(gelu.triton, "cdiv", lambda a, b: launched.append(b) or cdiv(a, b))
    argv = ["bias_gelu", "--sweep", "--device", "cpu", "--rounds", "2", "--shape", "T=4", "I=64"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    found = [row for row in rows.read(tmp_path) if row["op"] == "bias_gelu sweep"]
    assert {row["provider"] for row in found} == {f"BLOCK_M={m} BLOCK_N=64 num_warps=2" for m in (1, 2)}
    assert {row["mode"] for row in found} == {"fwd", "bwd", "fwd+bwd"} and {1, 2} <= set(launched)
    assert gelu.launch_config is before and "fastest:" in capsys.readouterr().out


def test_a_sweep_may_be_of_one_kernel_of_several():
    pytest.importorskip("triton")
    from benchmarks.sweep import Configured
    from fastbert.kernels import attention

    config = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    q = torch.empty(1, 1, 1, 64)
    asked = lambda: [attention.launch_config(kernel, q, set(), 9) for kernel in ("forward", "backward_q")]  # noqa: E731
    usual = asked()
    swept = Configured(None, "attention", {"kernel": "forward"} | config).during(asked)()
    assert swept == [config, usual[1]] and usual[0] != config and asked() == usual


# Rows.


def test_rows_are_kept_by_device_and_read_back(tmp_path):
    row = {"op": "x", "provider": "y", "status": "measured", "commit": "c", "date": "d"}
    h100, cpu = row | {"device": "NVIDIA H100 80GB HBM3"}, row | {"device": "AMD EPYC"}
    rows.write(tmp_path / "new", [h100, cpu])
    rows.write(tmp_path / "new", [h100])
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["amd-epyc.jsonl", "nvidia-h100-80gb-hbm3.jsonl"]
    assert list(rows.read(tmp_path / "new")) == [cpu, h100, h100]


@pytest.mark.parametrize("line, message", [("{", "line 2: not valid JSON"), ('{"op": "x"}', "line 2: no commit, date")])
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    good = {name: "x" for name in ("op", "provider", "status", "device", "commit", "date")}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        list(rows.read(tmp_path))


def test_the_environment_tells_an_interpreter_from_a_processor(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert rows.environment("cpu")["device"].endswith("(Triton interpreted)")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "interpreted" not in rows.environment("cpu")["device"]


def test_the_commit_is_that_of_the_checkout_or_told(monkeypatch, tmp_path):
    """Neither a copy without history nor an installed fastbert takes the commit of a repository around it."""
    git = lambda *words: subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True)  # noqa: E731
    git("init")
    git("-c", "user.name=x", "-c", "user.email=x", "commit", "--allow-empty", "-m", "theirs")
    folder = tmp_path / "copy" / "benchmarks"
    folder.mkdir(parents=True)
    monkeypatch.setattr(rows, "FOLDER", folder)
    monkeypatch.delenv("FASTBERT_COMMIT", raising=False)
    assert rows.environment("cpu")["commit"] == f"release {fastbert.__version__}"
    (tmp_path / "copy" / "pyproject.toml").touch()
    assert rows.environment("cpu")["commit"] is None
    monkeypatch.setenv("FASTBERT_COMMIT", "abc1234")
    assert rows.environment("cpu")["commit"] == "abc1234"
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(rows, "FOLDER", tmp_path / "copy")
    assert rows.environment("cpu")["commit"] == git("rev-parse", "--short", "HEAD").stdout.strip()


def test_bench_is_a_command_of_fastbert(capsys):
    assert fastbert.cli.main(["bench", "lamb", "--list", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("lamb (step)")


def test_ceilings_are_the_best_that_was_seen():
    times = itertools.cycle([5.0, 2.0, 4.0])
    found = ceilings.measure(clock(lambda step: next(times)), "cpu", ["fp32"], graphs=True)
    assert found.bytes == pytest.approx(2 * 4 * 2**26 / 2e-6)
    assert found.flops["fp32"] == pytest.approx(2 * 1024**3 / 2e-6)
    assert found.exps == pytest.approx(64 * 2**16 / 2e-6)
