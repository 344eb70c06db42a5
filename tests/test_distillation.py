"""A teacher: its terms against plain ones, where it is not, and runs with it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_models import FAMILIES, VOCAB, batch, pack, small_config
from test_train import NO_DROPOUT, SETTINGS, TINY, data, same_end, write_text  # noqa: F401

import fastbert
from fastbert.data import Tokenizer
from fastbert.errors import CheckpointError, ConfigError, MissingFileError
from fastbert.train import PretrainConfig, pretrain, setup
from fastbert.train.distillation import Distillation
from fastbert.train.feed import Buckets, labelled
from fastbert.train.step import TrainStep
from fastbert.train.world import World

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def build(family, seed=0, task="masked_lm", **changes):
    torch.manual_seed(seed)
    model = fastbert.model_class(family, task)(small_config(family, **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def micro(lengths, seed=0, sentences=False):
    ids, mask, labels = batch(lengths, seed)
    packed_ids, ends, longest = pack(ids.masked_fill(labels != -100, 4), mask)
    return labelled(
        packed_ids, labels[mask], ends, longest, None, torch.arange(len(lengths)) % 2 if sentences else None
    )


def new_step(student, teacher, **options):
    taught = Distillation(teacher, student, **options)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    return TrainStep(student, optimizer, lambda _: 0.1, world=World(CPU), distillation=taught)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_terms_are_the_plain_ones(family):
    """Of all logits and hidden states, in float64, with the teacher of another family."""
    other = FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]
    student, teacher, each = build(family), build(other, seed=1), micro([6, 11, 1, 8])
    given = {name: each.inputs[name] for name in ("input_ids", "cu_seqlens")}
    places, labels = each.inputs["label_positions"], each.inputs["labels"]
    temperature, logits, hidden = 2.5, 0.7, 0.3
    mine = student(**given, max_seqlen=each.max_seqlen, output_hidden_states=True)
    with torch.no_grad():
        its = teacher.eval()(**given, max_seqlen=each.max_seqlen, output_hidden_states=True)
    mlm = F.cross_entropy(mine.logits[places], labels)
    p, q = (F.softmax(model.logits[places] / temperature, -1) for model in (its, mine))
    kl = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    mse = (mine.hidden_states[-1][places] - its.hidden_states[-1][places]).square().mean()
    total = mlm + logits * kl + hidden * mse
    expected = torch.autograd.grad(total, list(student.parameters()), allow_unused=True)
    for form in (each, Buckets(5, 12, 0.5, pad_id=student.config.pad_token_id).fill(each)):
        student.zero_grad(set_to_none=True)
        step = new_step(student, teacher, logits=logits, hidden=hidden, temperature=temperature)
        assert [t.name for t in step.terms] == ["mlm_loss", "distill_logits_loss", "distill_hidden_loss"]
        step.accumulate(form, each.labels, 0)
        torch.testing.assert_close(step.progress.losses / each.labels, torch.stack([mlm, kl, mse]).detach())
        for (name, parameter), gradient in zip(student.named_parameters(), expected, strict=True):
            want = torch.zeros_like(parameter) if gradient is None else gradient
            torch.testing.assert_close(parameter.grad, want, rtol=1e-8, atol=1e-10, msg=name)
    assert kl > 0.01 and mse > 0.01


def test_two_heads_learn_from_a_teacher_too():
    student, teacher = build("bert", task="pretraining"), build("bert", seed=1)
    step, each = new_step(student, teacher), micro([6, 9, 4], sentences=True)
    step.accumulate(each, each.labels, 0, samples=each.samples)
    assert [t.name for t in step.terms] == ["mlm_loss", "nsp_loss", "distill_logits_loss"]
    assert step.progress.losses.shape == (3,) and (step.progress.losses > 0).all()


def test_the_teacher_is_frozen_and_the_student_alone_is_trained():
    student, teacher = build("bert"), build("bert", seed=1).train()
    before = [p.clone() for p in teacher.parameters()]
    step, each = new_step(student, teacher, hidden=1.0), micro([6, 9, 4])
    count = len(list(student.parameters()))
    step.accumulate(each, each.labels, 0)
    step.apply()
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), before, strict=True))
    held = [p for group in step.optimizer.param_groups for p in group["params"]]
    assert len(held) == count == len(list(step.working.parameters()))


def test_a_teacher_that_says_the_same_adds_nothing():
    student = build("bert").eval()
    step, each = new_step(student, build("bert"), hidden=1.0), micro([6, 9, 4])
    losses, _ = step.evaluate(each)
    torch.testing.assert_close(losses[1:], torch.zeros(2).double())
    step.accumulate(
        each._replace(
            labels=0, inputs=each.inputs | {name: each.inputs[name][:0] for name in ("labels", "label_positions")}
        ),
        0,
        0,
    )
    assert not step.progress.losses.any() and not step.gradients.buffer.any()


def test_compiles_without_a_graph_break(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found, full = [], Buckets(4, 12, 0.5, pad_id=0).fill(micro([6, 9, 4]))
    for compiled in (True, False):
        student, teacher = (build("bert", seed, num_hidden_layers=1) for seed in (0, 1))
        taught = Distillation(teacher, student, hidden=0.5)
        sgd = torch.optim.SGD(student.parameters())
        step = TrainStep(student, sgd, lambda _: 0.1, world=World(CPU), distillation=taught, compile=compiled)
        step.accumulate(full, full.labels, 0)
        found.append((step.progress.losses, step.gradients.buffer))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("teacher", "options", "said"),
    [
        (dict(vocab_size=VOCAB + 8), {}, "vocab_size of the teacher is 48, expected 40"),
        (dict(hidden_size=32), dict(hidden=1.0), "hidden_size of the teacher is 32, expected 16"),
    ],
)
def test_teachers_that_do_not_fit(teacher, options, said):
    with pytest.raises(ConfigError, match=said):
        Distillation(build("bert", **teacher), build("bert"), **options)
    Distillation(build("bert", hidden_size=32), build("bert"))  # whose distributions alone are compared


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(data, tmp_path_factory):  # noqa: F811
    """The folder of a model that has learnt something."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    torch.set_num_threads(1)
    settings = SETTINGS | dict(steps=60, lr=1e-2, masking="token", packing="single", checkpoint_every=0)
    return pretrain(PretrainConfig(data=str(data), out=str(out), model=TINY | NO_DROPOUT, **settings)).model


