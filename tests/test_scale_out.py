"""Training on several processes: the same run as on one, whether they share the model (ddp) or have a part each (fsdp);
what they exchange; and what is said when one of them fails.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_train import TINY, close_end, config, data, environment, losses  # noqa: F401

import fastbert
from fastbert.errors import ConfigError, ProcessError
from fastbert.train import PretrainConfig, gradients, pretrain
from fastbert.train.feed import Feed
from fastbert.train.step import TrainStep
from fastbert.train.world import Notes, World

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = TINY | dict(embedding_size=8)
RUNS = {
    "roformer": {},
    "bert": dict(variant="bert", bias_correction=False),
    "nezha": dict(variant="nezha", optimizer="lamb", lr=0.01),
    "albert": dict(variant="albert", model=SMALL, optimizer="lamb", lr=0.01),
    "rtd": dict(variant="electra", objective="rtd", model=SMALL, masking="token"),
    "checkpointing": dict(gradient_checkpointing=True),
}


def whole(config, **changes):  # noqa: F811
    """Sixteen samples an update, by four."""
    return replace(config, batch_size=4, global_batch=16, steps=6, validate_every=3, log_every=2, **changes)


def run(config):  # noqa: F811
    """In each process. Returns what the first one has heard of."""
    torch.set_num_threads(1)
    return pretrain(config).loss


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):  # noqa: F811
    """alone(name): the folder of that run on one process."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("alone") / "run"
            torch.set_num_threads(1)
            pretrain(whole(_config(data, made[name]), **RUNS[name]))
        return made[name]

    return get


def _config(data, out):  # noqa: F811
    settings = dict(max_length=20, lr=1e-3, warmup=2, checkpoint_every=5, device="cpu")
    return PretrainConfig(data=str(data), out=str(out), model=TINY, **settings)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RUNS)
