"""All layers of an encoder in one call, for inference: what fastbert.compile_for_latency runs."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert import extension, portable, reference
from fastbert.backend import pick, serves, triton_cannot_run
from fastbert.errors import ShapeError
from fastbert.ops import checks
from fastbert.ops.attention import attention

ACTIVATIONS = {
    "gelu": "none",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class LayerWeights(NamedTuple):
    """The weights of a layer, matrices in the dtype of x and contiguous: qkv `[3C, C]`, the projections to query, key
    and value one below the other; output `[C, C]`; up `[I, C]`, down `[C, I]`. Biases, and weights and biases of the
    norms behind attention and feed-forward: any floating dtype."""

    qkv: Tensor
    qkv_bias: Tensor
    output: Tensor
    output_bias: Tensor
    attention_norm: Tensor
    attention_norm_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    output_norm: Tensor
    output_norm_bias: Tensor


@torch.no_grad()
def encoder_layers(
    x: Tensor,
    layers: Sequence[LayerWeights],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    heads: int,
    hidden_act: str = "gelu",
    eps: float = 1e-12,
    every: bool = False,
    backend: str | None = None,
) -> list[Tensor]:
    """The post-LN layers of BERT one after another, y = LN(x + attention(x)), z = LN(y + W2 act(W1 y + b1) + b2),
    without dropout and without gradients: see fastbert.reference.

    x: [..., C], floating. layers: the weights of each application; a shared layer's come as often as it is applied.
    attend(q, k, v): the attention, [..., H, D] -> [..., H, D], views of one projection. hidden_act: by its name in
    transformers. every: return the result of each application, not of the last alone.
    Returns a list of [..., C] in x's dtype, under autocast too.

    Backend "triton": float16, bfloat16 and float32 on CUDA, a few launches a layer, for up to some thousand rows; on
    the CPU in Triton's interpreter only, if asked for. Backend "cuda": all layers in one launch, only if asked for; x
    [B, L, C] of 16 bits with B <= 8, L <= 512, heads of 64 columns, C and I multiples of 64, gelu or relu; `attend` is
    ops.attention or a functools.partial of it with a key_padding_mask.

    Raises ShapeError, DtypeError, ConfigError (hidden_act, eps), BackendError.
    Source: Vaswani et al. (2017), arXiv 1706.03762; Devlin et al. (2018), arXiv 1810.04805, section 3.
    """
    checks.tensors(x=x)
    checks.floating(x=x)
    checks.rows(x=x)
    checks.epsilon(eps)
    checks.option("hidden_act", hidden_act, tuple(ACTIVATIONS))
    checks.number("heads", heads, lambda n: n > 0 and x.shape[-1] % n == 0, f"a divisor of {x.shape[-1]}", whole=True)
    for number, weights in enumerate(layers):
        _check_weights(f"layers[{number}]", weights, x)
    if not layers:
        raise ShapeError("layers: got none, expected at least one")
    act = ACTIVATIONS[hidden_act]
    order = _ON_CUDA if x.is_cuda and x.dtype != torch.float32 else _ELSEWHERE
    name = pick("encoder_layers", order, backend, x, layers, attend, heads, act, every)
    attend = attend if name == "cuda" else partial(_attended, attend)
    with torch.autocast(x.device.type, enabled=False):
        return _TWINS[name](x, layers, attend, heads=heads, act=act, eps=eps, every=every)


def _attended(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = attend(q, k, v)
    checks.shape("attend's result", o, q.shape, "as q")
    checks.same_dtype(q=q, **{"attend's result": o})
    return o


def _check_weights(where: str, weights: LayerWeights, x: Tensor) -> None:
    tensors = {f"{where}.{name}": t for name, t in zip(weights._fields, weights, strict=True)}
    checks.tensors(**tensors)
    checks.floating(**tensors)
    checks.same_device(x=x, **tensors)
    width, inner = x.shape[-1], len(weights.up)
    shapes = {"qkv": (3 * width, width), "output": (width, width), "up": (inner, width), "down": (width, inner)}
    for name, t in zip(weights._fields, weights, strict=True):
        rows = {"qkv_bias": 3 * width, "up_bias": inner}.get(name, width)
        checks.shape(f"{where}.{name}", t, shapes.get(name, (rows,)), f"for x of {width} columns")
        if name in shapes:
            checks.same_dtype(**{"x": x, f"{where}.{name}": t})


def _triton_serves(x: Tensor, layers: Sequence[LayerWeights], *_) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x is {x.dtype}, not float16, bfloat16 or float32"
    if x.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "x is bfloat16, whose products Triton's interpreter gets wrong"
    if x.numel() // x.shape[-1] * 2 * max(3 * x.shape[-1], *(len(w.up) for w in layers)) >= 2**31:
        return f"offsets within rows of x of shape {tuple(x.shape)} do not fit 32 bits"
    return triton_cannot_run(x.device)


def _triton(x: Tensor, layers, attend, *, heads: int, act: str, eps: float, every: bool) -> list[Tensor]:
    from fastbert.kernels.encoder_layers import encoder_layers_fwd

    if x.numel() == 0:
        return [torch.empty_like(x)] * (len(layers) if every else 1)
    layers = [LayerWeights(*(t.contiguous() for t in weights)) for weights in layers]
    return encoder_layers_fwd(x.contiguous(), layers, lambda *qkv: attend(*qkv).contiguous(), heads, act, eps, every)


_ONE_LAUNCH = ("none", "tanh", "relu")  # its activations, in the order of csrc/encoder_launch.h


def _cuda_serves(x: Tensor, layers: Sequence[LayerWeights], attend, heads: int, act: str, every: bool) -> str | None:
    plain = attend is attention or (
        isinstance(attend, partial) and attend.func is attention and attend.keywords.keys() <= {"key_padding_mask"}
    )
    sizes = {"hidden": x.shape[-1], "intermediate": len(layers[0].up)}
    if not plain:
        return "attend is not ops.attention with at most a key_padding_mask"
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {x.dtype} on {x.device}, not float16 or bfloat16 on CUDA"
    if x.dim() != 3 or not 1 <= x.shape[0] <= 8 or not 1 <= x.shape[1] <= 512:
        return f"x has shape {tuple(x.shape)}, not [B, L, C] with B from 1 to 8 and L to 512"
    if (
        x.shape[-1] != 64 * heads
        or sizes["intermediate"] % 64
        or max(sizes["hidden"], sizes["intermediate"] / 4) > 4096
    ):
        return f"{heads} heads do not have 64 columns each, or it does not take the sizes {sizes}"
    if act not in _ONE_LAUNCH or every or len(set(map(id, layers))) > 48 or len(layers) > 128:
        return "it computes the last result, of gelu or relu, and at most 128 applications of 48 layers"
    if reason := extension.load():
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastbert::encoder_layers", "CUDA"):
        return "the extension was built without its CUDA part: install it again where nvcc is, or remove it"
    return None


def _cuda(x: Tensor, layers, attend, *, heads: int, act: str, eps: float, every: bool) -> list[Tensor]:
    own = {id(weights): weights for weights in layers}
    place = {key: number for number, key in enumerate(own)}
    weights = [t.contiguous() if t.dim() == 2 else t.float().contiguous() for layer in own.values() for t in layer]
    applications = torch.tensor([place[id(layer)] for layer in layers], dtype=torch.uint8)
    mask = attend.keywords.get("key_padding_mask") if isinstance(attend, partial) else None
    mask = None if mask is None else mask.contiguous()
    options = weights, applications, mask, eps, _ONE_LAUNCH.index(act)
    return [torch.ops.fastbert.encoder_layers(x.contiguous(), *options)]


_ON_CUDA = {"triton": _triton_serves, "torch": serves, "reference": serves, "cuda": _cuda_serves}
_ELSEWHERE = {"torch": serves, "reference": serves, "triton": _triton_serves, "cuda": _cuda_serves}
_TWINS = {
    "triton": _triton,
    "torch": portable.encoder_layers,
    "reference": reference.encoder_layers,
    "cuda": _cuda,
}
