"""ops.encoder_layers: every backend against the reference, what it shares with the modules, and bad input."""

from functools import partial
from importlib import import_module
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastbert import ops, reference
from fastbert.errors import BackendError, ConfigError, DtypeError, ShapeError
from fastbert.ops.encoder_layers import ACTIVATIONS, LayerWeights
from fastbert.testing import compare

pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ["torch", "reference", "triton"]
SIXTEEN = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # the interpreter multiplies bfloat16 wrongly


def draw_layer(width, inner, dtype, generator, narrow_vectors=False):
    def draw(*shape, scale=1.0, shift=0.0):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift

    matrices = {"qkv": (3 * width, width), "output": (width, width), "up": (inner, width), "down": (width, inner)}
    weights = {}
    for name in LayerWeights._fields:
        if name in matrices:
            weights[name] = draw(*matrices[name], scale=matrices[name][1] ** -0.5).to(DEVICE, dtype)
        else:
            size = {"qkv_bias": 3 * width, "up_bias": inner}.get(name, width)
            shift = 1.0 if name.endswith("norm") else 0.0
            weights[name] = draw(size, scale=0.3, shift=shift).to(DEVICE, dtype if narrow_vectors else torch.float32)
    return LayerWeights(**weights)


def attention(q, k, v, **sequences):
    return reference.attention(q, k, v, **sequences)


def call(function, x, layers, applications, attend=attention, **options):
    weights = [LayerWeights(*layers[index]) for index in applications]
    return function(x, weights, attend, **options)


def written_out(x, layers, applications, *, hidden_act, attend=attention, **options):
    return call(reference.encoder_layers, x, layers, applications, attend, act=ACTIVATIONS[hidden_act], **options)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=settings.default.max_examples // 2)
@given(
    rows=st.sampled_from([(1,), (3,), (2, 5), (17,), (40,), (1, 70)]),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([5, 8, 16, 26]),
    inner=st.integers(1, 150),
    applications=st.sampled_from([[0], [0, 0], [0, 1], [0, 1, 1]]),
    hidden_act=st.sampled_from(sorted(ACTIVATIONS)),
    eps=st.sampled_from([1e-12, 1e-5]),
    every=st.booleans(),
    dtype=st.sampled_from([torch.float32, *SIXTEEN]),
    narrow=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example((40,), 4, 64, 1024, [0, 0], "gelu", 1e-12, True, torch.float16, False, 0)  # several tiles, split sums
@example((130,), 3, 64, 256, [0], "gelu_new", 1e-12, False, torch.float32, True, 1)
def test_op(backend, rows, heads, head_dim, inner, applications, hidden_act, eps, every, dtype, narrow, seed):
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_dim
    x = torch.randn(*rows, width, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    layers = [draw_layer(width, inner, dtype, generator, narrow) for _ in range(2)]
    options = dict(heads=heads, hidden_act=hidden_act, eps=eps, every=every)
    if len(rows) == 1:  # packed: one row, and the rest
        ends = torch.tensor([0, 1, rows[0]], dtype=torch.int32, device=DEVICE)
        options["attend"] = partial(attention, cu_seqlens=ends)
    inputs = {"x": x, "layers": [list(layer) for layer in layers], "applications": applications}
    result = compare(
        partial(call, partial(ops.encoder_layers, backend=backend), **options), partial(written_out, **options), inputs
    )
    assert len(result) == (len(applications) if every else 1)


@pytest.mark.parametrize("parts", [1, 2, 4, 7])
@given(
    rows=st.sampled_from([1, 9, 33, 70]),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 26]),
    inner=st.sampled_from([40, 100, 129]),
    dtype=st.sampled_from([torch.float32, *SIXTEEN]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=4)
def test_sums_in_parts(parts, rows, heads, head_dim, inner, dtype, seed):
    """Tiles whose sum several programs share, in several launches that share their counters."""
    kernels, launched = import_module("fastbert.kernels.encoder_layers"), []
    usual = kernels.launch_config

    def config(rows, columns, depth, *rest):
        launched.append(kernels._parts(depth, parts, 16))  # where a part would be empty there are fewer
        return usual(rows, columns, depth, *rest) | {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "SPLIT": parts}

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, rows, heads * head_dim, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    layer = draw_layer(heads * head_dim, inner, dtype, generator)
    options = dict(heads=heads, hidden_act="gelu", eps=1e-12)
    inputs = {"x": x, "layers": [list(layer)], "applications": [0, 0]}
    with mock.patch.object(kernels, "launch_config", config):
        ours = partial(call, partial(ops.encoder_layers, backend="triton"), **options)
        compare(ours, partial(written_out, **options), inputs)
    assert max(launched) > 1 or parts == 1


def test_more_split_tiles_than_counters(monkeypatch):
    """Of a configuration that a sweep tries."""
    kernels = import_module("fastbert.kernels.encoder_layers")
    usual, sizes = kernels.launch_config, []
    small = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "SPLIT": 2}
    monkeypatch.setattr(kernels, "launch_config", lambda *arguments: usual(*arguments) | small)
    monkeypatch.setattr(kernels, "_PROCESSORS", 1)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **o: (sizes.append(size), zeros(*size, **o))[1])
    layer = draw_layer(64, 64, torch.float32, torch.Generator().manual_seed(0))
    x = torch.randn(1, 40, 64).to(DEVICE)
    run = partial(ops.encoder_layers, x, [layer], lambda q, k, v: v, heads=1)
    torch.testing.assert_close(run(backend="triton")[0], run(backend="reference")[0], rtol=1e-4, atol=1e-5)
    assert sizes[:2] == [(2,), (18,)]


