"""The tolerance rule must let right ops pass and catch wrong ones."""

from functools import partial

import pytest
import torch

from fastbert import reference
from fastbert.testing import compare, make_inputs


def double(x, bias=None):
    return x * 2 if bias is None else x * 2 + bias


def inputs(dtype=torch.float32, **more):
    return {"x": torch.randn(5, 7).to(dtype).requires_grad_(), **more}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equal_passes_and_reports(dtype):
    rows = compare(lambda x: x + x, double, inputs(dtype))
    assert [row.name for row in rows] == ["output", "grad x"]
    assert all(row.ok and row.error <= row.bound for row in rows)
    assert "output: error 0.000e+00, bound" in str(rows[0])


def test_a_wrong_value_a_wrong_gradient_and_a_nan_are_caught():
    with pytest.raises(AssertionError, match="output: error .* too large"):
        compare(lambda x: x * 2.001, double, inputs())
    with pytest.raises(AssertionError, match="grad x: error .* too large"):
        compare(lambda x: x.detach() + x, double, inputs())
    with pytest.raises(AssertionError, match="output: error inf"):
        compare(lambda x: (x * 2).where(torch.arange(7) > 0, float("nan")), double, inputs())


def test_memory_that_is_not_written_is_caught():
    def forgetful(x):
        y = torch.empty(x.shape)
        y[1:] = 2 * x.detach()[1:]
        return y + 0 * x

    with pytest.raises(AssertionError, match="output: error inf"):
        compare(forgetful, double, inputs())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_lost_gradient_a_shape_and_a_dtype_are_caught():
    with pytest.raises(AssertionError, match="got output, expected output, grad x"):
        compare(lambda x: 2 * x.detach(), double, inputs())
    with pytest.raises(AssertionError, match=r"output: got torch.float32 \(7, 5\), expected torch.float32 \(5, 7\)"):
        compare(lambda x: (2 * x).mT, double, inputs())
    with pytest.raises(AssertionError, match="output: got torch.float64"):
        compare(lambda x: 2 * x.double(), double, inputs())


def test_a_reference_that_is_not_finite_is_caught():
    with pytest.raises(AssertionError, match="reference is not finite"):
        compare(double, double, {"x": torch.tensor([1.0, float("inf")])})


def test_lists_and_inputs_without_gradients():
    def many(xs, n):
        return [x * n for x in xs], xs[0] + 1

    xs = [torch.randn(2, requires_grad=True), torch.randn(3)]
    rows = compare(many, many, {"xs": xs, "n": 3})
    assert [row.name for row in rows] == ["output[0][0]", "output[0][1]", "output[1]", "grad xs[0]"]


def test_an_eager_op_in_16_bits_is_within_its_own_yardstick():
    compare(
        partial(reference.attention, dropout_p=0.0), reference.attention, make_inputs([9, 9], 2, 8, dtype=torch.half)
    )


def test_make_inputs_layouts():
    padded = make_inputs([3, 0, 2], 2, 4, layout="padded", padding=float("nan"))
    assert padded["q"].shape == (3, 3, 2, 4) and padded["key_padding_mask"].sum(1).tolist() == [3, 0, 2]
    assert torch.equal(padded["k"].isnan().all(-1).all(-1), ~padded["key_padding_mask"])
    packed = make_inputs([3, 0, 2], 2, 4, layout="packed", projection_view=True)
    assert packed["cu_seqlens"].tolist() == [0, 3, 3, 5] and packed["cu_seqlens"].dtype == torch.int32
    assert packed["max_seqlen"] == 3 and packed["v"].shape == (5, 2, 4) and packed["v"].stride() == (24, 4, 1)
    with pytest.raises(ValueError, match=r"layout: got 'dense' for \[3, 2\]"):
        make_inputs([3, 2], 2, 4)
