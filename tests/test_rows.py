"""Pieces of kernels over whole rows, by themselves: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

from fastbert.philox import philox4x32, row_keep, seed_tensor, threshold

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastbert.kernels import rows as r  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def factors_kernel(
    p_seed, p_y, p_first, rows, drop, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_y = r.factors(tl.load(p_seed), tl.load(p_first) + o_row, drop, 2.0, BLOCK_N)
    r.store(p_y, b_y, o_row, o_row < rows, COLUMNS, BLOCK_N)


def factors(seed, p, rows, columns, first=0):
    y, first = torch.empty(rows, columns, device=DEVICE), torch.tensor([first], device=DEVICE)
    seeds, block = seed_tensor(seed, torch.device(DEVICE)), {"BLOCK_M": 4, "BLOCK_N": r.block_n(columns)}
    factors_kernel[(-(-rows // 4),)](seeds, y, first, rows, threshold(p), COLUMNS=columns, **block)
    return y.cpu()


@pytest.mark.parametrize("seed", [0, 5, 2**32, 2**63 + 77, 2**64 - 1])
@pytest.mark.parametrize("columns", [1, 16, 50])
def test_dropout_keeps_what_philox_says(seed, columns):
    assert torch.equal(factors(seed, 0.3, 9, columns), 2.0 * row_keep(seed, 0.3, 9, columns))


def test_dropout_of_rows_beyond_32_bits():
    row = 5 * 2**32 + torch.arange(3)[:, None]
    words = philox4x32((torch.arange(4), row & 0xFFFFFFFF, row >> 32, torch.zeros_like(row)), 7)
    each = [word >> shift & 255 for word in torch.broadcast_tensors(*words) for shift in (0, 8, 16, 24)]
    expected = 2.0 * (torch.stack(each, -1).flatten(1) >= threshold(0.3))
    assert torch.equal(factors(7, 0.3, 3, 64, first=5 * 2**32), expected)


@pytest.mark.parametrize("rows", [1, 128, 300])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float16, torch.float32], [torch.float32] * 3])
def test_column_sums(rows, dtypes):
    tables = torch.randn(len(dtypes), rows, 70, device=DEVICE)
    sums = [torch.full((70,), float("nan"), dtype=dtype, device=DEVICE) for dtype in dtypes]
    r.column_sums(tables, sums)
    for table, result in zip(tables, sums, strict=True):
        assert torch.allclose(result.double(), table.double().sum(0), rtol=2 * torch.finfo(result.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 1023, 1024, 1025, 10**6])
def test_few_programs_share_the_rows(rows):
    chunk = r.chunk(rows, 2)
    assert chunk % 2 == 0 and -(-rows // chunk) <= 512 and (chunk == 2 or rows > 1024)
