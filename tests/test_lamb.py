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
from fastbert.ops import LambGroup, lamb
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


def group_of(params, grads, exp_avgs, exp_avg_sqs, *, step, masters=None, **settings):
    """A LambGroup whose next step is number `step`."""
    steps = [torch.full((), step - 1.0, device=p.device) for p in params]
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    return LambGroup(**lists, steps=steps, masters=masters, **settings)


def stepped(params, grads, exp_avgs, exp_avg_sqs, *, backend, grad_scale=None, max_grad_norm=None, **settings):
    """The op behind the interface of the reference: new lists instead of a step in place."""
    params, exp_avgs, exp_avg_sqs = ([t.clone() for t in tensors] for tensors in (params, exp_avgs, exp_avg_sqs))
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    groups = [group_of(params, grads, exp_avgs, exp_avg_sqs, **settings)]
    lamb(groups, grad_scale=scale, max_grad_norm=max_grad_norm, backend=backend)
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
        settings = {"lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.0}
        lamb([group_of(ours, grads, *moments, step=step, **settings)], backend=backend)
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
    lr = 0.01 * (update.norm() / p.norm()).item()
    lamb([group_of([p], [g], *zeros, step=1, lr=lr, weight_decay=0.1)], backend=backend)
    assert torch.allclose(p, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_as_long_as_the_parameter(backend):
    skip_unless_served(backend)
    tensors = group([30, 10], [8])
    before = [p.clone() for p in tensors["params"]]
    lamb([group_of(**tensors, step=3, lr=0.02)], backend=backend)
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
@example(shapes=[[[4], [3, 0]], [[2100], []], [[5]]], dtypes=["fp16", "bf16", "fp32"], seed=0, scale=1024.0, limit=0.1)
@given(
    shapes=st.lists(st.lists(st.lists(st.integers(0, 7), max_size=2), max_size=3), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(["fp32", "fp16", "bf16", "fp16 alone"]), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([None, 1.0, 1024.0]),
    limit=st.sampled_from([None, 0.1, 1e6]),
)
def test_groups_of_any_dtypes_and_the_norm_over_all_of_them(backend, shapes, dtypes, seed, scale, limit):
    """With a loss scale; masters change as float32 parameters do; copies are masters rounded."""
    skip_unless_served(backend)
    generator, groups, wide = torch.Generator().manual_seed(seed), [], []
    for i, sizes in enumerate(shapes):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(dtypes[i], torch.float16)
        lists = group(*sizes, seed=seed + i)
        grads = [(0.01 * torch.randn(s, generator=generator) * (scale or 1.0)).to(dtype) for s in sizes]
        own = [p.to(dtype) for p in lists["params"]]
        masters = None if dtypes[i] == "fp16 alone" or dtype == torch.float32 else lists["params"]
        settings = {"step": 1 + i, "lr": 0.1 / (1 + i), "weight_decay": 0.01 * (i % 2), "eps": 1e-4}
        weights = own if masters is None else masters
        wide.append(({**lists, "params": [w.double() for w in weights], "grads": grads}, settings))
        groups.append(group_of(own, grads, lists["exp_avgs"], lists["exp_avg_sqs"], masters=masters, **settings))
    every = [g for lists, _ in wide for g in lists["grads"]]
    divisor, expected = reference.lamb_scale(every or [torch.zeros(1)], scale or 1.0, limit)
    for lists, _ in wide:
        for name in NAMES:
            lists[name] = [t.double() for t in lists[name]]
    truths = [reference.lamb(**lists, **settings, grad_scale=divisor) for lists, settings in wide]
    norm = lamb(groups, grad_scale=None if scale is None else torch.tensor(scale), max_grad_norm=limit, backend=backend)
    assert torch.allclose(norm.double(), expected, rtol=1e-6)
    for each, truth, (lists, settings), dtype in zip(groups, truths, wide, dtypes, strict=False):
        names = ("params", "exp_avgs", "exp_avg_sqs")
        for name, ours, theirs in zip(names, (each.masters, each.exp_avgs, each.exp_avg_sqs), truth, strict=True):
            for a, b, before in zip(ours, theirs, lists[name], strict=True):
                tolerance = 1e-3 if dtype == "fp16 alone" and ours is each.masters else 2e-6
                # relative to what it was, where it has come near to 0
                assert (a.double() - b).norm() <= tolerance * max(b.norm(), before.norm()) + 1e-12
        assert all(step.item() == settings["step"] for step in each.steps)
        assert all(torch.equal(p, m.to(p.dtype)) for p, m in zip(each.params, each.masters, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), "found_inf"])
def test_a_gradient_that_is_not_finite_changes_nothing(backend, dtype, bad):
    skip_unless_served(backend)
    lists = group([30, 10], [8], [5000])
    masters = None if dtype == torch.float32 else lists["params"]
    groups = [
        group_of(
            [p.to(dtype) for p in lists["params"]],
            [g.to(dtype) for g in lists["grads"]],
            lists["exp_avgs"],
            lists["exp_avg_sqs"],
            step=4,
            lr=0.1,
            masters=masters,
        )
    ]
    found = torch.tensor(1.0 if bad == "found_inf" else 0.0)
    if bad != "found_inf":
        groups[0].grads[2][4321] = bad
    before = [t.clone() for name in NAMES + ("masters", "steps") if name != "grads" for t in getattr(groups[0], name)]
    norm = lamb(groups, found_inf=found, max_grad_norm=1.0, backend=backend)
    after = [t for name in NAMES + ("masters", "steps") if name != "grads" for t in getattr(groups[0], name)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert norm.isfinite() == (bad == "found_inf")
    lamb(
        [group_of(*([t.nan_to_num(1.0, 1.0, 1.0) for t in getattr(groups[0], n)] for n in NAMES), step=4)],
        backend=backend,
    )


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_a_loss_scale_that_makes_no_sense_makes_no_step(backend, scale):
    skip_unless_served(backend)
    made = group_of(**group([30]), step=3)
    before = made.params[0].clone()
    lamb([made], grad_scale=torch.tensor(scale), max_grad_norm=1.0, backend=backend)
    assert torch.equal(made.params[0], before) and made.steps[0] == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_and_small_gradients_that_are_finite_make_a_step(backend, dtype):
    """Their squares do not fit float32."""
    skip_unless_served(backend)
    for size in (1e30, 1e-30):
        lists = group([40], dtype=torch.float32)
        lists["grads"] = [torch.full((40,), size, dtype=dtype)]
        lists["exp_avgs"], lists["exp_avg_sqs"] = [torch.zeros(40)], [torch.zeros(40)]
        before = lists["params"][0].clone()
        norm = lamb([group_of(**lists, step=1, lr=0.1)], max_grad_norm=1.0, backend=backend)
        assert norm.item() == pytest.approx(size * 40**0.5, rel=1e-2)
        assert lists["params"][0].isfinite().all() and not torch.equal(lists["params"][0], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_scaled_down_to_the_limit_and_never_up(backend):
    """A limit twice as large as the norm does nothing; half of it is a division by two."""
    skip_unless_served(backend)
    tensors = group([16], [4, 4])
    tensors["grads"] = [torch.full_like(g, 2.0) for g in tensors["grads"]]  # 32 elements: the norm is 8 sqrt(2)
    tensors["grads"][0][0] = 6.0  # and now 4 sqrt(10)
    limit = 4 * 10**0.5
    plain = stepped(**tensors, step=1, lr=0.1, backend=backend)
    free = stepped(**tensors, step=1, lr=0.1, backend=backend, max_grad_norm=2 * limit)
    halved = stepped(**tensors, step=1, lr=0.1, backend=backend, max_grad_norm=limit / 2)
    expected = stepped(**{**tensors, "grads": [g / 2 for g in tensors["grads"]]}, step=1, lr=0.1, backend=backend)
    for a, b in zip(plain, free, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for a, b in zip(halved, expected, strict=True):
        assert all(torch.allclose(x, y, rtol=1e-6) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_lr_tensor_is_read_at_the_step(backend):
    skip_unless_served(backend)
    tensors = group([30], [8])
    lr = torch.tensor(0.5)
    groups = [group_of(**tensors, step=2, lr=lr)]
    expected = stepped(**tensors, step=2, lr=0.0625, backend=backend)
    lr.fill_(0.0625)
    lamb(groups, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(groups[0].params, expected[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_groups_and_empty_groups_are_no_step(backend):
    skip_unless_served(backend)
    assert lamb([], backend=backend) == 0
    assert lamb([group_of([], [], [], [], step=1, lr=0.1)], backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_in_place_and_autograd_notices(backend):
    skip_unless_served(backend)
    tensors = group([6, 6])
    (p,) = tensors["params"] = [torch.nn.Parameter(tensors["params"][0])]
    address, before = p.data_ptr(), p.detach().clone()
    loss = p.square().sum()
    lamb([group_of(**tensors, step=1, lr=0.1)], backend=backend)
    assert p.data_ptr() == address and p.is_leaf and not torch.equal(p, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_tensors_that_are_not_contiguous(backend):
    tensors = {name: [t.mT for t in values] for name, values in group([4, 6], [3, 2]).items()}
    compare(partial(stepped, backend=backend), reference.lamb, {**tensors, "step": 1, "lr": 0.1})


def test_the_default_serves_what_the_extension_cannot():
    tensors = {name: [t.mT for t in values] for name, values in group([4, 6]).items()}
    lamb([group_of(**tensors, step=1, lr=0.1)])
    with pytest.raises(BackendError, match="not built|not all tensors are contiguous"):
        lamb([group_of(**tensors, step=1, lr=0.1)], backend="cuda")
    with pytest.raises(BackendError, match="not built|does not take float64"):
        lamb([group_of(**group([4], dtype=torch.float64), step=1, lr=0.1)], backend="cuda")


def test_says_why_there_is_no_extension(monkeypatch):
    monkeypatch.setattr(MODULE.extension, "load", lambda: "the extension is not built: there is no C++ compiler")
    with pytest.raises(BackendError, match="cannot serve lamb: the extension is not built: there is no C"):
        lamb([group_of(**group([2]), step=1)], backend="cuda")


# ---------------------------------------------------------------- what other implementations do


def published(name, p, g, m, v, *, step, lr, betas, eps, weight_decay, exempt):
    """A step on lists of numbers, written from the description of each implementation."""
    decay = 0 if exempt else weight_decay
    b1, b2 = betas
    m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
    v = [b2 * a + (1 - b2) * b * b for a, b in zip(v, g, strict=True)]
    c1, c2 = 1 - b1**step, 1 - b2**step
    corrected = [a / c1 / (math.sqrt(b / c2) + eps) + decay * x for a, b, x in zip(m, v, p, strict=True)]
    raw = [a / (math.sqrt(b) + eps) + decay * x for a, b, x in zip(m, v, p, strict=True)]
    size = math.hypot(*p)
    if name == "apex":
        u, ratio = corrected, 1 if exempt else size / math.hypot(*corrected)
    elif name == "nvlamb":
        u, ratio = corrected, size / math.hypot(*corrected)
    elif name == "timm-trust-clip":
        u, ratio = corrected, 1 if exempt else min(1, size / math.hypot(*corrected))
    elif name == "albert":
        u, ratio = raw, 1 if exempt else size / math.hypot(*raw)
    elif name == "nezha":
        inside = [a / c1 / math.sqrt(b / c2 + eps) + weight_decay * x for a, b, x in zip(m, v, p, strict=True)]
        u, ratio = corrected, min(10, size / math.hypot(*inside))
    elif name == "deepspeed":
        u, ratio = raw, min(10, max(0.01, size / math.hypot(*raw)))
        lr = lr * math.sqrt(c2) / c1
    else:
        u, ratio = raw, min(size, 10) / math.hypot(*raw)
    return [x - lr * ratio * y for x, y in zip(p, u, strict=True)], m, v


@pytest.mark.parametrize("exempt", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("name", reference.LAMBS)
def test_other_implementations_in_the_reference(name, scale, exempt):
    lists = group([7], dtype=torch.float64)
    (p,), (g,), (m,), (v,) = lists.values()
    settings = {"step": 3, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.05, "exempt": exempt}
    expected = published(name, *((t * s).tolist() for t, s in ((p, scale), (g, 1), (m, 1), (v, 1))), **settings)
    for ours, theirs in zip(reference.lamb_of(name, p * scale, g, m, v, **settings), expected, strict=True):
        assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    if name in ("apex", "nvlamb"):
        settings["weight_decay"] *= not settings.pop("exempt")
        ours = reference.lamb([p * scale], [g], [m], [v], **settings, always_adapt=name == "nvlamb")
        assert torch.allclose(ours[0][0], torch.tensor(expected[0], dtype=torch.float64), rtol=1e-12)


def test_timm_is_apex_in_the_reference():
    timm = pytest.importorskip("timm.optim.lamb")
    ours, theirs = ([torch.nn.Parameter(t.double()) for t in group([6, 5], [4])["params"]] for _ in range(2))
    optimizer = timm.Lamb(theirs, lr=0.01, weight_decay=0.02)
    moments = [[torch.zeros_like(p) for p in ours] for _ in range(2)]
    for step in range(1, 5):
        for p, g in zip(theirs, grads := [g.double() for g in group([6, 5], [4], seed=step)["grads"]], strict=True):
            p.grad = g
        optimizer.step()
        scale, _ = reference.lamb_scale(grads, 1.0, 1.0)
        ours, *moments = reference.lamb(ours, grads, *moments, step=step, lr=0.01, weight_decay=0.02, grad_scale=scale)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"grads": []}, ShapeError, r"groups\[0\].grads: got 0 tensors, expected 2 as in params"),
        (
            {"exp_avgs": [torch.zeros(4), torch.zeros(2)]},
            ShapeError,
            r"groups\[0\].exp_avgs\[1\]: got shape \(2,\), expected \(3,\)",
        ),
        ({"exp_avg_sqs": [torch.zeros(4).half(), torch.zeros(3)]}, DtypeError, r"exp_avg_sqs\[0\]: got torch.float16"),
        ({"grads": [torch.zeros(4), torch.zeros(3).int()]}, DtypeError, r"grads\[1\]: got torch.int32"),
        ({"grads": [torch.zeros(4), torch.zeros(3).to_sparse()]}, DtypeError, r"grads\[1\]: got a torch.sparse_coo"),
        ({"params": [torch.zeros(4).int(), torch.zeros(3)]}, DtypeError, r"params\[0\]: got torch.int32"),
        ({"masters": [torch.zeros(4).half(), torch.zeros(3)]}, DtypeError, r"masters\[0\]: got torch.float16"),
        ({"steps": [torch.zeros(2), torch.zeros(())]}, ShapeError, r"steps\[0\]: got torch.float32 \(2,\)"),
        ({"lr": -0.1}, ConfigError, r"groups\[0\].lr: got -0.1"),
        ({"lr": torch.ones(2)}, ConfigError, r"lr: got torch.float32 \(2,\), expected one float32"),
        ({"betas": (0.9, 1.0)}, ConfigError, r"betas\[1\]: got 1.0, expected 0 <= beta < 1"),
        ({"betas": 0.9}, ConfigError, "betas: got 0.9, expected two numbers"),
        ({"lr": "0.1"}, ConfigError, "lr: got '0.1', expected at least 0"),
        ({"grads": None}, DtypeError, "grads: got a NoneType, expected a list of tensors"),
        ({"grads": [torch.zeros(4), None]}, DtypeError, r"grads\[1\]: got a NoneType, expected a torch.Tensor"),
        ({"eps": -1e-6}, ConfigError, "eps: got -1e-06"),
        ({"weight_decay": -1.0}, ConfigError, "weight_decay: got -1.0"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    tensors = group([4], [3])
    before = tensors["params"][0].clone()
    arguments = {**tensors, "steps": [torch.zeros(()), torch.zeros(())], "lr": 0.1}
    with pytest.raises(error, match=message):
        lamb([LambGroup(**{**arguments, **change})])
    assert torch.equal(tensors["params"][0], before)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"max_grad_norm": 0.0}, ConfigError, "max_grad_norm: got 0.0, expected None or more than 0"),
        ({"grad_scale": 2.0}, DtypeError, "grad_scale: got a float, expected a torch.Tensor"),
        ({"found_inf": torch.zeros(2)}, ShapeError, r"found_inf: got shape \(2,\), expected one element"),
        ({"backend": "triton"}, BackendError, "triton"),
    ],
)
def test_says_what_is_wrong_with_the_call(change, error, message):
    with pytest.raises(error, match=message):
        lamb([group_of(**group([4]), step=1)], **change)