@pytest.fixture
def config(data, tmp_path, taught):  # noqa: F811
    settings = SETTINGS | dict(teacher=str(taught), distill_hidden=0.5, log_every=3)
    return PretrainConfig(data=str(data), out=str(tmp_path / "run"), model=TINY, **settings)


def records(out, event):
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def test_a_run_follows_its_teacher_and_keeps_none_of_it(config):
    config = replace(config, variant="bert", steps=40, lr=1e-2, distill_temperature=2.0)
    result = pretrain(config)
    train = records(config.out, "train")
    for record in (train[-1], records(config.out, "validation")[-1]):
        parts = record["mlm_loss"] + record["distill_logits_loss"] + 0.5 * record["distill_hidden_loss"]
        assert record["loss"] == pytest.approx(parts)
    assert train[-1]["distill_logits_loss"] < 0.9 * train[0]["distill_logits_loss"]
    assert train[-1]["distill_hidden_loss"] < 0.9 * train[0]["distill_hidden_loss"]
    model = fastbert.from_pretrained(result.model)
    assert type(model) is fastbert.BertForMaskedLM
    moments = load_file(Path(config.out) / "checkpoints" / "step-00000040" / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in moments} == {name for name, _ in model.named_parameters()}


def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path):
    whole = replace(config, out=str(tmp_path / "whole"))
    pretrain(whole)
    pretrain(config)
    for step in (10, 12):
        setup.state.remove_folder(Path(config.out) / "checkpoints" / f"step-{step:08d}")
    pretrain(replace(config, resume=True))
    same_end(config.out, whole.out)
    with pytest.raises(ConfigError, match="distill_hidden is 1.0, but the run in .* was begun with 0.5"):
        pretrain(replace(config, resume=True, distill_hidden=1.0))


def test_accumulation_and_sixteen_bits(config, tmp_path):
    config = replace(config, model=TINY | NO_DROPOUT, steps=4, log_every=1)
    pretrain(config)
    parts = replace(config, batch_size=2, accumulation=4, out=str(tmp_path / "parts"))
    pretrain(parts)
    narrow = replace(config, precision="bf16", out=str(tmp_path / "narrow"))
    pretrain(narrow)
    for a, b, c in zip(*(records(c.out, "train") for c in (config, parts, narrow)), strict=True):
        for name in ("loss", "mlm_loss", "distill_logits_loss", "distill_hidden_loss"):
            assert b[name] == pytest.approx(a[name], rel=1e-4)
            assert c[name] == pytest.approx(a[name], rel=0.05)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (dict(teacher="/nowhere"), MissingFileError, "/nowhere"),
        (dict(distill_logits=0.0, distill_hidden=0.0), ConfigError, "distill_logits and distill_hidden are both 0"),
        (dict(variant="electra", objective="rtd"), ConfigError, "objective is 'rtd', expected another"),
        (dict(distill_temperature=0.0), ConfigError, "distill_temperature is 0.0"),
        (dict(model=TINY | {"hidden_size": 32}), ConfigError, "hidden_size of the teacher is 16, expected 32"),
        (dict(pad_vocab_to=64), ConfigError, "vocab_size of the teacher is 24, expected 64"),
    ],
)
def test_what_cannot_work_is_an_error_before_the_first_step(config, change, error, said):
    with pytest.raises(error, match=said):
        pretrain(replace(config, **change))
    assert not (Path(config.out) / "checkpoints").exists()


def test_folders_that_teach_nothing(config, taught, tmp_path):
    other = fastbert.from_pretrained(taught)
    other.model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="bare is a RoFormerModel, expected one with a masked-language-model head"):
        pretrain(replace(config, teacher=str(tmp_path / "bare")))
    content = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(content | {"architectures": ["RoFormerForMaskedLM"]}))
    with pytest.raises(CheckpointError, match="bare is not complete: .*cls.predictions.*drawn anew"):
        pretrain(replace(config, teacher=str(tmp_path / "bare"), overwrite=True))
    tokenizer = Tokenizer.train(write_text(tmp_path / "text.txt", 40), 12, progress=False)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="teacher .*other was trained with the tokenizer"):
        pretrain(replace(config, teacher=str(tmp_path / "other"), overwrite=True))
    short = fastbert.BertForMaskedLM(fastbert.EncoderConfig("bert", vocab_size=24, max_position_embeddings=16, **TINY))
    short.save_pretrained(tmp_path / "short")
    with pytest.raises(ConfigError, match="max_length is 20, but the teacher has 16 positions"):
        pretrain(replace(config, teacher=str(tmp_path / "short"), overwrite=True))


def test_what_a_teacher_is_asked_without_one_is_refused(config):
    with pytest.raises(ConfigError, match="distill_hidden is 0.5, which does nothing: it goes with a teacher"):
        pretrain(replace(config, teacher=None, distill_hidden=0.5))
