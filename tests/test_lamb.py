"""LAMB: the reference against a loop over numbers and against Adam and AdamW, every backend against the reference."""

import importlib
import math
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastbert import reference
from fastbert.errors import BackendError, ConfigError, DtypeError, ShapeError
from fastbert.ops import lamb
from fastbert.testing import compare

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
MODULE = importlib.import_module("fastbert.ops.lamb")
BACKENDS = ["torch", "reference", "cuda"]
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs")
FLAGS = {
    "step": st.sampled_from([1, 2, 1000]),
    "lr": st.sampled_from([0.0, 1e-3, 0.1]),
    "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.87, 0.98)]),
    "eps": st.sampled_from([1e-6, 1e-2]),
    "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
    "bias_correction": st.booleans(),
    "grad_averaging": st.booleans(),
    "always_adapt": st.booleans(),
    "grad_scale": st.sampled_from([1.0, 3.0, 65536.0]),
}


def group(*shapes, dtype=torch.float32, device="cpu", seed=0):
    """The four lists of a group, as a run in the middle has them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda scale: [(torch.randn(s, generator=generator) * scale).to(device, dtype) for s in shapes]  # noqa: E731
    return dict(zip(NAMES, (draw(0.1), draw(1.0), draw(0.3), [t.square() for t in draw(0.05)]), strict=True))


def stepped(params, grads, exp_avgs, exp_avg_sqs, *, backend, **flags):
    """The op behind the interface of the reference: new lists instead of a step in place."""
    params, exp_avgs, exp_avg_sqs = ([t.clone() for t in tensors] for tensors in (params, exp_avgs, exp_avg_sqs))
    lamb(params, grads, exp_avgs, exp_avg_sqs, backend=backend, **flags)
    return params, exp_avgs, exp_avg_sqs


def loop(p, g, m, v, *, step, lr, betas, eps, weight_decay, bias_correction, grad_averaging, always_adapt, grad_scale):
    """One tensor's step on lists of numbers, written from the paper's algorithm and apex's rules for the ratio."""
    new_m, new_v, update = [], [], []
    for i in range(len(p)):
        scaled = g[i] / grad_scale
        new_m.append(betas[0] * m[i] + (1 - betas[0] if grad_averaging else 1) * scaled)
        new_v.append(betas[1] * v[i] + (1 - betas[1]) * scaled * scaled)
        m_hat = new_m[i] / (1 - math.pow(betas[0], step)) if bias_correction else new_m[i]
        v_hat = new_v[i] / (1 - math.pow(betas[1], step)) if bias_correction else new_v[i]
        update.append(m_hat / (math.sqrt(v_hat) + eps) + weight_decay * p[i])
    p_norm, u_norm = math.hypot(*p), math.hypot(*update)
    adapts = weight_decay != 0 or always_adapt
    ratio = p_norm / u_norm if adapts and p_norm != 0 and u_norm != 0 else 1.0
    return [x - lr * ratio * u for x, u in zip(p, update, strict=True)], new_m, new_v


def skip_unless_served(backend, device="cpu"):
    reason = MODULE._extension_serves([torch.zeros(1, device=device)]) if backend == "cuda" else None
    if reason is not None:
        pytest.skip(reason)


@given(sizes=st.lists(st.integers(0, 7), max_size=3), seed=st.integers(0, 1000), flags=st.fixed_dictionaries(FLAGS))
def test_the_reference_is_a_loop_over_numbers(sizes, seed, flags):
    """Three steps in a row, in float64."""
    tensors = group(*((n,) for n in sizes), dtype=torch.float64, seed=seed)
    numbers = {name: [t.tolist() for t in values] for name, values in tensors.items()}
    for _ in range(3):
        results = reference.lamb(**tensors, **flags)
        tensors.update(zip(("params", "exp_avgs", "exp_avg_sqs"), results, strict=True))
        for i in range(len(sizes)):
            p, m, v = loop(*(numbers[name][i] for name in NAMES), **flags)
            numbers["params"][i], numbers["exp_avgs"][i], numbers["exp_avg_sqs"][i] = p, m, v
        flags["step"] += 1
    for name in NAMES:
        for ours, theirs in zip(tensors[name], numbers[name], strict=True):
            assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@example(shapes=[[0]], seed=0, flags={"step": 1, "lr": 0.1})
