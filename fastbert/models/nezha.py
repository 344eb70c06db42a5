"""NEZHA (arXiv 1909.00204): BERT's encoder with clipped sinusoidal relative positions on keys and values in every
layer, of any length; also WoNEZHA.
"""

from fastbert.models.base import BERT_HEAD_PARTS, EMBEDDING_PARTS, EncoderModel, MaskedLMModel, PublishedNames
from fastbert.models.pretraining import NextSentenceModel
from fastbert.models.tasks import (
    MultipleChoiceModel,
    QuestionAnsweringModel,
    SequenceClassificationModel,
    TokenClassificationModel,
)

NAMES = PublishedNames("nezha", EMBEDDING_PARTS | {"pooler.dense": "pooler.dense"} | BERT_HEAD_PARTS)


class NezhaModel(EncoderModel):
    __doc__ = "NEZHA's encoder: relative positions, pooler.\n\n" + EncoderModel.__doc__
    model_type, names, has_pooler = "nezha", NAMES, True


class NezhaForMaskedLM(MaskedLMModel):
    __doc__ = "NEZHA with the masked-language-model head.\n\n" + MaskedLMModel.__doc__
    model_type, names, model_class = "nezha", NAMES, NezhaModel


class NezhaForPreTraining(NextSentenceModel):
    __doc__ = "NEZHA as it is pretrained, with both heads.\n\n" + NextSentenceModel.__doc__
    model_type, names, model_class = "nezha", NAMES, NezhaModel


class NezhaForSequenceClassification(SequenceClassificationModel):
    __doc__ = "NEZHA with a head that labels sequences.\n\n" + SequenceClassificationModel.__doc__
    model_type, names, model_class, pools = "nezha", NAMES, NezhaModel, True


class NezhaForTokenClassification(TokenClassificationModel):
    __doc__ = "NEZHA with a head that labels tokens.\n\n" + TokenClassificationModel.__doc__
    model_type, names, model_class = "nezha", NAMES, NezhaModel


class NezhaForQuestionAnswering(QuestionAnsweringModel):
    __doc__ = "NEZHA with a head that finds an answer.\n\n" + QuestionAnsweringModel.__doc__
    model_type, names, model_class = "nezha", NAMES, NezhaModel


class NezhaForMultipleChoice(MultipleChoiceModel):
    __doc__ = "NEZHA with a head that chooses among texts.\n\n" + MultipleChoiceModel.__doc__
    model_type, names, model_class, pools = "nezha", NAMES, NezhaModel, True
