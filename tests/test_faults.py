"""Disks that are full, read-only or broken while a run writes to them: it ends with an error that says what cannot be
written and where to go on from, and once there is room it goes on as if nothing had happened.
"""

import errno
import os
import subprocess
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from test_train import TINY, command_line, config, data, same_end, uninterrupted  # noqa: F401

from fastbert.cli import main
from fastbert.errors import ProcessError, StorageError
from fastbert.train import pretrain, state

training = import_module("fastbert.train.pretrain")  # the name in fastbert.train is the function
pytestmark = pytest.mark.usefixtures("one_thread")
both = pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])


def checkpoints(out):
    """Their names, the oldest first. Fails if one is damaged, or if something else is there."""
    folders = sorted((Path(out) / "checkpoints").iterdir())
    for folder in folders:
        state.verify(folder)
    return [folder.name for folder in folders]


def fails(config, *said):  # noqa: F811
    with pytest.raises(StorageError) as caught:
        pretrain(config)
    for text in said:
        assert text in str(caught.value)
    return str(caught.value)


def once(monkeypatch, update, act):
    """act(trainer) before this update is computed, and when what was being saved is."""
    step = training.Trainer._train_step

    def train_step(self):
        if self.update == update:
            self.saver.wait()
            act(self)
        return step(self)

    monkeypatch.setattr(training.Trainer, "_train_step", train_step)


class Disk:
    """A small file system."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def resize(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)

    def lock(self):
        """Read-only, but for files that are open."""
        subprocess.run(["mount", "--bind", self.folder, self.folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", self.folder], check=True)

    def unlock(self):
        subprocess.run(["umount", self.folder], check=True)

    def remove(self):
        while os.path.ismount(self.folder):
            subprocess.run(["umount", "--lazy", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    yield made
    made.remove()


@both
def test_a_disk_that_fills_up(config, uninterrupted, disk, asynchronous):  # noqa: F811
    """With room for the first checkpoint, and for half of the second."""
    sizes = [path.stat().st_size for path in (uninterrupted / "checkpoints" / "step-00000005").iterdir()]
    disk.resize(4096 * (sum(-(-size // 4096) for size in sizes) * 3 // 2 + 4))
    config = replace(config, out=str(disk.folder / "run"), async_checkpoints=asynchronous)
    said = fails(config, "step-00000010 cannot be written", "o space left on device")
    assert "its last checkpoint is step-00000005" in said and "goes on from there with resume" in said
    assert checkpoints(config.out) == ["step-00000005"]
    fails(replace(config, resume=True), "step-00000010 cannot be written")  # there is still no room
    assert checkpoints(config.out) == ["step-00000005"]
    disk.resize("100m")
    pretrain(replace(config, resume=True))
    assert checkpoints(config.out)[-1] == "step-00000012"
    same_end(config.out, uninterrupted)


def test_a_log_that_has_no_room(config, uninterrupted, disk, monkeypatch):  # noqa: F811
    config = replace(config, out=str(disk.folder / "run"))

    def fill(trainer):
        free = os.statvfs(disk.folder)
        (disk.folder / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize))
        trainer.journal.record("note", text="." * 8192)

    with monkeypatch.context() as patch:
        disk.resize("1m")
        once(patch, 7, fill)
        fails(config, "log.jsonl cannot be written", "its last checkpoint is step-00000005")
    (disk.folder / "ballast").unlink()
    pretrain(replace(config, resume=True))
    same_end(config.out, uninterrupted)


@both
def test_a_disk_that_becomes_read_only(config, uninterrupted, disk, asynchronous, monkeypatch):  # noqa: F811
    config = replace(config, out=str(disk.folder / "run"), async_checkpoints=asynchronous)
    with monkeypatch.context() as patch:
        once(patch, 7, lambda _: disk.lock())
        fails(
            config, "step-00000010 cannot be written", "Read-only file system", "its last checkpoint is step-00000005"
        )
    assert checkpoints(config.out) == ["step-00000005"]
    fails(replace(config, resume=True), "Read-only file system")
    disk.unlock()
    pretrain(replace(config, resume=True))
    same_end(config.out, uninterrupted)


def test_a_folder_that_cannot_be_made(data, disk, capsys):  # noqa: F811
    disk.lock()
    options = dict(data=data, out=disk.folder / "run", steps=3, max_length=20, device="cpu")
    assert main(command_line(**options, model=TINY)) == 2
    shown = capsys.readouterr()
    assert f"{disk.folder / 'run'}" in shown.err and "Read-only file system" in shown.err
    assert len(shown.err.splitlines()) == 1 and "Traceback" not in shown.err
    disk.unlock()


@both
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_disk_that_does_not_sync(config, uninterrupted, asynchronous, number, monkeypatch):  # noqa: F811
    """The first time, so that there is no checkpoint, and once there is one."""
    config = replace(config, async_checkpoints=asynchronous)

    def fail(_path):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        once(patch, 3, lambda _: patch.setattr(state, "_sync", fail))
        fails(config, "step-00000005 cannot be written", os.strerror(number), "without any checkpoint")
    assert checkpoints(config.out) == []
    with monkeypatch.context() as patch:
        once(patch, 8, lambda _: patch.setattr(state, "_sync", fail))
        fails(replace(config, overwrite=True), os.strerror(number), "its last checkpoint is step-00000005")
    pretrain(replace(config, resume=True))
    same_end(config.out, uninterrupted)


def test_the_model_folder_is_whole_or_absent(config, uninterrupted, monkeypatch):  # noqa: F811
    """What is written last."""
    setup = import_module("fastbert.train.setup")
    write = setup.write_model

    def fail(model, tokenizer, folder):
        write(model, tokenizer, folder)
        if folder.name == ".model.new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(setup, "write_model", fail)
        fails(config, f"{Path(config.out) / 'model'} cannot be written", "its last checkpoint is step-00000012")
    assert not list(Path(config.out).glob("*model*"))
    result = pretrain(replace(config, resume=True))
    assert (
        result.step == 12
        and (result.model / "model.safetensors").read_bytes()
        == (uninterrupted / "model" / "model.safetensors").read_bytes()
    )


def together(config):  # noqa: F811
    """In each of several processes: what the run of all ends with."""

    def fail(_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept, state._sync = state._sync, fail
    try:
        pretrain(config)
    except (StorageError, ProcessError) as error:
        return type(error), str(error)
    finally:
        state._sync = kept


@both
def test_every_process_ends_where_the_first_cannot_save(config, processes, asynchronous):  # noqa: F811
    config = replace(config, global_batch=16, async_checkpoints=asynchronous)
    first, second = processes(2).run(together, config)
    assert first[0] is StorageError and os.strerror(errno.ENOSPC) in first[1]
    assert second[0] is ProcessError and second[1].startswith("process 0 cannot save a checkpoint")
