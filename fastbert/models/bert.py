"""BERT (arXiv 1810.04805); also the architecture of the whole-word-masking, ext, MacBERT and WoBERT models."""

from fastbert.models.base import BERT_HEAD_PARTS, EMBEDDING_PARTS, EncoderModel, MaskedLMModel, PublishedNames
from fastbert.models.pretraining import NextSentenceModel

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
