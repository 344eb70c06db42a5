"""Linear layers that branch off a residual connection: as autograd makes it, in fewer passes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastbert
from fastbert.ops.branch_linear import branch_linear, pays_off

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(shape, widths, biased, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=dtype).to(DEVICE).requires_grad_()  # noqa: E731
    weights = [draw(width, shape[-1]) for width in widths]
    return draw(*shape), weights, [draw(width) if given else None for width, given in zip(widths, biased, strict=True)]


def plain(x, weights, biases):
    return *(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)), x


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    bits=st.integers(0, 2**12 - 1),
    seed=st.integers(0, 100),
)
def test_is_linear_layers_and_their_input(shape, widths, bits, seed):
    """Whatever has a bias, needs a gradient or is used; results and gradients."""
    bit = [bool(bits >> i & 1) for i in range(12)]
    x, weights, biases = operands([*shape, 4], widths, bit[:3][: len(widths)], seed=seed)
    for t, wanted in zip([x, *weights, *biases], [bit[3], *bit[4:7][: len(widths)], *bit[7:10][: len(widths)]]):  # noqa: B905
        if t is not None:
            t.requires_grad_(wanted)
    found, expected = branch_linear(x, weights, biases), plain(x, weights, biases)
    for y, z in zip(found, expected, strict=True):
        torch.testing.assert_close(y, z)
    used = [
        i for i, wanted in enumerate([*bit[10:12], True, True][: len(found)]) if wanted and expected[i].requires_grad
    ]
    leaves = [t for t in (x, *weights, *biases) if t is not None and t.requires_grad]
    if used and leaves:
        loss = [sum((y[i] ** 2 * (i + 1)).sum() for i in used) for y in (found, expected)]
        for gradients in zip(
            *(torch.autograd.grad(each, leaves, materialize_grads=True) for each in loss), strict=True
        ):
            torch.testing.assert_close(*gradients)


def test_second_derivatives():
    x, weights, biases = operands([3, 4], [5, 2], [True, False])
    leaves = x, *weights, biases[0]

    def sums(x, *parameters):
        found = branch_linear(x, parameters[:2], [parameters[2], None])
        return sum((y**3).sum() for y in found)

    assert torch.autograd.gradgradcheck(sums, leaves)


def test_an_incoming_gradient_is_not_written_to():
    x, weights, biases = operands([3, 4], [4], [True])
    y, again = branch_linear(x, weights, biases)
    gradient = torch.ones_like(again)
    kept = gradient.clone()
    torch.autograd.grad([y, again], x, [torch.ones_like(y), gradient])
    assert torch.equal(gradient, kept)


def test_of_other_dtypes_autocast_decides():
    x, weights, biases = operands([3, 4], [5], [True], torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, again = branch_linear(x, weights, biases)
    assert y.dtype == torch.bfloat16 and again is x
    torch.func.vmap(lambda row: branch_linear(row, weights, biases)[0])(x)


class Quantised(torch.Tensor):
    """A weight that knows F.linear and no other product, as torchao's do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.as_subclass(torch.Tensor).detach(), *bias)
        if function in (torch.Tensor.__matmul__, torch.mm, torch.addmm, torch.Tensor.t):
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_that_are_more_than_tensors_and_forward_mode_take_the_usual_way():
    x, weights, _ = operands([3, 4], [5], [False], torch.float32)
    y, again = branch_linear(x, [weights[0].detach().as_subclass(Quantised)], [None])
    assert again is x
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], weights[0].sum(0).expand(3, 4))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y, _ = branch_linear(dual, weights, [None])
        slope = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(slope, weights[0].sum(1).expand(3, 5))


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_a_layer_adds_up_no_gradients_of_its_input(family):
    """Neither those of q, k, v and the residual nor those of the feed-forward block: no sum of [T, C] is left."""
    torch.manual_seed(0)
    config = fastbert.EncoderConfig(
        family, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=30,
        hidden_act="gelu",
    )  # fmt: skip
    model = fastbert.model_class(family, "masked_lm")(config).to(DEVICE)
    ids = torch.randint(5, 30, (2, 11), device=DEVICE)
    with fastbert.use_backend("torch"):  # asked for, so that a CPU computes as a GPU does: see pays_off
        loss = model(ids, labels=ids, return_logits=False).loss
    with torch.profiler.profile(record_shapes=True) as found:
        loss.backward()
    sums = [e.input_shapes for e in found.events() if e.name in ("aten::add", "aten::add_")]
    assert not [shapes for shapes in sums if shapes and shapes[0] in ([22, 16], [2, 11, 16])]


def test_a_cpu_sums_as_autograd_does_unless_a_backend_is_asked_for():
    x = torch.randn(3, 4)
    assert not pays_off(x)
    with fastbert.use_backend("reference"):
        assert pays_off(x)
    if torch.cuda.is_available():
        assert pays_off(x.cuda())
