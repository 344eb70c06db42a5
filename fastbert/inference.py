"""The encoder in evaluation mode, with weights packed for ops.encoder_layers."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.errors import ConfigError
from fastbert.nn import ATTENTIONS, Encoder, EncoderLayer, SelfAttention, is_plain
from fastbert.ops.encoder_layers import LayerWeights


class InferenceEncoder(nn.Module):
    """What an Encoder computes in evaluation mode, by ops.encoder_layers, without gradients.

    It holds copies of the weights as they are when it is made, matrices in `dtype` (None: as they are), query, key and
    value in one. `copied`: (its tensor, a module of the encoder, the name of the parameter there), for whoever keeps
    them equal.

    Raises ConfigError where a module of the encoder does something of its own (an adapter, a hook, quantisation), and
    where its layers differ in more than their weights.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype | None = None):
        super().__init__()
        _check_plain("the encoder", encoder, Encoder)
        first = encoder.layers[0]
        for number, layer in enumerate(encoder.layers):
            _check_layer(f"layers.{number}", layer)
            if _settings(layer) != _settings(first):
                raise ConfigError(
                    f"layers.{number} has settings {_settings(layer)}, expected {_settings(first)} as layers.0"
                )
        self.attend, self.heads = first.attention.attend, first.attention.heads  # not the module, or it would be ours
        self.hidden_act, self.eps = first.hidden_act, first.attention_norm.eps
        self.copied: list[tuple[Tensor, nn.Module, str]] = []
        layers = [self._weights(layer, dtype) for layer in encoder.layers]
        self.weights = [layers[index] for index in chain.from_iterable(encoder.applications)]
        self.ends = list(accumulate(len(application) for application in encoder.applications))

    def _weights(self, layer: EncoderLayer, dtype: torch.dtype | None) -> LayerWeights:
        attention = layer.attention
        groups = [(attention.query, attention.key, attention.value), (attention.output,), (layer.attention_norm,)]
        groups += [(layer.intermediate,), (layer.output,), (layer.output_norm,)]
        tensors = []
        for group in groups:
            matrix = isinstance(group[0], nn.Linear)
            tensors.append(self._copy(group, "weight", dtype if matrix else None))
            tensors.append(self._copy(group, "bias", None))
        return LayerWeights(*tensors)

    def _copy(self, modules: Sequence[nn.Module], name: str, dtype: torch.dtype | None) -> Tensor:
        """One tensor of the parameters of that name, one below the other."""
        parameters = [getattr(module, name).detach() for module in modules]
        whole = torch.cat([p.to(dtype or parameters[0].dtype) for p in parameters])
        parts = whole.split([len(p) for p in parameters])
        self.copied += [(part, module, name) for part, module in zip(parts, modules, strict=True)]
        return whole

    def forward(
        self, x: Tensor, *, rows: Tensor | None = None, output_hidden_states: bool = False, **sequences
    ) -> tuple[Tensor, list[Tensor] | None]:
        """As Encoder.forward."""
        results = ops.encoder_layers(
            x,
            self.weights,
            partial(self.attend, **sequences),
            heads=self.heads,
            hidden_act=self.hidden_act,
            eps=self.eps,
            every=output_hidden_states,
        )
        if rows is not None:
            results[-1] = results[-1].index_select(0, rows)
        if not output_hidden_states:
            return results[-1], None
        return results[-1], [x, *(results[end - 1] for end in self.ends)]


def _check_plain(where: str, module: nn.Module, kind: type[nn.Module]) -> None:
    if not is_plain(module, kind):
        raise ConfigError(
            f"{where} is a {type(module).__name__} that may do more than fastbert's {kind.__name__}: "
            "merge adapters and remove hooks first"
        )


def _check_layer(where: str, layer: nn.Module) -> None:
    _check_plain(where, layer, EncoderLayer)
    kind = type(layer.attention)
    _check_plain(f"{where}.attention", layer.attention, kind if kind in ATTENTIONS.values() else SelfAttention)
    linears = ("attention.query", "attention.key", "attention.value", "attention.output", "intermediate", "output")
    for name in (*linears, "attention_norm", "output_norm"):
        module = layer.get_submodule(name)
        _check_plain(f"{where}.{name}", module, nn.Linear if name in linears else nn.LayerNorm)
        for parameter in ("weight", "bias"):
            value = getattr(module, parameter)
            if type(value) is not nn.Parameter:
                found = type(value).__name__
                raise ConfigError(f"{where}.{name}.{parameter} is a {found}, expected a torch.nn.Parameter")


def _settings(layer: EncoderLayer) -> dict[str, object]:
    """All but the weights, as far as evaluation goes."""
    attention = {"attention": type(layer.attention).__name__, **vars(layer.attention)}
    numbers = {name: value for name, value in attention.items() if isinstance(value, bool | int | str)}
    del numbers["training"]
    eps = layer.attention_norm.eps, layer.output_norm.eps
    return {**numbers, "hidden_act": layer.hidden_act, "eps": eps[0] if eps[0] == eps[1] else eps}
