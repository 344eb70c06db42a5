"""The launches of Triton kernels that ship, for static.py to compile."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

Launches = Iterator[tuple[str, Callable[[], object]]]


def _gelu() -> Launches:
    import torch

    from fastbert.kernels import gelu

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x, bias = torch.empty(1024, 1024, dtype=dtype), torch.empty(1024, dtype=dtype)
        for form in ("none", "tanh"):
            name = f"{str(dtype).removeprefix('torch.')} {form}"
            yield name, partial(gelu.bias_gelu_fwd, x, bias, form)
            yield name, partial(gelu.bias_gelu_bwd, x, x, bias, form)


# dtype, columns, dropout, x_bias: training, in 16 bits and under autocast (x in 16 bits, the others float32); inference
LAYER_NORM = (
    "bfloat16 768 dropout bias",
    "float16 1024 dropout bias",
    "float16 1024 bias",
    "autocast 768 dropout bias",
    "float32 768 dropout",
    "float16 4096 dropout bias",
)


def _layer_norm() -> Launches:
    import torch

    from fastbert.kernels import layer_norm
    from fastbert.kernels.launch import Dropout

    for name in LAYER_NORM:
        dtype, columns, *traits = name.split()
        narrow, wide = (torch.bfloat16, torch.float32) if dtype == "autocast" else (getattr(torch, dtype),) * 2
        x, residual = (torch.empty(1024, int(columns), dtype=each) for each in (narrow, wide))
        vector, stats = torch.empty(int(columns), dtype=wide), torch.empty(2, 1024)
        operands = x, residual, vector, vector, vector if "bias" in traits else None
        dropout = Dropout(torch.empty(1, dtype=torch.int64), 26) if "dropout" in traits else None
        one = dropout is None and narrow == wide
        wanted = not one, True, True, True, "bias" in traits
        yield name, partial(layer_norm.dropout_add_layer_norm_fwd, *operands, 1e-12, dropout, dropout is not None)
        yield name, partial(layer_norm.dropout_add_layer_norm_bwd, residual, *operands, stats, dropout, wanted)


def _rows() -> Launches:
    import torch

    from fastbert.kernels import rows

    tables, sums = torch.empty(3, 512, 1024), [torch.empty(1024, dtype=torch.bfloat16) for _ in range(3)]
    yield "bfloat16", lambda: rows.column_sums(tables, sums)


def _cross_entropy() -> Launches:
    import torch

    from fastbert.kernels.cross_entropy import cross_entropy, row_stride

    z, labels = torch.empty(64, row_stride(21128)), torch.empty(64, dtype=torch.int64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        g = z if dtype == torch.float32 else torch.empty_like(z, dtype=dtype)
        yield str(dtype).removeprefix("torch."), partial(cross_entropy, z, z[0], labels, 21128, -100, z[1], g)
    yield "loss only", partial(cross_entropy, z, z[0], labels, 21128, -100, z[1], None)


# dtype, columns, tables (w: words, t: token types, p: positions), layout, dropout
EMBEDDING = (
    "bfloat16 768 wtp packed dropout",
    "float16 1024 wt packed dropout",
    "float16 128 wtp dense",
    "float32 768 wtp dense dropout",
)


def _embedding() -> Launches:
    """Of the types, two; of the positions, those of the packed tokens, or by index."""
    import torch

    from fastbert.kernels.embedding import embedding_layer_norm_bwd, embedding_layer_norm_fwd, lookup
    from fastbert.kernels.launch import Dropout

    for name in EMBEDDING:
        dtype, columns, tables, layout, *dropped = name.split()
        shape, table = torch.Size((2, 512)), torch.empty(1024, int(columns), dtype=getattr(torch, dtype))
        ids = torch.empty(shape, dtype=torch.int64)
        places = lookup(table, ids if layout == "packed" else None, shape, True) if "p" in tables else None
        lookups = lookup(table, ids, shape), lookup(table[:2], ids, shape), places
        vector, stats = torch.empty(int(columns), dtype=table.dtype), torch.empty(2, 1024)
        dropout = Dropout(torch.empty(1, dtype=torch.int64), 26) if dropped else None
        yield name, partial(embedding_layer_norm_fwd, *lookups, vector, vector, dropout, 1e-12, shape)
        yield name, partial(embedding_layer_norm_bwd, table, *lookups, vector, vector, stats, dropout)


# dtype, head dim, positions, layout, dropout: what models are trained with, and one of each thing that changes code
ATTENTION = (
    "float16 64 absolute packed",
    "bfloat16 64 absolute packed dropout",
    "bfloat16 64 rotary packed",
    "float16 64 rotary packed dropout",
    "float16 64 rotary dense",
    "float16 64 absolute mask dropout",
    "float16 64 rotary-values-halves mask dropout",
    "float16 26 rotary packed dropout",
    "bfloat16 128 rotary packed dropout",
    "float32 64 rotary packed dropout",
)
# The same, with the radius in place of the positions: with 5, both edges of the band cross a tile
RELATIVE = (
    "float16 64 R64 packed",
    "bfloat16 64 R64 packed dropout",
    "bfloat16 64 R64 mask dropout",
    "bfloat16 64 R5 packed dropout",
    "float16 26 R64 packed dropout",
    "bfloat16 128 R64 packed dropout",
    "float32 64 R64 packed dropout",
)


def _attention(shipped: Sequence[str] = ATTENTION) -> Launches:
    """A forward pass without gradients, and a training step's forward and backward, of each."""
    import torch

    from fastbert.kernels import attention
    from fastbert.kernels.launch import Rotation

    for name in shipped:
        (q, k, v), o, lse, sequences, dropout = _attended(name)
        positions, rotation, values = name.split()[2], None, "values" in name
        if "rotary" in positions:
            table = torch.empty(2, 512, q.shape[-1] // 2)
            rotation = Rotation(table, values, "halves" not in positions)
        options = 0.125, sequences, rotation, dropout
        operands = (q, k, v) if rotation is None else (o, o, o if values else v)
        if dropout is None:
            yield f"{name}, inference", partial(attention.attention_fwd, q, k, v, *options, False)
        yield name, partial(attention.attention_fwd, q, k, v, *options, True)
        yield name, partial(attention.attention_bwd, o, *operands, q, o, lse, *options)


def _relative_attention(backward: bool, shipped: Sequence[str] = RELATIVE) -> Launches:
    """A training step's forward of each, and one without gradients if there is no dropout; or its backward."""
    import torch
    import triton

    from fastbert.kernels import relative_attention, relative_attention_bwd
    from fastbert.kernels.launch import Relative

    for name in shipped:
        (q, k, v), o, lse, sequences, dropout = _attended(name)
        radius, width = int(name.split()[2].removeprefix("R")), max(16, triton.next_power_of_2(q.shape[-1]))
        waves, edges = q.new_empty(2 * (512 + radius), width), q.new_empty(16, width)
        options = 0.125, sequences, Relative(torch.empty(2, len(waves), width // 2), waves, edges, radius), dropout
        if backward:
            yield name, partial(relative_attention_bwd.relative_attention_bwd, o, q, k, v, q, o, lse, *options)
            continue
        forward = partial(relative_attention.relative_attention_fwd, q, k, v, *options)
        if dropout is None:
            yield f"{name}, inference", partial(forward, False)
        yield name, partial(forward, True)


def _attended(name: str) -> tuple:
    """((q, k, v), o, lse, sequences, dropout) that a name calls for."""
    import torch

    from fastbert.kernels.launch import Dropout, Sequences

    dtype, head_dim, _, layout, *dropped = name.split()
    rows = (1024,) if layout == "packed" else (2, 512)
    q, k, v = torch.empty(*rows, 3, 12, int(head_dim), dtype=getattr(torch, dtype)).unbind(-3)
    o, lse = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty(12, 1024)
    mask = torch.empty(2, 512, dtype=torch.bool) if layout == "mask" else None
    ends = torch.empty(3, dtype=torch.int32) if layout == "packed" else None
    dropout = Dropout(torch.empty(1, dtype=torch.int64), 26) if dropped else None
    return (q, k, v), o, lse, Sequences(512, mask, ends), dropout


# dtype, rows, hidden and intermediate size, activation
ENCODER_LAYERS = (
    "float16 32 768 3072 gelu_new",
    "bfloat16 128 768 3072 gelu",
    "float16 512 312 1248 relu",
    "bfloat16 4096 1024 4096 gelu",
    "float32 128 768 3072 gelu",
)


def _encoder_layers() -> Launches:
    """Two applications of a layer without the attention between, whose kernels are launched elsewhere: the first reads
    rows as they are, the second rows whose norm is deferred."""
    import torch

    from fastbert.kernels.encoder_layers import encoder_layers_fwd
    from fastbert.ops.encoder_layers import ACTIVATIONS, LayerWeights

    for name in ENCODER_LAYERS:
        dtype, rows, width, inner, act = name.split()
        dtype, rows, width, inner = getattr(torch, dtype), int(rows), int(width), int(inner)
        matrices = {"qkv": (3 * width, width), "output": (width, width), "up": (inner, width), "down": (width, inner)}
        sizes = {"qkv_bias": 3 * width, "up_bias": inner}
        weights = (
            torch.empty(matrices[field], dtype=dtype) if field in matrices else torch.empty(sizes.get(field, width))
            for field in LayerWeights._fields
        )
        x, layer = torch.empty(rows, width, dtype=dtype), LayerWeights(*weights)
        options = lambda q, k, v: v.contiguous(), 4, ACTIVATIONS[act], 1e-12, False
        yield name, partial(encoder_layers_fwd, x, [layer, layer], *options)


# File of kernels/ -> the launches that ship: a name, and a call of the launcher with CPU tensors that nothing reads.
# Their sizes are multiples of 16, as real ones are: Triton compiles other code for others. A name may come twice.
CONFIGURATIONS: dict[str, Callable[[], Launches]] = {
    "attention": _attention,
    "relative_attention": partial(_relative_attention, False),
    "relative_attention_bwd": partial(_relative_attention, True),
    "encoder_layers": _encoder_layers,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "rows": _rows,
    "cross_entropy": _cross_entropy,
    "embedding": _embedding,
}
