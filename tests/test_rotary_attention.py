"""What is peculiar to rotary attention; the rest is in test_attention.py."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbert import ops, reference
from fastbert.errors import ConfigError, ShapeError
from fastbert.testing import compare, make_inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    layout=st.sampled_from(["padded", "packed"]),
    head_dim=st.sampled_from([2, 4, 26]),
    dtype=st.sampled_from(DTYPES),
    theta=st.sampled_from([10000.0, 10.0, 0.5]),
    rotate_value=st.booleans(),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_equals_reference(lengths, layout, head_dim, dtype, theta, rotate_value, interleaved, seed):
    inputs = make_inputs(lengths, 2, head_dim, layout=layout, dtype=dtype, seed=seed)
    flags = {"theta": theta, "rotate_value": rotate_value, "interleaved": interleaved}
    compare(partial(ops.rotary_attention, **flags), partial(reference.rotary_attention, **flags), inputs)


def test_rotation_by_hand():
    """D=4: pairs (0, 1) and (2, 3) turn by m and m/100."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    got = reference.rotate(x.expand(1, 6, 1, 4), 10000.0)[0, 5, 0]
    turned = [
        complex(1, 2) * complex(math.cos(5), math.sin(5)),
        complex(3, 4) * complex(math.cos(0.05), math.sin(0.05)),
    ]
    expected = torch.tensor([part for z in turned for part in (z.real, z.imag)], dtype=torch.float64)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shift", [1, 7, 100])
def test_scores_depend_on_the_difference_of_positions_only(backend, shift):
    """A sequence after `shift` masked positions has the answer that it has at the start."""
    q, k, v = torch.randn(3, 1, 12, 2, 8, dtype=torch.float64)
    expected = ops.rotary_attention(q, k, v, backend=backend)
    mask = torch.arange(shift + 12)[None] >= shift
    late = (torch.cat([torch.zeros(1, shift, 2, 8, dtype=torch.float64), t], dim=1) for t in (q, k, v))
    output = ops.rotary_attention(*late, key_padding_mask=mask, backend=backend)
    torch.testing.assert_close(output[:, shift:], expected)


def test_half_split_pairs_are_a_permutation_of_interleaved_pairs():
    q, k, v = torch.randn(3, 2, 12, 2, 8, dtype=torch.float64)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    expected = ops.rotary_attention(q, k, v)
    torch.testing.assert_close(ops.rotary_attention(q[..., order], k[..., order], v, interleaved=False), expected)
    assert not torch.allclose(ops.rotary_attention(q, k, v, interleaved=False), expected)


def test_the_first_token_is_not_turned_and_values_are_only_if_asked():
    q, k, v = torch.randn(3, 2, 1, 2, 8)
    torch.testing.assert_close(ops.rotary_attention(q, k, v), v)
    q, k, v = torch.randn(3, 1, 9, 2, 8, dtype=torch.float64)
    turned = reference.rotate(v, 10000.0)
    torch.testing.assert_close(ops.rotary_attention(q, k, v, rotate_value=True), ops.rotary_attention(q, k, turned))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_stay_exact_at_long_lengths_in_16_bits(dtype):
    """Angles in the dtype of the input would be off by 0.6 at position 1536."""
    inputs = make_inputs([1536], 1, 8, dtype=dtype)
    compare(ops.rotary_attention, reference.rotary_attention, inputs)
    late = {n: inputs[n].detach()[:, -4:].double() for n in "qkv"}
    exact = reference.rotate(torch.cat([torch.zeros(1, 1532, 1, 8).double(), late["q"]], dim=1), 10000.0)[:, -4:]
    rounded = reference.rotate(inputs["q"].detach(), 10000.0)[:, -4:]
    assert (rounded - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_tables_serve_many_lengths_in_any_order():
    for length in (1, 17, 3, 64, 65, 2):
        compare(ops.rotary_attention, reference.rotary_attention, make_inputs([length], 1, 6))


def test_wrong_input_is_named():
    odd = torch.zeros(2, 3, 2, 5)
    with pytest.raises(ShapeError, match=r"q: got head dim 5, the last of \(2, 3, 2, 5\), expected an even number"):
        ops.rotary_attention(odd, odd, odd)
    even = torch.zeros(2, 3, 2, 4)
    for theta in (0.0, float("nan"), float("inf"), "10"):
        with pytest.raises(ConfigError, match=f"theta: got {theta!r}, expected a positive number"):
            ops.rotary_attention(even, even, even, theta=theta)
