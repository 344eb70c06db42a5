"""fastbert._C, the compiled part: LAMB against the reference on each device it serves."""

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

from fastbert import reference
from fastbert.testing import compare

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
CHUNK = 32768  # kLambChunk
DEFAULTS = {
    "step": 3,
    "lr": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "bias_correction": True,
    "grad_averaging": True,
    "always_adapt": False,
    "grad_scale": 1.0,
}
# Sizes of the tensors of a group: empty, scalar, around the vector width and around a chunk.
GROUPS = [[1], [0, 5, 0], [15, 16, 17], [CHUNK - 1, 3], [CHUNK, CHUNK + 1], [3 * CHUNK + 7, 1, 100]]

pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
try:
    import fastbert._C  # noqa: F401
except ImportError as error:
    pytestmark.append(pytest.mark.skip(reason=f"the compiled part is not built ({error})"))
    DEVICES = []
else:
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("fastbert::lamb_", "CUDA") and torch.cuda.is_available()
    DEVICES = ["cpu", "cuda"] if has_cuda else ["cpu"]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def fused(params, grads, exp_avgs, exp_avg_sqs, *, betas, **flags):
    """The compiled operator behind the interface of the reference: new lists instead of a step in place."""
    params, exp_avgs, exp_avg_sqs = ([t.clone() for t in tensors] for tensors in (params, exp_avgs, exp_avg_sqs))
    torch.ops.fastbert.lamb_(params, grads, exp_avgs, exp_avg_sqs, beta1=betas[0], beta2=betas[1], **flags)
    return params, exp_avgs, exp_avg_sqs


def group(sizes, device="cpu", seed=0):
    """The tensors of one step, as a run in its third step would have them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda scale: [(torch.randn(n, generator=generator) * scale).to(device) for n in sizes]  # noqa: E731
    return {
        "params": draw(0.1),
        "grads": draw(1.0),
        "exp_avgs": draw(0.3),
        "exp_avg_sqs": [t.square() for t in draw(0.05)],
    }


@on_each_device
@example(sizes=GROUPS[-1], seed=0, flags={"weight_decay": 0.0, "always_adapt": True})
@example(sizes=GROUPS[0], seed=1, flags={"step": 1, "grad_scale": 1024.0})
@given(
    sizes=st.sampled_from(GROUPS) | st.lists(st.integers(0, 200), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    flags=st.fixed_dictionaries(
        {
            "step": st.sampled_from([1, 2, 1000]),
            "lr": st.sampled_from([0.0, 1e-3, 0.1]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.87, 0.98)]),
            "eps": st.sampled_from([1e-6, 1e-8, 1e-2]),
            "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
            "bias_correction": st.booleans(),
            "grad_averaging": st.booleans(),
            "always_adapt": st.booleans(),
            "grad_scale": st.sampled_from([1.0, 3.0, 65536.0]),
        }
    ),
)
def test_a_step_is_the_reference_step(device, sizes, seed, flags):
    compare(fused, reference.lamb, {**group(sizes, device, seed), **DEFAULTS, **flags})


@on_each_device
def test_ratio_is_one_where_a_norm_is_zero(device):
    tensors = group([64, 64], device)
    tensors["params"][0].zero_()
    for name in ("grads", "exp_avgs", "exp_avg_sqs"):
        tensors[name][1].zero_()
    compare(fused, reference.lamb, {**tensors, **DEFAULTS, "always_adapt": True, "weight_decay": 0.0})


@on_each_device
def test_a_nan_reaches_its_tensor_and_no_other(device):
    tensors = group([CHUNK + 5, 10], device)
    tensors["grads"][0][CHUNK] = float("nan")
    params, _, _ = fused(**tensors, **DEFAULTS)
    assert params[0].isnan().all() and params[1].isfinite().all()


@on_each_device
def test_more_tensors_than_one_launch_takes(device):
    compare(fused, reference.lamb, {**group(range(1, 601), device), **DEFAULTS})


@on_each_device
def test_views_that_are_not_aligned(device):
    tensors = {name: [t[1:] for t in values] for name, values in group([1001, 38], device).items()}
    compare(fused, reference.lamb, {**tensors, **DEFAULTS})


@on_each_device
def test_repeats_bit_by_bit_and_does_not_depend_on_threads(device):
    tensors = group([5 * CHUNK + 11, 77, 2 * CHUNK], device)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(fused(**tensors, **DEFAULTS))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.skipif("cuda" not in DEVICES, reason="there is no GPU here")
def test_moments_on_the_gpu_are_the_bits_of_the_cpu():
    tensors = group([CHUNK + 3, 100])
    _, *cpu = fused(**tensors, **DEFAULTS)
    _, *cuda = fused(**{name: [t.cuda() for t in values] for name, values in tensors.items()}, **DEFAULTS)
    for ours, theirs in zip(cpu, cuda, strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t["grads"].pop(), "lists of 2 params, 1 grads"),
        (lambda t: t["grads"].__setitem__(1, torch.zeros(3)), "index 1 differ in size"),
        (lambda t: t["params"].__setitem__(1, torch.zeros(4).double()), r"params\[1\] is not float32"),
        (lambda t: t["exp_avgs"].__setitem__(1, torch.zeros(8)[::2]), r"exp_avgs\[1\] is not contiguous"),
    ],
)
def test_says_what_is_wrong_before_it_writes(spoil, message):
    tensors = group([4, 4])
    spoil(tensors)
    before = tensors["params"][0].clone()
    flags = {name: value for name, value in DEFAULTS.items() if name != "betas"}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastbert.lamb_(*tensors.values(), beta1=0.9, beta2=0.999, **flags)
    assert torch.equal(before, tensors["params"][0])


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_bindings_compile_with_the_cuda_part(tmp_path):
    """Where torch has no CUDA, nobody builds this half of bindings.cpp: at least it must compile."""
    include = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    macros = ["USE_CUDA", "FASTBERT_CUDA", "Py_LIMITED_API=0x030a0000", "=".join(SETUP["STABLE_ABI"])]
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", *(f"-D{macro}" for macro in macros)]
    command += [argument for folder in include for argument in ("-isystem", folder)]
    done = subprocess.run([*command, "csrc/bindings.cpp"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
