"""What PyTorch asks of operators, of every one there is: schemas that say what is changed and what an alias, gradients
that are registered, shapes without data, and the same under torch.compile's tracing (torch.library.opcheck); and, of
every public op, gradients that are those of finite differences (torch.autograd.gradcheck).

A new operator, or a new public op, without a case here is a failure.
"""

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.fx
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from fastbert import extension, ops

lamb = import_module("fastbert.ops.lamb")  # the name in fastbert.ops is the function
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
ENDS = [0, 5, 7, 12]


def draw(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def of_attention(op, dtype, packed, **options):
    shape = (12, 2, 16) if packed else (2, 6, 2, 16)
    tensors = [draw(*shape, dtype=dtype) for _ in "qkv"]
    if packed:
        options |= {"cu_seqlens": torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)}
    else:
        options |= {"key_padding_mask": torch.arange(6, device=DEVICE) < torch.tensor([[6], [4]], device=DEVICE)}
    return partial(op, **options), tensors


def of_bias_gelu(dtype, approximate):
    return partial(ops.bias_gelu, approximate=approximate), [draw(3, 40, dtype=dtype), draw(40, dtype=dtype)]


def of_dropout_add_layer_norm(dtype, p, x_bias):
    tensors = [draw(3, 40, dtype=dtype), draw(3, 40, dtype=dtype)] + [draw(40, dtype=dtype) for _ in range(2 + x_bias)]

    def call(x, residual, weight, bias, x_bias=None, **options):
        return ops.dropout_add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=p, seed=7, **options)

    return call, tensors


def of_embedding_layer_norm(dtype, tables):
    ids = {name: torch.tensor([[1, 2, 4], [3, 1, 0]], device=DEVICE) % n for name, n in (("a", 9), ("b", 2), ("c", 5))}
    tensors = [draw(n, 16, dtype=dtype) for n in (9, 2, 5)[: 3 if tables else 1]]
    tensors += [draw(16, dtype=dtype), draw(16, dtype=dtype)]

    def call(word, *more, **options):
        *more, weight, bias = more
        if tables:
            options |= {"token_type_ids": ids["b"], "token_type_embeddings": more[0]}
            options |= {"position_ids": ids["c"], "position_embeddings": more[1]}
        return ops.embedding_layer_norm(ids["a"], word, weight=weight, bias=bias, **options)

    return call, tensors


def of_linear_cross_entropy(dtype, bias):
    labels = torch.tensor([3, -100, 0, 16], device=DEVICE)
    tensors = [draw(4, 16, dtype=dtype), draw(17, 16, dtype=dtype), draw(17, dtype=dtype)][: 2 + bias]
    call = lambda h, w, b=None, **options: ops.linear_cross_entropy(h, w, b, labels, **options)  # noqa: E731
    return call, tensors


# For every public op that has gradients, its calls: a function of tensors (and backend=), and the tensors.
DIFFERENTIABLE = {
    "attention": [
        partial(of_attention, ops.attention, packed=packed, dropout_p=0.25, seed=3) for packed in (True, False)
    ],
    "rotary_attention": [
        partial(of_attention, ops.rotary_attention, packed=True),
        partial(of_attention, ops.rotary_attention, packed=False, rotate_value=True),
    ],
    "relative_attention": [
        partial(of_attention, ops.relative_attention, packed=packed, max_relative_position=4)
        for packed in (True, False)
    ],
    "bias_gelu": [partial(of_bias_gelu, approximate=form) for form in ("none", "tanh")],
    "dropout_add_layer_norm": [
        partial(of_dropout_add_layer_norm, p=0.4, x_bias=True),
        partial(of_dropout_add_layer_norm, p=0.0, x_bias=False),
    ],
    "embedding_layer_norm": [partial(of_embedding_layer_norm, tables=tables) for tables in (True, False)],
    "linear_cross_entropy": [partial(of_linear_cross_entropy, bias=bias) for bias in (True, False)],
}
WITHOUT_GRADIENTS = {"lamb", "encoder_layers"}  # an optimizer's step, and inference


