"""Models with two heads, as they are pretrained on pairs of segments: the masked language model, and a sentence head on
the pooler that says whether a pair is what it seems.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.errors import ShapeError
from fastbert.models.arguments import as_in_transformers
from fastbert.models.base import LossTerm, MaskedLMModel
from fastbert.models.labels import IGNORE_INDEX
from fastbert.models.outputs import ModelOutput
from fastbert.nn import Classifier
from fastbert.ops import checks


@dataclass
class NextSentenceOutput(ModelOutput):
    """loss: scalar; prediction_logits `[B, L, V]` (packed: `[T, V]`); seq_relationship_logits `[B, 2]`; the others as
    in MaskedLMOutput.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Tensor | None = None
    label_states: Tensor | None = None

    @property
    def sentence_logits(self) -> Tensor:
        return self.seq_relationship_logits


@dataclass
class SentenceOrderOutput(ModelOutput):
    """loss: scalar; prediction_logits `[B, L, V]` (packed: `[T, V]`); sop_logits `[B, 2]`; the others as in
    MaskedLMOutput.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    sop_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Tensor | None = None
    label_states: Tensor | None = None

    @property
    def sentence_logits(self) -> Tensor:
        return self.sop_logits


class PretrainingModel(MaskedLMModel):
    """Base of the models with a masked-language-model head and a sentence head. `sentence_label` is the argument of
    forward that takes the labels of the sentence head.
    """

    pools = True
    sentence_label: str
    sentence_output: type[ModelOutput]
    sentence_dropout: ClassVar[float] = 0.0

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.sentence_head = Classifier(config, 2, self.sentence_dropout)
        self.sentence_head.apply(self.initialize)

    def _predict_both(self, sentence_labels: Tensor | None, *inputs, return_logits: bool, **named) -> ModelOutput:
        if sentence_labels is None and not return_logits:
            raise ShapeError(
                f"{self.sentence_label} is None and return_logits is False; expected a label for each sequence, as "
                "losses are those of both heads"
            )
        words, pooled = self._predict(*inputs, return_logits=return_logits, **named)
        logits, loss, losses = self.sentence_head(pooled), words.loss, words.losses
        if sentence_labels is not None:
            sentence = self._sentence_loss(logits, sentence_labels)
            loss = sentence if loss is None else loss + sentence
            losses = None if losses is None else torch.cat([losses, sentence[None]])
        return self.sentence_output(loss, words.logits, logits, words.hidden_states, losses, words.label_states)

    def _sentence_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy over the labels that are not -100, 0 if there are none."""
        checks.tensors(**{self.sentence_label: labels})
        checks.integer(**{self.sentence_label: labels})
        if labels.shape != logits.shape[:1]:
            raise ShapeError(
                f"{self.sentence_label} has shape {list(labels.shape)}; expected {list(logits.shape[:1])}, one for "
                "each sequence"
            )
        checks.indices(self.sentence_label, labels, 2, "as the head has two classes", besides=IGNORE_INDEX)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide, labels.long(), ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


class NextSentenceModel(PretrainingModel):
    """An encoder with the masked-language-model head and the next-sentence head, `cls.seq_relationship`.

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None,
    next_sentence_label=None, *, label_positions=None, cu_seqlens=None, max_seqlen=None, output_hidden_states=False,
    return_logits=True): as the family's ForMaskedLM, and next_sentence_label int64 `[B]`: 0 where the second segment
    follows the first, 1 where it is a random one (or, for sentence order, where the two are swapped), -100 where it
    does not count. Returns `NextSentenceOutput`; loss is the sum of the means of both heads, or that of the one that
    has labels. With return_logits=False both need labels, and the last layer is computed for the labelled rows and each
    sequence's first.

    `ShapeError`, `DtypeError`, `DataError` for arguments that do not fit.
    """

    sentence_label, sentence_output = "next_sentence_label", NextSentenceOutput
    terms = (LossTerm("mlm_loss"), LossTerm("nsp_loss", per="sample"))

    @as_in_transformers
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        label_positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool = False,
        return_logits: bool = True,
    ) -> NextSentenceOutput:
        return self._predict_both(
            next_sentence_label,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            labels=labels,
            label_positions=label_positions,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            output_hidden_states=output_hidden_states,
            return_logits=return_logits,
        )


class SentenceOrderModel(PretrainingModel):
    """An encoder with the masked-language-model head and the sentence-order head, `sop_classifier.classifier`, before
    which dropout of 0.1 stands, as in transformers.

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None,
    sentence_order_label=None, *, label_positions=None, cu_seqlens=None, max_seqlen=None, output_hidden_states=False,
    return_logits=True): as the family's ForMaskedLM, and sentence_order_label int64 `[B]`: 0 where the two segments
    are in order, 1 where they are swapped, -100 where it does not count. Returns `SentenceOrderOutput`; loss is the sum
    of the means of both heads, or that of the one that has labels. With return_logits=False both need labels, and the
    last layer is computed for the labelled rows and each sequence's first.

    `ShapeError`, `DtypeError`, `DataError` for arguments that do not fit.
    """

    sentence_label, sentence_output = "sentence_order_label", SentenceOrderOutput
    sentence_dropout = 0.1
    terms = (LossTerm("mlm_loss"), LossTerm("sop_loss", per="sample"))

    @as_in_transformers
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        *,
        label_positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool = False,
        return_logits: bool = True,
    ) -> SentenceOrderOutput:
        return self._predict_both(
            sentence_order_label,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            labels=labels,
            label_positions=label_positions,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            output_hidden_states=output_hidden_states,
            return_logits=return_logits,
        )
