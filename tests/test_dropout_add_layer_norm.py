"""LN(residual + dropout(x + x_bias)): every backend against float64; the Triton kernel interpreted."""

import importlib
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastbert import reference
from fastbert.errors import BackendError, ConfigError, DtypeError, ShapeError
from fastbert.ops import dropout_add_layer_norm
from fastbert.philox import seed_tensor
from fastbert.testing import compare

triton = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
MODULE = importlib.import_module("fastbert.ops.dropout_add_layer_norm")
TRITON_DTYPES = [torch.float32, torch.float16] + (
    [torch.bfloat16] if CUDA else []
)  # the interpreter truncates bfloat16
SERVED = {
    "torch": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "reference": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "triton": TRITON_DTYPES,
}
BACKENDS = ["torch", "reference", pytest.param("triton", marks=needs_triton)]


def inputs(*shape, dtype=torch.float32, residual_dtype=None, bias=False, device=DEVICE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda dtype, *shape: torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()  # noqa: E731
    tensors = {"x": draw(dtype, *shape), "residual": draw(residual_dtype or dtype, *shape)}
    tensors |= {name: draw(dtype, shape[-1]) for name in ("weight", "bias")}
    return tensors | ({"x_bias": draw(dtype, shape[-1])} if bias else {})


def gradients(arguments, **options):
    """Those of all that need one, of the sum of the squares of what comes out."""
    leaves = [t for t in arguments.values() if t.requires_grad]
    y = dropout_add_layer_norm(**arguments, **options)
    return torch.autograd.grad(y.float().square().sum(), leaves)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # numpy, beyond the columns
@pytest.mark.parametrize("backend", BACKENDS)
@example(rows=[], width=8, dtype=0, eps=1e-12, dropout_p=0.0, bias=True, seed=0)
@example(rows=[0], width=8, dtype=0, eps=1e-12, dropout_p=0.5, bias=True, seed=0)
@example(rows=[3], width=0, dtype=0, eps=1e-12, dropout_p=0.5, bias=True, seed=0)
@example(rows=[1], width=384, dtype=-1, eps=1e-12, dropout_p=0.0, bias=False, seed=0)
# F.layer_norm on a CPU sums the gradients of weight and bias in the dtype of x: 16 bits are not enough for 1000 rows.
@example(rows=[1000], width=24, dtype=2, eps=1e-12, dropout_p=0.0, bias=False, seed=0)
@example(rows=[3], width=2049, dtype=1, eps=1e-12, dropout_p=0.1, bias=True, seed=0)
@given(
    rows=st.lists(st.integers(1, 9), max_size=2),
    width=st.sampled_from([5, 8, 33, 64, 130, 384]),
    dtype=st.integers(0, 3),
    eps=st.sampled_from([1e-12, 1e-5]),
    dropout_p=st.sampled_from([0.0, 0.001, 0.1, 0.5]),
    bias=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_is_the_reference(backend, rows, width, dtype, eps, dropout_p, bias, seed):
    dtype = SERVED[backend][dtype % len(SERVED[backend])]
    arguments = inputs(*rows, width, dtype=dtype, bias=bias, seed=seed % 1000)
    op = partial(dropout_add_layer_norm, backend=backend)
    compare(op, reference.dropout_add_layer_norm, {**arguments, "eps": eps, "dropout_p": dropout_p, "seed": seed})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("x, residual", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_the_result_has_the_dtype_of_the_residual(backend, dropout_p, x, residual):
    """And every gradient that of its tensor (compare holds it to the reference's)."""
    arguments = inputs(5, 64, dtype=x, residual_dtype=residual, bias=True)
    arguments["weight"] = arguments["weight"].detach().float().requires_grad_()
    op = partial(dropout_add_layer_norm, backend=backend, dropout_p=dropout_p, seed=1)
    compare(op, partial(reference.dropout_add_layer_norm, dropout_p=dropout_p, seed=1), arguments)
    assert op(**arguments).dtype == residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_the_residual(dtype):
    arguments = inputs(5, 64, residual_dtype=dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert dropout_add_layer_norm(**arguments).dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_bias_is_the_bias_of_the_linear_layer_before(backend):
    arguments = inputs(5, 24, bias=True)
    before = torch.nn.Linear(24, 24, device=DEVICE)
    bare = {**arguments, "x": before(arguments["x"])}
    del bare["x_bias"]
    whole = dropout_add_layer_norm(**bare, dropout_p=0.3, seed=4, backend=backend)
    x = torch.nn.functional.linear(arguments["x"], before.weight)
    y = dropout_add_layer_norm(**{**arguments, "x": x, "x_bias": before.bias}, dropout_p=0.3, seed=4, backend=backend)
    assert torch.allclose(y, whole, rtol=1e-5, atol=1e-5)
    expected, result = (torch.autograd.grad(t.square().sum(), before.bias)[0] for t in (whole, y))
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend):
    """Rows of a wider tensor, rows from the end, transposed, one row for all, and an expanded gradient."""
    wide = torch.randn(4, 40, 96, device=DEVICE)
    vector = torch.randn(96, device=DEVICE)[::2][:40]
    other = torch.randn(4, 40, device=DEVICE)
    for x in (wide[:, 3, 8:48], wide[:, ::3, :40][:, 5], wide[:, :40, 7], wide[0, 0, :40].expand(4, 40)):
        for pair in ((x, other), (other, x)):
            tensors = dict(
                zip(("x", "residual", "weight", "bias", "x_bias"), (*pair, vector, vector, vector), strict=True)
            )
            arguments = {name: t.detach().requires_grad_() for name, t in tensors.items()}
            compare(partial(dropout_add_layer_norm, backend=backend), reference.dropout_add_layer_norm, arguments)
    leaves = list(arguments.values())
    result = torch.autograd.grad(dropout_add_layer_norm(**arguments, backend=backend).sum(), leaves)
    expected = torch.autograd.grad(reference.dropout_add_layer_norm(**arguments).sum(), leaves)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_inside_the_root(backend):
    x = torch.tensor([[-3.0, 3.0]], device=DEVICE)
    zero = torch.zeros_like(x)
    y = dropout_add_layer_norm(x, zero, torch.ones_like(x[0]), zero[0], eps=16.0, backend=backend)
    assert torch.allclose(y.cpu(), torch.tensor([[-0.6, 0.6]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_row_gives_the_bias_and_finite_gradients(backend):
    arguments = inputs(3, 16)
    arguments["x"] = torch.full((3, 16), 7.0, device=DEVICE, requires_grad=True)
    arguments["residual"] = torch.full((3, 16), -2.0, device=DEVICE, requires_grad=True)
    y = dropout_add_layer_norm(**arguments, backend=backend)
    assert torch.equal(y, arguments["bias"].expand(3, 16))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(arguments.values())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row(backend):
    arguments = inputs(4, 16)
    arguments["x"].data[2, 5] = float("nan")
    y = dropout_add_layer_norm(**arguments, dropout_p=0.1, backend=backend)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_seed_drops_the_same_elements_in_every_backend(backend):
    arguments = inputs(7, 3, 50)
    run = lambda backend, seed: dropout_add_layer_norm(**arguments, dropout_p=0.3, seed=seed, backend=backend)  # noqa: E731
    assert torch.allclose(run(backend, 2**63 + 5), run("reference", 2**63 + 5), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(backend, 1), run(backend, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_drops_with_probability_p(backend, seed, p):
    """Of a row of ones, what is kept comes out positive and what is dropped negative."""
    x = torch.ones(40, 1000, device=DEVICE)
    zero = torch.zeros_like(x)
    y = dropout_add_layer_norm(x, zero, x[0], zero[0], dropout_p=p, seed=seed, backend=backend)
    expected = round(256 * p) / 256 if seed is not None or backend == "triton" else p
    assert abs((y < 0).double().mean().item() - expected) < 5 * (p * (1 - p) / x.numel()) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_kept_is_scaled_up(backend, seed):
    """An eps far above the variance turns LN into a subtraction of the mean."""
    x, zero, one = (make(1, 1000, device=DEVICE) for make in (torch.ones, torch.zeros, torch.ones))
    one, scale = one[0], 256 / (256 - 26) if seed is not None or backend == "triton" else 1 / 0.9
    y = dropout_add_layer_norm(x, zero, one, zero[0], eps=1e6, dropout_p=0.1, seed=seed, backend=backend) * 1000
    assert (y.max() - y.min()).item() == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_draws_nothing(backend):
    state = torch.cuda.get_rng_state if CUDA else torch.get_rng_state
    before = state()
    dropout_add_layer_norm(**inputs(4, 8), dropout_p=0.0, backend=backend)
    assert torch.equal(before, state())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend):
    arguments = inputs(3, 2, 5, dtype=torch.float64, bias=True, device="cpu")
    op = partial(dropout_add_layer_norm, dropout_p=0.4, seed=9, backend=backend)
    by_position = lambda *tensors: op(**dict(zip(arguments, tensors, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(by_position, tuple(arguments.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    torch.compiler.reset()
    for dropout_p, bias in ((0.0, False), (0.25, True)):
        arguments = inputs(4, 6, 32, bias=bias)
        op = partial(dropout_add_layer_norm, dropout_p=dropout_p, seed=7)
        compiled = torch.compile(partial(op, backend=backend), fullgraph=True, backend="aot_eager")
        compare(compiled, partial(reference.dropout_add_layer_norm, dropout_p=dropout_p, seed=7), arguments)
    op = partial(dropout_add_layer_norm, dropout_p=0.25, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(**arguments), compiled(**arguments))


@needs_triton
@pytest.mark.parametrize("dropout_p, bias", [(0.0, False), (0.25, True)])
def test_registered_operators(dropout_p, bias):
    x, residual, weight, norm_bias, *x_bias = inputs(5, 40, bias=bias).values()
    seeds, drop = (seed_tensor(3, x.device), 64) if dropout_p else (None, 0)
    tensors = (x, residual, weight, norm_bias, *(x_bias or [None]))
    torch.library.opcheck(MODULE._forward_op, (*tensors, seeds, 1e-12, drop, True))
    tensors = [t if t is None else t.detach() for t in tensors]
    torch.library.opcheck(MODULE._forward_op, (*tensors, seeds, 1e-12, drop, False))
    stats = MODULE._forward_op(*tensors, seeds, 1e-12, drop, True)[1]
    for wanted in ([True] * 4 + [bias], [False, True, False, False, False]):
        torch.library.opcheck(MODULE._backward_op, (x.detach(), *tensors, seeds, stats, drop, wanted))


@needs_triton
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("needing", [["x"], ["residual"], ["weight"], ["bias"], ["x_bias"], ["residual", "bias"]])
def test_triton_gives_the_gradients_that_are_needed(dropout_p, needing):
    options = {"dropout_p": dropout_p, "seed": 3, "backend": "triton"}
    arguments = inputs(6, 40, bias=True)
    every = dict(zip(arguments, gradients(arguments, **options), strict=True))
    for name, t in arguments.items():
        t.requires_grad_(name in needing)
    for name, gradient in zip(needing, gradients(arguments, **options), strict=True):
        assert torch.equal(gradient, every[name])


@needs_triton
def test_triton_without_gradients_keeps_nothing(monkeypatch):
    from fastbert.kernels import layer_norm

    kept, forward = [], layer_norm.dropout_add_layer_norm_fwd
    monkeypatch.setattr(layer_norm, "dropout_add_layer_norm_fwd", lambda *a: kept.append(forward(*a)) or kept[-1])
    arguments = inputs(3, 8)
    with torch.no_grad():
        dropout_add_layer_norm(**arguments, backend="triton")
    dropout_add_layer_norm(**{name: t.detach() for name, t in arguments.items()}, backend="triton")
    dropout_add_layer_norm(**arguments, backend="triton")
    assert [stats is None for _, stats in kept] == [True, True, False]


@needs_triton
def test_triton_gives_x_and_residual_gradients_that_may_be_changed():
    """Without dropout they are one tensor inside."""
    arguments = inputs(4, 16)
    x, residual = arguments["x"], arguments["residual"]
    dropout_add_layer_norm(**arguments, backend="triton").square().sum().backward()
    assert torch.equal(x.grad, residual.grad)
    x.grad += 1
    assert torch.allclose(x.grad, residual.grad + 1) and not torch.equal(x.grad, residual.grad)
    h = torch.randn(4, 16, device=DEVICE, requires_grad=True)
    whole = [
        torch.autograd.grad(dropout_add_layer_norm(h, 2 * h, x[0], x[1], backend=backend).square().sum() + h.sum(), h)[
            0
        ]
        for backend in ("triton", "reference")
    ]
    assert torch.allclose(*whole, rtol=1e-4, atol=1e-4)


@needs_triton
def test_triton_rounds_gradients_to_their_own_dtypes_only():
    dx, dresidual, *_ = gradients(inputs(4, 16, residual_dtype=torch.float16), backend="triton")
    assert not torch.equal(dx, dx.half().float()) and torch.equal(dx.half(), dresidual)


@needs_triton
@pytest.mark.parametrize("rows, width", [(70, 40), (11, 200)])
def test_triton_sums_over_several_blocks_of_a_program(monkeypatch, rows, width):
    from fastbert.kernels import rows as module

    monkeypatch.setattr(module, "_PROGRAMS", 2)
    op = partial(dropout_add_layer_norm, backend="triton", dropout_p=0.1, seed=5)
    expected = partial(reference.dropout_add_layer_norm, dropout_p=0.1, seed=5)
    compare(op, expected, inputs(rows, width, bias=True))


@needs_triton
@pytest.mark.parametrize("seed", [None, 5])
def test_triton_under_activation_checkpointing(seed):
    arguments = inputs(5, 33, bias=True)
    op = partial(dropout_add_layer_norm, **arguments, backend="triton", dropout_p=0.3, seed=seed)
    found = []
    for run in (lambda: op(), lambda: checkpoint(op, use_reentrant=False)):
        torch.manual_seed(3)
        y = run()
        found.append([y, *torch.autograd.grad((y**2).sum(), list(arguments.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_triton
def test_triton_gives_the_same_bits_again():
    arguments = inputs(40, 33, bias=True)
    first, second = (gradients(arguments, dropout_p=0.1, seed=1, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_triton_draws_its_seed_from_the_generator():
    arguments = inputs(6, 40)
    run = partial(dropout_add_layer_norm, **arguments, dropout_p=0.3, backend="triton")
    torch.manual_seed(5)
    first, other = run(), run()
    torch.manual_seed(5)
    drawn = seed_tensor(None, arguments["x"].device).item() % 2**64
    assert torch.equal(first, run(seed=drawn)) and not torch.equal(first, other)


@needs_triton
def test_triton_has_no_second_derivative():
    arguments = inputs(3, 8)
    y = dropout_add_layer_norm(**arguments, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.skipif(CUDA, reason="on CUDA it is the default")
def test_triton_on_a_cpu_only_if_asked_for(monkeypatch):
    monkeypatch.setitem(MODULE._TWINS, "triton", None)
    dropout_add_layer_norm(**inputs(2, 8))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        dropout_add_layer_norm(**inputs(2, 8), backend="triton")


@needs_triton
def test_triton_refuses_what_it_cannot_serve():
    with pytest.raises(BackendError, match="float64"):
        dropout_add_layer_norm(**inputs(2, 8, dtype=torch.float64), backend="triton")
    with pytest.raises(BackendError, match="4097 columns, more than 4096"):
        dropout_add_layer_norm(**inputs(2, 4097), backend="triton")


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
        ({"x_bias": torch.zeros(5)}, ShapeError, r"x_bias: got shape \(5,\), expected \(6,\)"),
        ({"x_bias": torch.zeros(6, dtype=torch.int32)}, DtypeError, "x_bias: got torch.int32"),
        ({"x_bias": 1.0}, DtypeError, "x_bias: got a float, expected a torch.Tensor"),
        ({"backend": "cuda"}, BackendError, "cuda"),
        ({"backend": "fastest"}, BackendError, "fastest"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    arguments = {**inputs(5, 6, device="cpu"), **change}
    with pytest.raises(error, match=message):
        dropout_add_layer_norm(**arguments)
