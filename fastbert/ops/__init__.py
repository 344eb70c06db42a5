"""The fused operations, one file each: check the arguments, pick a backend, run its twin."""

from fastbert.ops.attention import attention
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastbert.ops.embedding_layer_norm import embedding_layer_norm
from fastbert.ops.encoder_layers import LayerWeights, encoder_layers
from fastbert.ops.lamb import LambGroup, lamb
from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from fastbert.ops.relative_attention import relative_attention
from fastbert.ops.rotary_attention import rotary_attention

__all__ = [
    "LambGroup",
    "LayerWeights",
    "attention",
    "bias_gelu",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "encoder_layers",
    "lamb",
    "linear_cross_entropy",
    "relative_attention",
    "rotary_attention",
]
