"""FusedLAMB on several processes: one process's step, whether parameters are replicated (DDP) or sharded (FSDP2)."""

import copy
import math
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fastbert import BertForMaskedLM, EncoderConfig, extension
from fastbert.backend import use_backend
from fastbert.optim import FusedLAMB, param_groups

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [1, 2, 4]
STEPS = 4
SEQUENCES, TOKENS = 8, 8
DECAY = 0.1
LEARN = dict(lr=0.05, eps=0.1, max_grad_norm=0.5)  # of the runs whose gradients come from a model

# Rows that neither 2 nor 4 divides (21 ids, 9 positions, 10 and 22 features), and one row alone, of which all processes
# but the first have nothing.
TINY = dict(vocab_size=21, hidden_size=10, num_hidden_layers=2, num_attention_heads=2, intermediate_size=22)
TINY |= dict(max_position_embeddings=9, type_vocab_size=1, initializer_range=0.2)
TINY |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

# One that is larger than a chunk of the compiled twin and is cut elsewhere when it is sharded; rows that do not divide;
# fewer rows than processes.
SHAPES = [(130, 131), (4, 4), (7, 5), (3, 8), (1, 6), (2,), (9,)]


@pytest.fixture(params=["torch", "cuda"])
def backend(request):
    if request.param == "cuda" and (reason := extension.load()):
        pytest.skip(reason)
    if request.param == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key("fastbert::lamb_", "CPU"):
        pytest.skip("the extension was built without its CPU part")
    return request.param


# -- models, gradients and steps, the same on one process and on many ------------------------------------------------


class Shapes(nn.Module):
    """Parameters of the shapes above."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape) for shape in SHAPES)


def build(kind, dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Shapes() if kind == "shapes" else BertForMaskedLM(EncoderConfig("bert", **TINY))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))  # biases are zero at first, which hides their trust ratio
    return model.to(dtype)


def shard(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.encoder.layers if hasattr(model, "model") else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer_of(model, **settings):
    """Every second tensor of Shapes is decayed; BERT as usual."""
    groups = param_groups(model, DECAY)
    if isinstance(model, Shapes):
        weights = list(model.weights)
        groups = [{"params": weights[::2], "weight_decay": DECAY}, {"params": weights[1::2], "weight_decay": 0.0}]
    return FusedLAMB(groups, **{"lr": 0.05, "max_grad_norm": 0.5} | settings)


def gradients(model, step):
    """Whole gradients of all parameters, of norm > 2."""
    generator = torch.Generator().manual_seed(step)
    drawn = [(n, torch.randn(p.shape, generator=generator).to(p.dtype)) for n, p in model.named_parameters()]
    return {name: 0.2 * g for name, g in drawn}


def set_gradients(model, whole):
    for name, p in model.named_parameters():
        p.grad = whole[name]
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(whole[name], p.device_mesh, p.placements, src_data_rank=None)


def drive(model, optimizer, steps):
    """Steps with given gradients. Returns their norms."""
    norms = []
    for step in steps:
        set_gradients(model, gradients(model, step))
        optimizer.step()
        norms.append(optimizer.grad_norm.clone())
        optimizer.zero_grad()
    return norms


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def snapshot(model, optimizer):
    """Every whole parameter and all of its state, by name."""
    content = {}
    for name, p in model.named_parameters():
        content[name] = whole(p)
        content |= {f"{name}/{key}": whole(value) for key, value in optimizer.state[p].items()}
    return content


def local_snapshot(model, optimizer):
    """What this process has of it."""
    parts = {}
    for name, p in model.named_parameters():
        tensors = {"": p, **optimizer.state[p]}
        parts |= {f"{name}/{key}": local(t).detach().clone() for key, t in tensors.items()}
    return parts


def identical(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# -- how near is the same --------------------------------------------------------------------------------------------


def training_bound(dtype):
    """What the order of sums can do to a weight in STEPS steps of LEARN.

    A gradient is a sum over n = SEQUENCES x TOKENS tokens; in another order it differs by n u times the sum of the
    terms' magnitudes, u = 2^-24 or 2^-53, which is about 1 after clipping. In the update, m / (sqrt(v) + eps), m and
    sqrt(v) are off by that much, so the update is by 2 n u / eps. It moves the weights by lr ratio times that, where
    ratio = |p| / |u| <= 1 / weight_decay. Every step adds as much.
    """
    unit = torch.finfo(dtype).eps / 2
    update = 2 * SEQUENCES * TOKENS * unit / LEARN["eps"]
    return STEPS * LEARN["lr"] * update / DECAY


def norm_bound(backend):
    """Of norms, relative: sums of at most 17,000 terms in float64; the compiled twin adds 256 squares in fp32, at most
    12 after each other."""
    return 1e-11 if backend == "torch" else 12 * 2**-24


def nearly(t, steps):
    """How much `steps` steps with the same gradients may differ, sharded or not.

    Only the norms are summed in another order, and the clipping divisor and the trust ratio are rounded to fp32, u =
    2^-24. The compiled twin adds 256 squares in fp32, at most 12 after each other: |p|^2 and |u|^2 are off by 12 u and
    ratio by 12 u; with the divisor (u), the quotients and products of m, v and the update that makes at most 20 u of
    lr ratio u. An element of that is below 3 lr max|p| (its root mean square is lr times that of p), lr <= 0.1, and
    the weight itself is rounded (u): 7 u max|p|. Moments are off by less.
    """
    return steps * 8 * 2**-24 * t.abs().max().item()


def assert_same_steps(one, two, steps):
    assert one.keys() == two.keys()
    for key in one:
        if key.endswith("/step"):
            assert torch.equal(one[key], two[key]), key
        elif one[key].dtype == torch.float32:
            atol, said = nearly(two[key], steps), partial("{}: {}".format, key)
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=atol, msg=said)
        else:  # a rounded copy of the master
            assert all(torch.equal(each[key], each[f"{key}/master"].to(each[key].dtype)) for each in (one, two)), key


# -- training a model ------------------------------------------------------------------------------------------------


def batch(step):
    """Ids and labels; every sequence has as many labels, so that the mean of means is the mean."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, TINY["vocab_size"], (SEQUENCES, TOKENS), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, ::3] = torch.randint(5, TINY["vocab_size"], labels[:, ::3].shape, generator=generator)
    return ids, labels


