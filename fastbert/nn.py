"""Thin modules over the ops: embeddings, attention (absolute, rotary, relative), layer, encoder (unshared or shared),
heads.

All take rows `[T, C]` of packed tokens (with `cu_seqlens`, `max_seqlen`) or dense `[B, L, C]` (with an optional
`key_padding_mask`), in the dtype of their parameters or under autocast. They hold no buffers: sinusoids are implied by
the op.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert import ops
from fastbert.config import EncoderConfig
from fastbert.ops.branch_linear import branch_linear, pays_off
from fastbert.ops.encoder_layers import ACTIVATIONS
from fastbert.ops.shared_linear import SharedWeight, can_share, share, shared_branch, widened

_GELU = {name: form for name, form in ACTIVATIONS.items() if form in ("none", "tanh")}
_OTHER = {name: getattr(F, function) for name, function in ACTIVATIONS.items() if name not in _GELU}


class Weights:
    """How a layer gets at its weights. This is the usual way: as its modules have them."""

    def branch(self, x: Tensor, *modules: nn.Module) -> Sequence[Tensor]:
        """What each of the modules, linear layers, makes of x, and x again, for the residual connection."""
        if pays_off(x) and all(is_plain(module, nn.Linear) for module in modules):
            return branch_linear(x, [module.weight for module in modules], [module.bias for module in modules])
        return *(module(x) for module in modules), x

    def product(self, x: Tensor, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """x W' and b, for an op that adds b by itself; or the module's result and None."""
        if pays_off(x) and is_plain(module, nn.Linear):
            return F.linear(x, module.weight), module.bias
        return module(x), None

    def activated(self, x: Tensor, module: nn.Module, hidden_act: str) -> tuple[Tensor, Tensor]:
        """act(x W' + b), and x again, for the residual connection."""
        if hidden_act in _GELU and pays_off(x) and is_plain(module, nn.Linear):
            product, x = branch_linear(x, [module.weight], [None])
            return ops.bias_gelu(product, module.bias, approximate=_GELU[hidden_act]), x
        act = partial(F.gelu, approximate=_GELU[hidden_act]) if hidden_act in _GELU else _OTHER[hidden_act]
        product, x = self.branch(x, module)
        return act(product), x

    def vector(self, parameter: Tensor) -> Tensor:
        """A weight or bias `[C]` that is not multiplied by a matrix."""
        return parameter


MODULES = Weights()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call does just what `kind` does: not replaced, wrapped (adapter, quantisation, sharding), patched or
    hooked."""
    # asked of every layer in every forward pass, so without a loop
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and "forward" not in module.__dict__ and not hooked and not hooked_everywhere()


def _is_sharded_alone(layer: nn.Module) -> bool:
    """Whether nothing but fully_shard has been done to a layer: it makes a class of its own, with a hook before and
    after."""
    hooked = len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
    return type(layer).__name__ == f"FSDP{EncoderLayer.__name__}" and hooked and not hooked_everywhere()


def hooked_everywhere() -> bool:
    """Whether there are hooks for all modules."""
    every = nn.modules.module
    forward = every._global_forward_hooks or every._global_forward_pre_hooks
    return bool(forward or every._global_backward_hooks or every._global_backward_pre_hooks)


class Embeddings(nn.Module):
    """dropout(LN(word + token type + position)), then a projection to hidden_size where the family has one. The
    position table exists for absolute positions only.

    forward(input_ids, token_type_ids=None, position_ids=None): int64 ids of one shape `[...]` -> `[..., hidden_size]`.
    token_type_ids None means type 0.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.dropout_p = config.hidden_dropout_prob
        self.word = nn.Embedding(config.vocab_size, width)
        self.token_type = nn.Embedding(config.type_vocab_size, width)
        self.position = nn.Embedding(config.max_position_embeddings, width) if config.attention == "absolute" else None
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        # ALBERT's published PyTorch weights hold a projection even where the widths are equal; the other families' do
        # not.
        projected = width != config.hidden_size or config.model_type == "albert"
        self.projection = nn.Linear(width, config.hidden_size) if projected else None

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        x = ops.embedding_layer_norm(
            input_ids,
            _table(self.word),
            self.norm.weight,
            self.norm.bias,
            token_type_ids=token_type_ids,
            token_type_embeddings=_table(self.token_type),
            position_ids=position_ids,
            position_embeddings=None if self.position is None else _table(self.position),
            eps=self.norm.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        return x if self.projection is None else self.projection(x)


def _table(embedding: nn.Embedding) -> Tensor:
    """The rows of an embedding `[V, C]`. That of its padding_idx, if it has one (ours have none), gets no gradient."""
    if embedding.padding_idx is None or not torch.is_grad_enabled():
        return embedding.weight
    return _FreezeRow.apply(embedding.weight, embedding.padding_idx)


class _FreezeRow(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(table, row):
        return table.view_as(table)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.row = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():  # create_graph: it may be read again
            gradient = gradient.clone()
        gradient[ctx.row] = 0  # in place: a lookup makes the gradient of its table for nobody else
        return gradient, None


class SelfAttention(nn.Module):
    """Multi-head self-attention without residual: three projections, `ops.attention`, an output projection. `[..., C]`
    -> `[..., C]`.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.heads, self.dropout_p = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, **sequences) -> Tensor:
        return self.output(self.context(x, **sequences)[0])

    def context(self, x: Tensor, weights: Weights = MODULES, **sequences) -> tuple[Tensor, Tensor]:
        """The heads' answers side by side, before the output projection; and x again, for the residual connection."""
        *projected, x = weights.branch(x, self.query, self.key, self.value)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in projected)
        o = self.attend(q, k, v, dropout_p=self.dropout_p if self.training else 0.0, **sequences)
        return o.flatten(-2), x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments) -> Tensor:
        return ops.attention(q, k, v, **arguments)


class RotarySelfAttention(SelfAttention):
    """Self-attention with rotary position embedding (RoFormer, arXiv 2104.09864)."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.rotate_value = config.rotary_value

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments) -> Tensor:
        return ops.rotary_attention(q, k, v, rotate_value=self.rotate_value, **arguments)


class RelativeSelfAttention(SelfAttention):
    """Self-attention with clipped sinusoidal relative positions on keys and values (NEZHA, arXiv 1909.00204)."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.max_relative_position = config.max_relative_position

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments) -> Tensor:
        return ops.relative_attention(q, k, v, max_relative_position=self.max_relative_position, **arguments)


