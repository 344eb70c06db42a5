"""y = dropout(LN(z)), z = word + token type + position, as reference.embedding_layer_norm; and the gradients of the
tables, weight and bias.

Floors: forward every word row that occurs is read once, y is written; backward dy and those rows are read, a gradient
[V, C] is written. T = 16384 tokens that name 11400 of V = 21128 words, C = 768 columns, 16 bits: 43 MB and 75 MB, which
are 13 and 22 us at the 3.35 TB/s of an H100, 9 and 16 us at the 4.8 TB/s of an H200. This backward also writes dz and
reads it for each table but the types', 25 MB each that an L2 may hold, and zeros the gradient before, whose rows that
occur are then written twice.

Backward. One pass over the rows looks z up again, writes dz, in the dtype of the tables as PyTorch would, and sums for
weight, bias and up to _TYPES types, a row of a float32 table per program; rows.column_sums adds them up. For the other
tables tokens are sorted by id, stably, and cut into chunks of _CHUNK. A program per chunk sums the rows of each of its
ids. Where an id goes on in the next chunk the sum is a part, float32, and another kernel sums an id's parts. Launches
depend on T and not on the ids, for which the host would have to wait, nor on the device; there are no atomics: the same
bits on every run.

An id outside its table reads nothing: its row is NaN. Nobody waits for a GPU to find it.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import rows
from fastbert.kernels.launch import Dropout, seed_drop_factor
from fastbert.kernels.layer_norm import launch_config

_CHUNK = 32  # of sorted tokens. A word that fills T of them leaves T / 32 parts, which are read 32 at a time
_TYPES = 4  # each costs the pass over the rows registers


class Lookup(NamedTuple):
    """What is read of a table [limit, C], contiguous: row ids[n] for token n or, with a period, ids[n % period];
    without ids, row n % period. ids: int64 or int32, contiguous."""

    table: Tensor
    limit: int
    ids: Tensor | None
    period: int | None


def lookup(table: Tensor, ids: Tensor | None, shape: torch.Size, in_order: bool = False) -> Lookup:
    """Of the tokens' ids, of this shape or one that broadcasts to it. None: all 0, or if in_order the index in the last
    dimension."""
    table = table.contiguous()
    if ids is None:
        return Lookup(table, len(table), None, shape[-1] if in_order else 1)
    ids = ids.expand(shape)
    lines = math.prod(shape[:-1])
    if lines > 1 and all(n == 1 or stride == 0 for n, stride in zip(shape[:-1], ids.stride(), strict=False)):
        return Lookup(table, len(table), ids[(0,) * (ids.dim() - 1)].contiguous(), shape[-1])
    return Lookup(table, len(table), ids.contiguous(), None)


@triton.jit
def _find(what, o_row, m_row):
    """(ids of rows, int32; which of them are in the table)."""
    o_id = o_row if what.period is None else o_row % what.period
    if what.ids is None:
        return o_id, m_row & (o_id < what.limit)
    else:
        b_id = tl.load(what.ids + o_id, mask=m_row, other=0)
        return b_id.to(tl.int32), m_row & (b_id >= 0) & (b_id < what.limit)


@triton.jit
def _sum(
    word, kind, place, o_row, m_row,
    KINDS: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(z, without what is not in its table; types; which rows have everything). KINDS, PLACES: whether there are any;
    to compare a tuple with None is more than Triton 3.6 can."""
    b_id, m_all = _find(word, o_row, m_row)
    b_z = rows.load(word.table, b_id.to(tl.int64), m_all, COLUMNS, COLUMNS, BLOCK_N)
    b_kind = b_id * 0
    if KINDS:
        b_kind, m_id = _find(kind, o_row, m_row)
        b_z += rows.load(kind.table, b_kind.to(tl.int64), m_id, COLUMNS, COLUMNS, BLOCK_N)
        m_all &= m_id
    if PLACES:
        b_id, m_id = _find(place, o_row, m_row)
        b_z += rows.load(place.table, b_id.to(tl.int64), m_id, COLUMNS, COLUMNS, BLOCK_N)
        m_all &= m_id
    return b_z, b_kind, m_all