def step_of_lamb():
    params = [torch.randn(n, device=DEVICE).half() for n in (5, 7)]
    masters = [p.float() for p in params]
    lists = {"exp_avgs": [t * 0.1 for t in masters], "exp_avg_sqs": [t.square() for t in masters]}
    lists |= {"grads": [t.clone() for t in params], "steps": [torch.ones((), device=DEVICE) for _ in params]}
    return ops.LambGroup(params=params, masters=masters, **lists, lr=0.1)


def arguments_of_encoder_layers():
    """Of one layer, in 16 bits: 64 columns a head, four times as many between."""
    shapes = [(384, 128), (384,), (128, 128), *[(128,)] * 3, (512, 128), (512,), (128, 512), *[(128,)] * 3]
    kinds = [torch.float16 if len(shape) == 2 else torch.float32 for shape in shapes]
    weights = [0.1 * torch.randn(s, device=DEVICE, dtype=kind) for s, kind in zip(shapes, kinds, strict=True)]
    x = torch.randn(1, 32, 128, device=DEVICE, dtype=torch.float16)
    return [x, weights, torch.zeros(1, dtype=torch.uint8), None, 1e-12, 0], {}


class Recorder(torch.fx.Interpreter):
    """Runs a graph, and keeps a call of each of our operators for each pattern of arguments that are left out."""

    calls: dict[tuple, tuple] = {}

    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", "") == "fastbert":
            record(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def record(operator, args, kwargs):
    options = [a for a in args if a is None or isinstance(a, bool | str)]
    copies = [prepared(a, operator) for a in args], {name: prepared(a, operator) for name, a in kwargs.items()}
    Recorder.calls.setdefault((operator.name(), str(options)), (operator, *copies))


def prepared(argument, operator):
    """A copy, which requires a gradient where the operator has one."""
    if isinstance(argument, torch.Tensor):
        wanted = argument.is_floating_point() and not operator.name().endswith(("_backward", "lamb_", "encoder_layers"))
        return argument.detach().clone().requires_grad_(wanted)
    return [prepared(a, operator) for a in argument] if isinstance(argument, list | tuple) else argument


@pytest.fixture(scope="module")
def calls():
    """Of every op, compiled, on every backend that has an operator of its own."""
    assert extension.load() is None, "the compiled operators are to be checked, too"
    run = lambda graph, _: make_boxed_func(lambda *given: Recorder(graph).run(*given))  # noqa: E731
    for cases in DIFFERENTIABLE.values():
        for case in cases:
            for backend in ("triton", "torch"):
                torch.compiler.reset()
                call, tensors = case(dtype=torch.float32)
                compiled = torch.compile(partial(call, backend=backend), backend=aot_autograd(fw_compiler=run))
                compiled(*tensors).sum().backward()
    step = lamb._Extension([step_of_lamb()], {"grad_scale": None, "found_inf": None}, None)
    step.run(7)  # makes the workspace, whose contents are nobody's business
    record(torch.ops.fastbert.lamb_.default, [], step.given(7))
    if CUDA:
        record(torch.ops.fastbert.encoder_layers.default, *arguments_of_encoder_layers())
    counters = torch.arange(6, device=DEVICE).view(1, 6)
    record(torch.ops.fastbert.philox_kept.default, [*[counters] * 4, 5, 0.3, 4], {})
    record(torch.ops.fastbert.philox_attention_keep.default, [torch.arange(2, device=DEVICE), 2, 20, 5, 0.3], {})
    yield Recorder.calls
    torch.compiler.reset()


def registered():
    return {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastbert::")}


def test_every_operator_is_checked(calls):
    unchecked = registered() - {name for name, _ in calls}
    assert unchecked <= (set() if CUDA else {"fastbert::encoder_layers"}), "no case for these operators"


def test_operators(calls):
    for operator, args, kwargs in calls.values():
        torch.library.opcheck(operator, tuple(args), kwargs)


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - WITHOUT_GRADIENTS - {"LambGroup", "LayerWeights"}))
def test_gradients(name):
    """Of the portable form in float64: every other backend is held to it, or to the reference as it is."""
    assert name in DIFFERENTIABLE, f"no case for {name}"
    for case in DIFFERENTIABLE[name]:
        call, tensors = case(dtype=torch.float64)
        for backend in ("torch", "reference"):
            assert torch.autograd.gradcheck(partial(call, backend=backend), tensors, fast_mode=True)