def test_the_sums_of_albert_base_are_split():
    """What ships has parts too; and none of them is empty."""
    launch_config = import_module("fastbert.kernels.encoder_layers").launch_config
    assert launch_config(128, 768, 3072, 2, (9, 0))["SPLIT"] > 1
    for rows in (1, 16, 32, 100, 128, 500, 4096):
        for columns, depth in ((2304, 768), (768, 768), (3072, 768), (768, 3072), (936, 312), (312, 1248)):
            config = launch_config(rows, columns, depth, 2, (9, 0))
            part = -(-depth // (config["SPLIT"] * config["BLOCK_K"])) * config["BLOCK_K"]
            assert part * (config["SPLIT"] - 1) < depth and config["num_stages"] >= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_may_answer_with_a_view(backend):
    generator = torch.Generator().manual_seed(0)
    layer = draw_layer(32, 48, torch.float32, generator)
    x = torch.randn(2, 6, 32, generator=generator).to(DEVICE)
    view = ops.encoder_layers(x, [layer], lambda q, k, v: v, heads=2, backend=backend)[0]
    want = ops.encoder_layers(x, [layer], lambda q, k, v: v.contiguous(), heads=2, backend="reference")[0]
    torch.testing.assert_close(view, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_must_answer_in_the_shape_of_q(backend):
    layer = draw_layer(32, 48, torch.float32, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 32).to(DEVICE)
    with pytest.raises(ShapeError, match=r"attend's result: got shape \(2, 6, 2, 8\), expected \(2, 6, 2, 16\)"):
        ops.encoder_layers(x, [layer], lambda q, k, v: v[..., :8], heads=2, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_change_the_dtype(backend):
    layer = draw_layer(32, 48, torch.float32, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 32).to(DEVICE)
    run = partial(ops.encoder_layers, x, [layer], lambda q, k, v: v.contiguous(), heads=2, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = run()[0]
    assert inside.dtype == torch.float32 and torch.equal(inside, run()[0])


@pytest.mark.skipif(
    not CUDA, reason="one launch over all layers needs a GPU; tests/test_encoder_kernel.py runs it here"
)
@given(
    sizes=st.tuples(st.integers(1, 8), st.sampled_from([1, 7, 32, 33, 128, 200])),
    heads=st.sampled_from([1, 3, 12]),
    inner=st.sampled_from([64, 320, 3072]),
    applications=st.sampled_from([[0], [0, 0, 0], [0, 1], [0, 1, 1, 0]]),
    hidden_act=st.sampled_from(["gelu", "gelu_new", "relu"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    masked=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_one_launch(sizes, heads, inner, applications, hidden_act, dtype, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*sizes, 64 * heads, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    layers = [draw_layer(64 * heads, inner, dtype, generator) for _ in range(2)]
    mask = {"key_padding_mask": (torch.rand(sizes, generator=generator) < 0.7).to(DEVICE)} if masked else {}
    inputs = {"x": x, "layers": [list(layer) for layer in layers], "applications": applications}
    options = dict(heads=heads, hidden_act=hidden_act, eps=1e-12)
    ours = partial(ops.encoder_layers, backend="cuda")
    compare(
        partial(call, ours, attend=partial(ops.attention, **mask), **options),
        partial(written_out, attend=partial(attention, **mask), **options),
        inputs,
    )
    run = partial(ours, x, [layers[i] for i in applications], partial(ops.attention, **mask), **options)
    assert torch.equal(run()[0], run()[0])


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
def test_a_large_mean_does_not_cancel(dtype):
    """The norm's statistics come from means and squares of differences, tile by tile."""
    generator = torch.Generator().manual_seed(0)
    layer = draw_layer(128, 64, dtype, generator)
    layer = layer._replace(output_bias=layer.output_bias + 200.0, down_bias=layer.down_bias - 300.0)
    x = torch.randn(1, 9, 128, generator=generator).to(DEVICE, dtype)
    options = dict(heads=2, hidden_act="gelu", eps=1e-12)
    inputs = {"x": x, "layers": [list(layer)], "applications": [0, 0]}
    compare(
        partial(call, partial(ops.encoder_layers, backend="triton"), **options), partial(written_out, **options), inputs
    )


def test_the_same_bits_every_time():
    generator = torch.Generator().manual_seed(0)
    layer = draw_layer(256, 512, torch.float16, generator)
    x = torch.randn(33, 256, generator=generator).to(DEVICE, torch.float16)
    run = partial(ops.encoder_layers, x, [layer], lambda q, k, v: (q + k + v).contiguous(), heads=4, backend="triton")
    first = run()[0]
    for _ in range(20 if CUDA else 1):
        assert torch.equal(run()[0], first)


def test_other_strides_and_no_rows():
    generator = torch.Generator().manual_seed(0)
    layer = draw_layer(32, 48, torch.float32, generator)
    turned = LayerWeights(*(t.T.contiguous().T if t.dim() == 2 else torch.stack([t, t], 1)[:, 0] for t in layer))
    x = torch.randn(2, 6, 64, generator=generator).to(DEVICE)[..., ::2]
    for backend in BACKENDS:
        run = partial(ops.encoder_layers, attend=attention, heads=2, backend=backend)
        torch.testing.assert_close(run(x, [turned])[0], run(x.contiguous(), [layer])[0])
        empty = run(x[:0], [layer] * 2, every=True)
        assert [t.shape for t in empty] == [(0, 6, 32)] * 2


def test_no_gradients():
    layer = draw_layer(8, 8, torch.float32, torch.Generator().manual_seed(0))
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    assert not ops.encoder_layers(x, [layer], lambda q, k, v: v, heads=2)[0].requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.ones(3, 8, dtype=torch.int64)), DtypeError, "x: got torch.int64"),
        (dict(layers=[]), ShapeError, "layers: got none"),
        (dict(heads=3), ConfigError, "heads: got 3, expected a divisor of 8"),
        (dict(hidden_act="mish"), ConfigError, "hidden_act: got 'mish', expected one of 'gelu'"),
        (dict(eps=-1.0), ConfigError, "eps: got -1.0"),
        (dict(backend="cuda"), BackendError, "cannot serve encoder_layers"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    layer = draw_layer(8, 12, torch.float32, torch.Generator().manual_seed(0))
    arguments = dict(x=torch.ones(3, 8), layers=[LayerWeights(*(t.cpu() for t in layer))], heads=2) | change
    with pytest.raises(error, match=message):
        ops.encoder_layers(attend=lambda q, k, v: v, **arguments)


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("qkv", torch.ones(8, 8), ShapeError, r"layers\[1\].qkv: got shape \(8, 8\), expected \(24, 8\)"),
        ("up", torch.ones(12, 8).half(), DtypeError, r"layers\[1\].up: got torch.float16, expected torch.float32"),
        ("down_bias", torch.ones(7), ShapeError, r"layers\[1\].down_bias: got shape \(7,\), expected \(8,\)"),
        ("output_norm", None, DtypeError, r"layers\[1\].output_norm: got a NoneType"),
    ],
)
def test_bad_weights_are_named(name, value, error, message):
    layer = LayerWeights(*(t.cpu() for t in draw_layer(8, 12, torch.float32, torch.Generator().manual_seed(0))))
    with pytest.raises(error, match=message):
        ops.encoder_layers(torch.ones(3, 8), [layer, layer._replace(**{name: value})], lambda q, k, v: v, heads=2)
