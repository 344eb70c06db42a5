"""Runs that go on with another number of processes, or after one was killed: the samples, their order and the losses of
the run that nothing has happened to.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from test_scale_out import whole
from test_train import TINY, close_end, config, data, environment, losses, same_end  # noqa: F401

from fastbert.train import PretrainConfig, pretrain
from fastbert.train.feed import Feed
from fastbert.train.journal import read_log

training = import_module("fastbert.train.pretrain")  # the name in fastbert.train is the function
pytestmark = pytest.mark.usefixtures("one_thread")
STAGES = {3: 1, 6: 2, 9: 4, 12: 1}  # the step up to which so many processes take it
SMALL = TINY | dict(embedding_size=8)


def stage(config, until):  # noqa: F811
    """In each process: trains until a step. Returns the micro-batches of each update that it had."""
    torch.set_num_threads(1)
    taken, own, step = {}, Feed.own, training.Trainer._train_step

    def noted(self, update):
        taken[update] = own(self, update).tolist()
        return own(self, update)

    def stopping(self):
        if self.update == until - 1 and until < 12:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    Feed.own, training.Trainer._train_step = noted, stopping
    try:
        result = pretrain(config)
    finally:
        Feed.own, training.Trainer._train_step = own, step
    assert result.step == until
    return taken


def in_order(of_ranks, begin, end):
    """For each update its micro-batches, process after process having the next."""
    return {
        update: [batch for step in zip(*(taken[update] for taken in of_ranks), strict=True) for batch in step]
        for update in range(begin, end)
    }


@pytest.mark.parametrize(
    ("parallel", "own"),
    [
        ("ddp", {}),
        ("fsdp", {}),
        ("fsdp", dict(variant="albert", model=SMALL, optimizer="lamb", lr=0.01)),
        ("ddp", dict(variant="electra", objective="rtd", model=SMALL, masking="token")),
    ],
    ids=["ddp", "fsdp", "fsdp-albert-lamb", "ddp-rtd"],
)
def test_one_two_four_one(config, tmp_path, processes, parallel, own):  # noqa: F811
    config = replace(whole(config), steps=12, validate_every=4, log_every=1, parallel=parallel, **own)
    alone = replace(config, out=str(tmp_path / "alone"))
    expected, found, begin = in_order([stage(alone, 12)], 0, 12), {}, 0
    for until, size in STAGES.items():
        now = replace(config, resume=begin > 0)
        of_ranks = [stage(now, until)] if size == 1 else processes(size).run(stage, now, until)
        found |= in_order(of_ranks, begin, until)
        begin = until
    assert found == expected
    assert [record["processes"] for record in read_log(config.out, "resume")] == [2, 4, 1]
    assert [record["step"] for record in losses(config.out)] == [record["step"] for record in losses(alone.out)]
    close_end(config.out, alone.out)


def of_two(config):  # noqa: F811
    torch.set_num_threads(1)
    assert dist.get_world_size() == 2
    return pretrain(config).step


def test_torchrun_goes_on_after_a_process_was_killed(config, processes, tmp_path):  # noqa: F811
    """Two times; the run is, bit by bit, that of two processes that lived."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from importlib import import_module\n"
        "from fastbert import cli\n"
        "trainer = import_module('fastbert.train.pretrain').Trainer\n"
        "step = trainer._train_step\n"
        "deaths = {'0': (7, '1'), '1': (9, '0')}  # by the number of restarts: in which update, and of which process\n"
        "def die(self):\n"
        "    self.saver.wait()\n"
        "    if deaths.get(os.environ['TORCHELASTIC_RESTART_COUNT']) == (self.update, os.environ['RANK']):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self)\n"
        "trainer._train_step = die\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    settings = dict(
        batch_size=4, global_batch=16, steps=12, lr=1e-3, warmup=2, log_every=1, validate_every=6, threads=1
    )
    settings |= dict(data=config.data, model=TINY, max_length=20, checkpoint_every=5, device="cpu")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings | {"out": config.out}), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--monitor-interval", "0.1", str(script), "pretrain", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in read_log(config.out, "resume")] == [5, 5]
    lived = PretrainConfig(**settings, out=str(tmp_path / "lived"))
    assert processes(2).run(of_two, lived) == [12, 12]
    same_end(config.out, lived.out)
