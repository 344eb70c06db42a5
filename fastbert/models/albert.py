"""ALBERT (arXiv 1909.11942): factorised embeddings, and one layer's weights for all applications (or one per group of
them).

As in the original code, dropout follows the feed-forward's output too; transformers leaves it out, which matters only
to version 1 in training.
"""

from fastbert.models.base import EMBEDDING_PARTS, TASK_HEAD_PARTS, EncoderModel, MaskedLMModel, PublishedNames
from fastbert.models.pretraining import SentenceOrderModel
from fastbert.models.tasks import (
    MultipleChoiceModel,
    QuestionAnsweringModel,
    SequenceClassificationModel,
    TokenClassificationModel,
)

NAMES = PublishedNames(
    "albert",
    EMBEDDING_PARTS
    | TASK_HEAD_PARTS
    | {
        "embeddings.projection": "encoder.embedding_hidden_mapping_in",
        "pooler.dense": "pooler",
        "head.dense": "predictions.dense",
        "head.norm": "predictions.LayerNorm",
        "head": "predictions",
        "sentence_head.classifier": "sop_classifier.classifier",
    },
    layer="encoder.albert_layer_groups.{group}.albert_layers.{inner}",
    layer_parts={
        "attention.query": "attention.query",
        "attention.key": "attention.key",
        "attention.value": "attention.value",
        "attention.output": "attention.dense",
        "attention_norm": "attention.LayerNorm",
        "intermediate": "ffn",
        "output": "ffn_output",
        "output_norm": "full_layer_layer_norm",
    },
)


class AlbertModel(EncoderModel):
    __doc__ = (
        "ALBERT's encoder: factorised embeddings, shared layers, learned absolute positions, pooler.\n\n"
        + EncoderModel.__doc__
    )
    model_type, names, has_pooler = "albert", NAMES, True


class AlbertForMaskedLM(MaskedLMModel):
    __doc__ = "ALBERT with the masked-language-model head.\n\n" + MaskedLMModel.__doc__
    model_type, names, model_class = "albert", NAMES, AlbertModel


class AlbertForPreTraining(SentenceOrderModel):
    __doc__ = "ALBERT as it is pretrained, with both heads.\n\n" + SentenceOrderModel.__doc__
    model_type, names, model_class = "albert", NAMES, AlbertModel


class AlbertForSequenceClassification(SequenceClassificationModel):
    __doc__ = "ALBERT with a head that labels sequences.\n\n" + SequenceClassificationModel.__doc__
    model_type, names, model_class, pools = "albert", NAMES, AlbertModel, True


class AlbertForTokenClassification(TokenClassificationModel):
    __doc__ = "ALBERT with a head that labels tokens.\n\n" + TokenClassificationModel.__doc__
    model_type, names, model_class = "albert", NAMES, AlbertModel


class AlbertForQuestionAnswering(QuestionAnsweringModel):
    __doc__ = "ALBERT with a head that finds an answer.\n\n" + QuestionAnsweringModel.__doc__
    model_type, names, model_class = "albert", NAMES, AlbertModel


class AlbertForMultipleChoice(MultipleChoiceModel):
    __doc__ = "ALBERT with a head that chooses among texts.\n\n" + MultipleChoiceModel.__doc__
    model_type, names, model_class, pools = "albert", NAMES, AlbertModel, True
