"""The loss over a large vocabulary: every backend against float64, and what must not happen to memory and to NaN."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from fastbert import portable, reference
from fastbert.errors import BackendError, ConfigError, DataError, DtypeError, ShapeError
from fastbert.ops import linear_cross_entropy
from fastbert.testing import compare

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
pytestmark = pytest.mark.gpu
BACKENDS = ["torch", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(*rows, width=8, vocabulary=31, ignored=0.5, ignore_index=-100, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()  # noqa: E731
    labels = torch.randint(vocabulary, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = ignore_index
    tensors = {"hidden": draw(*rows, width), "weight": draw(vocabulary, width), "bias": draw(vocabulary)}
    return {**tensors, "labels": labels.to(device)}


def gradients(loss, arguments):
    return torch.autograd.grad(loss, [arguments[name] for name in ("hidden", "weight", "bias")])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(portable, "_LOGIT_BYTES", 4000)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
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
    settings = {"vocabulary": vocabulary, "ignored": ignored, "ignore_index": ignore_index, "dtype": dtype}
    arguments = inputs(*rows, **settings, device=device, seed=seed)
    if not bias:
        arguments["bias"] = None
    options = {"ignore_index": ignore_index, "reduction": reduction}
    op = partial(linear_cross_entropy, backend=backend)
    compare(op, reference.linear_cross_entropy, {**arguments, **options})


@pytest.mark.parametrize("backend", BACKENDS)
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
    arguments = inputs(*rows, ignored=ignored)
    loss = linear_cross_entropy(**arguments, backend=backend)
    assert loss.item() == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(loss, arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_rows_without_a_label_hold_reaches_nothing(backend):
    arguments = inputs(20)
    expected = gradients(linear_cross_entropy(**arguments, backend=backend), arguments)
    arguments["hidden"] = arguments["hidden"].detach().clone()
    arguments["hidden"][arguments["labels"] == -100] = float("nan")
    arguments["hidden"].requires_grad_()
    loss = linear_cross_entropy(**arguments, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(gradients(loss, arguments), expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_size(backend):
    """Softmax saturates: the right class has no loss, a wrong one the difference of the logits."""
    hidden = torch.tensor([[1e4], [1e4], [-1e30]], requires_grad=True)
    weight, bias = torch.tensor([[1.0], [-1.0]]), torch.zeros(2)
    loss = linear_cross_entropy(hidden, weight, bias, torch.tensor([0, 1, 1]), reduction="sum", backend=backend)
    assert loss.item() == 2e4
    assert torch.autograd.grad(loss, hidden)[0].flatten().tolist() == [0, 2, 0]


def test_a_second_backward_through_a_retained_graph():
    arguments = inputs(20)
    loss = linear_cross_entropy(**arguments) * 3
    tensors = [arguments[name] for name in ("hidden", "weight", "bias")]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, kept, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_frozen_tensors(backend, name):
    arguments = inputs(20)
    expected = dict(
        zip(("hidden", "weight", "bias"), gradients(linear_cross_entropy(**arguments), arguments), strict=True)
    )
    for other in {"hidden", "weight", "bias"} - {name}:
        arguments[other].requires_grad_(False)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(**arguments, backend=backend), arguments[name])
    assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_without_gradients():
    arguments = inputs(20)
    with torch.no_grad():
        loss = linear_cross_entropy(**arguments)
    assert not loss.requires_grad and torch.equal(loss, linear_cross_entropy(**arguments))


@pytest.mark.usefixtures("small_chunks")
def test_nothing_of_the_size_of_the_logits_is_kept():
    arguments, sizes = inputs(64, vocabulary=500), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(**arguments)
    assert max(sizes) <= 500 * 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """hidden may arrive in 16 bits while the parameters are float32; the gradients keep the dtypes of their tensors."""
    arguments = inputs(40, width=32)
    arguments["hidden"] = arguments["hidden"].detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(**arguments, backend=backend)
        logits = F.linear(arguments["hidden"], arguments["weight"], arguments["bias"])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(logits.float(), arguments["labels"]).item(), rel=0.02)
    assert [g.dtype for g in gradients(loss, arguments)] == [dtype, torch.float32, torch.float32]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend, bias):
    arguments = inputs(7, 2, width=3, vocabulary=100, dtype=torch.float64)
    tensors = tuple(arguments[name] for name in ("hidden", "weight", "bias")[: 2 + bias])
    op = lambda h, w, b=None: linear_cross_entropy(h, w, b, arguments["labels"], backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(op, tensors)


def test_compiles_as_one_graph():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    compare(compiled, reference.linear_cross_entropy, inputs(3, 9))
    with torch.no_grad():
        compare(compiled, reference.linear_cross_entropy, {**inputs(3, 9), "bias": None})


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False], [False, False, False]])
def test_registered_operator(wanted):
    arguments = inputs(9)
    for name, want in zip(("hidden", "weight", "bias"), wanted, strict=True):
        arguments[name].requires_grad_(want)
    torch.library.opcheck(portable._cross_entropy_op, (*arguments.values(), -100, True, torch.float32, wanted))


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
        ({"backend": "triton"}, BackendError, "triton"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**inputs(3, ignored=0.0), **change})
