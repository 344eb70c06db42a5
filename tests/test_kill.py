"""A run that is killed (SIGKILL) at any moment, again and again, is in the end the run that nothing has happened to.

Half of the kills come at a random time, the other half at a random operation on files: before a file, a folder or a
name is made, synced or removed, so mostly inside a checkpoint. FASTBERT_KILLS=200 makes that many in each of the two
modes; -s shows what they came to.
"""

import json
import math
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from processes import forkserver
from test_train import TINY, command_line, data, losses  # noqa: F401
from tqdm import tqdm

import fastbert
from fastbert.cli import main
from fastbert.train import state

KILLS = int(os.environ.get("FASTBERT_KILLS", "12"))
STEPS, INTERVAL = 12, 3
SETTINGS = dict(max_length=20, batch_size=8, steps=STEPS, lr=1e-3, warmup=2, log_every=1, validate_every=4)
SETTINGS |= dict(checkpoint_every=INTERVAL, keep_last=2, device="cpu", threads=1, masking="token")
RUNS = {
    "async": dict(variant="roformer", model=TINY),
    "sync": dict(variant="electra", objective="rtd", optimizer="lamb", model=TINY | dict(embedding_size=8)),
}
_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"}


# -- in the process that is killed -----------------------------------------------------------------------------------


def live(arguments, folder, said, last_operation):
    """`fastbert` with these arguments, up to an operation on the files of `folder`; tells the number of operations."""
    with open(said, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.manual_seed(random.SystemRandom().getrandbits(60))  # nothing may depend on the state of a generator
    tqdm.set_lock(threading.RLock())  # its own has a semaphore, which a process that is killed leaves behind
    count = 0

    def operate():
        nonlocal count
        count += 1
        if count == last_operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, given):
        writes = event in _WRITES or event == "open" and isinstance(given[2], int) and given[2] & os.O_ACCMODE
        if writes and isinstance(given[0], str | Path) and str(given[0]).startswith(folder):
            operate()

    sync = os.fsync
    os.fsync = lambda handle: (operate(), sync(handle))
    sys.addaudithook(audit)
    code = main(arguments)
    sys.stdout.write(f"operations: {count}\n")
    sys.stdout.flush()
    os._exit(code)


# -- in the process that kills ---------------------------------------------------------------------------------------


class Run:
    """A run in `out` of the `data`, in processes that are forked from one that has imported everything."""

    def __init__(self, data, out, mode):  # noqa: F811
        self.out, self.said = out, out.with_name(f"{out.name}.txt")
        settings = SETTINGS | RUNS[mode] | {"data": data, "out": out}
        self.arguments = command_line(**settings) + ([] if mode == "async" else ["--no-async-checkpoints"])

    def start(self, last_operation=math.inf):
        how = ["--resume"] if self.checkpoints() else ["--overwrite"] if self.out.exists() else []
        given = ([*self.arguments, *how], str(self.out), str(self.said), last_operation)
        process = forkserver().Process(target=live, args=given, daemon=True)
        process.start()
        return process

    def finish(self):
        """The seconds that the rest of it takes, and the operations."""
        begin = time.monotonic()
        process = self.start()
        process.join(120)
        assert process.exitcode == 0, self.said.read_text(encoding="utf-8")
        return time.monotonic() - begin, int(self.said.read_text(encoding="utf-8").rpartition("operations: ")[2])

    def checkpoints(self):
        """The steps of its checkpoints, the newest first. Fails if one is not whole."""
        folders = state.newest_first(self.out / "checkpoints")
        for folder in folders:
            state.verify(folder)
        return [state.step_of(folder) for folder in folders]

    def records(self):
        path = self.out / "log.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def reached(self):
        """The last step that was taken."""
        return max((record["step"] for record in self.records() if record["event"] == "train"), default=0)


def same(run, other):
    """Every tensor, every loss, every setting, and the state that a resumed run would go on from."""
    names = ["model.safetensors", "optimizer.safetensors", "config.json", "vocab.txt"]
    folder = Path("checkpoints") / state.name_of(STEPS)
    for path in [folder / name for name in names] + [Path("model") / name for name in names if "optim" not in name]:
        assert (run.out / path).read_bytes() == (other.out / path).read_bytes(), path
    one, two = (state.read_state(each.out / folder) for each in (run, other))
    for content in (one, two):
        for name in ("out", "resume", "overwrite"):
            del content["config"][name]
    assert one == two
    assert losses(run.out) == losses(other.out)
    assert run.checkpoints() == other.checkpoints()
    assert not list((run.out / "checkpoints").glob(".*")), "remains of a folder that was not completed"
    fastbert.from_pretrained(run.out / "model")


@pytest.mark.parametrize("mode", RUNS)
def test_kills_change_nothing(data, tmp_path, mode):  # noqa: F811
    whole = Run(data, tmp_path / "whole", mode)
    whole.finish()
    seconds, operations = Run(data, tmp_path / "again", mode).finish()
    draw = random.Random(mode)
    kills, inside, runs, repeated = 0, 0, 0, []
    while kills < KILLS:
        run, runs = Run(data, tmp_path / f"run{runs}", mode), runs + 1
        for _ in range(3):
            before = run.checkpoints()
            if kills % 2:
                process = run.start()
                process.join(draw.uniform(0, seconds))
                process.kill()
            else:
                process = run.start(draw.randrange(1, operations))
            process.join(120)
            if process.exitcode == 0:  # it was over before
                break
            assert process.exitcode == -signal.SIGKILL, run.said.read_text(encoding="utf-8")
            kills += 1
            inside += bool(list((run.out / "checkpoints").glob(".*")))
            found = run.checkpoints()
            assert found[:1] >= before[:1], "a checkpoint was lost"
            repeated.append(run.reached() - (found[0] if found else 0))
        run.finish()
        if repeated:
            resumed = [record["step"] for record in run.records() if record["event"] == "resume"]
            assert all(step % INTERVAL == 0 for step in resumed)
        same(run, whole)
    print(
        f"\n{mode}: {kills} kills in {runs} runs, {inside} of them while a folder was being written; steps taken "
        f"again: at most {max(repeated)} (a checkpoint every {INTERVAL}), {sum(repeated) / kills:.1f} on average"
    )
    # What is being written while training goes on is not there yet.
    assert max(repeated) <= (INTERVAL if mode == "sync" else 2 * INTERVAL)
    assert inside >= kills // 8


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """As after a power cut: what was not synced may be gone, and a name may be there before what it names."""
    done, rename, sync = [], Path.rename, os.fsync

    def synced(handle):
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(("rename", str(to))), rename(path, to))[1])
    folder = state.save(tmp_path, 7, lambda at: (at / "part").mkdir(), {"w/m": torch.ones(3)}, {"step": 7})
    named = done.index(("rename", str(folder)))
    temporary = tmp_path / f".{folder.name}.new"
    before = {Path(path) for what, path in done[:named] if what == "sync"}
    assert before == {temporary / path.relative_to(folder) for path in (folder, *folder.rglob("*"))}
    assert done[named + 1 :] == [("sync", str(tmp_path))]
