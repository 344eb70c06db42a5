"""LN(residual + dropout(x)): every backend against float64."""

from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastbert import reference
from fastbert.errors import BackendError, ConfigError, DtypeError, ShapeError
from fastbert.ops import dropout_add_layer_norm
from fastbert.testing import compare

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
pytestmark = pytest.mark.gpu
BACKENDS = ["torch", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(*shape, dtype=torch.float32, residual_dtype=None, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda dtype, *shape: torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()  # noqa: E731
    tensors = {"x": draw(dtype, *shape), "residual": draw(residual_dtype or dtype, *shape)}
    return {**tensors, "weight": draw(dtype, shape[-1]), "bias": draw(dtype, shape[-1])}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@example(rows=[], width=8, dtype=torch.float32, eps=1e-12, dropout_p=0.0, seed=0)
@example(rows=[0], width=8, dtype=torch.float32, eps=1e-12, dropout_p=0.5, seed=0)
@example(rows=[1], width=384, dtype=torch.float16, eps=1e-12, dropout_p=0.0, seed=0)
# F.layer_norm on a CPU sums the gradients of weight and bias in the dtype of x: 16 bits are not enough for 1000 rows.
@example(rows=[1000], width=24, dtype=torch.bfloat16, eps=1e-12, dropout_p=0.0, seed=0)
@given(
    rows=st.lists(st.integers(1, 9), max_size=2),
    width=st.sampled_from([8, 33, 64, 130, 384]),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-12, 1e-5]),
    dropout_p=st.sampled_from([0.0, 0.001, 0.1, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)
def test_is_the_reference(backend, device, rows, width, dtype, eps, dropout_p, seed):
    arguments = inputs(*rows, width, dtype=dtype, device=device, seed=seed % 1000)
    op = partial(dropout_add_layer_norm, backend=backend)
    compare(op, reference.dropout_add_layer_norm, {**arguments, "eps": eps, "dropout_p": dropout_p, "seed": seed})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x, residual", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_the_result_has_the_dtype_of_the_residual(backend, x, residual):
    arguments = inputs(5, 64, dtype=x, residual_dtype=residual)
    arguments["weight"] = arguments["weight"].detach().float().requires_grad_()
    op = partial(dropout_add_layer_norm, backend=backend, dropout_p=0.2, seed=1)
    compare(op, partial(reference.dropout_add_layer_norm, dropout_p=0.2, seed=1), arguments)
    assert op(**arguments).dtype == residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_the_residual(dtype):
    arguments = inputs(5, 64, residual_dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert dropout_add_layer_norm(**arguments).dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_inside_the_root(backend):
    x = torch.tensor([[-3.0, 3.0]], dtype=torch.float64)
    y = dropout_add_layer_norm(x, torch.zeros_like(x), torch.ones(2), torch.zeros(2), eps=16.0, backend=backend)
    assert torch.allclose(y, torch.tensor([[-0.6, 0.6]], dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_row_gives_the_bias_and_finite_gradients(backend):
    arguments = inputs(3, 16)
    arguments["x"] = torch.full((3, 16), 7.0, requires_grad=True)
    arguments["residual"] = torch.full((3, 16), -2.0, requires_grad=True)
    y = dropout_add_layer_norm(**arguments, backend=backend)
    assert torch.equal(y, arguments["bias"].expand(3, 16))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(arguments.values())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row(backend):
    arguments = inputs(4, 16)
    arguments["x"].data[2, 5] = float("nan")
    y = dropout_add_layer_norm(**arguments, dropout_p=0.1, backend=backend)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


def test_a_seed_drops_the_same_elements_in_every_backend():
    arguments = inputs(7, 3, 50, dtype=torch.float64)
    run = lambda backend, seed: dropout_add_layer_norm(**arguments, dropout_p=0.3, seed=seed, backend=backend)  # noqa: E731
    assert torch.allclose(run("torch", 2**63 + 5), run("reference", 2**63 + 5), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run("torch", 1), run("torch", 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_drops_with_probability_p(backend, seed, p):
    """Of a row of ones, what is kept comes out positive and what is dropped negative."""
    x = torch.ones(100, 1000)
    y = dropout_add_layer_norm(
        x, torch.zeros_like(x), torch.ones(1000), torch.zeros(1000), dropout_p=p, seed=seed, backend=backend
    )
    expected = p if seed is None else round(256 * p) / 256
    assert abs((y < 0).double().mean().item() - expected) < 5 * (p * (1 - p) / x.numel()) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed, scale", [(None, 1 / 0.9), (3, 256 / (256 - 26))])
def test_what_is_kept_is_scaled_up(backend, seed, scale):
    """An eps far above the variance turns LN into a subtraction of the mean."""
    x, zero, one = torch.ones(1, 1000), torch.zeros(1, 1000), torch.ones(1000)
    y = dropout_add_layer_norm(x, zero, one, zero[0], eps=1e6, dropout_p=0.1, seed=seed, backend=backend) * 1000
    assert (y.max() - y.min()).item() == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_draws_nothing(backend):
    before = torch.get_rng_state()
    dropout_add_layer_norm(**inputs(4, 8), dropout_p=0.0, backend=backend)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    arguments = inputs(3, 2, 5, dtype=torch.float64)
    op = partial(dropout_add_layer_norm, dropout_p=0.4, seed=9, backend=backend)
    assert torch.autograd.gradcheck(op, tuple(arguments.values()))


def test_compiles_as_one_graph():
    arguments = inputs(4, 6, 32)
    op = partial(dropout_add_layer_norm, dropout_p=0.25, seed=7)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    compare(compiled, partial(reference.dropout_add_layer_norm, dropout_p=0.25, seed=7), arguments)
    compiled = torch.compile(partial(dropout_add_layer_norm, dropout_p=0.25), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(**arguments), compiled(**arguments))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"residual": torch.zeros(4, 6)}, ShapeError, r"residual: got shape \(4, 6\), expected \(5, 6\)"),
        ({"weight": torch.zeros(5)}, ShapeError, r"weight: got shape \(5,\), expected \(6,\)"),
        ({"bias": torch.zeros(1, 6)}, ShapeError, r"bias: got shape \(1, 6\), expected \(6,\)"),
        ({"x": torch.zeros(5, 6, dtype=torch.int64)}, DtypeError, "x: got torch.int64"),
        ({"weight": torch.zeros(6, dtype=torch.bool)}, DtypeError, "weight: got torch.bool"),
        ({"bias": torch.zeros(6, device="meta")}, ShapeError, "bias: got a tensor on meta, expected cpu as x"),
        ({"dropout_p": 1.0}, ConfigError, "dropout_p: got 1.0"),
        ({"dropout_p": -0.1}, ConfigError, "dropout_p: got -0.1"),
        ({"dropout_p": float("nan")}, ConfigError, "dropout_p: got nan"),
        ({"dropout_p": "a"}, ConfigError, "dropout_p: got 'a', expected 0 <= dropout_p < 1"),
        ({"dropout_p": 0.1, "seed": -1}, ConfigError, "seed: got -1"),
        ({"dropout_p": 0.1, "seed": 1.5}, ConfigError, "seed: got 1.5, expected None or .*, an int"),
        ({"eps": -1e-6}, ConfigError, "eps: got -1e-06, expected a number, at least 0"),
        ({"eps": float("nan")}, ConfigError, "eps: got nan"),
        ({"eps": None}, ConfigError, "eps: got None"),
        ({"bias": None}, DtypeError, "bias: got a NoneType, expected a torch.Tensor"),
        ({"x": [[0.0] * 6] * 5}, DtypeError, "x: got a list, expected a torch.Tensor"),
        ({"x": torch.tensor(1.0)}, ShapeError, r"x: got shape \(\), expected at least one dimension"),
        ({"backend": "triton"}, BackendError, "triton"),
        ({"backend": "fastest"}, BackendError, "fastest"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    arguments = {**inputs(5, 6), **change}
    with pytest.raises(error, match=message):
        dropout_add_layer_norm(**arguments)
