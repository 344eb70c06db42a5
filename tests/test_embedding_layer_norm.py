"""dropout(LN(word + token type + position)): every backend against float64; the Triton kernels interpreted."""

import importlib
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastbert import portable, reference
from fastbert.errors import BackendError, ConfigError, DataError, DtypeError, ShapeError
from fastbert.ops import embedding_layer_norm
from fastbert.testing import compare

triton = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
MODULE = importlib.import_module("fastbert.ops.embedding_layer_norm")
PORTABLE = ["torch", "reference"]
BACKENDS = [*PORTABLE, pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SERVED = {
    "torch": DTYPES,
    "reference": DTYPES,
    "triton": DTYPES[1:] if CUDA else [torch.float32, torch.float16],  # the interpreter truncates bfloat16
}


def inputs(*shape, vocabulary=13, width=16, types=0, positions=0, dtype=torch.float32, device=DEVICE, seed=0):
    """Arguments for ids of `shape`; types, positions: rows of the table, 0 for none."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()  # noqa: E731
    index = lambda limit: torch.randint(limit, shape, generator=generator).to(device)  # noqa: E731
    arguments = {"input_ids": index(vocabulary), "word_embeddings": draw(vocabulary, width)}
    if types:
        arguments |= {"token_type_ids": index(types), "token_type_embeddings": draw(types, width)}
    if positions:
        arguments |= {"position_ids": index(positions), "position_embeddings": draw(positions, width)}
    return {**arguments, "weight": draw(width), "bias": draw(width)}


@pytest.mark.parametrize("backend", BACKENDS)
@example(shape=[0], vocabulary=5, types=2, positions=3, implied=False, dtype=0, dropout_p=0.5, seed=0, width=16)
@example(shape=[2, 0], vocabulary=5, types=2, positions=3, implied=True, dtype=0, dropout_p=0.5, seed=0, width=16)
@example(shape=[1], vocabulary=1, types=1, positions=1, implied=True, dtype=1, dropout_p=0.0, seed=0, width=16)
@example(shape=[7, 1], vocabulary=1, types=0, positions=7, implied=True, dtype=0, dropout_p=0.0, seed=0, width=16)
@example(shape=[3, 33], vocabulary=4, types=5, positions=40, implied=False, dtype=1, dropout_p=0.1, seed=0, width=16)
@example(shape=[3, 40], vocabulary=4, types=2, positions=40, implied=True, dtype=0, dropout_p=0.1, seed=0, width=300)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    vocabulary=st.integers(1, 50),
    types=st.integers(0, 5),
    positions=st.sampled_from([0, 7, 40]),
    implied=st.booleans(),
    dtype=st.integers(0, 3),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    width=st.sampled_from([3, 16, 33, 300]),
)
def test_is_the_reference(backend, shape, vocabulary, types, positions, implied, dtype, dropout_p, seed, width):
    dtype = SERVED[backend][dtype % len(SERVED[backend])]
    arguments = inputs(*shape, vocabulary=vocabulary, width=width, types=types, positions=positions, dtype=dtype)
    if implied:
        arguments |= {"token_type_ids": None, "position_ids": None}
    op = partial(embedding_layer_norm, backend=backend)
    compare(op, reference.embedding_layer_norm, {**arguments, "dropout_p": dropout_p, "seed": seed})


@pytest.mark.parametrize("backend", PORTABLE)
def test_is_what_it_says(backend):
    a = inputs(2, 5, types=2, positions=9, dtype=torch.float64)
    x = a["word_embeddings"][a["input_ids"]] + a["token_type_embeddings"][a["token_type_ids"]]
    x = x + a["position_embeddings"][a["position_ids"]]
    expected = torch.nn.functional.layer_norm(x, (16,), a["weight"], a["bias"], 1e-5)
    assert torch.allclose(embedding_layer_norm(**a, eps=1e-5, backend=backend), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_ids_the_type_is_0_and_positions_count_along_a_row(backend):
    arguments = inputs(3, 6, types=2, positions=6)
    implied = {**arguments, "token_type_ids": None, "position_ids": None}
    explicit = {**arguments, "token_type_ids": torch.zeros_like(arguments["input_ids"])}
    for places in (torch.arange(6).repeat(3, 1), torch.arange(6), torch.arange(6)[None].int()):
        explicit["position_ids"] = places.to(DEVICE)
        expected = embedding_layer_norm(**explicit, backend=backend)
        assert torch.equal(embedding_layer_norm(**implied, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_looked_up_get_no_gradient(backend):
    arguments = inputs(4, 4, vocabulary=30)
    (gradient,) = torch.autograd.grad(
        embedding_layer_norm(**arguments, backend=backend).square().sum(), arguments["word_embeddings"]
    )
    used = torch.zeros(30, dtype=torch.bool, device=DEVICE)
    used[arguments["input_ids"]] = True
    assert torch.equal(gradient.abs().sum(1) > 0, used)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_dtype_of_the_tables(backend):
    arguments = inputs(4, dtype=torch.bfloat16)
    arguments["weight"], arguments["bias"] = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    assert embedding_layer_norm(**arguments, backend=backend).dtype == torch.bfloat16
    with torch.autocast(DEVICE, torch.float16):
        assert embedding_layer_norm(**inputs(4), backend=backend).dtype == torch.float32


def test_a_seed_drops_the_same_elements_in_every_backend_whatever_the_shape():
    arguments = inputs(3, 5, dtype=torch.float64)
    run = lambda backend, **change: embedding_layer_norm(  # noqa: E731
        **{**arguments, **change}, dropout_p=0.3, seed=11, backend=backend
    )
    assert torch.allclose(run("torch"), run("reference"), rtol=1e-12, atol=1e-12)
    packed = run("torch", input_ids=arguments["input_ids"].flatten())
    assert torch.equal(packed, run("torch").flatten(0, 1)) and 0.2 < (packed == 0).double().mean() < 0.4


@pytest.mark.parametrize("backend", PORTABLE)
def test_gradcheck(backend):
    arguments = inputs(2, 3, width=4, types=2, positions=5, dtype=torch.float64)
    names = [name for name, t in arguments.items() if t.requires_grad]
    fixed = {name: t for name, t in arguments.items() if name not in names}
    op = lambda *tensors: embedding_layer_norm(**dict(zip(names, tensors, strict=True)), **fixed, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(op, tuple(arguments[name] for name in names))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    arguments = inputs(2, 6, types=2, positions=6)
    compiled = torch.compile(partial(embedding_layer_norm, backend=backend), fullgraph=True, backend="aot_eager")
    compare(compiled, reference.embedding_layer_norm, arguments)


@needs_triton
@pytest.mark.parametrize("tables", [("word",), ("word", "type", "place")])
def test_registered_operators(tables):
    a = inputs(2, 5, types=2, positions=7)
    more = [a[name] if tables[1:] else None for name in ("token_type_ids", "token_type_embeddings")]
    more += [a[name] if tables[1:] else None for name in ("position_ids", "position_embeddings")]
    seeds = torch.tensor([3], device=DEVICE)
    operands = a["input_ids"], a["word_embeddings"], *more, a["weight"], a["bias"], seeds
    torch.library.opcheck(MODULE._forward_op, (*operands, 1e-12, 26))
    y, stats = MODULE._forward_op(*operands, 1e-12, 26)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in (y, *operands, stats)]
    torch.library.opcheck(MODULE._backward_op, (*detached, 26))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_ids_of_every_kind(backend):
    """int32, transposed, expanded and broadcast ids, a table that is a view, vectors of another dtype."""
    a = inputs(3, 6, types=3, positions=6, dtype=torch.float16)
    a["input_ids"] = a["input_ids"].mT.contiguous().mT.int()
    a["word_embeddings"] = torch.randn(13, 40, device=DEVICE).half()[:, 3:19].requires_grad_()
    a["weight"] = torch.randn(32, device=DEVICE)[::2].requires_grad_()
    row, column = torch.arange(6, device=DEVICE), torch.tensor([[0], [2], [1]], device=DEVICE)
    op = partial(embedding_layer_norm, backend=backend)
    for types, places in ((column, row), (row.int() % 3, row.expand(3, 6)), (column.expand(3, 6), row[None].flip(1))):
        ids = {"token_type_ids": types, "position_ids": places}
        compare(op, reference.embedding_layer_norm, {**a, **ids})
    one = {"input_ids": torch.tensor([[7]], device=DEVICE).expand(3, 6)}
    compare(op, reference.embedding_layer_norm, {**a, **one, **ids})


@needs_triton
@example(tokens=1500, vocabulary=1, spread=1, width=140, dtype=torch.float16, seed=0)  # parts for the merger's loop
@given(
    tokens=st.integers(1, 140),
    vocabulary=st.integers(1, 6),
    spread=st.sampled_from([1, 10]),
    width=st.sampled_from([3, 140]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_rows_of_an_id_are_summed_wherever_they_lie(tokens, vocabulary, spread, width, dtype, seed):
    """Of ids that fill chunks of sorted rows, begin with one and end with one; outside the table, nothing."""
    from fastbert.kernels.embedding import _sum_by_id

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-spread + 1, vocabulary * spread, (tokens,), generator=generator) // spread
    ids[::5] -= 1
    ids[tokens // 2 :: 7] = vocabulary + 3
    dz = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    inside = (ids >= 0) & (ids < vocabulary)
    expected = torch.zeros(vocabulary, width, dtype=torch.float64)
    expected.index_add_(0, ids[inside], dz.double().cpu()[inside])
    dtable = torch.zeros(vocabulary, width, dtype=dtype, device=DEVICE)
    _sum_by_id(dz, *ids.to(DEVICE).int().sort(stable=True), dtable)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(dtable.double().cpu(), expected, rtol=eps, atol=1e-6 * tokens)


@needs_triton
@pytest.mark.parametrize("types", [2, 5])
def test_triton_sums_over_several_blocks_of_a_program(monkeypatch, types):
    from fastbert.kernels import rows as module

    monkeypatch.setattr(module, "_PROGRAMS", 2)
    op = partial(embedding_layer_norm, backend="triton", dropout_p=0.1, seed=5)
    expected = partial(reference.embedding_layer_norm, dropout_p=0.1, seed=5)
    compare(op, expected, inputs(3, 37, width=33, types=types, positions=37))


@needs_triton
@pytest.mark.parametrize("seed", [None, 5])
def test_triton_under_activation_checkpointing(seed):
    arguments = inputs(3, 7, types=2, positions=7)
    op = partial(embedding_layer_norm, **arguments, backend="triton", dropout_p=0.3, seed=seed)
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    found = []
    for run in (lambda: op(), lambda: checkpoint(op, use_reentrant=False)):
        torch.manual_seed(3)
        y = run()
        found.append([y, *torch.autograd.grad((y**2).sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_triton
def test_triton_without_a_gradient_of_the_result():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, other):
            return x * 1 + other

        @staticmethod
        def backward(ctx, dy):
            return None, dy

    arguments, other = inputs(3, 7), torch.zeros((), device=DEVICE, requires_grad=True)
    y = embedding_layer_norm(**arguments, backend="triton")
    Stop.apply(y, other).sum().backward()
    assert arguments["word_embeddings"].grad is None


@needs_triton
def test_triton_gives_the_same_bits_again():
    arguments = inputs(4, 40, vocabulary=3, types=2, positions=40)
    leaves = [t for t in arguments.values() if t.requires_grad]
    run = lambda: torch.autograd.grad(  # noqa: E731
        embedding_layer_norm(**arguments, dropout_p=0.1, seed=1, backend="triton").square().sum(), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@needs_triton
def test_triton_draws_from_the_generator_of_torch():
    """And the backward drops what the forward dropped: dbias counts what was kept."""
    arguments = inputs(3, 20)

    def run():
        y = embedding_layer_norm(**arguments, dropout_p=0.5, backend="triton")
        return y, torch.autograd.grad(y.sum(), arguments["bias"])[0]

    torch.manual_seed(5)
    (first, dbias), (second, _) = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run()[0], first) and not torch.equal(first, second)
    assert torch.equal(dbias, 2 * (first != 0).sum((0, 1)).float()) and 0.3 < (first == 0).float().mean() < 0.7


@needs_triton
@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
@pytest.mark.parametrize("wrong", [-1, 40, 2**31, 2**40])
def test_triton_reads_nothing_outside_of_a_table(monkeypatch, name, wrong):
    monkeypatch.setattr(MODULE.checks, "indices", lambda *_: None)  # a GPU's ids are not looked at
    arguments = inputs(3, 6, types=2, positions=6)
    right = embedding_layer_norm(**arguments, backend="triton")
    arguments[name] = arguments[name].clone()
    arguments[name][1, 2] = wrong
    y = embedding_layer_norm(**arguments, backend="triton")
    assert y[1, 2].isnan().all()
    y[1, 2] = right[1, 2]
    assert torch.equal(y, right)
    (dword,) = torch.autograd.grad(y.sum(), arguments["word_embeddings"])
    same_word = arguments["input_ids"][1, 2].int()  # kernels sort by 32 bits
    others = torch.arange(13, device=DEVICE) != same_word
    assert dword[others].isfinite().all()


@needs_triton
def test_triton_reaches_rows_beyond_32_bits():
    """The last row of a table of 2^31 elements and more; the memory between is never touched."""
    table = torch.empty(2**25 + 2, 64, dtype=torch.float16, device=DEVICE)
    table[[0, -1]] = torch.randn(2, 64).to(table)
    vectors = {name: torch.randn(64, device=DEVICE).half() for name in ("weight", "bias")}
    ids = torch.tensor([len(table) - 1, 0], device=DEVICE)
    y = embedding_layer_norm(ids, table, **vectors, backend="triton")
    assert torch.allclose(y, portable.embedding_layer_norm(ids, table, **vectors), atol=2e-3, rtol=2e-3)


@pytest.mark.skipif(CUDA, reason="on CUDA it is the default")
def test_triton_on_a_cpu_only_if_asked_for(monkeypatch):
    monkeypatch.setitem(MODULE._TWINS, "triton", None)
    embedding_layer_norm(**inputs(2))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        embedding_layer_norm(**inputs(2), backend="triton")


@needs_triton
@pytest.mark.parametrize("change, message", [({"dtype": torch.float64}, "float64"), ({"width": 8200}, "8200")])
def test_what_triton_refuses(change, message):
    with pytest.raises(BackendError, match=message):
        embedding_layer_norm(**inputs(2, **change), backend="triton")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"input_ids": torch.tensor([[1, 2], [3, 13]])},
            DataError,
            r"input_ids\[1, 1\]: got 13, expected 0 to 12 \(rows",
        ),
        (
            {"input_ids": torch.tensor([0, 1, -1])},
            DataError,
            r"input_ids\[2\]: got -1, expected 0 to 12 \(rows of word_",
        ),
        ({"token_type_ids": torch.tensor([0, 2, 0, 0])}, DataError, r"token_type_ids\[1\]: got 2, expected 0 to 1"),
        ({"position_ids": torch.tensor([5, 4, 4, 4])}, DataError, r"position_ids\[0\]: got 5, expected 0 to 4"),
        ({"input_ids": torch.zeros(4)}, DtypeError, "input_ids: got torch.float32, expected torch.int64"),
        ({"position_ids": torch.zeros(4)}, DtypeError, "position_ids: got torch.float32"),
        ({"input_ids": torch.tensor(3)}, ShapeError, r"input_ids: got shape \(\)"),
        ({"token_type_ids": torch.zeros(3).long()}, ShapeError, r"token_type_ids: got shape \(3,\), expected \(4,\)"),
        ({"position_ids": torch.zeros(2, 4).long()}, ShapeError, r"position_ids: got shape \(2, 4\), expected \(4,\)"),
        (
            {"input_ids": torch.zeros(6).long(), "position_ids": None},
            ShapeError,
            "got 6 tokens in a row, .* has 5 rows",
        ),
        ({"token_type_embeddings": None}, ConfigError, "token_type_ids: got a tensor, expected None"),
        ({"position_embeddings": torch.zeros(5, 8)}, ShapeError, r"position_embeddings: got shape \(5, 8\)"),
        ({"position_embeddings": torch.zeros(5, 16).half()}, DtypeError, "position_embeddings: got torch.float16"),
        ({"word_embeddings": torch.zeros(16)}, ShapeError, r"word_embeddings: got shape \(16,\)"),
        ({"word_embeddings": torch.zeros(13, 16).long()}, DtypeError, "word_embeddings: got torch.int64"),
        ({"weight": torch.zeros(13)}, ShapeError, r"weight: got shape \(13,\), expected \(16,\)"),
        ({"bias": torch.zeros(16, device="meta")}, ShapeError, "bias: got a tensor on meta"),
        ({"word_embeddings": torch.tensor(1.0)}, ShapeError, r"word_embeddings: got shape \(\), expected two dim"),
        ({"token_type_embeddings": torch.tensor(1.0)}, ShapeError, r"token_type_embeddings: got shape \(\)"),
        ({"input_ids": [0, 1, 2, 3]}, DtypeError, "input_ids: got a list, expected a torch.Tensor"),
        ({"token_type_ids": [0, 1, 1, 0]}, DtypeError, "token_type_ids: got a list"),
        ({"weight": None}, DtypeError, "weight: got a NoneType"),
        ({"eps": float("nan")}, ConfigError, "eps: got nan, expected a number, at least 0"),
        ({"dropout_p": 1.5}, ConfigError, "dropout_p: got 1.5"),
        ({"backend": "cuda"}, BackendError, "cuda"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    arguments = {**inputs(4, types=2, positions=5, device="cpu"), **change}
    if isinstance(change.get("input_ids"), torch.Tensor) and arguments["input_ids"].shape != (4,):
        arguments |= {"token_type_ids": None, "token_type_embeddings": None}
        if arguments["position_ids"] is not None:
            arguments |= {"position_ids": None, "position_embeddings": None}
    with pytest.raises(error, match=message):
        embedding_layer_norm(**arguments)
