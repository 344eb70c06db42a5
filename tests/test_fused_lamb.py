"""FusedLAMB: a hundred steps against float64, 16 bits against masters, overflows, loss scaling, and its state."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from fastbert import BertForMaskedLM, EncoderConfig, extension, reference
from fastbert.errors import BackendError, CheckpointError, ConfigError, DtypeError, ShapeError
from fastbert.optim import FusedLAMB, param_groups, schedule

pytestmark = pytest.mark.gpu
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
BACKENDS = ["torch"] if extension.load() else ["cuda", "torch"]
on_each_device = pytest.mark.parametrize("device", DEVICES)
with_each_backend = pytest.mark.parametrize("backend", BACKENDS)


def make_parameters(sizes, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(device, dtype)) for s in sizes]


def give_gradients(parameters, seed, scale=1.0):
    """Normal gradients, rounded to bfloat16 and float16 so that parameters of all dtypes get the same ones."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in parameters:
        g = torch.randn(p.shape, generator=generator).bfloat16().half() * scale
        p.grad = g.to(p.device, p.dtype)


def state_tensors(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = ("exp_avg", "exp_avg_sq", "step", "master")
    return parameters + [optimizer.state[p][name] for name in names for p in parameters if name in optimizer.state[p]]


def same(a, b):
    return all(torch.equal(x.detach().cpu(), y.detach().cpu()) for x, y in zip(a, b, strict=True))


@on_each_device
@with_each_backend
@example(groups=[[[300, 70], [9]], [[40]]], seed=0, flags=[(0.01, True), (0.0, False)], averaging=True, correction=True)
@given(
    groups=st.lists(
        st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=1, max_size=3), min_size=1, max_size=3
    ),
    seed=st.integers(0, 1000),
    flags=st.lists(
        st.tuples(st.sampled_from([0.0, 0.01, 0.3]), st.booleans()),
        min_size=3,
        max_size=3,
    ),
    averaging=st.booleans(),
    correction=st.booleans(),
)
def test_a_hundred_steps_are_those_of_float64(device, backend, groups, seed, flags, averaging, correction):
    made = [make_parameters(sizes, seed + i, device=device) for i, sizes in enumerate(groups)]
    settings = [{"weight_decay": d, "always_adapt": a, "lr": 1e-3 * (i + 1)} for i, (d, a) in enumerate(flags)]
    settings = settings[: len(made)]
    common = {"bias_correction": correction, "grad_averaging": averaging, "eps": 1e-4}
    optimizer = FusedLAMB([{"params": p} | s for p, s in zip(made, settings, strict=True)], **common, backend=backend)
    truth = [
        [[p.detach().double() for p in ps], *([torch.zeros_like(p).double() for p in ps] for _ in "mv")] for ps in made
    ]
    starts = [p for p, _, _ in truth]
    for step in range(1, 101):
        for i, ps in enumerate(made):
            give_gradients(ps, 7 * step + i, scale=0.01)
        divisor, norm = reference.lamb_scale([p.grad for ps in made for p in ps], 1.0, 1.0)
        for i, ps in enumerate(made):
            p, m, v = truth[i]
            grads = [p.grad.double() for p in ps]
            truth[i] = list(reference.lamb(p, grads, m, v, step=step, grad_scale=divisor, **settings[i], **common))
        optimizer.step()
    for ps, start, (p, m, v) in zip(made, starts, truth, strict=True):
        for q, p_0, *truths in zip(ps, start, p, m, v, strict=True):
            ours = (q, optimizer.state[q]["exp_avg"], optimizer.state[q]["exp_avg_sq"])
            sizes = (max(p_0.norm(), truths[0].norm()), *(t.norm() for t in truths[1:]))
            # relative to what a weight was at first, where it has come near to 0; a hundred roundings, which in few
            # elements need not even out
            limit = 1e-6 if q.numel() > 32 else 100 * torch.finfo(torch.float32).eps / 2
            for a, b, size in zip(ours, truths, sizes, strict=True):
                assert (a.double() - b).norm() <= limit * size
            assert optimizer.state[q]["step"] == 100
    assert torch.allclose(optimizer.grad_norm, norm, rtol=1e-6)