def test_several_processes_make_the_run_of_one(data, alone, processes, tmp_path, name, parallel, size):  # noqa: F811
    """With dropout: weights, moments, losses and validations, to the rounding of sums."""
    own = whole(_config(data, tmp_path / "run"), **RUNS[name], parallel=parallel)
    processes(size).run(run, own)
    close_end(own.out, alone(name), step=6)
    one, two = (
        load_file(Path(out) / "checkpoints/step-00000006/optimizer.safetensors") for out in (own.out, alone(name))
    )
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)
    assert type(fastbert.from_pretrained(Path(own.out) / "model")) is type(
        fastbert.from_pretrained(alone(name) / "model")
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_teacher_is_whole_in_every_process(data, alone, processes, tmp_path, parallel):  # noqa: F811
    one = whole(_config(data, tmp_path / "one"), teacher=str(alone("bert") / "model"), distill_hidden=0.5)
    pretrain(one)
    two = replace(one, parallel=parallel, out=str(tmp_path / "two"))
    processes(2).run(run, two)
    close_end(two.out, one.out, step=6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_sharded_model_runs_in_16_bits_beside_weights_in_fp32(data, processes, tmp_path, precision):  # noqa: F811
    one = whole(_config(data, tmp_path / "one"), precision=precision)
    pretrain(one)
    two = replace(one, parallel="fsdp", out=str(tmp_path / "two"))
    processes(2).run(run, two)
    for a, b in zip(losses(one.out), losses(two.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    weights = load_file(Path(two.out) / "checkpoints/step-00000006/model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert json.loads((Path(two.out) / "log.jsonl").read_text().splitlines()[0])["precision"].endswith(precision[-2:])


# -- what is exchanged -----------------------------------------------------------------------------------------------


def exchanges(config, bucket=None):  # noqa: F811
    """Trains; returns, of each update, the sizes and dtypes of what was summed over processes for it."""
    torch.set_num_threads(1)
    updates, now = [], []
    scatter = (
        "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    )  # torch < 2.13
    kept = {name: getattr(dist, name) for name in ("all_reduce", scatter)}
    limit, apply = gradients._BUCKET, TrainStep.apply

    def all_reduce(tensor, *args, **kwargs):
        if tensor.numel() > 64:
            now.append((tensor.numel(), str(tensor.dtype)))
        return kept["all_reduce"](tensor, *args, **kwargs)

    def reduce_scatter(output, input, *args, **kwargs):
        now.append((input.numel(), str(input.dtype)))
        return kept[scatter](output, input, *args, **kwargs)

    def applied(self):
        early = len(now)
        apply(self)
        updates.append((early, list(now)))
        now.clear()

    try:
        dist.all_reduce, TrainStep.apply = all_reduce, applied
        setattr(dist, scatter, reduce_scatter)
        gradients._BUCKET = bucket or limit
        pretrain(config)
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
        gradients._BUCKET, TrainStep.apply = limit, apply
    return updates


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_in_an_update(data, processes, tmp_path, parallel, precision):  # noqa: F811
    """Whatever the number of micro-batches; in the last backward pass but for what is left; in the dtype asked for."""
    found = {}
    for accumulation in (1, 3):
        for dtype in ("fp32", "bf16"):
            own = whole(_config(data, tmp_path / f"{accumulation}{dtype}"), parallel=parallel, precision=precision)
            own = replace(own, global_batch=None, accumulation=accumulation, reduce_dtype=dtype, validation_samples=0)
            first, second = processes(2).run(exchanges, own, 2000)
            assert first == second and len(first) == 6
            found[accumulation, dtype] = first
    for (_, dtype), updates in found.items():
        for early, sent in updates:
            assert early >= len(sent) - 1, "all but what had no gradient is sent before the update is applied"
            assert {kind for _, kind in sent} == {{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]}
    assert found[1, "fp32"] == found[3, "fp32"]
    assert len(found[1, "fp32"][0][1]) > 2, "in several parts"


def buckets_of(seed, bucket, unused, reduce_dtype):
    """The sums of gradients over all processes in buckets of a size, and in one."""
    found = []
    limit = gradients._BUCKET
    for size in (bucket, 1 << 40):
        gradients._BUCKET = size
        torch.manual_seed(seed)
        model = torch.nn.ModuleList(torch.nn.Linear(9, 9) for _ in range(5))
        torch.manual_seed(seed + 1 + dist.get_rank())
        made = gradients.MainGradients(
            model, model, World(torch.device("cpu"), dist.get_rank(), dist.get_world_size()), reduce_dtype
        )
        for step in range(2):
            for last in (False, True):
                made.expect(last)
                x = torch.randn(3, 9)
                for index, layer in enumerate(model):
                    if index != unused or not last:
                        x = layer(x)
                x.square().sum().backward()
            if step == 0:
                try:
                    made.expect(False)
                    assert size > 1 << 30
                except ConfigError as error:
                    assert "after the last one of the update, expected apply" in str(error)
            made.complete()
            found.append(made.buffer.clone())
            made.begin()
    gradients._BUCKET = limit
    return torch.equal(found[0], found[2]) and torch.equal(found[1], found[3]), found[1]


@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("unused", [None, 0, 2, 4])
def test_sums_do_not_depend_on_buckets(processes, unused, reduce_dtype):
    results = processes(2).run(buckets_of, 3, 100, unused, reduce_dtype)
    assert all(same for same, _ in results)
    assert torch.equal(results[0][1], results[1][1]) and results[0][1].any()


# -- the order of samples --------------------------------------------------------------------------------------------


def taken(config, updates):  # noqa: F811
    torch.set_num_threads(1)
    rows = []
    own = Feed.own
    try:
        Feed.own = lambda self, update: (rows.append((update, own(self, update).tolist())), own(self, update))[1]
        pretrain(config)
    finally:
        Feed.own = own
    return {update: batches for update, batches in rows if update < updates}


def test_micro_batches_are_the_same_on_any_number_of_processes(data, processes, tmp_path):  # noqa: F811
    """In the same order: process after process has the next."""
    found = {1: [taken(whole(_config(data, tmp_path / "1")), 6)]}
    found |= {size: processes(size).run(taken, whole(_config(data, tmp_path / str(size))), 6) for size in (2, 4)}
    for update in range(6):
        orders = []
        for size, each in found.items():
            orders.append(
                [batch for step in range(4 // size) for rank in each for batch in rank[update][step : step + 1]]
            )
        assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 4


# -- a process that fails --------------------------------------------------------------------------------------------


@pytest.fixture
def notes():
    store, made = dist.HashStore(), []

    def get(rank):
        made.append(Notes(store, rank, 3))
        return made[-1]

    yield get
    for each in made:
        each.close()


def note_of(notes, rank, **changes):
    store = notes._store
    store.set(f"note/{rank}", json.dumps(json.loads(store.get(f"note/{rank}")) | changes))


def test_the_others_are_told_of_by_name(notes, monkeypatch):
    monkeypatch.setattr("fastbert.train.world._SILENCE", 0.1)
    monkeypatch.setattr("fastbert.train.world._BEAT", 0.1)
    first, second, third = (notes(rank) for rank in range(3))
    second.doing("in step 7")
    second._write()
    third.doing("in step 8")
    third._write()
    told = first.of_others()
    assert f"process 1 (pid {os.getpid()}" in told and "lives, and has been in step 7 for 0 s" in told
    assert "process 2" in told and "in step 8" in told
    for each in (second, third):
        each.close()
    note_of(first, 2, pid=2**22 + 1)
    assert first.of_others() == f"process 2 (pid {2**22 + 1} on {os.uname().nodename}) has died, last seen in step 8"
    note_of(first, 2, pid=os.getpid(), host="elsewhere", time=time.time() - 60)
    assert first.of_others() == f"process 2 (pid {os.getpid()} on elsewhere) has died, last seen in step 8"
    second.fail(ProcessError("of another"))
    second.fail(ValueError("bang"))
    assert first.of_others().startswith("process 1 failed: ValueError: bang; process 2")
    with pytest.raises(
        ProcessError, match="process 2 of 3 waited for process 0, making it: process 0 failed: KeyError"
    ):
        first.fail(KeyError("k"))
        notes(2).wait_for_main("making it")


def test_the_first_process_is_waited_for(notes):
    first, second = notes(0), notes(1)
    first.wait_for_main("one")
    second.wait_for_main("one")
    begin = time.monotonic()
    Timer(0.5, first.wait_for_main, ["two"]).start()
    second.wait_for_main("two")
    assert time.monotonic() - begin >= 0.4


def end(running):
    """Ends a process and its children."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    for pid in [running.pid, *map(int, children)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["raise ValueError('bang')", "time.sleep(100)"])
def test_the_survivor_of_a_failure_says_for_whom_it_waited(data, tmp_path, how):  # noqa: F811
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from importlib import import_module\n"
        "from fastbert import cli\n"
        "trainer = import_module('fastbert.train.pretrain').Trainer\n"
        "step = trainer._train_step\n"
        "def fail(self):\n"
        "    if self.update == 3 and self.world.rank == 1:\n"
        f"        {how}\n"
        "    return step(self)\n"
        "trainer._train_step = fail\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    options = ["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu", "--max-length", "20"]
    options += [
        "--batch-size",
        "8",
        "--steps",
        "6",
        "--timeout",
        "5",
        "--model",
        *(f"{k}={v}" for k, v in TINY.items()),
    ]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment()) as running:
        told = ""
        while "waited in vain" not in told:
            line = running.stderr.readline()
            assert line, told
            told += line
        end(running)  # the launcher would give a process that hangs half a minute
    reason = "process 1 failed: ValueError: bang" if "raise" in how else "lives, and has been in step 4 for"
    assert "process 0 of 2 waited in vain for the others: process 1" in told and reason in told


@pytest.mark.parametrize("option", ["compile", "cuda_graphs"])
def test_a_sharded_model_is_in_no_graph(option):
    with pytest.raises(ConfigError, match=f"{option} is set and parallel is 'fsdp', expected 'ddp'"):
        PretrainConfig(data="d", parallel="fsdp", **{option: True})