ATTENTIONS = {"absolute": SelfAttention, "rotary": RotarySelfAttention, "relative": RelativeSelfAttention}


class EncoderLayer(nn.Module):
    """The post-LN block of BERT: y = LN(x + dropout(attention(x))), z = LN(y + dropout(W2 act(W1 y + b1) + b2)), with
    dropout_p on the first and output_dropout_p on the second.

    forward(x, rows=None, **sequences): with rows, int64 `[N]`, of packed x `[T, C]` only these rows of z, `[N, C]`:
    all are attended to, the rest of the layer is computed for these.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dropout_p = self.output_dropout_p = config.hidden_dropout_prob
        self.hidden_act = config.hidden_act
        self.attention = ATTENTIONS[config.attention](config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, rows: Tensor | None = None, weights: Weights = MODULES, **sequences) -> Tensor:
        attention, norm = self.attention, self.attention_norm
        own = _is_own_attention(attention)
        o, x = attention.context(x, weights, **sequences) if own else (attention(x, **sequences), x)
        if rows is not None:
            o, x = o.index_select(0, rows), x.index_select(0, rows)
        o, bias = weights.product(o, attention.output) if own else (o, None)
        y = self._add_norm(o, bias, x, norm, weights, self.dropout_p)
        h, y = weights.activated(y, self.intermediate, self.hidden_act)
        return self._add_norm(*weights.product(h, self.output), y, self.output_norm, weights, self.output_dropout_p)

    def _add_norm(
        self,
        x: Tensor,
        x_bias: Tensor | None,
        residual: Tensor,
        norm: nn.LayerNorm,
        weights: Weights,
        dropout_p: float,
    ) -> Tensor:
        dropout_p = dropout_p if self.training else 0.0
        weight, bias = weights.vector(norm.weight), weights.vector(norm.bias)
        return ops.dropout_add_layer_norm(x, residual, weight, bias, x_bias=x_bias, eps=norm.eps, dropout_p=dropout_p)


def _is_own_attention(module: nn.Module) -> bool:
    return type(module) in ATTENTIONS.values() and is_plain(module, type(module))


class SharedWeights(Weights):
    """The weights of a layer in one of the applications that share them, by ops.shared_linear: copied once, their
    gradients summed in float32 over all applications. `total` goes from one application to the next.
    """

    def __init__(self, linears: Mapping[tuple[nn.Module, ...], SharedWeight], vectors: Mapping[Tensor, Tensor], total):
        self.linears, self.vectors, self.total = linears, vectors, total

    @classmethod
    def of(cls, layer: "EncoderLayer") -> "SharedWeights | None":
        """Those of a layer for one forward pass, or None if its modules must be called one by one or are not all to be
        trained."""
        attention = layer.attention
        if type(layer) is not EncoderLayer or not _is_own_attention(attention):
            return None
        together = [(attention.query, attention.key, attention.value), (attention.output,)]
        together += [(layer.intermediate,), (layer.output,)]
        norms = (layer.attention_norm, layer.output_norm)
        modules = list(chain.from_iterable(together))
        if not all(is_plain(m, nn.Linear) for m in modules) or not all(is_plain(m, nn.LayerNorm) for m in norms):
            return None
        parameters = [p for module in (*modules, *norms) for p in (module.weight, module.bias)]
        if not all(type(p) is nn.Parameter and p.requires_grad for p in parameters):
            return None
        groups = [([m.weight for m in group], [m.bias for m in group]) for group in together]
        lone = [p for norm in norms for p in (norm.weight, norm.bias)]
        # of these another op adds the bias: the norm's, and gelu's
        for index in (1, 2, 3) if layer.hidden_act in _GELU else (1, 3):
            lone += groups[index][1]
            groups[index] = (groups[index][0], [])
        found, total = share(_product_dtype(layer.intermediate.weight), groups)
        return cls(dict(zip(together, found, strict=True)), {p: widened(p) for p in lone}, total)

    def again(self, total: Tensor) -> "SharedWeights":
        """The same for another application."""
        return SharedWeights(self.linears, self.vectors, total)

    def branch(self, x: Tensor, *modules: nn.Module) -> Sequence[Tensor]:
        sizes = [module.out_features for module in modules]
        *parts, x, self.total = shared_branch(x, self.linears[modules], self.total, sizes)
        return *parts, x

    def product(self, x: Tensor, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        return self.branch(x, module)[0], self.vector(module.bias)

    def activated(self, x: Tensor, module: nn.Module, hidden_act: str) -> tuple[Tensor, Tensor]:
        product, x = self.branch(x, module)
        if hidden_act not in _GELU:
            return _OTHER[hidden_act](product), x
        return ops.bias_gelu(product, self.vector(module.bias), approximate=_GELU[hidden_act]), x

    def vector(self, parameter: Tensor) -> Tensor:
        return self.vectors[parameter]


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What F.linear multiplies in."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


class Encoder(nn.Module):
    """num_hidden_layers applications of the layers in `layers`: one each, or, in ALBERT, shared by groups.

    Application i runs the `inner_group_num` layers of group `i * num_hidden_groups // num_hidden_layers`, in integers:
    the floating-point form in other implementations picks another group for some pairs, such as 18 layers in 14 groups.

    While it is trained, a layer that is applied more than once has its weights copied once per forward pass, in the
    dtype they are multiplied in, query, key and value side by side, and the gradient of each weight is summed in
    float32 over all applications in one buffer, by the matrix product itself (ops.shared_linear says how and why). That
    buffer is what autograd hands to the parameters, so optimizers, gradient scalers and DDP see one gradient per
    tensor; parameters in 16 bits keep it in float32 if `optim.main_gradients` asked for it. Where a linear layer or a
    norm is replaced, hooked, frozen or sharded by itself, the layer's modules are called instead, one by one.

    gradient_checkpointing: keep only the input of each application for the backward pass and compute the rest again;
    in training mode. share_weights: False calls the modules of a shared layer one by one, which is better where a CPU
    has little to multiply.
    """

    gradient_checkpointing = False
    share_weights = True

    def __init__(self, config: EncoderConfig):
        super().__init__()
        count, inner = config.num_hidden_layers, config.inner_group_num or 1
        groups = config.num_hidden_groups or count
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(groups * inner))
        self.applications = [[i * groups // count * inner + j for j in range(inner)] for i in range(count)]

    def forward(
        self, x: Tensor, *, rows: Tensor | None = None, output_hidden_states: bool = False, **sequences
    ) -> tuple[Tensor, list[Tensor] | None]:
        """The last hidden state, and with output_hidden_states the input and the result of every application, in a list
        of num_hidden_layers + 1. rows: int64 `[N]`, the only rows of packed x whose last hidden state is wanted,
        `[N, C]`.
        """
        states = [x] if output_hidden_states else None
        shared = self._shared()
        order = list(chain.from_iterable(self.applications))
        ends = set(accumulate(map(len, self.applications)))
        for number, index in enumerate(order, start=1):
            only = rows if number == len(order) else None
            x = self._apply_layer(self.layers[index], x, shared.get(index), sequences, only)
            if states is not None and number in ends:
                states.append(x)
        return x, states

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters of layers that are applied more than once."""
        return [p for index in self._applied_again() for p in self.layers[index].parameters()]

    def _applied_again(self) -> list[int]:
        times = Counter(chain.from_iterable(self.applications))
        return [index for index, count in times.items() if count > 1]

    def _shared(self) -> dict[int, SharedWeights]:
        """The shared weights of this forward pass, by the index of the layer."""
        if not self.share_weights or not torch.is_grad_enabled() or not can_share():
            return {}
        found = {index: SharedWeights.of(self.layers[index]) for index in self._applied_again()}
        return {index: weights for index, weights in found.items() if weights is not None}

    def _apply_layer(
        self, layer: nn.Module, x: Tensor, shared: SharedWeights | None, sequences: dict, rows: Tensor | None
    ) -> Tensor:
        if rows is not None:
            if not (is_plain(layer, EncoderLayer) or _is_sharded_alone(layer)):
                return self._apply_layer(layer, x, shared, sequences, None).index_select(0, rows)
            sequences = {**sequences, "rows": rows}
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        run = partial(checkpoint, use_reentrant=False) if checkpointed else _call
        if shared is None:
            return run(layer, x, **sequences)

        def apply(x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            weights = shared.again(total)
            return layer(x, weights=weights, **sequences), weights.total

        x, shared.total = run(apply, x, shared.total)
        return x


def _call(function: Callable, *arguments, **named):
    return function(*arguments, **named)


class MaskedLMHead(nn.Module):
    """LN(act(W h)) in the width of the embeddings, then the word embeddings as decoder, and a bias over the vocabulary.

    forward(h, word_embeddings): h `[..., C]` -> logits `[..., V]`. forward(h, word_embeddings, labels): labels int64
    `[...]`, -100 where there is nothing to predict -> the mean cross-entropy over the labels, a scalar; no `[..., V]`
    tensor is kept. Rows without a label cost as much as others on a GPU: leave them out where they are known.
    """

    def __init__(self, config: EncoderConfig, hidden_act: str | None = None):
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.hidden_act = hidden_act or config.hidden_act
        self.dense = nn.Linear(config.hidden_size, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, h: Tensor) -> Tensor:
        """`[..., C]` -> `[..., E]`: all but the decoder."""
        return self.norm(MODULES.activated(h, self.dense, self.hidden_act)[0])

    def forward(self, h: Tensor, word_embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return F.linear(self.transform(h), word_embeddings, self.bias)
        return ops.linear_cross_entropy(self.transform(h), word_embeddings, self.bias, labels)


class Classifier(nn.Module):
    """Logits of what a row stands for: dropout, then W h; with `dense_act` dropout, W' h, that activation, and then the
    same. `[..., C]` -> `[..., count]`.
    """

    def __init__(
        self,
        config: EncoderConfig,
        count: int,
        dropout_p: float = 0.0,
        dense_act: str | None = None,
        dense_dropout_p: float | None = None,
    ):
        super().__init__()
        self.dropout, self.dense_act = nn.Dropout(dropout_p), dense_act
        self.dense_dropout = (
            nn.Dropout(dropout_p if dense_dropout_p is None else dense_dropout_p) if dense_act else None
        )
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if dense_act else None
        self.classifier = nn.Linear(config.hidden_size, count)

    def forward(self, h: Tensor) -> Tensor:
        if self.dense is not None:
            h = self.dense_dropout(h)
            h = torch.tanh(self.dense(h)) if self.dense_act == "tanh" else self._activated(h)
        return self.classifier(self.dropout(h))

    def _activated(self, h: Tensor) -> Tensor:
        return MODULES.activated(h, self.dense, self.dense_act)[0]


class DiscriminatorHead(nn.Module):
    """ELECTRA's replaced-token head: W2 act(W1 h), one logit per token, neither LayerNorm nor dropout. `[..., C]` ->
    `[...]`.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.hidden_act = config.hidden_act
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.prediction = nn.Linear(config.hidden_size, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.prediction(MODULES.activated(h, self.dense, self.hidden_act)[0]).squeeze(-1)


class Pooler(nn.Module):
    """tanh(W h) of a sequence's first token: `[B, C]` -> `[B, C]`."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))
