"""fastbert._C, the compiled part: what the course of csrc/lamb.h owes, on each device that it serves.

That a step is the reference's step is tested in test_lamb.py; here are the sizes at which its course turns.
"""

import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils import cpp_extension

from fastbert import extension, reference
from fastbert.ops import LambGroup, lamb

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
CPU_CHUNK, CUDA_CHUNK = 16384, 2048  # kCpuChunk, kCudaChunk
SLOTS = 4  # kSlots
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Sizes of the tensors of a step: empty, around a chunk of either device, more chunks than a block keeps or than one
# ticket of the norm has, and more tensors than one launch takes.
SIZES = [
    [1],
    [0, 5, 0],
    [7, 8, 9, 255, 256, 257],
    [CUDA_CHUNK - 1, CUDA_CHUNK, CUDA_CHUNK + 1],
    [CPU_CHUNK + 1, 3, CPU_CHUNK - 1],
    [(SLOTS + 3) * CPU_CHUNK + 5, 1, CPU_CHUNK],
    [1, 20 * CPU_CHUNK, 100, 2 * CPU_CHUNK],
    list(range(1, 900)),
]

pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
if (reason := extension.load()) is not None:
    pytestmark.append(pytest.mark.skip(reason=reason))
    DEVICES = []
else:
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("fastbert::lamb_", "CUDA") and torch.cuda.is_available()
    DEVICES = ["cpu", "cuda"] if has_cuda else ["cpu"]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def make_group(sizes, device="cpu", seed=0, dtype=torch.float32, **settings):
    """The tensors of a step, as a run before its third step would have them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda scale: [(torch.randn(n, generator=generator) * scale).to(device) for n in sizes]  # noqa: E731
    weights, grads, m, v = draw(0.1), draw(1.0), draw(0.3), draw(0.05)
    return LambGroup(
        params=[w.to(dtype) for w in weights],
        grads=[g.to(dtype) for g in grads],
        exp_avgs=m,
        exp_avg_sqs=[t.square() for t in v],
        steps=[torch.full((), 2.0, device=device) for _ in sizes],
        masters=None if dtype == torch.float32 else weights,
        **{"lr": 0.01, **settings},
    )


def results_of(group):
    return [
        t.cpu()
        for tensors in (group.params, group.masters, group.exp_avgs, group.exp_avg_sqs, group.steps)
        for t in tensors
    ]


def expected_of(groups, max_grad_norm=None):
    """Weights, m and v after the step, by the reference in float64."""
    divisor, _ = reference.lamb_scale([g for group in groups for g in group.grads], 1.0, max_grad_norm)
    for group in groups:
        lists = [[t.double() for t in ts] for ts in (group.masters, group.grads, group.exp_avgs, group.exp_avg_sqs)]
        names = ("lr", "betas", "eps", "weight_decay", "bias_correction", "grad_averaging", "always_adapt")
        settings = {name: getattr(group, name) for name in names}
        yield from reference.lamb(*lists, step=3, grad_scale=divisor, **settings)


@on_each_device
@example(sizes=SIZES[-2], seed=0, dtype="fp16", decay=0.01)
@example(sizes=SIZES[-1], seed=1, dtype="fp32", decay=0.0)
@given(
    sizes=st.sampled_from(SIZES) | st.lists(st.integers(0, 3 * CUDA_CHUNK), min_size=1, max_size=9),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(DTYPES)),
    decay=st.sampled_from([0.0, 0.01]),
)
def test_a_step_is_the_reference_step(device, sizes, seed, dtype, decay):
    """The error of a float32 step: some roundings of m, v and u, and of the sums."""
    groups = [make_group(sizes, device, seed, DTYPES[dtype], weight_decay=decay), make_group([5], device, lr=0.1)]
    expected = list(expected_of(groups, 0.5))
    lamb(groups, max_grad_norm=0.5, backend="cuda")
    ours = [ts for group in groups for ts in (group.masters, group.exp_avgs, group.exp_avg_sqs)]
    for tensors, truths in zip(ours, expected, strict=True):
        for a, b in zip(tensors, truths, strict=True):
            assert (a.double() - b).norm() <= 5e-7 * b.norm()
    for group in groups:
        assert all(torch.equal(p, w.to(p.dtype)) for p, w in zip(group.params, group.masters, strict=True))
        assert all(step == 3 for step in group.steps)


@on_each_device
def test_more_groups_than_one_launch_takes(device):
    groups = [make_group([3, 40], device, seed, lr=0.001 * (1 + seed)) for seed in range(150)]
    expected = list(expected_of(groups, 1.0))
    lamb(groups, max_grad_norm=1.0, backend="cuda")
    for group, truths in zip(groups, expected[::3], strict=True):
        assert all(torch.allclose(p.double(), t, rtol=1e-6) for p, t in zip(group.params, truths, strict=True))


@on_each_device
def test_repeats_bit_by_bit_and_does_not_depend_on_threads(device):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            group = make_group([9 * CPU_CHUNK + 11, 77, 2 * CPU_CHUNK], device, dtype=torch.bfloat16)
            lamb([group], max_grad_norm=1.0, backend="cuda")
            results.append(results_of(group))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on_each_device
def test_phases_apart_are_the_phases_together(device):
    """As the norms of shards need them: then nothing is kept on chip, and the bits are the same."""
    from fastbert.ops.lamb import _Extension

    results = []
    for phases in ([7], [1, 2, 4], [1, 6]):
        groups = [make_group([9 * CPU_CHUNK, 50], device), make_group([70], device, weight_decay=0.0)]
        call = _Extension(groups, {"grad_scale": None, "found_inf": None}, 1.0)
        for part in phases:
            call.run(part)
        results.append([t for group in groups for t in results_of(group)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on_each_device
def test_threads_that_wait_for_each_other_come_to_an_end(device):
    """Many small steps: a wait that is not paired with a signal would hang here sooner or later."""
    group = make_group([40, 3 * CPU_CHUNK, 7, CPU_CHUNK + 1], device)
    for _ in range(100):
        lamb([group], backend="cuda")
    assert all(step == 102 for step in group.steps)


@on_each_device
def test_a_nan_in_the_weights_reaches_its_tensor_and_no_other(device):
    """Gradients decide whether a step is made; what weights and moments hold is theirs."""
    group = make_group([CPU_CHUNK + 5, 10], device)
    group.params[0][CPU_CHUNK] = float("nan")
    lamb([group], backend="cuda")
    assert group.params[0].isnan().all() and group.params[1].isfinite().all()


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_that_are_not_aligned(device, dtype):
    def shifted(tensors):
        spaces = [torch.zeros(t.numel() + 1, dtype=t.dtype, device=device) for t in tensors]
        return [space[1:].copy_(t) for space, t in zip(spaces, tensors, strict=True)]

    results = []
    for moved in (lambda tensors: tensors, shifted):
        group = make_group([5001, 38], device, dtype=DTYPES[dtype])
        masters = None if dtype == "fp32" else moved(group.masters)
        lists = {name: moved(getattr(group, name)) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
        group = LambGroup(**lists, steps=group.steps, masters=masters, lr=0.01)
        lamb([group], backend="cuda")
        results.append(results_of(group))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_each_device
def test_every_16_bit_number_is_read_and_written_as_torch_does(device):
    """With lr 0 a weight without master is read, and written again."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
        finite = every[every.isfinite()]
        group = make_group([finite.numel()], device)
        group = LambGroup(
            params=[finite.clone()],
            grads=[finite.clone()],
            exp_avgs=[torch.zeros_like(group.exp_avgs[0])],
            exp_avg_sqs=[torch.zeros_like(group.exp_avgs[0])],
            steps=group.steps,
            lr=0.0,
            betas=(0.0, 0.0),
            weight_decay=0.0,
        )
        lamb([group], backend="cuda")
        assert torch.equal(group.params[0].view(torch.int16), finite.view(torch.int16))
        assert torch.equal(group.exp_avgs[0], finite.float())


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_are_rounded_as_torch_does(device, dtype):
    """Ties, values below the smallest normal number, and above the largest."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(4000, generator=generator) * torch.exp2(torch.randint(-30, 18, (4000,), generator=generator))
    exact = some.to(dtype).float()
    step = torch.exp2(exact.abs().clamp(min=1e-30).log2().floor() - (10 if dtype == torch.float16 else 7))
    masters = torch.cat([some, exact + step / 2, exact - step / 2, torch.tensor([65519.0, 65520.0, 3e38, 0.0, -0.0])])
    group = make_group([masters.numel()], device)
    params = [torch.zeros_like(masters, dtype=dtype, device=device)]
    lists = {name: getattr(group, name) for name in ("grads", "exp_avgs", "exp_avg_sqs", "steps")}
    group = LambGroup(params=params, masters=[masters.to(device)], **lists, lr=0.0, weight_decay=0.0)
    lamb([group], backend="cuda")
    assert torch.equal(group.params[0].view(torch.int16), masters.to(device).to(dtype).view(torch.int16))


@pytest.mark.skipif("cuda" not in DEVICES, reason="there is no GPU here")
def test_moments_on_the_gpu_are_the_bits_of_the_cpu():
    sizes = [CPU_CHUNK + 3, 100]
    results = {}
    for device in ("cpu", "cuda"):
        group = make_group(sizes, device)
        lamb([group], max_grad_norm=None, backend="cuda")
        results[device] = [t.cpu() for t in (*group.exp_avgs, *group.exp_avg_sqs)]
    assert all(torch.equal(a, b) for a, b in zip(results["cpu"], results["cuda"], strict=True))


@pytest.mark.skipif("cuda" not in DEVICES, reason="there is no GPU here")
def test_a_captured_step_follows_its_tensors():
    """lr, loss scale and found_inf are read when the graph runs; nothing is waited for."""
    group = make_group([5 * CUDA_CHUNK, 7], "cuda", dtype=torch.float16, lr=torch.tensor(0.01, device="cuda"))
    other = make_group([5 * CUDA_CHUNK, 7], "cuda", dtype=torch.float16)
    scalars = {"grad_scale": torch.tensor(1.0, device="cuda"), "found_inf": torch.tensor(0.0, device="cuda")}
    lamb([make_group([5], "cuda")], **scalars, max_grad_norm=1.0, backend="cuda")  # loads the code
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lamb([group], **scalars, max_grad_norm=1.0, backend="cuda")
    for lr, scale, found in ((0.01, 1.0, 0.0), (0.5, 4.0, 0.0), (0.3, 2.0, 1.0), (0.02, 2.0, 0.0)):
        group.lr.fill_(lr)
        scalars["grad_scale"].fill_(scale)
        scalars["found_inf"].fill_(found)
        graph.replay()
        other.lr = lr
        lamb([other], **scalars, max_grad_norm=1.0, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(results_of(group), results_of(other), strict=True))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t["grads"].pop(), "lists of 2 params, 2 masters, 1 grads"),
        (lambda t: t["grads"].__setitem__(1, torch.zeros(3)), "index 1 differ in size"),
        (lambda t: t["exp_avgs"].__setitem__(1, torch.zeros(4).double()), r"exp_avgs\[1\] is not float32"),
        (lambda t: t["params"].__setitem__(1, torch.zeros(4).double()), r"params\[1\] is not float32, float16"),
        (lambda t: t["exp_avgs"].__setitem__(1, torch.zeros(8)[::2]), r"exp_avgs\[1\] is not contiguous"),
        (lambda t: t["params"].__setitem__(1, torch.zeros(4)), r"masters\[1\] is not params\[1\] and not float32"),
        (lambda t: t.__setitem__("totals", torch.zeros(3).double()), "totals has 3 elements"),
        (lambda t: t.__setitem__("settings", torch.zeros(1, 8)), "settings is not a float64 matrix"),
        (lambda t: t["settings"][0].__setitem__(0, 3.0), "settings counts more tensors"),
        (lambda t: t.__setitem__("phases", 2), "phases is 2, and those after the norm need its workspace"),
        (lambda t: t.__setitem__("phases", 9), "phases is 9"),
        (lambda t: t.__setitem__("workspace", torch.zeros(3, dtype=torch.int32)), "workspace is not that of"),
    ],
)
def test_the_operator_says_what_is_wrong_before_it_writes(spoil, message):
    group = make_group([4, 4])
    before = group.params[0].clone()
    arguments = {name: list(getattr(group, name)) for name in ("params", "masters", "grads", "exp_avgs", "exp_avg_sqs")}
    arguments |= {"steps": group.steps, "lrs": [], "grad_scale": None, "found_inf": None, "workspace": None}
    arguments["settings"] = torch.tensor([[2, 0.1, -1, 0.9, 0.999, 1e-6, 0.01, 7]], dtype=torch.float64)
    arguments["totals"] = torch.zeros(6, dtype=torch.float64)
    spoil(arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastbert.lamb_(**{"phases": 7} | arguments, max_grad_norm=1.0)
    assert torch.equal(before, group.params[0])


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_bindings_compile_with_the_cuda_part(tmp_path):
    """Where torch has no CUDA, nobody builds this half of bindings.cpp: at least it must compile."""
    include = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    macros = ["USE_CUDA", "FASTBERT_CUDA", "Py_LIMITED_API=0x030a0000", "=".join(SETUP["STABLE_ABI"])]
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", *(f"-D{macro}" for macro in macros)]
    command += [argument for folder in include for argument in ("-isystem", folder)]
    done = subprocess.run([*command, "csrc/bindings.cpp"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
