"""What a run notices of itself: updates that stand out, numbers that are not finite, and where they come from."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import config, data, training  # noqa: F401

from fastbert.errors import ConfigError, FastBertError
from fastbert.nn import EncoderLayer
from fastbert.train import PretrainConfig, pretrain
from fastbert.train.spikes import WINDOW, Spikes
from fastbert.train.step import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LONG = dict(steps=90, log_every=10, checkpoint_every=0, validate_every=0, validation_samples=0, lr=1e-4)
SPIKE = 70  # the update


def records(folder, event):
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def end(folder, name="model.safetensors", step=90):
    return load_file(Path(folder) / "checkpoints" / f"step-{step:08d}" / name)


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def spiking(monkeypatch):
    """The gradients of one update are a thousand times too large."""
    apply = TrainStep.apply

    def spike(self):
        if self.progress.tried == SPIKE:
            self.gradients.buffer.mul_(1000)
        apply(self)

    monkeypatch.setattr(TrainStep, "apply", spike)


# -- updates that stand out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_spikes_are_those_of_a_plain_computation(action):
    draw = np.random.default_rng(0)
    figures = np.stack([3 + 0.1 * draw.standard_normal(400), 1 + 0.2 * draw.random(400)], 1)
    figures[[30, 150, 151, 320], 0] += 5  # the first before there is a window
    figures[[200, 350], 1] *= 20
    figures[100] = math.inf
    spikes, expected, window = Spikes(action, 6.0, CPU), [], []
    never = torch.zeros(1, dtype=torch.bool)
    for update, row in enumerate(figures):
        usual = np.array(window[-WINDOW:]).reshape(-1, 2)
        stands_out = len(usual) >= 64 and bool((row > usual.mean(0) + 6.0 * usual.std(0, ddof=1)).any())
        stands_out = stands_out and bool(np.isfinite(row).all())
        if stands_out:
            expected.append((update, *row, *usual.mean(0)))
        if np.isfinite(row).all() and not (stands_out and action == "stop"):
            window.append(row)
        loss, norm = torch.from_numpy(row)
        found = spikes.judge(torch.tensor([update]), loss, norm, never)
        assert found.item() == stands_out == spikes.skips.item(), update
    assert {200, 350} <= {row[0] for row in expected} and 30 not in {row[0] for row in expected}
    np.testing.assert_allclose(np.array(spikes.look()), np.array(expected), rtol=1e-9)
    assert spikes.look() == []
    other = Spikes(action, 6.0, CPU)
    other.load(json.loads(json.dumps(spikes.state())))
    assert torch.equal(other.recent, spikes.recent) and torch.equal(other.count, spikes.count)


def test_once_updates_are_halted_none_spikes_and_none_counts():
    spikes = Spikes("stop", 6.0, CPU)
    for value, halted in [(1.0, False)] * 70 + [(99.0, True)] * 3:
        arguments = torch.tensor([0]), torch.tensor(value + torch.rand(()).item()), torch.tensor(1.0)
        assert not spikes.judge(*arguments, torch.tensor([halted]))
    assert spikes.count == 70 and spikes.look() == []


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "lamb"}, {"precision": "fp16"}, {"bias_correction": False}], ids=str
)
def test_a_spike_is_made_or_skipped_as_asked(config, settings, spiking, tmp_path):  # noqa: F811
    runs = {
        name: replace(config, **LONG, **settings, spikes=name, out=str(tmp_path / name)) for name in ("ignore", "skip")
    }
    for run in runs.values():
        pretrain(run)
    assert records(runs["ignore"].out, "spike") == []
    (told,) = records(runs["skip"].out, "spike")
    kept = json.loads((Path(runs["skip"].out) / "checkpoints" / "step-00000090" / "state.json").read_text())
    overflows = kept["update"] - 91
    assert (overflows > 0) == (settings.get("precision") == "fp16")
    assert told["update"] == SPIKE == told["step"] + overflows and len(told["samples"]) == 8
    assert told["grad_norm"] > 100 * told["usual_grad_norm"] and abs(told["loss"] - told["usual_loss"]) < 0.5
    assert records(runs["skip"].out, "checkpoint")[-1]["step"] == 90
    assert end(runs["skip"].out, "optimizer.safetensors")["head.bias/step"] == 90
    assert not same(end(runs["skip"].out), end(runs["ignore"].out))


def test_a_run_that_a_spike_has_stopped_goes_on_without_it(config, spiking, tmp_path):  # noqa: F811
    stopped = replace(config, **LONG, spikes="stop")
    with pytest.raises(FastBertError, match=rf"of update {SPIKE} stand out .*on samples .* in step-00000070\..*'skip'"):
        pretrain(stopped)
    assert records(config.out, "error")[-1]["reason"] == "spike"
    with pytest.raises(FastBertError, match=f"of update {SPIKE} stand out"):
        pretrain(replace(stopped, resume=True))
    pretrain(replace(stopped, spikes="skip", resume=True))
    whole = replace(config, **LONG, spikes="skip", out=str(tmp_path / "whole"))
    pretrain(whole)
    assert same(end(config.out), end(whole.out))
    assert same(end(config.out, "optimizer.safetensors"), end(whole.out, "optimizer.safetensors"))


def test_a_run_that_is_resumed_judges_as_one_that_never_stopped(config, spiking, tmp_path):  # noqa: F811
    short = replace(config, **LONG, spikes="skip")
    pretrain(replace(short, checkpoint_every=40))
    whole = end(config.out)
    (Path(config.out) / "checkpoints" / "step-00000090" / "state.json").unlink()
    (Path(config.out) / "checkpoints" / "step-00000080" / "state.json").unlink()
    pretrain(replace(short, resume=True))
    assert same(end(config.out), whole)
    assert [record["update"] for record in records(config.out, "spike")] == [SPIKE]


# -- what is not finite ----------------------------------------------------------------------------------------------


def spoil(monkeypatch, update, how):
    take = training.Trainer._train_step

    def spoilt(self):
        if self.update == update:
            how(self)
        return take(self)

    monkeypatch.setattr(training.Trainer, "_train_step", spoilt)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_weight_that_is_not_finite_is_named(config, monkeypatch, precision):  # noqa: F811
    def how(trainer):
        for model in {trainer.model, trainer.updates.working}:
            with torch.no_grad():
                model.model.encoder.layers[1].attention.value.weight[0, 0] = math.nan

    spoil(monkeypatch, 4, how)
    with pytest.raises(FastBertError, match="not finite in step 5, on samples .* of epoch 0; weights and moments"):
        pretrain(replace(config, precision=precision))
    (fault,) = records(config.out, "error")[-1]["faults"]
    assert fault["weights"] == ["model.encoder.layers.1.attention.value.weight"]
    assert fault["losses"] == ["mlm_loss"] and "head.dense.weight" in fault["gradients"]


def test_the_first_module_and_only_the_bad_micro_batch_are_named(config, monkeypatch):  # noqa: F811
    """A layer whose result overflows where some sample is in the batch."""
    forward, chosen = EncoderLayer.forward, {}

    def overflowing(self, x, **more):
        result = forward(self, x, **more)
        return result * math.inf if chosen.get("layer") is self and chosen["ids"] == chosen["now"] else result

    once = TrainStep.once
    monkeypatch.setattr(EncoderLayer, "forward", overflowing)

    def noticing(function):
        def call(self, batch, *args, **kwargs):
            chosen["now"] = batch.inputs["input_ids"].tolist()
            return function(self, batch, *args, **kwargs)

        return call

    monkeypatch.setattr(TrainStep, "accumulate", noticing(TrainStep.accumulate))
    monkeypatch.setattr(TrainStep, "once", noticing(once))

    def how(trainer):
        batches = trainer.feed.take(3)
        chosen.update(layer=trainer.model.model.encoder.layers[0], ids=batches[1].inputs["input_ids"].tolist())
        chosen["samples"] = trainer.feed.own(3)[1].tolist()

    spoil(monkeypatch, 3, how)
    with pytest.raises(FastBertError, match="modules model.encoder.layers.0"):
        pretrain(replace(config, batch_size=4, accumulation=2))
    error = records(config.out, "error")[-1]
    (fault,) = error["faults"]
    assert fault["samples"] == chosen["samples"] and len(error["samples"]) == 8
    assert fault["modules"][0] == "model.encoder.layers.0"
    assert "weights" not in fault and "losses" in fault and "gradients" in fault


def test_what_is_finite_when_computed_again_is_told_so(config, monkeypatch):  # noqa: F811
    apply = TrainStep.apply

    def flip(self):
        if self.progress.tried == 4:
            self.model.head.bias.grad[0] = math.inf
        apply(self)

    with monkeypatch.context() as patched, pytest.raises(FastBertError, match="not finite in step 5, .* may be faulty"):
        patched.setattr(TrainStep, "apply", flip)
        pretrain(config)
    assert records(config.out, "error")[-1]["faults"] == []
    assert pretrain(replace(config, resume=True)).step == 12  # and nothing was lost


def test_the_options_say_what_they_take(tmp_path):
    with pytest.raises(ConfigError, match="spikes is 'slip', expected one of ignore, skip, stop"):
        PretrainConfig(data="d", out=str(tmp_path), spikes="slip")
    with pytest.raises(ConfigError, match="spike_sigmas is 0.5, expected at least 1"):
        PretrainConfig(data="d", out=str(tmp_path), spike_sigmas=0.5)
