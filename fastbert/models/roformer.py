"""RoFormer (arXiv 2104.09864): BERT's encoder with rotary positions, of any length."""

import torch
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.models.base import (
    BERT_HEAD_PARTS,
    DENSE_SEQUENCE_HEAD_PARTS,
    EMBEDDING_PARTS,
    EncoderModel,
    MaskedLMModel,
    PublishedNames,
)
from fastbert.models.tasks import (
    MultipleChoiceModel,
    QuestionAnsweringModel,
    SequenceClassificationModel,
    TokenClassificationModel,
)


def _constants(config: EncoderConfig) -> dict[str, Tensor]:
    """The table of sinusoids that transformers keeps among its weights, `[P, D]`: sines, then cosines."""
    k = torch.arange(config.head_dim // 2, dtype=torch.float64)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float64)
    angles = positions[:, None] / 10000 ** (2 * k / config.head_dim)
    return {"encoder.embed_positions.weight": torch.cat([angles.sin(), angles.cos()], dim=1).float()}


NAMES = PublishedNames(
    "roformer",
    EMBEDDING_PARTS | {"embeddings.projection": "embeddings_project"} | BERT_HEAD_PARTS | DENSE_SEQUENCE_HEAD_PARTS,
    constants=_constants,
)


class RoFormerModel(EncoderModel):
    __doc__ = "RoFormer's encoder: rotary positions, no pooler.\n\n" + EncoderModel.__doc__
    model_type, names = "roformer", NAMES


class RoFormerForMaskedLM(MaskedLMModel):
    __doc__ = "RoFormer with the masked-language-model head.\n\n" + MaskedLMModel.__doc__
    model_type, names, model_class = "roformer", NAMES, RoFormerModel


class RoFormerForSequenceClassification(SequenceClassificationModel):
    __doc__ = "RoFormer with a head that labels sequences.\n\n" + SequenceClassificationModel.__doc__
    model_type, names, model_class = "roformer", NAMES, RoFormerModel

    @property
    def dense_act(self) -> str:
        return self.config.hidden_act


class RoFormerForTokenClassification(TokenClassificationModel):
    __doc__ = "RoFormer with a head that labels tokens.\n\n" + TokenClassificationModel.__doc__
    model_type, names, model_class = "roformer", NAMES, RoFormerModel


class RoFormerForQuestionAnswering(QuestionAnsweringModel):
    __doc__ = "RoFormer with a head that finds an answer.\n\n" + QuestionAnsweringModel.__doc__
    model_type, names, model_class = "roformer", NAMES, RoFormerModel


class RoFormerForMultipleChoice(MultipleChoiceModel):
    __doc__ = "RoFormer with a head that chooses among texts.\n\n" + MultipleChoiceModel.__doc__
    model_type, names, model_class = "roformer", NAMES, RoFormerModel
    summary = "last"  # as transformers has it, of the tokens that are real
    summary_keys = {"summary_type": "last", "summary_use_proj": False, "summary_activation": None}

    @property
    def dropout_p(self) -> float:
        return 0.0
