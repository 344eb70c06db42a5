"""gelu(x + bias): every backend against float64; the Triton kernel interpreted."""

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from fastbert import portable, reference
from fastbert.errors import BackendError, ConfigError, DtypeError, ShapeError
from fastbert.ops import bias_gelu
from fastbert.testing import compare

triton = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
FORMS = ["none", "tanh"]
MODULE = importlib.import_module("fastbert.ops.bias_gelu")
TRITON_DTYPES = [torch.float32, torch.float16] + (
    [torch.bfloat16] if CUDA else []
)  # the interpreter truncates bfloat16
SERVED = {
    "torch": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "reference": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "triton": TRITON_DTYPES,
}
BACKENDS = ["torch", "reference", pytest.param("triton", marks=needs_triton)]


def inputs(*shape, dtype=torch.float32, bias_dtype=None, device=DEVICE, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda dtype, *shape: (torch.randn(*shape, generator=generator) * scale).to(device, dtype)  # noqa: E731
    x, bias = draw(dtype, *shape), draw(bias_dtype or dtype, shape[-1])
    return {"x": x.requires_grad_(), "bias": bias.requires_grad_()}


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@example(rows=[], width=1, dtype=0, seed=0, scale=2.0)
@example(rows=[0], width=8, dtype=0, seed=0, scale=2.0)
@example(rows=[3, 0], width=8, dtype=1, seed=0, scale=2.0)
@example(rows=[129], width=520, dtype=0, seed=0, scale=2.0)  # several programs in both directions, and a remainder
@given(
    rows=st.lists(st.integers(1, 9), max_size=2),
    width=st.sampled_from([1, 7, 64, 130, 513]),
    dtype=st.integers(0, 3),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.01, 1.0, 4.0]),
)
def test_is_the_reference(backend, approximate, rows, width, dtype, seed, scale):
    dtype = SERVED[backend][dtype % len(SERVED[backend])]
    arguments = inputs(*rows, width, dtype=dtype, seed=seed, scale=scale)
    op = partial(bias_gelu, approximate=approximate, backend=backend)
    compare(op, partial(reference.bias_gelu, approximate=approximate), arguments)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_right_from_end_to_end(backend, approximate):
    """On a fine grid, so that no stretch of the approximated distribution function stays untested."""
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    x = grid.float().to(DEVICE).requires_grad_()
    y = bias_gelu(x, torch.zeros_like(x), approximate=approximate, backend=backend)
    wide = x.detach().double().requires_grad_()
    truth = reference.bias_gelu(wide, torch.zeros_like(wide), approximate=approximate)
    assert (y.double() - truth).abs().max() < 1.2e-6
    dx, truth = (torch.autograd.grad(t.sum(), leaf)[0] for t, leaf in ((y, x), (truth, wide)))
    assert (dx.double() - truth).abs().max() < 2e-6


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, at infinity
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values(backend, approximate):
    x = torch.tensor([[-1e4, -50.0, -0.0, 0.0, 50.0, 1e4, float("inf"), float("nan")]], device=DEVICE)
    x = x.half().requires_grad_()
    y = bias_gelu(x, torch.zeros(8, device=DEVICE).half(), approximate=approximate, backend=backend)
    assert y[0, :6].tolist() == [0, 0, 0, 0, 50, x[0, 5].item()] and y[0, 7].isnan()
    # PyTorch's own is NaN on some CPUs (Intel's with AVX-512), and what is made of it is as it is.
    infinity = F.gelu(x.detach(), approximate=approximate)[0, 6] if backend == "torch" else x[0, 6]
    assert torch.equal(y[0, 6].isnan(), infinity.isnan()) and (infinity.isnan() or y[0, 6] == float("inf"))
    (dx,) = torch.autograd.grad(y[0, :6].sum(), x)
    assert dx[0, :6].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_the_two_forms_differ_as_published():
    x, bias = torch.linspace(-6, 6, 10001, dtype=torch.float64)[:, None], torch.zeros(1, dtype=torch.float64)
    difference = (bias_gelu(x, bias) - bias_gelu(x, bias, approximate="tanh")).abs().max()
    assert 4.6e-4 < difference < 4.8e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_is_cast_to_the_dtype_of_x(backend):
    arguments = inputs(6, 70, dtype=torch.float16, bias_dtype=torch.float32)
    rows = compare(partial(bias_gelu, backend=backend), reference.bias_gelu, arguments)
    assert [row.name for row in rows] == [
        "output",
        "grad x",
        "grad bias",
    ]  # compare holds their dtypes to the reference's


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend):
    """Rows of a wider tensor, rows from the end, transposed, and a gradient that is one expanded number."""
    wide = torch.randn(4, 40, 96, device=DEVICE)
    bias = torch.randn(40, device=DEVICE)
    for x in (wide[..., 8:48], wide[:, ::3, :40], wide[:, :40, :7].mT, wide[0, 0, :40].expand(4, 40)):
        arguments = {"x": x.detach().requires_grad_(), "bias": bias.detach().requires_grad_()}
        compare(partial(bias_gelu, backend=backend), reference.bias_gelu, arguments)
        dx, _ = torch.autograd.grad(bias_gelu(**arguments, backend=backend).sum(), list(arguments.values()))
        expected, _ = torch.autograd.grad(reference.bias_gelu(**arguments).sum(), list(arguments.values()))
        assert torch.allclose(dx, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck(backend, approximate):
    op = partial(bias_gelu, approximate=approximate, backend=backend)
    assert torch.autograd.gradcheck(op, tuple(inputs(3, 2, 5, dtype=torch.float64, device="cpu").values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    compiled = torch.compile(partial(bias_gelu, backend=backend), fullgraph=True, backend="aot_eager")
    compare(compiled, reference.bias_gelu, inputs(5, 40))


@needs_triton
def test_registered_operators():
    x, bias = inputs(5, 40).values()
    for approximate in FORMS:
        torch.library.opcheck(MODULE._forward_op, (x, bias, approximate))
        torch.library.opcheck(MODULE._backward_op, (x.detach(), x.detach(), bias.detach(), approximate))


@needs_triton
def test_triton_gives_the_same_bits_again():
    arguments = inputs(200, 33)
    run = lambda: torch.autograd.grad(bias_gelu(**arguments, backend="triton").sum(), list(arguments.values()))  # noqa: E731
    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_triton_reaches_rows_beyond_32_bits():
    """Two rows that lie 2^31 elements apart; the memory between them is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = far.as_strided((2, 64), (2**31, 1))
    x.copy_(torch.randn(2, 64))
    arguments = {"x": x, "bias": torch.randn(64, dtype=torch.float16, device=DEVICE).requires_grad_()}
    y = bias_gelu(**arguments, backend="triton")
    assert torch.allclose(y, portable.bias_gelu(**arguments), atol=2e-3, rtol=2e-3)


@pytest.mark.skipif(CUDA, reason="on CUDA it is the default")
def test_triton_on_a_cpu_only_if_asked_for(monkeypatch):
    monkeypatch.setitem(MODULE._TWINS, "triton", None)
    bias_gelu(**inputs(2, 8))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        bias_gelu(**inputs(2, 8), backend="triton")


@needs_triton
def test_triton_refuses_float64():
    with pytest.raises(BackendError, match="float64"):
        bias_gelu(**inputs(2, 8, dtype=torch.float64), backend="triton")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"bias": torch.zeros(5)}, ShapeError, r"bias: got shape \(5,\), expected \(6,\)"),
        ({"x": torch.zeros(5, 6, dtype=torch.int32)}, DtypeError, "x: got torch.int32"),
        ({"bias": torch.zeros(6, dtype=torch.int32)}, DtypeError, "bias: got torch.int32"),
        ({"bias": torch.zeros(6, device="meta")}, ShapeError, "bias: got a tensor on meta"),
        ({"x": None}, DtypeError, "x: got a NoneType, expected a torch.Tensor"),
        ({"x": torch.tensor(1.0)}, ShapeError, r"x: got shape \(\), expected at least one dimension"),
        ({"approximate": "erf"}, ConfigError, "approximate: got 'erf', expected one of 'none', 'tanh'"),
        ({"backend": "cuda"}, BackendError, "cuda"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        bias_gelu(**{**inputs(5, 6, device="cpu"), **change})
