"""`fastbert pretrain --optimizer lamb` learns, follows its schedule, resumes to the bit, and stops where it must."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_train import SETTINGS, TINY, data, write_text  # noqa: F401

from fastbert.cli import main
from fastbert.errors import ConfigError, FastBertError
from fastbert.optim import FusedLAMB, schedule
from fastbert.train import PretrainConfig, pretrain, state

pytestmark = pytest.mark.usefixtures("one_thread")


def lamb_config(data, out, **changes):  # noqa: F811
    settings = SETTINGS | dict(optimizer="lamb", lr=0.05, schedule="poly", log_every=1, clip=1.0) | changes
    return PretrainConfig(data=str(data), out=str(out), model=TINY, **settings)


def records(out, event):
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


@pytest.mark.parametrize(("name", "warmup"), [("poly", 0.2843), ("nezha", 3)])
def test_learns_with_the_schedules_of_nvidia_and_nezha(data, tmp_path, name, warmup):  # noqa: F811
    result = pretrain(lamb_config(data, tmp_path, schedule=name, warmup=warmup, steps=40))
    train = records(tmp_path, "train")
    factor = schedule(name, steps=40, warmup=warmup)
    assert [entry["lr"] for entry in train] == [0.05 * factor(step) for step in range(40)]
    assert train[-1]["loss"] < train[0]["loss"] - 0.1 and all(entry["grad_norm"] > 0 for entry in train)
    assert result.step == 40 and records(tmp_path, "begin")[0]["config"]["optimizer"] == "lamb"


def test_resumed_is_uninterrupted(data, tmp_path):  # noqa: F811
    pretrain(lamb_config(data, tmp_path / "through", schedule="linear"))
    pretrain(lamb_config(data, tmp_path / "cut", schedule="linear"))
    for step in (10, 12):  # the checkpoint of step 5 stays
        state.remove_folder(tmp_path / "cut" / "checkpoints" / state.name_of(step))
    pretrain(lamb_config(data, tmp_path / "cut", schedule="linear", resume=True))
    for file in ("model/model.safetensors", f"checkpoints/{state.name_of(12)}/optimizer.safetensors"):
        through, cut = (load_file(tmp_path / name / file) for name in ("through", "cut"))
        assert through.keys() == cut.keys() and all(torch.equal(through[name], cut[name]) for name in through)
    with pytest.raises(ConfigError, match="optimizer is 'adamw', but the run in .* was begun with 'lamb'"):
        pretrain(lamb_config(data, tmp_path / "cut", schedule="linear", resume=True, optimizer="adamw"))


def test_a_run_from_before_the_option_resumes(data, tmp_path):  # noqa: F811
    config = lamb_config(data, tmp_path, optimizer="adamw")
    pretrain(config)
    path = tmp_path / "checkpoints" / state.name_of(12)
    content = state.read_state(path)
    del content["config"]["optimizer"]
    from fastbert.train import resume

    resume.check_resumable(config, content, content["global_batch"], content["data"])


def test_a_gradient_that_is_not_finite_stops_the_run_by_name(data, tmp_path, monkeypatch):  # noqa: F811
    """Without a loss scaler there is nothing to wait for: the step is skipped and the run says so."""
    step, calls = FusedLAMB.step, []

    def spoilt(self, closure=None):
        calls.append(None)
        if len(calls) == 4:
            self.param_groups[0]["params"][0].grad.view(-1)[0] = float("inf")
        return step(self, closure)

    monkeypatch.setattr(FusedLAMB, "step", spoilt)
    with pytest.raises(FastBertError, match="the loss or its gradient is not finite in step 4, on samples"):
        pretrain(lamb_config(data, tmp_path))
    assert len(calls) == 4


def test_from_the_command_line(data, tmp_path, capsys):  # noqa: F811
    words = (
        "--optimizer lamb --schedule poly --warmup 2 --lr 0.01 --steps 3 --batch-size 8 --max-length 20 --device cpu"
    )
    model = [f"{name}={value}" for name, value in TINY.items()]
    assert main(["pretrain", "--data", str(data), "--out", str(tmp_path), *words.split(), "--model", *model]) == 0
    assert records(tmp_path, "begin")[0]["config"]["optimizer"] == "lamb"
    assert main(["pretrain", "--data", str(data), "--out", str(tmp_path / "b"), "--optimizer", "lmab"]) == 2
    assert "optimizer is 'lmab', expected one of adamw, lamb" in capsys.readouterr().err
