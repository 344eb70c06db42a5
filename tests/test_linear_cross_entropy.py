"""The loss over a large vocabulary: every backend against float64, the Triton kernel interpreted, and what must not
happen to memory and to NaN."""

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import portable, reference
from fastbert.errors import BackendError, ConfigError, DataError, DtypeError, ShapeError
from fastbert.ops import linear_cross_entropy
from fastbert.testing import compare

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
MODULE = importlib.import_module("fastbert.ops.linear_cross_entropy")
PORTABLE = ["torch", "reference"]
BACKENDS = [*PORTABLE, pytest.param("triton", marks=needs_triton)]
PLACES = [(backend, device) for backend in PORTABLE for device in (["cpu", "cuda"] if CUDA else ["cpu"])]
PLACES += [pytest.param("triton", "cuda" if CUDA else "cpu", marks=needs_triton)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# The interpreter truncates bfloat16
SERVED = {"triton": [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]}
NAMES = ("hidden", "weight", "bias")


def home(backend):
    """Where a backend is tested: Triton's interpreter stands in for a GPU."""
    return "cuda" if backend == "triton" and CUDA else "cpu"


def inputs(*rows, width=8, vocabulary=31, ignored=0.5, ignore_index=-100, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()  # noqa: E731
    labels = torch.randint(vocabulary, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = ignore_index
    tensors = {"hidden": draw(*rows, width), "weight": draw(vocabulary, width), "bias": draw(vocabulary)}
    return {**tensors, "labels": labels.to(device)}


def gradients(loss, arguments):
    return torch.autograd.grad(loss, [arguments[name] for name in NAMES])


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of rows, and several tiles of columns."""
    monkeypatch.setattr(portable, "_LOGIT_BYTES", 4000)
    monkeypatch.setattr(MODULE, "_LOGIT_BYTES", 8000)
    if importlib.util.find_spec("triton") is not None:
        from fastbert.kernels import cross_entropy

        monkeypatch.setattr(cross_entropy, "launch_config", lambda dtype: {"BLOCK": 256, "num_warps": 1})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend, device", PLACES)
@example(
    rows=[0], vocabulary=5, ignored=0.0, ignore_index=-100, reduction="mean", bias=True, dtype=torch.float32, seed=0
)
@example(
    rows=[1], vocabulary=1, ignored=0.0, ignore_index=-100, reduction="mean", bias=True, dtype=torch.float32, seed=0
)
@example(
    rows=[9], vocabulary=5, ignored=1.0, ignore_index=-100, reduction="mean", bias=True, dtype=torch.float16, seed=0
)
@example(
    rows=[40], vocabulary=999, ignored=0.0, ignore_index=7, reduction="sum", bias=False, dtype=torch.float32, seed=0
)
@example(
    rows=[9], vocabulary=300, ignored=0.0, ignore_index=-100, reduction="mean", bias=True, dtype=torch.float16, seed=0
)
@given(
    rows=st.lists(st.integers(1, 12), min_size=1, max_size=2),
    vocabulary=st.integers(1, 400),
    ignored=st.sampled_from([0.0, 0.5, 0.85, 1.0]),
    ignore_index=st.sampled_from([-100, -1, 0, 1000]),
    reduction=st.sampled_from(["mean", "sum"]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_is_the_reference(backend, device, rows, vocabulary, ignored, ignore_index, reduction, bias, dtype, seed):
    dtype = dtype if dtype in SERVED.get(backend, DTYPES) else torch.float16
    settings = {"vocabulary": vocabulary, "ignored": ignored, "ignore_index": ignore_index, "dtype": dtype}
    arguments = inputs(*rows, **settings, device=device, seed=seed)
    if not bias:
        arguments["bias"] = None
    options = {"ignore_index": ignore_index, "reduction": reduction}
    op = partial(linear_cross_entropy, backend=backend)
    compare(op, reference.linear_cross_entropy, {**arguments, **options})


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_is_what_pytorch_computes(backend, reduction):
    arguments = inputs(50, dtype=torch.float64)
    loss = linear_cross_entropy(**arguments, reduction=reduction, backend=backend)
    logits = F.linear(arguments["hidden"], arguments["weight"], arguments["bias"])
    expected = F.cross_entropy(logits, arguments["labels"], reduction=reduction)
    pairs = zip([loss, *gradients(loss, arguments)], [expected, *gradients(expected, arguments)], strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, ignored", [((0,), 0.0), ((6,), 1.0)])
def test_without_labels_the_loss_and_its_gradients_are_zero(backend, rows, ignored):
    arguments = inputs(*rows, ignored=ignored, device=home(backend))
    loss = linear_cross_entropy(**arguments, backend=backend)
    assert loss.item() == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(loss, arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_rows_without_a_label_hold_reaches_nothing(backend):
    arguments = inputs(20, device=home(backend))
    expected = gradients(linear_cross_entropy(**arguments, backend=backend), arguments)
    arguments["hidden"] = arguments["hidden"].detach().clone()
    arguments["hidden"][arguments["labels"] == -100] = float("nan")
    arguments["hidden"].requires_grad_()
    loss = linear_cross_entropy(**arguments, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(gradients(loss, arguments), expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_size(backend):
    """Softmax saturates: the right class has no loss, a wrong one the difference of the logits."""
    with torch.device(home(backend)):
        hidden = torch.tensor([[1e4], [1e4], [-1e30]], requires_grad=True)
        weight, bias, labels = torch.tensor([[1.0], [-1.0]]), torch.zeros(2), torch.tensor([0, 1, 1])
    loss = linear_cross_entropy(hidden, weight, bias, labels, reduction="sum", backend=backend)
    assert loss.item() == 2e4
    assert torch.autograd.grad(loss, hidden)[0].flatten().tolist() == [0, 2, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_logits_far_below_zero(backend):
    device = home(backend)
    arguments = inputs(4, width=4, vocabulary=9, ignored=0.0, device=device)
    with torch.no_grad():
        arguments["bias"].sub_(400)
    compare(partial(linear_cross_entropy, backend=backend), reference.linear_cross_entropy, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_nothing(backend):
    """Whose rows cannot have labels."""
    arguments = inputs(3, vocabulary=1, ignored=1.0, device=home(backend))
    arguments |= {name: arguments[name].detach()[:0].requires_grad_() for name in ("weight", "bias")}
    loss = linear_cross_entropy(**arguments, backend=backend)
    assert loss == 0 and not any(g.any() for g in gradients(loss, arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_words(backend):
    """A bias of -inf: no probability, no gradient."""
    arguments = inputs(20, device=home(backend))
    with torch.no_grad():
        arguments["bias"][7] = -torch.inf
        arguments["labels"][arguments["labels"] == 7] = 8
    compare(partial(linear_cross_entropy, backend=backend), reference.linear_cross_entropy, arguments)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_second_backward_through_a_retained_graph(backend):
    arguments = inputs(20, device=home(backend))
    loss = linear_cross_entropy(**arguments, backend=backend) * 3
    tensors = [arguments[name] for name in NAMES]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, kept, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_frozen_tensors(backend, name):
    arguments = inputs(20, device=home(backend))
    expected = dict(zip(NAMES, gradients(linear_cross_entropy(**arguments), arguments), strict=True))
    for other in set(NAMES) - {name}:
        arguments[other].requires_grad_(False)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(**arguments, backend=backend), arguments[name])
    assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients(backend):
    arguments = inputs(20, device=home(backend))
    with torch.no_grad():
        loss = linear_cross_entropy(**arguments, backend=backend)
    assert not loss.requires_grad and torch.equal(loss, linear_cross_entropy(**arguments, backend=backend))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_nothing_of_the_size_of_the_logits_is_kept(backend):
    arguments, sizes = inputs(64, vocabulary=500, device=home(backend)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(**arguments, backend=backend)
    assert max(sizes) <= 500 * 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """hidden may arrive in 16 bits while the parameters are float32; the gradients keep the dtypes of their tensors."""
    arguments = inputs(40, width=32, device=home(backend))
    arguments["hidden"] = arguments["hidden"].detach().to(dtype).requires_grad_()
    with torch.autocast(home(backend), dtype):
        loss = linear_cross_entropy(**arguments, backend=backend)
        logits = F.linear(arguments["hidden"], arguments["weight"], arguments["bias"])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(logits.float(), arguments["labels"]).item(), rel=0.02)
    assert [g.dtype for g in gradients(loss, arguments)] == [dtype, torch.float32, torch.float32]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend, bias):
    arguments = inputs(7, 2, width=3, vocabulary=100, dtype=torch.float64)
    tensors = tuple(arguments[name] for name in NAMES[: 2 + bias])
    op = lambda h, w, b=None: linear_cross_entropy(h, w, b, arguments["labels"], backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(op, tensors)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_compiles_as_one_graph(backend):
    torch.compiler.reset()
    op = partial(linear_cross_entropy, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    arguments = inputs(3, 9, device=home(backend))
    compare(compiled, reference.linear_cross_entropy, arguments)
    with torch.no_grad():
        compare(compiled, reference.linear_cross_entropy, {**arguments, "bias": None})


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False], [False, False, False]])
def test_registered_operators(backend, wanted):
    arguments = inputs(9, device=home(backend))
    for name, want in zip(NAMES, wanted, strict=True):
        arguments[name].requires_grad_(want)
    op = MODULE._forward_op if backend == "triton" else portable._cross_entropy_op
    torch.library.opcheck(op, (*arguments.values(), -100, True, torch.float32, wanted))


@pytest.mark.usefixtures("small_chunks")
@needs_triton
def test_triton_gives_the_same_bits_again():
    first, second = (inputs(40, vocabulary=300, dtype=torch.float16, device=home("triton")) for _ in range(2))
    losses = [linear_cross_entropy(**arguments, backend="triton") for arguments in (first, second)]
    assert torch.equal(*losses)
    assert all(map(torch.equal, *(gradients(*pair) for pair in zip(losses, (first, second), strict=True))))


@needs_triton
def test_triton_takes_views():
    """Rows of wider tensors, every other row, transposed, and labels in a column."""
    device, labels = home("triton"), torch.randint(31, (6, 2), device=home("triton"))
    views = {
        "hidden": torch.randn(12, 40, device=device)[::2, 8:24],
        "weight": torch.randn(16, 31, device=device).T,
        "bias": torch.randn(62, device=device)[::2],
    }
    views = {name: t.detach().requires_grad_() for name, t in views.items()}
    compare(
        partial(linear_cross_entropy, backend="triton"),
        reference.linear_cross_entropy,
        views | {"labels": labels[:, 1]},
    )


@needs_triton
def test_triton_keeps_the_range_of_float16():
    """Probabilities of 1e-8 and sums of 1e6, while the scaled loss has gradients in between."""
    with torch.device(home("triton")):
        weight = torch.zeros(4, 2, dtype=torch.float16, requires_grad=True)
        bias = torch.tensor([0.0, 0.0, 0.0, -18.5], dtype=torch.float16, requires_grad=True)
        arguments = {"hidden": torch.full((20, 2), 5e4).half(), "weight": weight, "bias": bias}
        labels = torch.zeros(20, dtype=torch.int64)

    def scaled(backend, loss_scale):
        loss = linear_cross_entropy(**arguments, labels=labels, backend=backend) * loss_scale
        return torch.autograd.grad(loss, [weight, bias])

    for loss_scale in (1.0, 2.0**16):
        for got, expected in zip(scaled("triton", loss_scale), scaled("reference", loss_scale), strict=True):
            assert torch.allclose(got, expected, rtol=3e-3, atol=0)
    assert scaled("triton", 2.0**16)[1][3] > 0 and scaled("triton", 1.0)[0].isfinite().all()


@needs_triton
def test_triton_waits_for_nothing():
    """No step reads a number, or has a shape, that only the device knows."""
    arguments = inputs(20, device=home("triton"))
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        loss = MODULE._triton(**arguments, ignore_index=-100, reduction="mean")
        gradients(loss, arguments)
    assert {"where", "addmm_"} <= seen or "addmm" in seen
    assert not seen & {"nonzero", "_local_scalar_dense", "masked_select", "unique", "equal"}, seen


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_triton_in_a_cuda_graph_counts_the_labels_anew():
    arguments = inputs(64, width=64, vocabulary=300, dtype=torch.float16, device="cuda")

    def step():
        loss = linear_cross_entropy(**arguments)
        return loss.detach(), *gradients(loss, arguments)

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    arguments["labels"][::3] = -100
    graph.replay()
    assert all(map(torch.equal, results, step()))


@needs_triton
def test_triton_tells_of_a_label_outside_of_the_vocabulary():
    """With a loss of NaN, where nobody waits to look at the labels."""
    arguments = inputs(5, ignored=0.0, device=home("triton"))
    for label in (31, -1, 2**40):
        arguments["labels"][2] = label
        assert MODULE._triton(**arguments, ignore_index=-100, reduction="mean").isnan()


@pytest.mark.skipif(CUDA, reason="on CUDA it is the default")
def test_triton_on_a_cpu_only_if_asked_for(monkeypatch):
    monkeypatch.setitem(MODULE._TWINS, "triton", None)
    linear_cross_entropy(**inputs(2))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match="TRITON_INTERPRET|not installed"):
        linear_cross_entropy(**inputs(2), backend="triton")


@needs_triton
def test_triton_refuses_float64():
    with pytest.raises(BackendError, match="hidden is torch.float64"):
        linear_cross_entropy(**inputs(2, dtype=torch.float64), backend="triton")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"labels": torch.tensor([1, 31, 2])},
            DataError,
            r"labels\[1\]: got 31, expected 0 to 30 \(rows of weight\) or -1",
        ),
        ({"labels": torch.tensor([1, 2, -1])}, DataError, r"labels\[2\]: got -1, expected 0 to 30"),
        ({"labels": torch.tensor([1, 2, -100]), "ignore_index": 0}, DataError, r"labels\[2\]: got -100"),
        ({"labels": torch.tensor([1, 2, 3]).int()}, DtypeError, "labels: got torch.int32, expected torch.int64"),
        ({"labels": torch.tensor([1, 2])}, ShapeError, r"labels: got shape \(2,\), expected \(3,\)"),
        ({"weight": torch.zeros(31, 7)}, ShapeError, r"weight: got shape \(31, 7\), expected \(31, 8\)"),
        ({"weight": torch.zeros(31)}, ShapeError, r"weight: got shape \(31,\)"),
        ({"bias": torch.zeros(30)}, ShapeError, r"bias: got shape \(30,\), expected \(31,\)"),
        ({"weight": torch.zeros(31, 8).half()}, DtypeError, "weight: got torch.float16, expected torch.float32"),
        ({"hidden": torch.zeros(3, 8).long()}, DtypeError, "hidden: got torch.int64"),
        ({"labels": torch.zeros(3, device="meta").long()}, ShapeError, "labels: got a tensor on meta"),
        ({"hidden": torch.tensor(1.0)}, ShapeError, r"hidden: got shape \(\), expected at least one dimension"),
        ({"weight": torch.tensor(1.0)}, ShapeError, r"weight: got shape \(\), expected two dimensions"),
        ({"labels": [1, 2, 3]}, DtypeError, "labels: got a list, expected a torch.Tensor"),
        ({"weight": None}, DtypeError, "weight: got a NoneType"),
        ({"bias": [0.0] * 31}, DtypeError, "bias: got a list"),
        ({"ignore_index": "none"}, ConfigError, "ignore_index: got 'none', expected an int64"),
        ({"reduction": "none"}, ConfigError, "reduction: got 'none', expected one of 'mean', 'sum'"),
        ({"backend": "cuda"}, BackendError, "cuda"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**inputs(3, ignored=0.0), **change})