@on_each_device
@with_each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_with_masters_are_the_float32_run_rounded(device, backend, dtype):
    sizes = [(130, 33), (33,), (20, 1000)]
    narrow = make_parameters(sizes, dtype=dtype, device=device)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    ours, theirs = (FusedLAMB(ps, lr=0.01, backend=backend) for ps in (narrow, wide))
    for step in range(30):
        for ps in (narrow, wide):
            give_gradients(ps, step)
        ours.step()
        theirs.step()
    assert same([ours.state[p]["master"] for p in narrow], wide)
    assert same(narrow, [p.to(dtype) for p in wide])
    assert all(ours.state[p][name].dtype == torch.float32 for p in narrow for name in ("exp_avg", "exp_avg_sq"))


@on_each_device
@with_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_thousand_steps_with_overflows_at_random(device, backend, dtype):
    """They are as if they had never been: the same bits as without them, and the count is right."""
    generator = torch.Generator().manual_seed(0)
    runs = [make_parameters([(40, 7), (60,)], dtype=dtype, device=device) for _ in range(2)]
    spoilt, clean = (FusedLAMB(ps, lr=0.001, backend=backend) for ps in runs)
    made = 0
    for step in range(1000):
        give_gradients(runs[0], step)
        if torch.rand((), generator=generator) < 0.3:
            bad = [float("inf"), float("-inf"), float("nan")][step % 3]
            p = runs[0][step % 2]
            p.grad.view(-1)[int(torch.randint(p.numel(), (), generator=generator))] = bad
            spoilt.step()
            assert not spoilt.grad_norm.isfinite()
            continue
        made += 1
        give_gradients(runs[1], step)
        spoilt.step()
        clean.step()
    assert 600 < made < 800 and all(spoilt.state[p]["step"] == made for p in runs[0])
    assert same(state_tensors(spoilt), state_tensors(clean))


@on_each_device
@with_each_backend
@pytest.mark.parametrize("unscaled", [False, True])
def test_gradscaler_drives_it(device, backend, unscaled):
    """Powers of two as loss scales: the run with a scaler has the bits of the run without. Overflows are skipped, halve
    the scale and do not count."""
    runs = [make_parameters([(40, 7), (60,)], device=device) for _ in range(2)]
    ours, plain = (FusedLAMB(ps, lr=0.01, backend=backend) for ps in runs)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**15, growth_interval=7)
    scales = []
    for step in range(40):
        for ps in runs:
            generator = torch.Generator().manual_seed(step)
            weights = [torch.randn(p.shape, generator=generator).to(device) for p in ps]
            loss = sum((w * p).sum() for w, p in zip(weights, ps, strict=True)) * 0.01
            (scaler.scale(loss) if ps is runs[0] else loss).backward()
        overflow = step % 9 == 4
        if overflow:
            runs[0][1].grad[3] = float("inf")
        if unscaled:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if not overflow:
            plain.step()
            assert torch.allclose(ours.grad_norm, plain.grad_norm, rtol=1e-12)
        scales.append(scaler.get_scale())
        for optimizer in (ours, plain):
            optimizer.zero_grad()
    assert same(state_tensors(ours), state_tensors(plain))
    assert scales[4] == 2.0**14 and scales[11] == 2.0**15 and all(ours.state[p]["step"] == 36 for p in runs[0])


def resumed(optimizer, parameters, through, **settings):
    """An optimizer over copies of the parameters that goes on from the state of another."""
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = FusedLAMB([{"params": copies[:1]}, {"params": copies[1:], "weight_decay": 0.0}], **settings)
    state = optimizer.state_dict()
    if through == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    other.load_state_dict(state)
    return copies, other


