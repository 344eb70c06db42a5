"""RoFormer (arXiv 2104.09864): BERT's encoder with rotary positions, of any length."""

import torch
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.models.base import BERT_HEAD_PARTS, EMBEDDING_PARTS, EncoderModel, MaskedLMModel, PublishedNames


def _constants(config: EncoderConfig) -> dict[str, Tensor]:
    """The table of sinusoids that transformers keeps among its weights, `[P, D]`: sines, then cosines."""
    k = torch.arange(config.head_dim // 2, dtype=torch.float64)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float64)
    angles = positions[:, None] / 10000 ** (2 * k / config.head_dim)
    return {"encoder.embed_positions.weight": torch.cat([angles.sin(), angles.cos()], dim=1).float()}


NAMES = PublishedNames(
    "roformer",
    EMBEDDING_PARTS | {"embeddings.projection": "embeddings_project"} | BERT_HEAD_PARTS,
    constants=_constants,
)


class RoFormerModel(EncoderModel):
    __doc__ = "RoFormer's encoder: rotary positions, no pooler.\n\n" + EncoderModel.__doc__
    model_type, names = "roformer", NAMES


class RoFormerForMaskedLM(MaskedLMModel):
    __doc__ = "RoFormer with the masked-language-model head.\n\n" + MaskedLMModel.__doc__
    model_type, names, model_class = "roformer", NAMES, RoFormerModel
