"""Processes joined by gloo on the CPU, for tests of what several of them do together. They stay for all the tests of a
file, each handed the same function of it, and are ended by a signal: a process that leaves by itself after DDP runs
into a race of PyTorch's own between the end of the process group and the end of the interpreter.
"""

import multiprocessing
import os
import pickle
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from unittest import mock

import pytest
import torch
import torch.distributed as dist

LIMIT = 30  # seconds that processes wait for each other


def forkserver():
    """What starts processes as forks of one that has imported what takes long, and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", "fastbert.train.pretrain"])
    return context


class Processes:
    """run(function, *args) is [function(*args) of every rank]."""

    def __init__(self, size, folder):
        context = forkserver()
        self.pipes, self.processes = [], []
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            for rank in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, rank, size, str(folder)), daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)

    def run(self, function, *args, **kwargs):
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args, kwargs)))
        results = {}
        while len(results) < len(self.pipes):
            ready = wait([pipe for pipe in self.pipes if pipe not in results], timeout=2 * LIMIT)
            try:
                results |= {pipe: pickle.loads(pipe.recv_bytes()) for pipe in ready}
            except EOFError:
                ready = []
            errors = [result for result in results.values() if isinstance(result, str)]
            if errors or not ready:
                self.stop()
                pytest.fail("\n".join(errors) or "a process died or did not answer", pytrace=bool(not errors))
        return [results[pipe] for pipe in self.pipes]

    def stop(self):
        """Without waiting for what they still do."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            process.terminate()
            process.join()
            pipe.close()
        self.pipes, self.processes = [], []


def _serve(pipe, rank, size, folder):
    """What a process does all its life."""
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", store, timedelta(seconds=LIMIT), world_size=size, rank=rank)
    while True:
        try:
            function, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            return
        try:
            result = function(*args, **kwargs)
        except Exception:
            result = f"rank {rank} of {size}:\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(result))
