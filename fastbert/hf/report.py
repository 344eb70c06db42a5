"""What `accelerate` has done, for a person to read."""

from dataclasses import dataclass
from importlib import import_module

import torch

from fastbert.backend import pick
from fastbert.hf.view import View
from fastbert.ops import fused_attention

_ATTENTIONS = {"absolute": "attention", "rotary": "rotary_attention", "relative": "relative_attention"}


@dataclass(frozen=True)
class Replaced:
    """An encoder that runs on fastbert. path: of the module in the model ("" is the model itself). layers: how many are
    applied. unpads: whether padding is left out. backends: by op, for the device and dtype of the weights. again: it
    ran on fastbert before."""

    path: str
    kind: str
    layers: int
    unpads: bool
    backends: dict[str, str]
    again: bool = False

    def __str__(self) -> str:
        padding = "without padding" if self.unpads else "with padding (unpad=True leaves it out)"
        head = f"{self.path or 'the model'}: {self.kind}, {self.layers} layers, {padding}"
        ops = ", ".join(f"{op} {backend}" for op, backend in self.backends.items())
        return f"{head}{' (was accelerated already)' if self.again else ''}\n    {ops}"


@dataclass(frozen=True)
class Left:
    """A part of the model that runs as before, and why."""

    path: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or 'the model'}: {self.kind}, {self.reason}"


@dataclass(frozen=True)
class Report:
    """What runs on fastbert and what was left as it is."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = ["on fastbert:", *(f"  {each}" for each in self.replaced)]
        if self.left:
            lines += ["as before:", *(f"  {each}" for each in self.left)]
        return "\n".join(lines)


def backends(view: View) -> dict[str, str]:
    """The backend of each op of an encoder, for its parameters' device and dtype; under autocast those of its dtype."""
    encoder = view.ours.encoder
    weight = encoder.layers[0].output_norm.weight
    width, heads = view.config.hidden_size, view.config.num_attention_heads
    x, q = weight.new_empty(1, width), weight.new_empty(1, heads, width // heads)
    attention = _ATTENTIONS[view.config.attention]
    found = {
        "embedding_layer_norm": _pick("embedding_layer_norm", x, weight, weight),
        attention: pick(attention, fused_attention.backends(q), None, q, None),
        "dropout_add_layer_norm": _pick("dropout_add_layer_norm", x, x, weight, weight, weight),
    }
    if "gelu" in view.config.hidden_act:
        found["bias_gelu"] = _pick("bias_gelu", x, weight)
    return found


def _pick(op: str, first: torch.Tensor, *tensors: torch.Tensor) -> str:
    module = import_module(f"fastbert.ops.{op}")
    return pick(op, module._ON_CUDA if first.is_cuda else module._ELSEWHERE, None, first, *tensors)
