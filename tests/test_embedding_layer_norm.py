"""dropout(LN(word + token type + position)): every backend against float64."""

from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastbert import reference
from fastbert.errors import BackendError, ConfigError, DataError, DtypeError, ShapeError
from fastbert.ops import embedding_layer_norm
from fastbert.testing import compare

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
pytestmark = pytest.mark.gpu
BACKENDS = ["torch", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(*shape, vocabulary=13, width=16, types=0, positions=0, dtype=torch.float32, device="cpu", seed=0):
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@example(shape=[0], vocabulary=5, types=2, positions=3, implied=False, dtype=torch.float32, dropout_p=0.5, seed=0)
@example(shape=[2, 0], vocabulary=5, types=2, positions=3, implied=True, dtype=torch.float32, dropout_p=0.5, seed=0)
@example(shape=[1], vocabulary=1, types=1, positions=1, implied=True, dtype=torch.float16, dropout_p=0.0, seed=0)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    vocabulary=st.integers(1, 50),
    types=st.integers(0, 3),
    positions=st.sampled_from([0, 7, 40]),
    implied=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)
def test_is_the_reference(backend, device, shape, vocabulary, types, positions, implied, dtype, dropout_p, seed):
    arguments = inputs(*shape, vocabulary=vocabulary, types=types, positions=positions, dtype=dtype, device=device)
    if implied:
        arguments |= {"token_type_ids": None, "position_ids": None}
    op = partial(embedding_layer_norm, backend=backend)
    compare(op, reference.embedding_layer_norm, {**arguments, "dropout_p": dropout_p, "seed": seed})


@pytest.mark.parametrize("backend", BACKENDS)
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
        explicit["position_ids"] = places
        expected = embedding_layer_norm(**explicit, backend=backend)
        assert torch.equal(embedding_layer_norm(**implied, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_looked_up_get_no_gradient(backend):
    arguments = inputs(4, 4, vocabulary=30)
    (gradient,) = torch.autograd.grad(
        embedding_layer_norm(**arguments, backend=backend).square().sum(), arguments["word_embeddings"]
    )
    used = torch.zeros(30, dtype=torch.bool)
    used[arguments["input_ids"]] = True
    assert torch.equal(gradient.abs().sum(1) > 0, used)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_dtype_of_the_tables(backend):
    arguments = inputs(4, dtype=torch.bfloat16)
    arguments["weight"], arguments["bias"] = torch.ones(16), torch.zeros(16)
    assert embedding_layer_norm(**arguments, backend=backend).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert embedding_layer_norm(**inputs(4), backend=backend).dtype == torch.float32


def test_a_seed_drops_the_same_elements_in_every_backend_whatever_the_shape():
    arguments = inputs(3, 5, dtype=torch.float64)
    run = lambda backend, **change: embedding_layer_norm(  # noqa: E731
        **{**arguments, **change}, dropout_p=0.3, seed=11, backend=backend
    )
    assert torch.allclose(run("torch"), run("reference"), rtol=1e-12, atol=1e-12)
    packed = run("torch", input_ids=arguments["input_ids"].flatten())
    assert torch.equal(packed, run("torch").flatten(0, 1)) and 0.2 < (packed == 0).double().mean() < 0.4


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    arguments = inputs(2, 3, width=4, types=2, positions=5, dtype=torch.float64)
    names = [name for name, t in arguments.items() if t.requires_grad]
    fixed = {name: t for name, t in arguments.items() if name not in names}
    op = lambda *tensors: embedding_layer_norm(**dict(zip(names, tensors, strict=True)), **fixed, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(op, tuple(arguments[name] for name in names))


def test_compiles_as_one_graph():
    arguments = inputs(2, 6, types=2, positions=6)
    compiled = torch.compile(embedding_layer_norm, fullgraph=True, backend="aot_eager")
    compare(compiled, reference.embedding_layer_norm, arguments)


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
        ({"backend": "triton"}, BackendError, "triton"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    arguments = {**inputs(4, types=2, positions=5), **change}
    if isinstance(change.get("input_ids"), torch.Tensor) and arguments["input_ids"].shape != (4,):
        arguments |= {"token_type_ids": None, "token_type_embeddings": None}
        if arguments["position_ids"] is not None:
            arguments |= {"position_ids": None, "position_embeddings": None}
    with pytest.raises(error, match=message):
        embedding_layer_norm(**arguments)