@on_each_device
@with_each_backend
@pytest.mark.parametrize("through", ["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_resumed_is_uninterrupted_bit_for_bit(device, backend, dtype, through):
    parameters = make_parameters([(40, 70), (60,), (5, 5)], dtype=dtype, device=device)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = FusedLAMB(groups, lr=0.01, backend=backend)
    for step in range(5):
        give_gradients(parameters, step)
        optimizer.step()
    copies, other = resumed(optimizer, parameters, through, lr=0.5, backend=backend)  # lr is in the state
    for step in range(5, 10):
        for ps, each in ((parameters, optimizer), (copies, other)):
            give_gradients(ps, step)
            each.step()
    assert same(state_tensors(optimizer), state_tensors(other))


@with_each_backend
def test_a_16_bit_run_goes_on_in_float32_and_back(backend):
    """Float32 parameters take the masters' values; the masters of a 16-bit run are the float32 weights it is given."""
    narrow = make_parameters([(40, 70), (60,)], dtype=torch.bfloat16)
    first = FusedLAMB(narrow, lr=0.01, backend=backend)
    never = [nn.Parameter(p.detach().float()) for p in narrow]
    straight = FusedLAMB(never, lr=0.01, backend=backend)
    for step in range(4):
        for ps, each in ((narrow, first), (never, straight)):
            give_gradients(ps, step)
            each.step()
    wide = [nn.Parameter(p.detach().float()) for p in narrow]  # rounded
    second = FusedLAMB(wide, backend=backend)
    second.load_state_dict(first.state_dict())
    assert same(wide, never) and "master" not in second.state[wide[0]]
    for ps, each in ((wide, second), (never, straight)):
        give_gradients(ps, 4)
        each.step()
    assert same(state_tensors(second), state_tensors(straight))
    again = [nn.Parameter(p.detach().bfloat16()) for p in wide]
    third = FusedLAMB(again, backend=backend)
    third.load_state_dict(second.state_dict())
    assert same([third.state[p]["master"] for p in again], again)
    assert same([third.state[p]["exp_avg_sq"] for p in again], [second.state[p]["exp_avg_sq"] for p in wide])


@pytest.mark.skipif("cuda" not in DEVICES, reason="there is no GPU here")
def test_the_state_goes_from_cpu_to_cuda_and_back():
    parameters = make_parameters([(40, 70), (60,)], dtype=torch.float16)
    optimizer = FusedLAMB(parameters, lr=0.01)
    give_gradients(parameters, 0)
    optimizer.step()
    there = [nn.Parameter(p.detach().cuda()) for p in parameters]
    other = FusedLAMB(there)
    other.load_state_dict(optimizer.state_dict())
    assert all(t.is_cuda for t in state_tensors(other)) and same(state_tensors(optimizer), state_tensors(other))
    back = FusedLAMB(make_parameters([(40, 70), (60,)], dtype=torch.float16))
    back.load_state_dict(other.state_dict())
    assert all(not t.is_cuda for t in state_tensors(back)) and same(state_tensors(back)[2:], state_tensors(other)[2:])


def test_takes_over_from_adamw():
    parameters = make_parameters([(4, 7), (6,)])
    adamw = torch.optim.AdamW(parameters, lr=0.01)
    for step in range(3):
        give_gradients(parameters, step)
        adamw.step()
    optimizer = FusedLAMB(parameters)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.state[parameters[0]]["step"] == 3
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], adamw.state[parameters[0]]["exp_avg"])
    give_gradients(parameters, 3)
    optimizer.step()
    assert optimizer.state[parameters[0]]["step"] == 4


def test_another_optimizers_state_leaves_the_settings_it_does_not_have():
    parameters = make_parameters([(4, 7)])
    adamw = torch.optim.AdamW(parameters, lr=0.25)
    give_gradients(parameters, 0)
    adamw.step()
    optimizer = FusedLAMB(parameters, always_adapt=True, bias_correction=False)
    optimizer.load_state_dict(adamw.state_dict())
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.25 and group["always_adapt"] and not group["bias_correction"] and group["grad_averaging"]


def test_hooks_around_loading_are_obeyed():
    """One before it may order the states anew; one after it has the last word."""
    parameters = make_parameters([(4, 7), (4, 7)])
    optimizer = FusedLAMB(parameters)
    give_gradients(parameters, 0)
    optimizer.step()
    other = FusedLAMB(make_parameters([(4, 7), (4, 7)]))

    def swap(_, state_dict):
        return state_dict | {"state": {0: state_dict["state"][1], 1: state_dict["state"][0]}}

    def clear(loaded):
        loaded.state[loaded.param_groups[0]["params"][0]]["exp_avg_sq"] = torch.ones(4, 7)

    other.register_load_state_dict_pre_hook(swap)
    other.register_load_state_dict_post_hook(clear)
    other.load_state_dict(optimizer.state_dict())
    first = other.state[other.param_groups[0]["params"][0]]
    assert torch.equal(first["exp_avg"], optimizer.state[parameters[1]]["exp_avg"])
    assert torch.equal(first["exp_avg_sq"], torch.ones(4, 7))


