"""What holds for all three attention ops, and what is wrong input to any of them. Their peculiarities have files of
their own."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastbert import ops, portable, reference, tiled
from fastbert.errors import ConfigError, DtypeError, FastBertError, ShapeError
from fastbert.testing import compare, make_inputs

NAMES = ["attention", "rotary_attention", "relative_attention"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
pytestmark = pytest.mark.gpu
NAN = float("nan")

every_op = pytest.mark.parametrize("name", NAMES)
every_backend = pytest.mark.parametrize("backend", ["torch", "reference"])


def hold(name, inputs, **arguments):
    """The default backend against the reference."""
    compare(partial(getattr(ops, name), **arguments), partial(getattr(reference, name), **arguments), inputs)


def run(name, inputs, **arguments):
    """Output, and gradients of q, k, v for a fixed output gradient, zero at masked positions."""
    output = getattr(ops, name)(**inputs, **arguments)
    direction = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    if "key_padding_mask" in inputs:
        direction = direction * inputs["key_padding_mask"][:, :, None, None]
    return output.detach(), *torch.autograd.grad(output, [inputs[n] for n in "qkv"], direction)


@st.composite
def layouts(draw):
    """(layout, lengths), with empty sequences and empty batches among them."""
    layout = draw(st.sampled_from(["dense", "padded", "packed"]))
    if layout == "dense":
        return layout, [draw(st.integers(0, 40))] * draw(st.integers(0, 3))
    return layout, draw(st.lists(st.integers(0, 40), max_size=4))


@every_op
@pytest.mark.parametrize("device", DEVICES)
@given(
    sequences=layouts(),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 16]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.7]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.1, 0.6]),
    seed=st.integers(0, 2**64 - 1),
    view=st.booleans(),
)
def test_equals_reference(name, device, sequences, heads, head_dim, dtype, scale, dropout_p, seed, view):
    layout, lengths = sequences
    padding = NAN if layout == "padded" else None
    settings = {"layout": layout, "dtype": dtype, "device": device, "seed": seed % 2**32}
    inputs = make_inputs(lengths, heads, head_dim, **settings, projection_view=view, padding=padding)
    hold(name, inputs, scale=scale, dropout_p=dropout_p, seed=seed)


@every_op
@pytest.mark.parametrize("arguments", [{}, {"dropout_p": 0.1, "seed": 1}], ids=["", "dropout"])
def test_many_tiles(name, arguments):
    """Longer than a tile of query rows, and so many scores that no two sequences share a tile."""
    hold(name, make_inputs([300, 300], 3, 8), **arguments)


@every_op
@pytest.mark.parametrize("arguments", [{}, {"dropout_p": 0.1, "seed": 1}], ids=["", "dropout"])
def test_probabilities_computed_again(name, arguments, monkeypatch):
    """As on a GPU, and for long sequences."""
    monkeypatch.setattr(tiled, "SAVED_LENGTH", 0)
    hold(name, make_inputs([150, 20], 2, 8, layout="packed"), **arguments)


@every_op
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
def test_one_token(name, layout):
    hold(name, make_inputs([1, 1], 2, 4, layout=layout))


@every_op
@every_backend
@pytest.mark.parametrize("arguments", [{}, {"dropout_p": 0.5, "seed": 1}], ids=["", "dropout"])
def test_a_sequence_without_real_keys_gives_zeros_and_zero_gradients(name, backend, arguments):
    inputs = make_inputs([4, 0], 2, 4, layout="padded")
    for tensor in run(name, inputs, backend=backend, **arguments):
        assert tensor[0].count_nonzero() > 0
        assert tensor[1].count_nonzero() == 0


@every_op
@every_backend
@pytest.mark.parametrize("junk", [NAN, float("inf"), -1e30])
def test_padding_reaches_nothing(name, backend, junk):
    lengths = [5, 0, 9, 1]
    clean, dirty = (make_inputs(lengths, 2, 4, layout="padded", padding=x) for x in (0.0, junk))
    real = clean["key_padding_mask"]
    results = [run(name, inputs, backend=backend, dropout_p=0.3, seed=2) for inputs in (clean, dirty)]
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got[real], expected[real])
    for gradient in results[1][2:]:
        assert gradient[~real].count_nonzero() == 0


@every_op
@every_backend
def test_packed_padded_and_alone_agree(name, backend):
    lengths = [5, 0, 9, 1, 9]
    settings = {"backend": backend, "dropout_p": 0.3, "seed": 4}
    padded = make_inputs(lengths, 2, 4, layout="padded", dtype=torch.float64)
    real = padded["key_padding_mask"]
    rows = {n: padded[n].detach()[real].requires_grad_() for n in "qkv"}
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = run(name, rows | {"cu_seqlens": ends, "max_seqlen": 9}, **settings)
    unhinted = run(name, rows | {"cu_seqlens": ends}, **settings)
    dense = getattr(ops, name)(**padded, **settings).detach()
    torch.testing.assert_close(packed[0], dense[real])
    for one, other in zip(packed, unhinted, strict=True):
        assert torch.equal(one, other)
    alone = getattr(ops, name)(*(rows[n][None, :5] for n in "qkv"), **settings).detach()
    torch.testing.assert_close(packed[0][:5], alone[0])


@every_op
def test_equally_long_packed_sequences_are_the_dense_batch(name):
    dense = make_inputs([6, 6, 6], 2, 4)
    packed = {n: dense[n].detach().flatten(0, 1).requires_grad_() for n in "qkv"}
    ends = torch.tensor([0, 6, 12, 18], dtype=torch.int32)
    results = run(name, dense), run(name, packed | {"cu_seqlens": ends, "max_seqlen": 6})
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got.view(expected.shape), expected)


@pytest.mark.parametrize("mask", [None, "with holes"])
@every_op
def test_a_mask_may_have_holes(name, mask):
    inputs = make_inputs([7, 7], 2, 4)
    keys = torch.tensor([[1, 0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1, 1]]).bool()
    hold(name, inputs | {"key_padding_mask": keys if mask else torch.ones_like(keys)})


@pytest.mark.parametrize("lengths", [[3, 0, 7, 1], [4]])
@pytest.mark.parametrize(
    ("core", "twin"),
    [
        (partial(portable._sdpa, scale=0.5, dropout_p=0.0), partial(reference.attention, scale=0.5)),
        (
            partial(portable.tiled_attention, scale=0.5, dropout_p=0.3, seed=1, max_relative_position=2),
            partial(reference.relative_attention, scale=0.5, dropout_p=0.3, seed=1, max_relative_position=2),
        ),
    ],
    ids=["sdpa", "tiled"],
)
def test_the_padded_form_that_gpus_run(core, twin, lengths):
    """On a CPU it is never chosen, so it is called here."""
    compare(partial(portable._padded, core), twin, make_inputs(lengths, 2, 4, layout="packed"))


@every_op
def test_views_of_a_fused_projection(name):
    """Forward and backward through the views, into the one tensor they are views of."""
    projection = torch.randn(2, 9, 3, 2, 4, requires_grad=True)
    outputs = []
    for fold in (lambda t: t, lambda t: t.contiguous()):
        output = getattr(ops, name)(*(fold(t) for t in projection.unbind(2)))
        outputs.append((output, *torch.autograd.grad(output.square().sum(), projection)))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


@every_op
def test_odd_strides(name):
    """Offsets and strides that cannot be read as complex numbers, and a last dimension that is not contiguous."""
    shape = (2, 5, 1, 4)
    inputs = make_inputs([5, 5], 1, 4)
    base = torch.randn(2, 5, 9)
    odd = {"q": base[..., 1:5].view(2, 5, 1, 4), "k": torch.randn(4, 2, 5, 1).movedim(0, -1)}
    inputs |= {n: t.requires_grad_() for n, t in odd.items()}
    assert all(inputs[n].shape == shape for n in "qkv")
    hold(name, inputs)


@every_op
def test_dropout_is_the_same_in_every_backend_and_differs_by_seed(name):
    inputs = make_inputs([20, 20], 2, 4, dtype=torch.float64)
    one, other = (run(name, inputs, dropout_p=0.4, seed=9, backend=backend) for backend in ("torch", "reference"))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(one[0], run(name, inputs, dropout_p=0.4, seed=10)[0])


@every_op
@every_backend
def test_dropout_without_a_seed_follows_the_generator_and_keeps_the_mean(name, backend):
    inputs = make_inputs([6], 1, 4, dtype=torch.float64)
    settings = {"dropout_p": 0.3, "backend": backend}
    torch.manual_seed(3)
    first, second = run(name, inputs, **settings), run(name, inputs, **settings)
    torch.manual_seed(3)
    for a, b in zip(first, run(name, inputs, **settings), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], second[0])
    many = {n: inputs[n].detach().expand(4000, -1, -1, -1) for n in "qkv"}
    mean = getattr(ops, name)(**many, **settings).mean(0)
    torch.testing.assert_close(mean, run(name, inputs, backend=backend)[0][0], atol=0.1, rtol=0)


@every_op
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("arguments", [{}, {"dropout_p": 0.1, "seed": 1}], ids=["", "dropout"])
def test_bitwise_repeatable(name, layout, arguments):
    inputs = make_inputs([130, 70, 9], 4, 16, layout=layout)
    for a, b in zip(run(name, inputs, **arguments), run(name, inputs, **arguments), strict=True):
        assert torch.equal(a, b)


@every_op
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("arguments", [{}, {"dropout_p": 0.5, "seed": 1}], ids=["", "dropout"])
def test_gradcheck(name, layout, arguments):
    inputs = make_inputs([4, 2], 2, 4, layout=layout, dtype=torch.float64)
    q, k, v = (inputs.pop(n) for n in "qkv")
    op = partial(getattr(ops, name), **inputs, **arguments)
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v), (q, k, v), fast_mode=True)


@every_op
def test_only_some_gradients_are_wanted(name):
    inputs = make_inputs([4, 4], 2, 4)
    frozen = {"q": inputs["q"].detach(), "k": inputs["k"], "v": inputs["v"].detach()}
    (dk,) = torch.autograd.grad(getattr(ops, name)(**frozen).sum(), frozen["k"])
    expected = torch.autograd.grad(getattr(ops, name)(**inputs).sum(), inputs["k"])[0]
    assert torch.equal(dk, expected)


@every_op
def test_training_after_inference_mode(name):
    """Constant tables that inference mode built must serve autograd too."""
    inputs = make_inputs([11], 1, 22)
    with torch.inference_mode():
        getattr(ops, name)(**inputs)
    run(name, inputs)


@every_op
@every_backend
def test_fake_tensors_leave_nothing_behind(name, backend):
    """The tables that are kept do not come from FakeTensorMode, nor go there."""
    op = partial(getattr(ops, name), backend=backend)
    inputs = make_inputs([13], 1, 34)
    for _ in range(2):
        with FakeTensorMode():
            fake = torch.zeros(1, 13, 1, 34)
            assert op(fake, fake, fake).shape == fake.shape
        op(**inputs)


@every_op
@every_backend
def test_the_default_device_decides_nothing(name, backend):
    inputs = make_inputs([13], 1, 38)
    with torch.device("meta"):
        output = getattr(ops, name)(**inputs, backend=backend)
    assert torch.equal(output, getattr(ops, name)(**inputs, backend=backend))


@every_op
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(name, backward_inside):
    inputs = make_inputs([9, 9], 2, 4)
    rounded = {n: inputs[n].detach().bfloat16().requires_grad_() for n in "qkv"}
    expected = run(name, rounded)
    with torch.autocast("cpu", torch.bfloat16):
        output = getattr(ops, name)(**inputs | {"k": inputs["k"].bfloat16()})
        assert torch.equal(output, expected[0])
        if backward_inside:
            run(name, inputs)
        double = getattr(ops, name)(**make_inputs([3], 1, 2, dtype=torch.float64))
    direction = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    gradients = torch.autograd.grad(output, [inputs[n] for n in "qkv"], direction)
    for gradient, other in zip(gradients, expected[1:], strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, other.float())
    assert double.dtype == torch.float64


@every_op
@pytest.mark.parametrize("arguments", [{}, {"dropout_p": 0.5, "seed": 1}], ids=["", "dropout"])
def test_compiles_without_graph_breaks(name, arguments):
    torch.compiler.reset()
    inputs = make_inputs([20, 20], 2, 4)
    compiled = torch.compile(partial(getattr(ops, name), **arguments), fullgraph=True, backend="aot_eager")
    output = compiled(**inputs)
    direction = torch.linspace(-1, 1, output.numel()).view(output.shape)
    got = output.detach(), *torch.autograd.grad(output, [inputs[n] for n in "qkv"], direction)
    for a, b in zip(got, run(name, inputs, **arguments), strict=True):
        torch.testing.assert_close(a, b)


DENSE = {n: torch.zeros(2, 3, 2, 4) for n in "qkv"}
PACKED = {n: torch.zeros(5, 2, 4) for n in "qkv"} | {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}
INT32 = partial(torch.tensor, dtype=torch.int32)
MASK = torch.ones(2, 3, dtype=torch.bool)
WRONG = {
    "rank": (DENSE | {"q": torch.zeros(2, 3, 8)}, ShapeError, r"q: got shape \(2, 3, 8\), expected \[B, L, H, D\]"),
    "packed rank": (PACKED | DENSE, ShapeError, r"q: got shape \(2, 3, 2, 4\), expected \[T, H, D\]"),
    "k": (DENSE | {"k": torch.zeros(2, 4, 2, 4)}, ShapeError, r"k: got shape \(2, 4, 2, 4\), expected \(2, 3, 2, 4\)"),
    "v": (DENSE | {"v": torch.zeros(2, 3, 1, 4)}, ShapeError, r"v: got shape \(2, 3, 1, 4\), expected \(2, 3, 2, 4\)"),
    "integers": ({n: t.long() for n, t in DENSE.items()}, DtypeError, "q: got torch.int64, expected a floating dtype"),
    "dtypes": (DENSE | {"v": DENSE["v"].half()}, DtypeError, "v: got torch.float16, expected torch.float32 as q has"),
    "devices": (DENSE | {"k": DENSE["k"].to("meta")}, ShapeError, "k: got a tensor on meta, expected cpu as q"),
    "no head dim": ({n: t[..., :0] for n, t in DENSE.items()}, ShapeError, "q: got head dim 0, .* expected a"),
    "mask dtype": (DENSE | {"key_padding_mask": torch.ones(2, 3)}, DtypeError, "mask: got torch.float32, expected"),
    "mask shape": (DENSE | {"key_padding_mask": MASK.mT}, ShapeError, r"mask: got shape \(3, 2\), expected \(2, 3\)"),
    "mask and ends": (PACKED | {"key_padding_mask": MASK}, ShapeError, "key_padding_mask: got one besides cu_seqlens"),
    "max_seqlen alone": (DENSE | {"max_seqlen": 3}, ShapeError, "max_seqlen: got 3 without cu_seqlens, expected None"),
    "int64 ends": (PACKED | {"cu_seqlens": torch.tensor([0, 5])}, DtypeError, "cu_seqlens: got torch.int64, expected"),
    "2-d ends": (PACKED | {"cu_seqlens": INT32([[0, 5]])}, ShapeError, r"cu_seqlens: got shape \(1, 2\), expected"),
    "no ends": (PACKED | {"cu_seqlens": INT32([])}, ShapeError, r"cu_seqlens: got shape \(0,\), expected \[B \+ 1\]"),
    "first end": (PACKED | {"cu_seqlens": INT32([1, 5])}, ShapeError, "got 1 as its first value, expected 0"),
    "last end": (PACKED | {"cu_seqlens": INT32([0, 4])}, ShapeError, "got 4 as its last value, expected 5"),
    "order": (PACKED | {"cu_seqlens": INT32([0, 4, 3, 5])}, ShapeError, r"cu_seqlens\[2\]: got 3 after 4, expected no"),
    "short": (PACKED | {"max_seqlen": 2}, ShapeError, "max_seqlen: got 2, expected at least 3, the longest"),
    "max_seqlen type": (PACKED | {"max_seqlen": 3.0}, ConfigError, "max_seqlen: got 3.0, expected the longest"),
    "dropout 1": (DENSE | {"dropout_p": 1.0}, ConfigError, "dropout_p: got 1.0, expected 0 <= dropout_p < 1"),
    "dropout -": (DENSE | {"dropout_p": -0.1}, ConfigError, "dropout_p: got -0.1, expected 0 <= dropout_p < 1"),
    "dropout text": (DENSE | {"dropout_p": "a"}, ConfigError, "dropout_p: got 'a', expected 0 <= dropout_p < 1"),
    "scale text": (DENSE | {"scale": "x"}, ConfigError, "scale: got 'x', expected None or a finite number"),
    "scale nan": (DENSE | {"scale": NAN}, ConfigError, "scale: got nan, expected None or a finite number"),
    "seed 1.5": (DENSE | {"dropout_p": 0.1, "seed": 1.5}, ConfigError, "seed: got 1.5, expected None or .*, an int"),
    "numpy": ({n: t.numpy() for n, t in DENSE.items()}, DtypeError, "q: got a ndarray, expected a torch.Tensor"),
    "None": (DENSE | {"v": None}, DtypeError, "v: got a NoneType, expected a torch.Tensor"),
    "mask list": (DENSE | {"key_padding_mask": [[True] * 3] * 2}, DtypeError, "key_padding_mask: got a list, expected"),
    "ends list": (PACKED | {"cu_seqlens": [0, 2, 5]}, DtypeError, "cu_seqlens: got a list, expected a torch.Tensor"),
    "seed": (DENSE | {"dropout_p": 0.1, "seed": -1}, ConfigError, "seed: got -1, expected None or 0 <= seed < 2"),
}


@every_op
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_named(name, wrong):
    arguments, error, message = WRONG[wrong]
    with pytest.raises(error, match=message) as caught:
        getattr(ops, name)(**arguments)
    assert isinstance(caught.value, FastBertError)
