"""ELECTRA (arXiv 2003.10555): two BERT encoders without pooler. The generator is `ElectraForMaskedLM`, the
discriminator `ElectraForPreTraining`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.models.base import (
    EMBEDDING_PARTS,
    IGNORE_INDEX,
    EncoderModel,
    MaskedLMModel,
    ModelOutput,
    PretrainedModel,
    PublishedNames,
    check_labels,
    labels_of_rows,
)
from fastbert.nn import DiscriminatorHead

NAMES = PublishedNames(
    "electra",
    EMBEDDING_PARTS
    | {
        "embeddings.projection": "embeddings_project",
        "head.dense": "generator_predictions.dense",
        "head.norm": "generator_predictions.LayerNorm",
        "head": "generator_lm_head",
    },
)
DISCRIMINATOR_NAMES = PublishedNames(
    "electra",
    NAMES.parts
    | {
        "head.dense": "discriminator_predictions.dense",
        "head.prediction": "discriminator_predictions.dense_prediction",
    },
)


@dataclass
class ReplacedTokenOutput(ModelOutput):
    """loss: scalar; logits `[B, L]` (packed: `[T]`), positive where a token looks replaced; hidden_states as in
    EncoderOutput.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ElectraModel(EncoderModel):
    __doc__ = "One of ELECTRA's encoders: learned absolute positions, no pooler.\n\n" + EncoderModel.__doc__
    model_type, names = "electra", NAMES


class ElectraForMaskedLM(MaskedLMModel):
    __doc__ = "ELECTRA's generator: the head is always exact GELU.\n\n" + MaskedLMModel.__doc__
    model_type, names, model_class, head_act = "electra", NAMES, ElectraModel, "gelu"


class ElectraForPreTraining(PretrainedModel):
    """ELECTRA's discriminator: for every token, was it replaced?

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *, cu_seqlens=None,
    max_seqlen=None, output_hidden_states=False): inputs as for ElectraModel; labels bool or integer like input_ids, 1
    where the token was replaced, 0 where not, -100 where it does not count. Returns `ReplacedTokenOutput`; loss is the
    mean binary cross-entropy over the real tokens that count.
    """

    model_type, names = "electra", DISCRIMINATOR_NAMES

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.model = ElectraModel(config)
        self.head = DiscriminatorHead(config)
        self.head.apply(self.initialize)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool = False,
    ) -> ReplacedTokenOutput:
        if labels is not None:
            labels = labels.long() if isinstance(labels, Tensor) and labels.dtype == torch.bool else labels
            check_labels(labels, input_ids, 2, "1 where the token was replaced")
        rows, layout, states, _ = self.model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            output_hidden_states=output_hidden_states,
            return_rows=True,
        )
        logits = self.head(rows)
        loss = None
        if labels is not None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            labels = labels_of_rows(labels, layout)
            counted = labels != IGNORE_INDEX
            losses = F.binary_cross_entropy_with_logits(wide, (labels == 1).to(wide.dtype), reduction="none")
            loss = losses.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
        return ReplacedTokenOutput(loss, layout.unpack(logits), states)