def train(parallel, dtype, backend):
    """STEPS steps, each on this process's share of the same batches: whole parameters, norms of gradients, and the
    norms as they should be."""
    joined = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    model = build("bert", dtype)
    if parallel == "fsdp":
        shard(model)
    called = DistributedDataParallel(model) if parallel == "ddp" else model
    optimizer = optimizer_of(model, **LEARN, backend=backend)
    norms, expected = [], []
    for step in range(STEPS):
        ids, labels = (t.chunk(size)[rank] for t in batch(step))
        with use_backend("torch"):
            called(ids, labels=labels).loss.backward()
        parts = [local(p.grad).double() for p in model.parameters()]
        squares = torch.stack([part.square().sum() for part in parts]).sum()
        if parallel == "fsdp":
            dist.all_reduce(squares)
        expected.append(squares.sqrt().item())
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
        optimizer.zero_grad()
    return {name: whole(p) for name, p in model.named_parameters()}, norms, expected


@cache
def train_alone(dtype, backend):
    return train(None, dtype, backend)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, "torch"), (torch.float32, "cuda"), (torch.float64, "torch")],
    indirect=["backend"],
)
def test_processes_train_as_one_does_with_the_same_global_batch(processes, parallel, size, dtype, backend):
    """In float64 too, with a tolerance that no other mistake fits in."""
    alone, alone_norms, _ = train_alone(dtype, backend)
    start = dict(build("bert", dtype).named_parameters())
    for name in start:  # it moves more than the bound; keys have biases in vain
        moved = (alone[name] - start[name]).abs().max()
        assert moved > 10 * training_bound(dtype) or name.endswith("key.bias"), name
    assert min(alone_norms) > LEARN["max_grad_norm"]
    results = processes(size).run(train, parallel, dtype, backend)
    for parameters, norms, expected in results:
        assert identical(parameters, results[0][0])
        assert norms == results[0][1]
        assert all(math.isclose(a, b, rel_tol=norm_bound(backend)) for a, b in zip(norms, expected, strict=True))
        for name in alone:
            said = partial("{}: {}".format, name)
            torch.testing.assert_close(parameters[name], alone[name], rtol=0, atol=training_bound(dtype), msg=said)