@triton.jit(do_not_specialize=["tokens", "drop"])
def _embedding_forward_kernel(
    word, kind, place, p_weight, p_bias, p_seed, drop, factor, p_y, p_stats, tokens, eps,
    KINDS: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < tokens
    o_wide = o_row.to(tl.int64)
    b_z, _, m_all = _sum(word, kind, place, o_row, m_row, KINDS, PLACES, COLUMNS, BLOCK_N)
    b_mean, b_scale = rows.statistics(b_z, eps, COLUMNS)
    b_scale = tl.where(m_all, b_scale, float("nan"))
    tl.store(p_stats + o_row, b_mean, mask=m_row)
    tl.store(p_stats + tokens + o_row, b_scale, mask=m_row)
    b_weight = rows.load_vector(p_weight, COLUMNS, BLOCK_N)
    b_bias = rows.load_vector(p_bias, COLUMNS, BLOCK_N)
    b_y = (b_z - b_mean[:, None]) * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]
    if p_seed is not None:
        b_y *= rows.factors(tl.load(p_seed), o_wide, drop, factor, BLOCK_N)
    rows.store(p_y, b_y, o_wide, m_row, COLUMNS, BLOCK_N)


@triton.jit(do_not_specialize=["tokens", "drop", "chunk"])
def _embedding_backward_kernel(
    p_dy, word, kind, place, p_weight, p_seed, drop, factor, p_stats, p_dz, p_sums, p_type_sums,
    tokens, chunk,
    KINDS: tl.constexpr, PLACES: tl.constexpr, TYPES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz of `chunk` rows; and what they add to dweight and dbias, as rows `program_id(0)` of p_sums
    [2, programs, COLUMNS], and to the rows of TYPES types, as row `program_id(0)` of p_type_sums
    [programs, TYPES, COLUMNS]."""
    i_chunk = tl.program_id(0)
    b_weight = rows.load_vector(p_weight, COLUMNS, BLOCK_N)
    b_dweight = tl.zeros([BLOCK_N], tl.float32)
    b_dbias = tl.zeros([BLOCK_N], tl.float32)
    b_types = ()
    for _ in tl.static_range(TYPES):
        b_types += (b_dbias,)
    for start in range(i_chunk * chunk, tl.minimum(i_chunk * chunk + chunk, tokens), BLOCK_M):
        o_row = start + tl.arange(0, BLOCK_M)
        m_row = o_row < tokens
        o_wide = o_row.to(tl.int64)
        # dy is zero outside, and so is what the sums get
        b_dy = rows.load(p_dy, o_wide, m_row, COLUMNS, COLUMNS, BLOCK_N)
        if p_seed is not None:
            b_dy *= rows.factors(tl.load(p_seed), o_wide, drop, factor, BLOCK_N)
        b_z, b_kind, m_all = _sum(word, kind, place, o_row, m_row, KINDS, PLACES, COLUMNS, BLOCK_N)
        b_mean = tl.load(p_stats + o_row, mask=m_row, other=0)
        b_scale = tl.load(p_stats + tokens + o_row, mask=m_row, other=0)
        b_normal = (b_z - b_mean[:, None]) * b_scale[:, None]
        b_dweight += tl.sum(b_dy * b_normal, 0)
        b_dbias += tl.sum(b_dy, 0)
        b_dz = rows.norm_gradient(b_dy, b_normal, b_weight, b_scale, COLUMNS)
        rows.store(p_dz, b_dz, o_wide, m_row, COLUMNS, BLOCK_N)
        b_more = ()
        for i in tl.static_range(TYPES):
            b_more += (b_types[i] + tl.sum(tl.where((b_kind == i)[:, None], b_dz, 0), 0),)
        b_types = b_more
    p_sums += i_chunk * COLUMNS
    rows.store_vector(p_sums, b_dweight, COLUMNS, BLOCK_N)
    rows.store_vector(p_sums + tl.num_programs(0) * COLUMNS, b_dbias, COLUMNS, BLOCK_N)
    for i in tl.static_range(TYPES):
        rows.store_vector(p_type_sums + (i_chunk * TYPES + i) * COLUMNS, b_types[i], COLUMNS, BLOCK_N)


@triton.jit(do_not_specialize=["tokens"])
def _embedding_chunk_kernel(
    p_dz, p_id, p_order, p_dtable, p_parts, tokens, limit,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of rows order[n] of dz with the same id[n], for the n of chunk number `program_id(0)`. Whole ones are rows
    of the table; one that began before the chunk, or goes on behind it, is a row of p_parts [chunks, 2, COLUMNS]: the
    first if it has the chunk's first row, else the second."""
    i_chunk = tl.program_id(0)
    first = i_chunk * CHUNK
    end = tl.minimum(first + CHUNK, tokens)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < COLUMNS
    p_parts += i_chunk.to(tl.int64) * 2 * COLUMNS
    i_first = tl.load(p_id + first)
    before = tl.load(p_id + first - 1, mask=first > 0, other=-1)
    behind = tl.load(p_id + end, mask=end < tokens, other=-1)
    i_id = i_first
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_M):
        b_rows = ()
        i_next = ()
        for i in tl.static_range(BLOCK_M):  # all loads before the first store
            i_row = tl.load(p_order + start + i, mask=start + i < end, other=0)
            b_rows += (tl.load(p_dz + i_row * COLUMNS + o_column, mask=m_column & (start + i < end), other=0),)
            i_next += (tl.load(p_id + start + i + 1, mask=start + i + 1 < end, other=-1),)
        for i in tl.static_range(BLOCK_M):
            b_sum += b_rows[i].to(tl.float32)
            after = i_next[i]
            if after != i_id:
                if (i_id >= 0) & (i_id < limit):
                    if (i_id != before) & (i_id != behind):
                        p_row = p_dtable + i_id.to(tl.int64) * COLUMNS + o_column
                        tl.store(p_row, b_sum.to(p_dtable.dtype.element_ty), mask=m_column)
                    else:
                        p_part = p_parts + (i_id != i_first).to(tl.int32) * COLUMNS + o_column
                        tl.store(p_part, b_sum, mask=m_column)
                b_sum = tl.zeros([BLOCK_N], tl.float32)
            i_id = after


