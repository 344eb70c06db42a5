"""The Triton kernels of relative attention: what they do that the other attention kernels do not."""

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_fused_attention import DEVICE, DTYPES, fused, hold, inputs, on_a_gpu, tiles

from fastbert import ops, reference
from fastbert.ops import fused_attention
from fastbert.philox import attention_keep
from fastbert.testing import compare

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastbert.kernels import band, relative_attention  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
CUDA = torch.cuda.is_available()
EDGES = ["1", "R - 1", "R", "R + 1", "2 * R", "2 * R + 1", "4 * R + 3"]


@triton.jit
def place_kernel(p_first, p_found, length, radius, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Functions of fastbert.kernels.band by themselves."""
    i = tl.program_id(0)
    first_m, first_n = tl.load(p_first + 2 * i), tl.load(p_first + 2 * i + 1)
    crossed, side = band.place(first_m, first_n, radius, BLOCK_M, BLOCK_N)
    low, high = band.near(first_m, length, radius, BLOCK_M, BLOCK_N)
    number = tl.where(first_n < low, first_n, first_n + low - high)  # which band.far has to undo
    tl.store(p_found + 4 * i, ((first_n >= low) & (first_n < high)).to(tl.int32))
    tl.store(p_found + 4 * i + 1, crossed.to(tl.int32))
    tl.store(p_found + 4 * i + 2, side)
    tl.store(p_found + 4 * i + 3, band.far(number, low, high))


def check(arguments, radius, **options):
    hold("relative_attention", arguments, max_relative_position=radius, **options)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Of 32 x 32, so that short sequences have tiles of every kind. GPUs run those that ship."""
    if not CUDA:
        tiles(monkeypatch, 32, 32)


@settings(max_examples=settings().max_examples // (1 if CUDA else 3))
@example(radius=64, lengths=[150], layout="packed", head_dim=16, dtype=1, dropout_p=0.1)
@example(radius=20, lengths=[130], layout="padded", head_dim=16, dtype=0, dropout_p=0.0)
@given(
    radius=st.one_of(st.integers(1, 70), st.sampled_from([127, 4096, 20_000])),
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=2).map(lambda x: [*x, 41]),
    layout=st.sampled_from(["padded", "packed"]),
    head_dim=st.sampled_from([2, 16, 26]),
    dtype=st.integers(0, 2),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_any_radius(radius, lengths, layout, head_dim, dtype, dropout_p):
    padding = float("nan") if layout == "padded" else None
    arguments = inputs(lengths, 1, head_dim, layout=layout, dtype=DTYPES[dtype % len(DTYPES)], padding=padding)
    check(arguments, radius, dropout_p=dropout_p, seed=3)


@pytest.mark.parametrize("radius", [1, 5, 64, 127] if CUDA else [1, 5, 32])
def test_lengths_around_the_radius(radius):
    lengths = [eval(length, {"R": radius}) for length in EDGES]
    for dtype in DTYPES:
        check(inputs(lengths, layout="packed", dtype=dtype), radius)


@pytest.mark.parametrize("radius", [64, 127])
def test_the_published_radii(radius, monkeypatch):
    tiles(monkeypatch, 128, 64)
    check(inputs([300], dtype=torch.float16), radius, dropout_p=0.1, seed=1)


@pytest.mark.parametrize("radius", [1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 127, 200])
@pytest.mark.parametrize("block_m, block_n", [(32, 32), (128, 64), (64, 128), (128, 32), (64, 32)])
def test_kinds_of_tiles(radius, block_m, block_n):
    """Whether a tile touches the band, and which of its edges cross it, from all of its pairs."""
    first = torch.cartesian_prod(torch.arange(0, 512, block_m), torch.arange(0, 512, block_n)).int()
    i, j = torch.arange(block_m)[:, None], torch.arange(block_n)
    distance = (first[:, 1] - first[:, 0]).view(-1, 1, 1) + j - i
    near, left, right = (
        (t.flatten(1).any(1)) for t in (distance.abs() < radius, distance < -radius, distance > radius)
    )
    assert relative_attention.crossed_twice(radius, block_m, block_n) == bool((near & left & right).any())
    found = torch.empty(len(first), 4, dtype=torch.int32, device=DEVICE)
    place_kernel[(len(first),)](first.to(DEVICE), found, 512, radius, BLOCK_M=block_m, BLOCK_N=block_n)
    touches, crossed, side, tile = found.cpu().unbind(1)
    assert torch.equal(touches.bool(), near) and torch.equal(crossed.bool(), left | right)
    assert torch.equal(side > 0, right) and torch.equal(tile[~near], first[:, 1][~near])


def definition(q, k, v, radius, rows):
    """Output of some rows of one head [L, D], element by element of the definition, in float64."""
    q, k, v = q.double()[rows], k.double(), v.double()
    offset = (torch.arange(len(k)) - rows[:, None]).clamp(-radius, radius)
    a = reference.sinusoids(radius, k.shape[-1])[offset + radius]
    scores = (q @ k.T + torch.einsum("id,ijd->ij", q, a)) * k.shape[-1] ** -0.5
    p = scores.softmax(-1)
    return p @ v + torch.einsum("ij,ijd->id", p, a)


@pytest.mark.parametrize("length", [2048, pytest.param(8192, marks=on_a_gpu)])
@pytest.mark.parametrize("radius", [64, 5000])
def test_late_positions_are_as_exact_as_early_ones(length, radius, monkeypatch):
    """Also where the sinusoids run over all of the sequence, unclipped."""
    if not CUDA:
        tiles(monkeypatch, 256, 256)
    q, k, v = torch.randn(3, length, 16, device=DEVICE)
    output = fused("relative_attention", max_relative_position=radius)(*(t[None, :, None] for t in (q, k, v)))[0, :, 0]
    errors = []
    for first in (0, length // 2, length - 64):
        rows = torch.arange(first, first + 64)
        errors.append((output[rows].cpu() - definition(q.cpu(), k.cpu(), v.cpu(), radius, rows)).abs().max().item())
    assert max(errors) < 4e-6, errors


def test_one_mask_of_dropout_for_keys_and_values_and_an_undropped_denominator():
    """With q = v = 0 the output are the kept ones of equal weights, times the sinusoids at their distances."""
    length, radius = 70, 9
    zeros = torch.zeros(1, length, 1, 16, device=DEVICE)
    output = fused("relative_attention", dropout_p=0.4, seed=11, max_relative_position=radius)(zeros, zeros, zeros)
    keep = attention_keep(11, 0.4, 1, 1, length)[0, 0]
    i = torch.arange(length)
    a = reference.sinusoids(radius, 16)[(i[None] - i[:, None]).clamp(-radius, radius) + radius]
    expected = torch.einsum("ij,ijd->id", keep.double() / length * 256 / (256 - 102), a)
    torch.testing.assert_close(output[0, :, 0].cpu().double(), expected, atol=1e-6, rtol=1e-5)


def test_tables_are_small_and_kept_once_per_radius():
    """For any number of lengths, as long as the radius is not enormous."""
    for length in (3, 20, 90):
        x = torch.randn(1, length, 1, 16, device=DEVICE)
        fused("relative_attention", max_relative_position=77)(x, x, x)
    found = [tables for key, tables in fused_attention._kept.items() if key[0] is fused_attention._waves and 77 in key]
    assert len(found) == 1 and sum(t.numel() for t in found[0]) < 50_000
    x = torch.randn(1, 20, 1, 16, device=DEVICE)
    fused("relative_attention", max_relative_position=2**30)(x, x, x)
    largest = [tables for key, tables in fused_attention._kept.items() if 2**30 in key]
    assert len(largest) == 1 and sum(t.numel() for t in largest[0]) < 50_000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_batches_give_what_packed_ones_give(dtype):
    padded, packed = (inputs([61, 0, 90], 1, layout=layout, dtype=dtype) for layout in ("padded", "packed"))
    real = padded["key_padding_mask"]
    packed |= {n: padded[n][real] for n in "qkv"}
    op = fused("relative_attention", max_relative_position=13)
    torch.testing.assert_close(op(**padded)[real], op(**packed))


@on_a_gpu
@settings(max_examples=5)
@given(radius=st.sampled_from([64, 127]), seed=st.integers(0, 99))
def test_as_the_portable_twin_at_512(radius, seed):
    arguments = inputs([512, 512], 2, 64, dtype=torch.float16, seed=seed)
    op = partial(ops.relative_attention, max_relative_position=radius)
    compare(partial(op, backend="triton"), partial(op, backend="torch"), arguments)
