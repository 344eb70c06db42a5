"""Parameter groups and schedules."""

import math

import pytest
import torch
from torch import nn

from fastbert import EncoderConfig, model_class
from fastbert.errors import ConfigError
from fastbert.optim import UncorrectedAdamW, param_groups, schedule

SMALL = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "nezha", "electra", "roformer"])
def test_norms_and_biases_are_not_decayed_in_any_family(family):
    model = model_class(family, "masked_lm")(EncoderConfig(family, **SMALL))
    decayed, exempt = param_groups(model, 0.01)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names.values()) == sorted(names[p] for group in (decayed, exempt) for p in group["params"])
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in exempt["params"])


def test_the_type_of_the_module_decides_and_not_its_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias_layer_norm = nn.Linear(2, 2)
            self.plain = nn.RMSNorm(2)
            self.scale = nn.Parameter(torch.ones(2))

    model = Odd()
    decayed, exempt = param_groups(model, 0.1)
    assert set(decayed["params"]) == {model.bias_layer_norm.weight, model.scale}
    assert set(exempt["params"]) == {model.bias_layer_norm.bias, model.plain.weight}


def test_a_shared_tensor_is_in_one_group_once_and_a_frozen_one_in_none():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    decayed, exempt = param_groups(model, 0.1)
    assert decayed["params"] == [model[0].weight] and exempt["params"] == []
    torch.optim.AdamW(param_groups(model, 0.1))


def test_linear_is_the_schedule_of_transformers_and_nezha_the_same_curve():
    steps, warmup = 50, 10
    linear, nezha = (schedule(name, steps=steps, warmup=warmup) for name in ("linear", "nezha"))
    for step in range(60):
        expected = step / warmup if step < warmup else max(0.0, (steps - step) / (steps - warmup))
        assert math.isclose(linear(step), expected, abs_tol=1e-12)
        # NEZHA: decay from lr / (1 - w/T), so that the curve has no jump at w
        published = step / warmup if step < warmup else 1 / (1 - warmup / steps) * max(0.0, 1 - step / steps)
        assert math.isclose(nezha(step), published, abs_tol=1e-12)


def test_linear_agrees_with_transformers_itself():
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, 7, 31)
    ours = schedule("linear", steps=31, warmup=7)
    for step in range(31):
        assert math.isclose(ours(step), theirs.get_last_lr()[0], abs_tol=1e-12)
        optimizer.step()
        theirs.step()


def test_poly_is_nvidias_with_its_drop_at_the_switch():
    steps, share = 7038, 0.2843
    factor = schedule("poly", steps=steps, warmup=share)
    for step in (0, 1, 1000, 2000):
        assert math.isclose(factor(step), step / steps / share)
    for step in (2001, 3000, 7037, 7038):
        assert math.isclose(factor(step), math.sqrt(1 - step / steps))
    assert factor(2000) > 0.99 and factor(2001) < 0.85
    assert math.isclose(schedule("poly", steps=100, degree=2.0)(50), 0.25)


def test_bert_drops_at_the_switch_and_electra_multiplies():
    steps, warmup = 50, 10
    bert, electra = (schedule(name, steps=steps, warmup=warmup) for name in ("bert", "electra"))
    for step in range(60):
        left = max(0.0, 1 - step / steps)
        assert math.isclose(bert(step), step / warmup if step < warmup else left, abs_tol=1e-12)
        assert math.isclose(electra(step), min(1.0, step / warmup) * left, abs_tol=1e-12)
    assert bert(9) == 0.9 and bert(10) == 0.8 and electra(5) == 0.5 * 0.9
    assert schedule("electra", steps=10)(0) == schedule("bert", steps=10)(0) == 1
    assert schedule("electra", steps=10, warmup=0.5)(5) == 0.5


def uncorrected(p, grads, lrs, betas, eps, decay):
    """Adam without bias correction, as BERT's code has it; eps as UncorrectedAdamW takes it."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * (m / (v.sqrt() + eps * math.sqrt(1 - betas[1] ** t)) + decay * p)
    return p


@pytest.mark.parametrize("form", [float, lambda lr: torch.full((1,), lr), lambda lr: torch.tensor(lr)])
def test_adamw_without_bias_correction_is_the_plain_loop(form):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)]
    grads = [[torch.randn(t.shape, generator=generator) * 10.0**-k for t in start] for k in range(6)]
    lrs, betas, eps = [0.01, 0.02, 0.03, 0.02, 0.01, 0.005], (0.9, 0.99), 1e-3
    params = [nn.Parameter(t.clone()) for t in start]
    groups = [{"params": params[:1], "weight_decay": 0.5}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = UncorrectedAdamW(groups, betas=betas, eps=eps)
    for step, lr in zip(grads, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = form(lr)
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
        assert all(float(group["lr"]) == pytest.approx(lr) for group in optimizer.param_groups)
    for p, begin, own, decay in zip(params, start, zip(*grads, strict=True), (0.5, 0.0), strict=True):
        right = uncorrected(begin.double(), [g.double() for g in own], lrs, betas, eps, decay)
        torch.testing.assert_close(p.detach().double(), right, rtol=1e-5, atol=1e-6)


def test_adamw_without_bias_correction_skips_what_overflowed_and_scales():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, other = UncorrectedAdamW([p], lr=0.1, weight_decay=0.1), UncorrectedAdamW([q], lr=0.1, weight_decay=0.1)
    p.grad = q.grad = torch.full((3,), 0.5)
    optimizer.step()
    other.step()
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.full((), 4.0)
    p.grad = torch.full((3,), math.inf)
    optimizer.step()
    assert torch.equal(p, q) and optimizer.state[p]["step"] == 1
    optimizer.found_inf = torch.zeros(())
    p.grad, q.grad = torch.full((3,), 2.0), torch.full((3,), 0.5)
    assert optimizer.step(lambda: 7) == 7
    other.step()
    assert torch.equal(p, q) and not torch.equal(p, torch.ones(3))


def test_constant_and_warm_up_alone():
    assert [schedule("constant", steps=10, warmup=4)(step) for step in (0, 2, 4, 9, 99)] == [0, 0.5, 1, 1, 1]
    assert [schedule("linear", steps=4, warmup=4)(step) for step in range(4)] == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(name="cosine", steps=10), "'cosine'"),
        (dict(name="linear", steps=0), "steps is 0"),
        (dict(name="linear", steps=10, warmup=11), "warmup is 11"),
        (dict(name="linear", steps=10, warmup=-1), "warmup is -1"),
        (dict(name="poly", steps=10, degree=0), "degree is 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        schedule(**arguments)