def test_a_capturable_rate_stays_on_the_device():
    meta = [nn.Parameter(torch.zeros(3, device="meta"))]
    assert FusedLAMB(meta, lr=torch.tensor(0.5), capturable=True).param_groups[0]["lr"].device.type == "meta"
    optimizer = FusedLAMB(meta, lr=0.5, capturable=True)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = torch.tensor(0.25)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"].device.type == "meta"


def test_masters_come_and_go_with_the_dtype_of_the_parameter():
    (p,) = parameters = make_parameters([(4, 7)])
    optimizer = FusedLAMB(parameters, lr=0.01)
    for step, dtype in enumerate([torch.float32, torch.bfloat16, torch.float32]):
        p.data, p.grad = p.data.to(dtype), None
        give_gradients(parameters, step)
        optimizer.step()
        assert ("master" in optimizer.state[p]) == (dtype == torch.bfloat16)
    assert optimizer.state[p]["step"] == 3


@pytest.mark.parametrize("lr", [float("nan"), torch.ones(2), torch.tensor(0.1, dtype=torch.float64)])
def test_a_rate_that_makes_no_sense_is_noticed_at_the_step(lr):
    parameters = make_parameters([(4, 7)])
    before = parameters[0].detach().clone()
    optimizer = FusedLAMB(parameters)
    optimizer.param_groups[0]["lr"] = lr
    give_gradients(parameters, 0)
    with pytest.raises(ConfigError, match=r"groups\[0\].lr: got"):
        optimizer.step()
    assert torch.equal(parameters[0], before)


def test_a_copy_and_a_pickle_go_their_own_way():
    parameters = make_parameters([(4, 7)])
    optimizer = FusedLAMB(parameters, lr=0.01)
    give_gradients(parameters, 0)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        before = [t.clone() for t in state_tensors(optimizer)]
        give_gradients(twin.param_groups[0]["params"], 1)
        twin.step()
        assert same(before, state_tensors(optimizer)) and not same(before, state_tensors(twin))


def test_parameters_without_a_gradient_rest():
    """Each parameter counts its own steps, as bias correction needs."""
    parameters = make_parameters([(4, 7), (6,)])
    optimizer = FusedLAMB(parameters, lr=0.01)
    before = parameters[1].detach().clone()
    for step in range(3):
        give_gradients(parameters[:1], step)
        optimizer.step()
    assert torch.equal(parameters[1], before) and parameters[1] not in optimizer.state
    give_gradients(parameters, 3)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in parameters] == [4, 1]


def test_no_gradient_at_all_is_no_step():
    optimizer = FusedLAMB(make_parameters([(4, 7)]))
    optimizer.step()
    assert optimizer.grad_norm == 0


def test_the_closure_is_evaluated_with_gradients():
    (p,) = parameters = make_parameters([(4, 7)])
    optimizer = FusedLAMB(parameters, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize("capturable", [False, True])
def test_torchs_schedulers_set_the_rate(capturable):
    parameters = make_parameters([(4, 7)])
    optimizer = FusedLAMB(parameters, lr=0.1, capturable=capturable)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("poly", steps=10, warmup=4))
    for step in range(6):
        before = parameters[0].detach().clone()
        give_gradients(parameters, step)
        optimizer.step()
        expected = 0.1 * schedule("poly", steps=10, warmup=4)(step) * before.norm()
        assert torch.allclose((parameters[0] - before).norm(), expected, rtol=1e-4)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == capturable
        scheduler.step()


def test_without_masters_16_bit_weights_lose_small_steps():
    kept, lost = ([nn.Parameter(torch.ones(64, dtype=torch.bfloat16))] for _ in range(2))
    with_master, without = FusedLAMB(kept, lr=1e-3), FusedLAMB(lost, lr=1e-3, master_weights=False)
    for _ in range(20):
        for ps, each in ((kept, with_master), (lost, without)):
            ps[0].grad = torch.ones_like(ps[0])
            each.step()
    assert torch.equal(lost[0], torch.ones(64, dtype=torch.bfloat16)) and kept[0].max() < 0.99
    assert "master" not in without.state[lost[0]]