@example(shapes=[[], [3, 0], [2, 3, 4]], seed=0, flags={"step": 1, "lr": 0.1})
@example(shapes=[[300, 200], [7]], seed=0, flags={"step": 5, "lr": 0.01, "grad_scale": 1024.0})
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    flags=st.fixed_dictionaries(FLAGS),
)
def test_is_the_reference(backend, device, shapes, seed, flags):
    skip_unless_served(backend, device)
    compare(partial(stepped, backend=backend), reference.lamb, {**group(*shapes, device=device, seed=seed), **flags})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_16_bits_and_float64(backend, dtype):
    tensors = group([5, 7], [3])
    tensors["grads"] = [g.to(dtype) for g in tensors["grads"]]
    expected = stepped(**{**tensors, "grads": [g.float() for g in tensors["grads"]]}, backend=backend, step=2, lr=0.1)
    for ours, theirs in zip(stepped(**tensors, backend=backend, step=2, lr=0.1), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    compare(
        partial(stepped, backend=backend), reference.lamb, {**group([5], dtype=torch.float64), "step": 1, "lr": 0.1}
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weight_decay_it_is_adam(backend):
    skip_unless_served(backend)
    ours, theirs = ([t.clone() for t in group([6, 5], [4])["params"]] for _ in range(2))
    moments = [[torch.zeros_like(p) for p in ours] for _ in range(2)]
    adam = torch.optim.Adam(theirs, lr=0.05, betas=(0.9, 0.99), eps=1e-6)
    for step in range(1, 6):
        grads = group([6, 5], [4], seed=step)["grads"]
        lamb(ours, grads, *moments, step=step, lr=0.05, betas=(0.9, 0.99), weight_decay=0.0, backend=backend)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        adam.step()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_ratio_one_it_is_adamw(backend):
    """The ratio is divided out of the learning rate: what is left is AdamW with its decoupled decay."""
    skip_unless_served(backend)
    tensors = group([40])
    (p,), (g,) = tensors["params"], tensors["grads"]
    adamw = torch.optim.AdamW([theirs := p.clone()], lr=0.01, eps=1e-6, weight_decay=0.1)
    theirs.grad = g
    adamw.step()
    update = g / (g.abs() + 1e-6) + 0.1 * p  # the first step: m and v without their bias are g and g^2
    zeros = [[torch.zeros_like(p)], [torch.zeros_like(p)]]
    lamb([p], [g], *zeros, step=1, lr=0.01 * (update.norm() / p.norm()).item(), weight_decay=0.1, backend=backend)
    assert torch.allclose(p, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_as_long_as_the_parameter(backend):
    skip_unless_served(backend)
    tensors = group([30, 10], [8])
    before = [p.clone() for p in tensors["params"]]
    lamb(**tensors, step=3, lr=0.02, backend=backend)
    for old, new in zip(before, tensors["params"], strict=True):
        assert (new - old).norm().item() == pytest.approx(0.02 * old.norm().item(), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ratio_is_one_where_a_norm_is_zero(backend):
    skip_unless_served(backend)
    tensors = group([12], [12])
    tensors["params"][0].zero_()
    for name in NAMES[1:]:
        tensors[name][1].zero_()
    flags = {"step": 2, "lr": 0.1, "weight_decay": 0.0, "always_adapt": True}
    compare(partial(stepped, backend=backend), reference.lamb, {**tensors, **flags})
    (moved, still), *_ = stepped(**tensors, **flags, backend=backend)
    assert moved.abs().min() > 0 and torch.equal(still, tensors["params"][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_decay_decides_whether_the_ratio_applies(backend):
    skip_unless_served(backend)
    tensors = group([30])
    length = lambda **flags: (  # noqa: E731
        stepped(**tensors, **flags, step=3, lr=1.0, backend=backend)[0][0] - tensors["params"][0]
    ).norm()
    p_norm = tensors["params"][0].norm()
    assert torch.allclose(length(weight_decay=0.01), p_norm, rtol=1e-4)
    assert torch.allclose(length(weight_decay=0.0, always_adapt=True), p_norm, rtol=1e-4)
    assert length(weight_decay=0.0) > 5 * p_norm


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_divided_by_grad_scale(backend):
    """A power of two, so that the results are the same bits."""
    skip_unless_served(backend)
    tensors = group([30], [2, 2])
    scaled = {**tensors, "grads": [g * 4096 for g in tensors["grads"]]}
    plain = stepped(**tensors, step=1, lr=0.1, backend=backend)
    for ours, theirs in zip(stepped(**scaled, step=1, lr=0.1, grad_scale=4096.0, backend=backend), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_group_is_no_step(backend):
    skip_unless_served(backend)
    lamb([], [], [], [], step=1, lr=0.1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_in_place_into_parameters_that_require_gradients(backend):
    skip_unless_served(backend)
    tensors = group([6, 6])
    (p,) = tensors["params"] = [torch.nn.Parameter(tensors["params"][0])]
    address, before = p.data_ptr(), p.detach().clone()
    lamb(**tensors, step=1, lr=0.1, backend=backend)
    assert p.data_ptr() == address and p.is_leaf and not torch.equal(p, before)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_tensors_that_are_not_contiguous(backend):
    tensors = {name: [t.mT for t in values] for name, values in group([4, 6], [3, 2]).items()}
    compare(partial(stepped, backend=backend), reference.lamb, {**tensors, "step": 1, "lr": 0.1})


def test_the_default_serves_what_the_extension_cannot():
    tensors = {name: [t.mT for t in values] for name, values in group([4, 6]).items()}
    lamb(**tensors, step=1, lr=0.1)
    with pytest.raises(BackendError, match="extension is not built|contiguous float32"):
        lamb(**tensors, step=1, lr=0.1, backend="cuda")


def test_says_how_to_build_the_extension(monkeypatch):
    monkeypatch.setattr(MODULE.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="not built: pip install --no-build-isolation"):
        lamb(**group([2]), step=1, lr=0.1, backend="cuda")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"grads": []}, ShapeError, "grads: got 0 tensors, expected 2 as in params"),
        (
            {"exp_avgs": [torch.zeros(4), torch.zeros(2)]},
            ShapeError,
            r"exp_avgs\[1\]: got shape \(2,\), expected \(3,\)",
        ),
        ({"exp_avg_sqs": [torch.zeros(4).half(), torch.zeros(3)]}, DtypeError, r"exp_avg_sqs\[0\]: got torch.float16"),
        ({"grads": [torch.zeros(4), torch.zeros(3).int()]}, DtypeError, r"grads\[1\]: got torch.int32"),
        ({"step": 0}, ConfigError, "step: got 0, expected at least 1"),
        ({"lr": -0.1}, ConfigError, "lr: got -0.1"),
        ({"betas": (0.9, 1.0)}, ConfigError, r"betas\[1\]: got 1.0, expected 0 <= beta < 1"),
        ({"betas": 0.9}, ConfigError, "betas: got 0.9, expected two numbers"),
        ({"step": 1.5}, ConfigError, "step: got 1.5, expected at least 1, an int"),
        ({"lr": "0.1"}, ConfigError, "lr: got '0.1', expected at least 0"),
        ({"grads": None}, DtypeError, "grads: got a NoneType, expected a list of tensors"),
        ({"grads": [torch.zeros(4), None]}, DtypeError, r"grads\[1\]: got a NoneType, expected a torch.Tensor"),
        ({"eps": -1e-6}, ConfigError, "eps: got -1e-06"),
        ({"weight_decay": -1.0}, ConfigError, "weight_decay: got -1.0"),
        ({"grad_scale": 0.0}, ConfigError, "grad_scale: got 0.0"),
        ({"backend": "triton"}, BackendError, "triton"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    arguments = {**group([4], [3]), "step": 1, "lr": 0.1}
    before = arguments["params"][0].clone()
    with pytest.raises(error, match=message):
        lamb(**{**arguments, **change})
    assert torch.equal(arguments["params"][0], before)


def test_refuses_parameters_in_16_bits():
    with pytest.raises(DtypeError, match=r"params\[0\]: got torch.float16, expected torch.float32"):
        lamb(**group([4], dtype=torch.float16), step=1, lr=0.1)
