"""Which checkpoints there are: kept, best, replaced; and how long training stands still for one."""

import json
import shutil
import threading
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_train import TINY, config, damage, data, losses, same_end, uninterrupted  # noqa: F401

from fastbert.errors import CheckpointError, ConfigError
from fastbert.train import pretrain, resume, state
from fastbert.train.journal import read_log
from fastbert.train.saver import Saver
from fastbert.train.world import World

training = import_module("fastbert.train.pretrain")  # the name in fastbert.train is the function
pytestmark = pytest.mark.usefixtures("one_thread")


def names(root):
    return [state.step_of(folder) for folder in state.newest_first(Path(root))]


@pytest.fixture
def saver(tmp_path):
    """saver(**options): one of a model of two weights, which it has too, as `model` and `optimizer`."""

    def make(**options):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        made = Saver(
            tmp_path / "checkpoints",
            model,
            lambda copied, folder: torch.save(copied.state_dict(), folder / "weights"),
            World(torch.device("cpu")),
            **dict(keep_last=2, asynchronous=True) | options,
        )
        made.model, made.optimizer = model, torch.optim.AdamW(model.parameters())
        return made

    return make


def save(saver, step, loss=None):
    saver.save(saver.model, saver.optimizer, {"step": step}, loss)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_last_and_the_best_are_kept(saver, asynchronous):
    made = saver(asynchronous=asynchronous)
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, None, 1.5], start=1):
        save(made, step, loss)
    made.wait()
    assert names(made.root) == [6, 5, 2] and made.best == (1.0, "step-00000002")
    assert [saved.step for saved in made.saved()] == [1, 2, 3, 4, 5, 6] and made.saved() == []
    save(made, 7, 0.5)
    made.wait()
    assert names(made.root) == [7, 6]
    assert state.read_state(made.root / "step-00000007")["best"] == [0.5, "step-00000007"]


def test_what_is_saved_is_the_moment_of_the_call(saver):
    """Though training goes on while it is written."""
    made, go_on = saver(), threading.Event()
    write = made._write

    def slow(model, folder):
        assert go_on.wait(10)
        write(model, folder)

    made._write = slow
    made.model(torch.ones(3)).sum().backward()
    made.optimizer.step()
    want = {name: t.clone() for name, t in made.model.state_dict().items()}
    moment = made.optimizer.state[made.model.weight]["exp_avg"].clone()
    save(made, 1)
    made.optimizer.step()
    assert not torch.equal(made.model.weight, want["weight"])
    assert names(made.root) == [] and not made.saved(), "it is not there before it is whole"
    go_on.set()
    made.wait()
    found = torch.load(made.root / "step-00000001" / "weights", weights_only=True)
    assert all(torch.equal(found[name], want[name]) for name in want)
    with state.safe_open(made.root / "step-00000001" / "optimizer.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("weight/exp_avg"), moment)


def test_what_goes_wrong_in_the_thread_is_kept(saver):
    made = saver()
    made._write = lambda *_: 1 / 0
    save(made, 1)
    made.wait()
    assert isinstance(made.error, ZeroDivisionError) and made.saved() == []
    assert not list(made.root.iterdir())


def test_damaged_checkpoints_are_not_counted(config, uninterrupted):  # noqa: F811
    """A run that goes back behind them, and keeps one checkpoint, keeps its own."""
    shutil.copytree(uninterrupted, config.out)
    root = Path(config.out) / "checkpoints"
    for step in (10, 12):
        damage(root / state.name_of(step) / "model.safetensors", "cut")
    seen, advance = [], training.Journal.advance

    def look(self, step):
        seen.append((step, names(root)))
        advance(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Journal, "advance", look)
        pretrain(
            replace(config, resume=True, keep_last=1, checkpoint_every=3, async_checkpoints=False, keep_best=False)
        )
    assert seen[0] == (6, [12, 10, 5]) and seen[1] == (7, [12, 10, 6]) and seen[-1] == (12, [12, 10, 9])
    assert names(root) == [12]
    same_end(config.out, uninterrupted)
    found = read_log(config.out, "damaged")
    assert [record["step"] for record in found] == [5, 5]
    assert "step-00000012/model.safetensors is damaged" in found[0]["reason"]


def test_the_best_of_a_run_survives_a_resume(config, monkeypatch):  # noqa: F811
    """Validation losses as they are told here."""
    told = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    validate = training.Trainer._validate

    def tell(self):
        validate(self)
        self.validation_loss = next(told)

    monkeypatch.setattr(training.Trainer, "_validate", tell)
    config = replace(config, steps=6, validate_every=1, checkpoint_every=1, keep_last=1)
    pretrain(config)
    assert names(Path(config.out) / "checkpoints") == [6, 2]
    assert read_log(config.out, "end")[0]["best_checkpoint"] == "step-00000002"
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000006")
    told = iter([1.4, 1.3, 1.2, 1.1])  # of steps 3 to 6
    result = pretrain(replace(config, resume=True))
    assert result.validation_loss == 1.1 and names(Path(config.out) / "checkpoints") == [6, 2]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, exchanges):
    """Where a file system cannot exchange names too."""
    if not exchanges:
        monkeypatch.setattr(state, "_exchange", lambda one, other: False)
    for content in ("one", "two"):
        with state.new_folder(tmp_path / "target") as folder:
            (folder / "file").write_text(content)
    assert (tmp_path / "target" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_names_are_exchanged_at_once_on_linux(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert state._exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "two").exists() and (tmp_path / "two" / "one").exists()
    assert not state._exchange(tmp_path / "one", tmp_path / "none")


def test_a_run_without_its_log_resumes(config, uninterrupted):  # noqa: F811
    """From what the checkpoint knows of its settings."""
    shutil.copytree(uninterrupted, config.out)
    (Path(config.out) / "log.jsonl").unlink()
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000012")
    assert resume.begun_config(Path(config.out))["model"] == TINY
    pretrain(replace(config, resume=True))
    assert losses(config.out) == losses(uninterrupted)[-len(losses(config.out)) :] != []
    with pytest.raises(ConfigError, match="lr is 0.5, but the run in"):
        pretrain(replace(config, resume=True, lr=0.5))


def test_a_state_that_lacks_something_is_damaged(config, uninterrupted):  # noqa: F811
    folder = uninterrupted / "checkpoints" / "step-00000012"
    copied = Path(shutil.copytree(folder, config.out))
    content = json.loads((copied / "state.json").read_text())
    for name, value, said in (("update", "7", "update is '7', expected a count"), ("window", None, "window is None")):
        (copied / "state.json").write_text(json.dumps(content | {name: value}))
        with pytest.raises(CheckpointError, match=said):
            resume.read_state(copied)


@pytest.mark.parametrize(
    ("launches", "checkpoints", "expected"),
    [
        (("a", "a"), True, (True, False)),
        (("a", "a"), False, (False, True)),
        (("a", "b"), True, (False, False)),
        ((None, None), True, (False, False)),
    ],
    ids=["restarted", "restarted-early", "another", "none"],
)
def test_processes_that_were_started_anew_go_on(config, monkeypatch, launches, checkpoints, expected):  # noqa: F811
    """Those of the same torchrun; any other is told that a run is in the way."""
    first, second = launches
    folder = Path(config.out)
    (folder / "checkpoints" / "step-00000005" if checkpoints else folder).mkdir(parents=True)
    (folder / "log.jsonl").write_text(json.dumps({"event": "begin", "launch": first}) + "\n")
    monkeypatch.setattr(resume, "launch", lambda: second)
    found = resume.after_restart(config, World(torch.device("cpu")))
    assert (found.resume, found.overwrite) == expected
