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
}
