"""The families, one file each."""

from fastbert import checkpoint, hub
from fastbert.config import EncoderConfig
from fastbert.errors import CheckpointError, ConfigError, shown
from fastbert.models.albert import (
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertModel,
)
from fastbert.models.bert import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from fastbert.models.electra import (
    ElectraForJointPreTraining,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
)
from fastbert.models.nezha import (
    NezhaForMaskedLM,
    NezhaForMultipleChoice,
    NezhaForPreTraining,
    NezhaForQuestionAnswering,
    NezhaForSequenceClassification,
    NezhaForTokenClassification,
    NezhaModel,
)
from fastbert.models.roberta import (
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from fastbert.models.roformer import (
    RoFormerForMaskedLM,
    RoFormerForMultipleChoice,
    RoFormerForQuestionAnswering,
    RoFormerForSequenceClassification,
    RoFormerForTokenClassification,
    RoFormerModel,
)

CLASSES = {
    "model": (BertModel, RobertaModel, AlbertModel, NezhaModel, ElectraModel, RoFormerModel),
    "masked_lm": (
        BertForMaskedLM,
        RobertaForMaskedLM,
        AlbertForMaskedLM,
        NezhaForMaskedLM,
        ElectraForMaskedLM,
        RoFormerForMaskedLM,
    ),
    "pretraining": (BertForPreTraining, AlbertForPreTraining, NezhaForPreTraining, ElectraForPreTraining),
    "joint_pretraining": (ElectraForJointPreTraining,),
    "sequence_classification": (
        BertForSequenceClassification,
        RobertaForSequenceClassification,
        AlbertForSequenceClassification,
        NezhaForSequenceClassification,
        ElectraForSequenceClassification,
        RoFormerForSequenceClassification,
    ),
    "token_classification": (
        BertForTokenClassification,
        RobertaForTokenClassification,
        AlbertForTokenClassification,
        NezhaForTokenClassification,
        ElectraForTokenClassification,
        RoFormerForTokenClassification,
    ),
    "question_answering": (
        BertForQuestionAnswering,
        RobertaForQuestionAnswering,
        AlbertForQuestionAnswering,
        NezhaForQuestionAnswering,
        ElectraForQuestionAnswering,
        RoFormerForQuestionAnswering,
    ),
    "multiple_choice": (
        BertForMultipleChoice,
        RobertaForMultipleChoice,
        AlbertForMultipleChoice,
        NezhaForMultipleChoice,
        ElectraForMultipleChoice,
        RoFormerForMultipleChoice,
    ),
}

__all__ = [candidate.__name__ for candidates in CLASSES.values() for candidate in candidates] + [
    "from_pretrained",
    "model_class",
]


def model_class(model_type: str, task: str = "masked_lm"):
    """The class of a family for a task: "model" (the bare encoder), "masked_lm", "pretraining" (both heads of BERT,
    ALBERT and NEZHA; ELECTRA's discriminator), "joint_pretraining" (ELECTRA's generator and discriminator together),
    "sequence_classification", "token_classification", "question_answering" or "multiple_choice". `ConfigError` if there
    is none.
    """
    for candidate in CLASSES.get(task, ()):
        if candidate.model_type == model_type:
            return candidate
    have = ", ".join(
        f"{candidate.model_type}/{name}" for name, candidates in CLASSES.items() for candidate in candidates
    )
    raise ConfigError(f"there is no class for model_type {model_type!r} and task {task!r}; there are: {have}")


def from_pretrained(folder, dtype=None, device=None, revision=None, **changes):
    """The model in `folder`, of the class that its `config.json` names under "architectures" (or its family's bare
    encoder if it names none); arguments as in the from_pretrained of every class.
    """
    folder = hub.local_folder(folder, revision)
    name = checkpoint.architecture(folder)
    by_name = {candidate.__name__: candidate for candidates in CLASSES.values() for candidate in candidates}
    if name is None:
        config = EncoderConfig.from_json_file(checkpoint.config_file(folder))
        return model_class(config.model_type, "model").from_pretrained(folder, dtype, device, **changes)
    if name not in by_name:
        raise CheckpointError(
            f"config file {checkpoint.config_file(folder)}: architectures names {shown(name)}, which fastbert does not "
            f"have; call from_pretrained of one of {', '.join(by_name)}"
        )
    return by_name[name].from_pretrained(folder, dtype, device, **changes)