@with_each_backend
def test_gradients_with_other_strides_than_their_parameters(backend):
    ours, theirs = make_parameters([(40, 7)]), make_parameters([(40, 7)])
    for ps, strided in ((ours, True), (theirs, False)):
        give_gradients(ps, 0)
        if strided:
            ps[0].grad = ps[0].grad.T.contiguous().T
        FusedLAMB(ps, lr=0.01, backend=backend).step()
    assert same(ours, theirs)


def test_trains_a_model_from_its_parameter_groups():
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForMaskedLM(EncoderConfig("bert", **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    optimizer = FusedLAMB(param_groups(model, 0.01), lr=0.05)
    ids = torch.randint(0, 30, (4, 12))
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"lr": -1.0}, ConfigError, "lr is -1.0, expected at least 0"),
        ({"lr": torch.ones(2)}, ConfigError, r"lr is a torch.float32 tensor of shape \(2,\)"),
        ({"betas": (0.9, 1.0)}, ConfigError, r"betas\[1\]: got 1.0"),
        ({"eps": -1.0}, ConfigError, "eps: got -1.0"),
        ({"weight_decay": -0.1}, ConfigError, "weight_decay: got -0.1"),
        ({"max_grad_norm": 0.0}, ConfigError, "max_grad_norm is 0.0, expected None or more than 0"),
        ({"master_weights": "always"}, ConfigError, "master_weights is 'always', expected 'auto' or False"),
        ({"backend": "triton"}, BackendError, "backend 'triton' cannot serve lamb"),
        ({"backend": "apex"}, BackendError, "backend: got 'apex', expected one of"),
    ],
)
def test_says_what_is_wrong(settings, error, message):
    parameters = make_parameters([(4, 7)])
    with pytest.raises(error, match=message):
        optimizer = FusedLAMB(parameters, **settings)
        give_gradients(parameters, 0)
        optimizer.step()


def test_refuses_what_it_cannot_optimize():
    with pytest.raises(DtypeError, match=r"parameter 1 of a group, of shape \(3,\), is torch.complex64"):
        FusedLAMB([*make_parameters([(4,)]), nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(ConfigError, match=r"several devices \(cpu, meta\)"):
        FusedLAMB([*make_parameters([(4,)]), nn.Parameter(torch.zeros(3, device="meta"))])
    optimizer = FusedLAMB(make_parameters([(4,)]))
    with pytest.raises(ConfigError, match=r"betas\[0\]: got 2.0"):
        optimizer.add_param_group({"params": make_parameters([(3,)]), "betas": (2.0, 0.9)})
    assert len(optimizer.param_groups) == 1


def test_refuses_sparse_gradients_by_name():
    table = nn.Embedding(9, 4, sparse=True)
    optimizer = FusedLAMB(table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(DtypeError, match="the gradient of weight is sparse, expected a dense one"):
        optimizer.step()


def test_refuses_a_state_that_does_not_fit():
    parameters = make_parameters([(4, 7)])
    optimizer = FusedLAMB(parameters)
    give_gradients(parameters, 0)
    optimizer.step()
    state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"exp_avg has shape \(4, 7\), expected \(7, 4\)"):
        FusedLAMB(make_parameters([(7, 4)])).load_state_dict(state)
    del state["state"][0]["exp_avg_sq"]
    with pytest.raises(CheckpointError, match=r"'exp_avg_sq' of a parameter is missing, got \['exp_avg', 'step'\]"):
        FusedLAMB(make_parameters([(4, 7)])).load_state_dict(state)


def test_a_moved_model_needs_its_state_moved():
    parameters = make_parameters([(4, 7)])
    optimizer = FusedLAMB(parameters)
    give_gradients(parameters, 0)
    optimizer.step()
    optimizer.state[parameters[0]]["exp_avg"] = torch.zeros(4, 7, device="meta")
    with pytest.raises(ShapeError, match=r"several devices \(cpu, meta\)"):
        optimizer.step()
