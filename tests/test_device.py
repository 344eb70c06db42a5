"""Whole models on the GPU, if there is one, else on the CPU: float64's numbers, 16 bits, graphs, a training run."""

import copy

import pytest
import torch

import fastbert
from fastbert import ops
from fastbert.testing import FLOOR, make_inputs
from fastbert.train import PretrainConfig, pretrain

pytestmark = pytest.mark.gpu
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FAMILIES = ["bert", "roberta", "albert", "nezha", "electra", "roformer"]
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=97)


def build(family, task="masked_lm"):
    torch.manual_seed(0)
    small = SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return fastbert.model_class(family, task)(fastbert.EncoderConfig(family, **small))


def batch():
    """Three sequences of 40, 23 and 1 tokens; every third real token is labelled."""
    mask = torch.arange(40) < torch.tensor([40, 23, 1])[:, None]
    ids = torch.randint(5, 97, mask.shape, generator=torch.Generator().manual_seed(1))
    labels = ids.where(mask & (torch.arange(40) % 3 == 0), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def found(model, device, dtype=None):
    """Logits at real positions, loss, and every gradient, in float64 on the CPU."""
    inputs = {name: t.to(device) for name, t in batch().items()}
    model = copy.deepcopy(model).to(device)
    with torch.autocast(device, dtype, enabled=dtype is not None):
        output = model(**inputs)
    output.loss.backward()
    values = [output.logits[inputs["attention_mask"].bool()], output.loss, *(p.grad for p in model.parameters())]
    return [t.detach().double().cpu() for t in values]


TASKS = [
    ("bert", "sequence_classification", {"labels": torch.tensor([1, 0, 1])}),
    ("roformer", "token_classification", {"labels": torch.arange(120).view(3, 40) % 2}),
    (
        "nezha",
        "question_answering",
        {"start_positions": torch.tensor([3, 0, 0]), "end_positions": torch.tensor([39, 9, 0])},
    ),
    ("electra", "multiple_choice", {"labels": torch.tensor([2])}),
]


@pytest.mark.parametrize("family, task, labels", TASKS, ids=[task for _, task, _ in TASKS])
def test_a_task_in_float32_is_the_model_in_float64(family, task, labels):
    model, inputs = build(family, task).eval(), batch()
    del inputs["labels"]
    if task == "multiple_choice":
        inputs = {name: t[None] for name, t in inputs.items()}
    inputs |= labels

    def found(dtype, device):
        there = copy.deepcopy(model).to(device, dtype)
        loss = there(**{name: t.to(device) for name, t in inputs.items()}, return_logits=False).losses.sum()
        loss.backward()
        gradients = (p.grad for p in there.parameters() if p.grad is not None)
        return [t.detach().double().cpu() for t in (loss, *gradients)]

    truth = found(torch.float64, "cpu")
    with fastbert.use_backend("reference"):
        yardstick = largest(found(torch.float32, DEVICE), truth)
    reach = max(1.0, *(t.abs().max().item() for t in truth))
    assert largest(found(torch.float32, DEVICE), truth) <= 2 * yardstick + FLOOR[torch.float32] * 2**-23 * reach


def largest(values, truth):
    return max((a - b).abs().max().item() for a, b in zip(values, truth, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_model_in_float64(family):
    model = build(family)
    truth = found(copy.deepcopy(model).double(), "cpu")
    with fastbert.use_backend("reference"):
        yardstick = largest(found(model, DEVICE), truth)
    reach = max(1.0, *(t.abs().max().item() for t in truth))
    assert largest(found(model, DEVICE), truth) <= 2 * yardstick + FLOOR[torch.float32] * 2**-23 * reach


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_is_as_exact_as_the_reference_under_autocast(family, dtype):
    model = build(family)
    truth = found(copy.deepcopy(model).double(), "cpu")
    with fastbert.use_backend("reference"):
        yardstick = largest(found(model, DEVICE, dtype), truth)
    reach = max(1.0, *(t.abs().max().item() for t in truth))
    assert largest(found(model, DEVICE, dtype), truth) <= 2 * yardstick + torch.finfo(dtype).eps * reach


@pytest.mark.skipif(not CUDA, reason="there is no GPU here")
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("name", ["attention", "rotary_attention", "relative_attention"])
def test_attention_in_a_cuda_graph(name, layout):
    """Forward and backward, captured once and replayed on other numbers."""
    lengths = [64, 64] if layout == "dense" else [64, 17]
    inputs = make_inputs(lengths, 2, 64, layout=layout, dtype=torch.float16, device="cuda")
    qkv = [inputs[n] for n in "qkv"]

    def step():
        y = getattr(ops, name)(**inputs)
        return y, *torch.autograd.grad(y, qkv, torch.ones_like(y))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        for t in qkv:
            t.copy_(torch.randn_like(t))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"] if CUDA else ["fp32"])
def test_a_training_run_learns(precision, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join("the cat sat on the mat and the dog ran off" for _ in range(200)) + "\n")
    model = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    run = dict(steps=100, log_every=10, batch_size=16, max_length=32, lr=3e-3, validation_samples=0)
    files = dict(files=[str(text)], out=str(tmp_path / "run"), vocab_size=60)
    result = pretrain(PretrainConfig(model=model, precision=precision, **run, **files))
    assert result.step == 100 and result.loss < 1.5, result  # ln 20 letters = 3
