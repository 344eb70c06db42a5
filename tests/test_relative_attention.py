"""What is peculiar to relative attention; the rest is in test_attention.py."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import ops, reference
from fastbert.errors import ConfigError, ShapeError
from fastbert.testing import compare, make_inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def hold(inputs, **arguments):
    compare(partial(ops.relative_attention, **arguments), partial(reference.relative_attention, **arguments), inputs)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    layout=st.sampled_from(["padded", "packed"]),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 26]),
    dtype=st.sampled_from(DTYPES),
    max_relative_position=st.integers(1, 50),
    dropout_p=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 2**32),
)
def test_equals_reference(lengths, layout, heads, head_dim, dtype, max_relative_position, dropout_p, seed):
    inputs = make_inputs(lengths, heads, head_dim, layout=layout, dtype=dtype, seed=seed)
    hold(inputs, max_relative_position=max_relative_position, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("radius", [1, 2, 5, 64])
@pytest.mark.parametrize("length", ["1", "R - 1", "R", "R + 1", "2 * R", "2 * R + 1", "4 * R + 3"])
def test_lengths_around_the_radius(radius, length):
    tokens = eval(length, {"R": radius})
    hold(make_inputs([tokens], 2, 8), max_relative_position=radius)
    hold(make_inputs([tokens, tokens], 1, 4, dtype=torch.float64), max_relative_position=radius, dropout_p=0.3, seed=1)


def test_the_english_radius():
    hold(make_inputs([300], 1, 8), max_relative_position=127)


def test_definition_by_hand():
    """One head, four tokens, R=2, element by element."""
    q, k, v = torch.randn(3, 4, 6, dtype=torch.float64)
    table = [[f(r * 10000 ** (-2 * p / 6)) for p in range(3) for f in (math.sin, math.cos)] for r in range(5)]
    table = torch.tensor(table, dtype=torch.float64)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for i in range(4):
        a = torch.stack([table[max(-2, min(2, j - i)) + 2] for j in range(4)])
        weights = torch.softmax((k + a) @ q[i] / math.sqrt(6), dim=0)
        expected[i] = weights @ (v + a)
    for backend in ("torch", "reference"):
        arguments = {"max_relative_position": 2, "backend": backend}
        output = ops.relative_attention(*(t[None, :, None] for t in (q, k, v)), **arguments)
        torch.testing.assert_close(output[0, :, 0], expected)


def test_the_table_is_the_code_s_and_not_the_paper_s():
    """Row r holds the angles r theta, so offset 0 is at R theta: the paper's (j - i) theta, turned by R theta."""
    radius, head_dim = 64, 64
    table = reference.sinusoids(radius, head_dim).view(-1, head_dim // 2, 2)
    code = torch.complex(table[..., 1], table[..., 0])
    theta = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float64)[:, None]
    paper = torch.polar(torch.ones(1, dtype=torch.float64), offset * theta)
    torch.testing.assert_close(code, paper * torch.polar(torch.ones(1, dtype=torch.float64), radius * theta))
    assert (code - paper).abs().max() > 1.9


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shift", [1, 7, 100])
def test_only_the_difference_of_positions_matters(backend, shift):
    """A sequence after `shift` masked positions has the answer that it has at the start."""
    q, k, v = torch.randn(3, 1, 12, 2, 8, dtype=torch.float64)
    arguments = {"max_relative_position": 4, "backend": backend}
    expected = ops.relative_attention(q, k, v, **arguments)
    mask = torch.arange(shift + 12)[None] >= shift
    late = (torch.cat([torch.zeros(1, shift, 2, 8, dtype=torch.float64), t], dim=1) for t in (q, k, v))
    output = ops.relative_attention(*late, key_padding_mask=mask, **arguments)
    torch.testing.assert_close(output[:, shift:], expected)


def test_offsets_beyond_the_radius_look_alike():
    """With R=1 the first query sees keys 2, 3, 4 all at the same distance: their order does not matter to it."""
    q, k, v = torch.randn(3, 1, 5, 1, 4, dtype=torch.float64)
    order = [0, 1, 4, 2, 3]
    arguments = {"max_relative_position": 1}
    expected = ops.relative_attention(q, k, v, **arguments)[:, 0]
    torch.testing.assert_close(ops.relative_attention(q, k[:, order], v[:, order], **arguments)[:, 0], expected)
    arguments = {"max_relative_position": 3}
    assert not torch.allclose(
        ops.relative_attention(q, k[:, order], v[:, order], **arguments)[:, 0],
        ops.relative_attention(q, k, v, **arguments)[:, 0],
    )


def test_one_dropout_mask_serves_keys_and_values():
    """With v = 0 and L = 1 the output is a multiple of a_00: dropped as a whole, or kept and scaled."""
    zeros = torch.zeros(64, 1, 1, 4, dtype=torch.float64)
    output = ops.relative_attention(zeros, zeros, zeros, dropout_p=0.5, seed=3)
    a = reference.sinusoids(64, 4)[64]
    kept = output.abs().sum((1, 2, 3)) > 0
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(output[kept][:, 0, 0], (2 * a).expand(kept.sum(), 4))


@pytest.mark.parametrize("length", [6, 12])
@pytest.mark.parametrize("arguments", [{}, {"dropout_p": 0.2, "seed": 1}], ids=["", "dropout"])
def test_compiles_without_graph_breaks(length, arguments):
    """Windows of the table below 2R + 1 tokens, the band of the scores from there on."""
    torch.compiler.reset()
    inputs = make_inputs([length, length], 2, 4)
    op = partial(ops.relative_attention, max_relative_position=4, **arguments)
    results = []
    for run in (torch.compile(op, fullgraph=True, backend="aot_eager"), op):
        output = run(**inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), [inputs[n] for n in "qkv"])))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


class LargestTensor(TorchDispatchMode):
    storage = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.storage = max(self.storage, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("length", "radius"), [(64, 64), (256, 16)])
def test_nothing_of_length_squared_times_head_dim_is_made(length, radius):
    inputs = make_inputs([length], 1, 32)
    with LargestTensor() as largest:
        ops.relative_attention(**inputs, max_relative_position=radius).sum().backward()
    assert largest.storage <= 4 * length * (length + 2 * radius)


def test_wrong_input_is_named():
    odd = torch.zeros(2, 3, 2, 5)
    with pytest.raises(ShapeError, match=r"q: got head dim 5, the last of \(2, 3, 2, 5\), expected an even number"):
        ops.relative_attention(odd, odd, odd)
    even = torch.zeros(2, 3, 2, 4)
    for radius in (0, 3.5, None, 2**30 + 1):
        with pytest.raises(
            ConfigError, match=rf"max_relative_position: got {radius}, expected from 1 to 2\^30, an int"
        ):
            ops.relative_attention(even, even, even, max_relative_position=radius)