# -- steps with given gradients --------------------------------------------------------------------------------------


@cache
def alone(dtype, backend, steps, kind="shapes", **settings):
    """On one process, without DTensors."""
    model = build(kind, dtype)
    optimizer = optimizer_of(model, backend=backend, **settings)
    norms = drive(model, optimizer, range(steps))
    return snapshot(model, optimizer), norms


def sharded(dtype, backend, steps, replicas=1):
    """On the processes of this group: the same, and what the tensors of the state are."""
    mesh = None
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("copy", "part"))
    model = shard(build("shapes", dtype), mesh)
    optimizer = optimizer_of(model, backend=backend)
    norms = drive(model, optimizer, range(steps))
    kinds = [
        {key: (type(t).__name__, t.dtype, getattr(t, "placements", ())) for key, t in optimizer.state[p].items()}
        for p in model.parameters()
    ]
    sizes = [p.to_local().numel() for p in model.parameters()]
    return snapshot(model, optimizer), norms, kinds, sizes


def step_of_parts(backend, steps, size):
    """What a step would be whose trust ratios are those of the shards: every shard is a parameter of its own."""
    model = build("shapes")
    parts = [list(p.detach().clone().chunk(size)) for p in model.parameters()]
    groups = [
        {"params": [part for whole in parts[i::2] for part in whole], "weight_decay": decay}
        for i, decay in ((0, DECAY), (1, 0.0))
    ]
    optimizer = FusedLAMB(groups, lr=0.05, max_grad_norm=0.5, backend=backend)
    for step in range(steps):
        for shards, g in zip(parts, gradients(model, step).values(), strict=True):
            for part, own in zip(shards, g.chunk(size), strict=True):
                part.grad = own.clone()
        optimizer.step()
    return {name: torch.cat(part) for (name, _), part in zip(model.named_parameters(), parts, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_the_step_of_shards_is_that_of_whole_tensors(processes, size, dtype, backend):
    """For bf16 parameters, of their fp32 masters."""
    expected, expected_norms = alone(dtype, backend, STEPS)
    results = processes(size).run(sharded, dtype, backend, STEPS)
    model = build("shapes", dtype)
    for found, norms, kinds, _ in results:
        assert identical(found, results[0][0])
        assert_same_steps(found, expected, STEPS)
        assert all(found[key] == STEPS for key in found if key.endswith("/step"))
        assert torch.equal(torch.stack(norms), torch.stack(results[0][1]))
        for step, norm in enumerate(norms):
            true = torch.cat([g.flatten() for g in gradients(model, step).values()]).double().norm()
            assert norm.dtype == torch.float64 and norm > 0.5
            assert math.isclose(norm.item(), true.item(), rel_tol=norm_bound(backend))
        moment = ("DTensor", torch.float32, (Shard(0),))
        state = {"step": ("Tensor", torch.float32, ()), "exp_avg": moment, "exp_avg_sq": moment}
        state |= {"master": moment} if dtype == torch.bfloat16 else {}
        assert all(kind == state for kind in kinds)
    assert all(sum(sizes) == math.prod(shape) for sizes, shape in zip(_sizes(results), SHAPES, strict=True))
    if size > 1:
        assert any(0 in sizes for sizes in _sizes(results)) and any(len(set(sizes)) > 1 for sizes in _sizes(results))


def _sizes(results):
    """Of each parameter, how much every rank has."""
    return list(zip(*(sizes for *_, sizes in results), strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_trust_ratios_of_shards_would_be_noticed(size, backend):
    expected, _ = alone(torch.float32, backend, STEPS)
    parts = step_of_parts(backend, STEPS, size)
    for i, (name, shape) in enumerate(zip(parts, SHAPES, strict=True)):
        apart = (parts[name] - expected[name]).abs().max().item()
        bound = nearly(expected[name], STEPS)
        assert apart > 10 * bound if i % 2 == 0 and shape[0] > 1 else apart <= bound


@pytest.mark.parametrize("size", [2, 4])
def test_a_norm_of_shards_would_be_noticed(size, backend):
    """Every process would clip by the norm of its own gradients."""
    expected, norms = alone(torch.float32, backend, STEPS)
    smaller, _ = alone(torch.float32, backend, STEPS, max_grad_norm=0.5 * size**0.5)
    for name in expected:
        if name.endswith("exp_avg"):
            assert (smaller[name] - expected[name]).abs().max() > 10 * nearly(expected[name], STEPS)


def test_copies_of_shards(processes, backend):
    """Two copies, each sharded over two processes: sums are over the shards of one copy."""
    expected, _ = alone(torch.float32, backend, STEPS)
    results = processes(4).run(sharded, torch.float32, backend, STEPS, replicas=2)
    for found, norms, kinds, _ in results:
        assert identical(found, results[0][0])
        assert_same_steps(found, expected, STEPS)
        assert torch.equal(torch.stack(norms), torch.stack(results[0][1]))
        assert all(kind["exp_avg"][2] == (Replicate(), Shard(0)) for kind in kinds)


def some_sharded(backend, steps):
    """Shapes of which the first and the last are no DTensors."""
    model = build("shapes")
    kept = {model.weights[0], model.weights[-1]}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params=kept)
    assert {isinstance(p, DTensor) for p in model.parameters()} == {True, False}
    optimizer = optimizer_of(model, backend=backend)
    norms = drive(model, optimizer, range(steps))
    return snapshot(model, optimizer), norms


@pytest.mark.parametrize("size", [2, 4])
def test_parameters_that_are_not_sharded_beside_those_that_are(processes, size, backend):
    """They count once in the norm, not once per process."""
    expected, expected_norms = alone(torch.float32, backend, STEPS)
    results = processes(size).run(some_sharded, backend, STEPS)
    for found, norms in results:
        assert identical(found, results[0][0])
        assert_same_steps(found, expected, STEPS)
        torch.testing.assert_close(torch.stack(norms), torch.stack(expected_norms), rtol=norm_bound(backend), atol=0)


def sharded_twice(backend, steps):
    """Over columns of a mesh and within them, as FSDP2 over tensor parallelism does: _StridedShard is not Shard."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    with torch.no_grad():
        for p, values in zip(model.parameters(), gradients(model, 100).values(), strict=True):
            p.copy_(values)
    plain = copy.deepcopy(model)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    placements = [p.placements for p in model.parameters()]
    results = []
    for each in (model, plain):
        optimizer = optimizer_of(each, backend=backend)
        norms = drive(each, optimizer, range(steps))
        results += [{name: whole(p) for name, p in each.named_parameters()}, norms]
    return *results, placements


@pytest.mark.filterwarnings("ignore")
def test_shards_of_shards(processes, backend):
    results = processes(4).run(sharded_twice, backend, STEPS)
    for found, norms, expected, expected_norms, placements in results:
        assert placements[0] != (Shard(0), Shard(0)) and placements[3] == (Shard(0), Replicate())
        torch.testing.assert_close(torch.stack(norms), torch.stack(expected_norms), rtol=norm_bound(backend), atol=0)
        assert_same_steps(found, expected, STEPS)


def partial_gradient(backend):
    """A replicated parameter whose gradient is a sum over the processes that nobody has added yet."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.full((4,), rank + 1.0), mesh, [Partial()])
    optimizer = FusedLAMB([p], max_grad_norm=None, backend=backend)
    optimizer.step()
    return optimizer.grad_norm.item(), local(optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize("size", [2, 4])
def test_a_gradient_that_is_still_to_be_added_up(processes, size, backend):
    total = size * (size + 1) / 2
    for norm, moment in processes(size).run(partial_gradient, backend):
        assert norm == 2 * total
        torch.testing.assert_close(moment, torch.full((4,), 0.1 * total))


# -- gradients that are not finite -----------------------------------------------------------------------------------


def spoiled(dtype, backend, owner, value):
    """A step, one with a bad gradient on one process, one more: the state of this process after each, the norms."""
    model = shard(build("shapes", dtype))
    optimizer = optimizer_of(model, backend=backend)
    states, norms = [], drive(model, optimizer, [0])
    states.append(local_snapshot(model, optimizer))
    set_gradients(model, gradients(model, 1))
    if dist.get_rank() == owner:
        model.weights[0].grad.to_local()[0, 3] = value
    optimizer.step()
    norms.append(optimizer.grad_norm.clone())
    states.append(local_snapshot(model, optimizer))
    norms += drive(model, optimizer, [1])
    return states, snapshot(model, optimizer), norms


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_a_bad_gradient_on_one_process_stops_all_of_them(processes, size, dtype, backend, value):
    expected, _ = alone(dtype, backend, 2)
    for (before, after), found, norms in processes(size).run(spoiled, dtype, backend, size - 1, value):
        assert identical(before, after)
        assert not norms[1].isfinite() and norms[0].isfinite() and norms[2].isfinite()
        assert_same_steps(found, expected, 2)


# -- checkpoints -----------------------------------------------------------------------------------------------------

BEFORE, AFTER = 3, 2


def save(folder, dtype):
    """Saves after BEFORE steps and goes on: states then and at the end."""
    model = shard(build("bert", dtype))
    optimizer = optimizer_of(model)
    drive(model, optimizer, range(BEFORE))
    state = snapshot(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    drive(model, optimizer, range(BEFORE, BEFORE + AFTER))
    return state, snapshot(model, optimizer)


def resume(folder, dtype, shards=True):
    """Begins with other weights and another lr, loads, and goes on: states then and at the end, and lr."""
    model = build("bert", dtype, seed=1)
    model = shard(model) if shards else model
    optimizer = optimizer_of(model, lr=0.5)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    state = snapshot(model, optimizer)
    drive(model, optimizer, range(BEFORE, BEFORE + AFTER))
    return state, snapshot(model, optimizer), [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distributed_checkpoint_resumes_on_any_number_of_processes(processes, tmp_path, dtype):
    """What is loaded is what was saved, bit for bit; so is the rest of the run on as many processes."""
    expected, _ = alone(dtype, None, BEFORE + AFTER, kind="bert")
    saved, ended = processes(2).run(save, tmp_path / "saved", dtype)[0]
    assert_same_steps(ended, expected, BEFORE + AFTER)
    moments = [saved[key] for key in saved if "/exp_avg" in key]
    assert all(t.dtype == torch.float32 for t in moments)
    assert dtype == torch.float32 or any(not torch.equal(t, t.to(dtype).float()) for t in moments)
    for size, shards in ((2, True), (4, True), (1, True), (1, False)):
        for state, end, lrs in processes(size).run(resume, tmp_path / "saved", dtype, shards):
            assert identical(state, saved) and lrs == [0.05, 0.05]
            assert all(state[key] == BEFORE for key in state if key.endswith("/step"))
            assert_same_steps(end, expected, BEFORE + AFTER)
            assert size != 2 or identical(end, ended)


# -- loss scaling ----------------------------------------------------------------------------------------------------


def scaled(backend):
    """A step, one that overflows on one process, one more, with gradients times the scale: state and scales."""
    model = shard(build("shapes"))
    optimizer = optimizer_of(model, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    scales, steps, norms = [], [], []
    for step, overflows in ((0, False), (1, True), (1, False)):
        scaler.scale(torch.ones(()))
        set_gradients(model, {name: g * scaler.get_scale() for name, g in gradients(model, step).items()})
        if overflows and dist.get_rank() == dist.get_world_size() - 1:
            model.weights[0].grad.to_local()[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        steps.append(optimizer.state[model.weights[0]]["step"].item())
        norms.append(optimizer.grad_norm.item())
    return snapshot(model, optimizer), scales, steps, norms


@pytest.mark.parametrize("size", SIZES)
def test_the_stock_scaler_drives_shards(processes, size, backend):
    """A power of two as the scale changes no bit."""
    plain = processes(size).run(sharded, torch.float32, backend, 2)
    for (found, scales, steps, norms), (expected, expected_norms, *_) in zip(
        processes(size).run(scaled, backend), plain, strict=True
    ):
        assert scales == [1024.0, 512.0, 512.0] and steps == [1, 1, 2]
        assert identical(found, expected)
        assert [norms[0], norms[2]] == [norm.item() for norm in expected_norms]
