"""BERT (arXiv 1810.04805); also the architecture of the whole-word-masking, ext, MacBERT and WoBERT models."""

from fastbert.models.base import BERT_HEAD_PARTS, EMBEDDING_PARTS, EncoderModel, MaskedLMModel, PublishedNames
from fastbert.models.pretraining import NextSentenceModel
from fastbert.models.tasks import (
    MultipleChoiceModel,
    QuestionAnsweringModel,
    SequenceClassificationModel,
    TokenClassificationModel,
)

NAMES = PublishedNames("bert", EMBEDDING_PARTS | {"pooler.dense": "pooler.dense"} | BERT_HEAD_PARTS)


class BertModel(EncoderModel):
    __doc__ = "BERT's encoder: learned absolute positions, pooler.\n\n" + EncoderModel.__doc__
    model_type, names, has_pooler = "bert", NAMES, True


class BertForMaskedLM(MaskedLMModel):
    __doc__ = "BERT with the masked-language-model head.\n\n" + MaskedLMModel.__doc__
    model_type, names, model_class = "bert", NAMES, BertModel


class BertForPreTraining(NextSentenceModel):
    __doc__ = "BERT as it is pretrained, with both heads.\n\n" + NextSentenceModel.__doc__
    model_type, names, model_class = "bert", NAMES, BertModel


class BertForSequenceClassification(SequenceClassificationModel):
    __doc__ = "BERT with a head that labels sequences.\n\n" + SequenceClassificationModel.__doc__
    model_type, names, model_class, pools = "bert", NAMES, BertModel, True


class BertForTokenClassification(TokenClassificationModel):
    __doc__ = "BERT with a head that labels tokens.\n\n" + TokenClassificationModel.__doc__
    model_type, names, model_class = "bert", NAMES, BertModel


class BertForQuestionAnswering(QuestionAnsweringModel):
    __doc__ = "BERT with a head that finds an answer.\n\n" + QuestionAnsweringModel.__doc__
    model_type, names, model_class = "bert", NAMES, BertModel


class BertForMultipleChoice(MultipleChoiceModel):
    __doc__ = "BERT with a head that chooses among texts.\n\n" + MultipleChoiceModel.__doc__
    model_type, names, model_class, pools = "bert", NAMES, BertModel, True
