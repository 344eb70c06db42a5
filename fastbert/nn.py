"""Thin modules over the ops: embeddings, attention (absolute, rotary, relative), layer, encoder (unshared or shared),
heads.

All take rows `[T, C]` of packed tokens (with `cu_seqlens`, `max_seqlen`) or dense `[B, L, C]` (with an optional
`key_padding_mask`), in the dtype of their parameters or under autocast. They hold no buffers: sinusoids are implied by
the op.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops
from fastbert.config import EncoderConfig

_GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
_OTHER = {"relu": F.relu, "silu": F.silu, "swish": F.silu}


def _linear_activation(x: Tensor, linear: nn.Module, hidden_act: str) -> Tensor:
    if hidden_act not in _GELU:
        return _OTHER[hidden_act](linear(x))
    if _is_plain(linear):
        return ops.bias_gelu(F.linear(x, linear.weight), linear.bias, approximate=_GELU[hidden_act])
    return F.gelu(linear(x), approximate=_GELU[hidden_act])


def _is_plain(linear: nn.Module) -> bool:
    """Whether a call is nothing but x W' + b: not replaced, wrapped (adapter, quantisation, sharding) or hooked."""
    return type(linear) is nn.Linear and not (
        linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    )


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
            self.word.weight,
            self.norm.weight,
            self.norm.bias,
            token_type_ids=token_type_ids,
            token_type_embeddings=self.token_type.weight,
            position_ids=position_ids,
            position_embeddings=None if self.position is None else self.position.weight,
            eps=self.norm.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        return x if self.projection is None else self.projection(x)


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
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value))
        o = self.attend(q, k, v, dropout_p=self.dropout_p if self.training else 0.0, **sequences)
        return self.output(o.flatten(-2))

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


_ATTENTION = {"absolute": SelfAttention, "rotary": RotarySelfAttention, "relative": RelativeSelfAttention}


class EncoderLayer(nn.Module):
    """The post-LN block of BERT: y = LN(x + dropout(attention(x))), z = LN(y + dropout(W2 act(W1 y + b1) + b2))."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dropout_p, self.hidden_act = config.hidden_dropout_prob, config.hidden_act
        self.attention = _ATTENTION[config.attention](config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, **sequences) -> Tensor:
        y = self._add_norm(self.attention(x, **sequences), x, self.attention_norm)
        return self._add_norm(
            self.output(_linear_activation(y, self.intermediate, self.hidden_act)), y, self.output_norm
        )

    def _add_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        return ops.dropout_add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=dropout_p)


class Encoder(nn.Module):
    """num_hidden_layers applications of the layers in `layers`: one each, or, in ALBERT, shared by groups.

    Application i runs the `inner_group_num` layers of group `i * num_hidden_groups // num_hidden_layers`, in integers:
    the floating-point form in other implementations picks another group for some pairs, such as 18 layers in 14 groups.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        count, inner = config.num_hidden_layers, config.inner_group_num or 1
        groups = config.num_hidden_groups or count
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(groups * inner))
        self.applications = [[i * groups // count * inner + j for j in range(inner)] for i in range(count)]

    def forward(
        self, x: Tensor, *, output_hidden_states: bool = False, **sequences
    ) -> tuple[Tensor, list[Tensor] | None]:
        """The last hidden state, and with output_hidden_states the input and the result of every application, in a list
        of num_hidden_layers + 1.
        """
        states = [x] if output_hidden_states else None
        for application in self.applications:
            for index in application:
                x = self.layers[index](x, **sequences)
            if states is not None:
                states.append(x)
        return x, states


class MaskedLMHead(nn.Module):
    """LN(act(W h)) in the width of the embeddings, then the word embeddings as decoder, and a bias over the vocabulary.

    forward(h, word_embeddings): h `[..., C]` -> logits `[..., V]`. forward(h, word_embeddings, labels): labels int64
    `[...]`, -100 where there is nothing to predict -> the mean cross-entropy over the labels, a scalar; only labelled
    rows are computed, and no `[..., V]` tensor is kept.
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
        return self.norm(_linear_activation(h, self.dense, self.hidden_act))

    def forward(self, h: Tensor, word_embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return F.linear(self.transform(h), word_embeddings, self.bias)
        h, labels = h.reshape(-1, h.shape[-1]), labels.reshape(-1)
        if not torch.compiler.is_compiling():  # how many rows are labelled is not for a compiler to know
            labelled = (labels != -100).nonzero().squeeze(1)
            h, labels = h[labelled], labels[labelled]
        return ops.linear_cross_entropy(self.transform(h), word_embeddings, self.bias, labels)


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
        return self.prediction(_linear_activation(h, self.dense, self.hidden_act)).squeeze(-1)


class Pooler(nn.Module):
    """tanh(W h) of a sequence's first token: `[B, C]` -> `[B, C]`."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))