@triton.jit(do_not_specialize=["chunks"])
def _embedding_merge_kernel(
    p_id, p_dtable, p_parts, chunks, limit,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of the parts of an id that begins in chunk number `program_id(0)` and goes on behind it."""
    i_chunk = tl.program_id(0)
    first = i_chunk * CHUNK
    i_id = tl.load(p_id + first + CHUNK - 1)
    before = tl.load(p_id + first - 1, mask=first > 0, other=-1)
    behind = tl.load(p_id + first + CHUNK)
    if (i_id == behind) & (i_id != before) & (i_id >= 0) & (i_id < limit):
        o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_column = o_column < COLUMNS
        # Its part in its first chunk is the second one, unless it has the chunk's first row
        later = (tl.load(p_id + first) != i_id).to(tl.int32)
        b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        more = i_chunk < chunks
        while more:
            o_chunk = i_chunk + tl.arange(0, BLOCK_M)
            o_part = o_chunk * 2 + tl.where(o_chunk * CHUNK == first, later, 0)
            i_chunk += BLOCK_M
            m_part = tl.load(p_id + o_chunk * CHUNK, mask=o_chunk < chunks, other=-1) == i_id
            m_part |= o_chunk * CHUNK == first
            p_part = p_parts + o_part.to(tl.int64)[:, None] * COLUMNS + o_column[None, :]
            b_sum += tl.load(p_part, mask=m_part[:, None] & m_column[None, :], other=0)
            more = tl.sum(m_part.to(tl.int32)) == BLOCK_M
        p_row = p_dtable + i_id.to(tl.int64) * COLUMNS + o_column
        tl.store(p_row, tl.sum(b_sum, 0).to(p_dtable.dtype.element_ty), mask=m_column)


def embedding_layer_norm_fwd(
    word: Lookup,
    kind: Lookup | None,
    place: Lookup | None,
    weight: Tensor,
    bias: Tensor,
    dropout: Dropout | None,
    eps: float,
    shape: torch.Size,
) -> tuple[Tensor, Tensor]:
    """(y [*shape, C] in the dtype of the tables, the rows' statistics for the backward, float32 [2, tokens]) for tokens
    of that shape. kind: the token types; place: the positions."""
    tokens, columns = shape.numel(), len(weight)
    y = torch.empty(*shape, columns, dtype=word.table.dtype, device=weight.device)
    stats = torch.empty(2, tokens, dtype=torch.float32, device=weight.device)
    if y.numel() > 0:
        config = launch_config("forward", columns)
        with torch.cuda.device_of(weight):
            _embedding_forward_kernel[(triton.cdiv(tokens, config["BLOCK_M"]),)](
                *(word, kind, place, weight.contiguous(), bias.contiguous(), *seed_drop_factor(dropout), y, stats),
                *(tokens, eps),
                KINDS=kind is not None,
                PLACES=place is not None,
                COLUMNS=columns,
                **config,
            )
    return y, stats


def embedding_layer_norm_bwd(
    dy: Tensor,
    word: Lookup,
    kind: Lookup | None,
    place: Lookup | None,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The gradients of the tables of word, kind and place (None for what is None), of weight and of bias, contiguous
    and in their dtypes, for dy [..., C]."""
    dtables = [None if what is None else torch.zeros_like(what.table) for what in (word, kind, place)]
    dweight, dbias = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (weight, bias))
    if dy.numel() > 0:
        dy = dy.reshape(-1, len(weight)).contiguous()  # so that the stride of rows is known to the compiler
        types = _types_on_the_way(kind)
        with torch.cuda.device_of(dy):
            dz, sums, type_sums = _row_gradients(dy, word, kind, place, weight, stats, dropout, types)
            rows.column_sums(sums, [dweight, dbias])
            if types:
                rows.column_sums(type_sums, [dtables[1][:types]])
            for what, dtable in zip((word, None if types else kind, place), dtables, strict=True):
                if what is not None:
                    _sum_by_id(dz, *_sorted(what, len(dz)), dtable)
    return *dtables, dweight, dbias


def _row_gradients(
    dy: Tensor,
    word: Lookup,
    kind: Lookup | None,
    place: Lookup | None,
    weight: Tensor,
    stats: Tensor,
    dropout: Dropout | None,
    types: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, p_sums, p_type_sums) of the kernel."""
    tokens, columns = dy.shape
    config = launch_config("backward", columns)
    chunk = rows.chunk(tokens, config["BLOCK_M"])
    programs = triton.cdiv(tokens, chunk)
    dz = torch.empty(tokens, columns, dtype=word.table.dtype, device=dy.device)
    sums = torch.empty(2, programs, columns, dtype=torch.float32, device=dy.device)
    type_sums = torch.empty(1, programs, types * columns, dtype=torch.float32, device=dy.device)
    _embedding_backward_kernel[(programs,)](
        *(dy, word, kind, place, weight.contiguous(), *seed_drop_factor(dropout), stats, dz, sums, type_sums),
        *(tokens, chunk),
        KINDS=kind is not None,
        PLACES=place is not None,
        TYPES=types,
        COLUMNS=columns,
        **config,
    )
    return dz, sums, type_sums


def _types_on_the_way(kind: Lookup | None) -> int:
    """How many types, from the first on, the pass over the rows gives the gradients of: all that occur, or none."""
    types = 0 if kind is None else 1 if kind.ids is None else len(kind.table)
    return types if types <= _TYPES else 0


def _sorted(what: Lookup, tokens: int) -> tuple[Tensor, Tensor]:
    """(ids in order, int32; the tokens that have them), stable."""
    if what.ids is None:
        order = torch.arange(what.period, device=what.table.device)
        ids = order.int()
    else:  # half the bits of int64 are half of the passes
        ids, order = what.ids.flatten().int().sort(stable=True)
    if what.period is None:
        return ids, order
    lines = torch.arange(0, tokens, what.period, device=ids.device)
    # Of one id, expand and flatten is a view whose elements are one.
    return ids[:, None].expand(-1, len(lines)).flatten().contiguous(), (order[:, None] + lines).flatten()


def _sum_by_id(dz: Tensor, ids: Tensor, order: Tensor, dtable: Tensor) -> None:
    """dtable[ids[n]] += dz[order[n]] for all n whose id is in it, where dtable is zeros and ids ascend."""
    tokens, columns = dz.shape
    chunks, block_n = triton.cdiv(tokens, _CHUNK), 512 // dz.itemsize  # 16 bytes a thread
    parts = torch.empty(chunks, 2, columns, dtype=torch.float32, device=dz.device)
    sizes = {"COLUMNS": columns, "CHUNK": _CHUNK}
    _embedding_chunk_kernel[(chunks, triton.cdiv(columns, block_n))](
        dz, ids, order, dtable, parts, tokens, len(dtable), **sizes, BLOCK_M=8, BLOCK_N=block_n, num_warps=1
    )
    if chunks > 1:
        _embedding_merge_kernel[(chunks - 1, triton.cdiv(columns, 128))](
            ids, dtable, parts, chunks, len(dtable), **sizes, BLOCK_M=32, BLOCK_N=128, num_warps=4
        )
