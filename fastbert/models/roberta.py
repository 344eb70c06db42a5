"""RoBERTa (arXiv 1907.11692): BERT's encoder with positions that count from pad_token_id + 1 and skip padding, and a
head that is always exact GELU.
"""

from torch import Tensor

from fastbert.models.base import (
    DENSE_SEQUENCE_HEAD_PARTS,
    EMBEDDING_PARTS,
    TASK_HEAD_PARTS,
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
from fastbert.packing import Layout

NAMES = PublishedNames(
    "roberta",
    EMBEDDING_PARTS
    | TASK_HEAD_PARTS
    | DENSE_SEQUENCE_HEAD_PARTS
    | {
        "pooler.dense": "pooler.dense",
        "head.dense": "lm_head.dense",
        "head.norm": "lm_head.layer_norm",
        "head": "lm_head",
    },
)


class RobertaModel(EncoderModel):
    __doc__ = (
        "RoBERTa's encoder: learned absolute positions from pad_token_id + 1 on, pooler.\n\n" + EncoderModel.__doc__
    )
    model_type, names, has_pooler = "roberta", NAMES, True

    def default_positions(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """pad_token_id for padding ids, else pad_token_id + 1, + 2, ... counted over the ids of the sequence that are
        not padding (fairseq's make_positions).
        """
        pad = self.config.pad_token_id
        real = (input_ids != pad).long()
        if layout.padded_shape is not None:
            return layout.pack(real.cumsum(1) * real + pad)
        total = real.cumsum(0)
        before = (
            (total - real)[layout.cu_seqlens[:-1].long().clamp(max=max(len(total) - 1, 0))] if len(total) else total
        )
        return (total - before.repeat_interleave(layout.cu_seqlens.diff().long(), output_size=len(total))) * real + pad


class RobertaForMaskedLM(MaskedLMModel):
    __doc__ = "RoBERTa with the masked-language-model head.\n\n" + MaskedLMModel.__doc__
    model_type, names, model_class, head_act = "roberta", NAMES, RobertaModel, "gelu"


class RobertaForSequenceClassification(SequenceClassificationModel):
    __doc__ = "RoBERTa with a head that labels sequences.\n\n" + SequenceClassificationModel.__doc__
    model_type, names, model_class = "roberta", NAMES, RobertaModel
    dense_act = "tanh"


class RobertaForTokenClassification(TokenClassificationModel):
    __doc__ = "RoBERTa with a head that labels tokens.\n\n" + TokenClassificationModel.__doc__
    model_type, names, model_class = "roberta", NAMES, RobertaModel


class RobertaForQuestionAnswering(QuestionAnsweringModel):
    __doc__ = "RoBERTa with a head that finds an answer.\n\n" + QuestionAnsweringModel.__doc__
    model_type, names, model_class = "roberta", NAMES, RobertaModel


class RobertaForMultipleChoice(MultipleChoiceModel):
    __doc__ = "RoBERTa with a head that chooses among texts.\n\n" + MultipleChoiceModel.__doc__
    model_type, names, model_class, pools = "roberta", NAMES, RobertaModel, True

    @property
    def dropout_p(self) -> float:
        return self.config.hidden_dropout_prob
