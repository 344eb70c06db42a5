"""ELECTRA (arXiv 2003.10555): two BERT encoders without pooler. The generator is `ElectraForMaskedLM`, the
discriminator `ElectraForPreTraining`, and `ElectraForJointPreTraining` trains the two together.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.errors import CheckpointError, ConfigError, ShapeError
from fastbert.models.arguments import as_in_transformers
from fastbert.models.base import (
    DENSE_SEQUENCE_HEAD_PARTS,
    EMBEDDING_PARTS,
    TASK_HEAD_PARTS,
    EncoderModel,
    LossTerm,
    MaskedLMModel,
    PretrainedModel,
    PublishedNames,
)
from fastbert.models.labels import IGNORE_INDEX, check_labels, check_word_labels, labelled_rows, labels_of_rows
from fastbert.models.outputs import ModelOutput
from fastbert.models.tasks import (
    MultipleChoiceModel,
    QuestionAnsweringModel,
    SequenceClassificationModel,
    TokenClassificationModel,
)
from fastbert.nn import DiscriminatorHead

GENERATOR = "generator"  # the folder of the generator in that of the discriminator
_SHARED = ("word", "position", "token_type", "norm")

NAMES = PublishedNames(
    "electra",
    EMBEDDING_PARTS
    | TASK_HEAD_PARTS
    | DENSE_SEQUENCE_HEAD_PARTS
    | {
        "choice_head.dense": "sequence_summary.summary",
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

    @as_in_transformers
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
        rows, layout, states, *_ = self.model(
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


class ElectraForSequenceClassification(SequenceClassificationModel):
    __doc__ = "ELECTRA with a head that labels sequences.\n\n" + SequenceClassificationModel.__doc__
    model_type, names, model_class = "electra", NAMES, ElectraModel
    dense_act = "gelu"


class ElectraForTokenClassification(TokenClassificationModel):
    __doc__ = "ELECTRA with a head that labels tokens.\n\n" + TokenClassificationModel.__doc__
    model_type, names, model_class = "electra", NAMES, ElectraModel


class ElectraForQuestionAnswering(QuestionAnsweringModel):
    __doc__ = "ELECTRA with a head that finds an answer.\n\n" + QuestionAnsweringModel.__doc__
    model_type, names, model_class = "electra", NAMES, ElectraModel


class ElectraForMultipleChoice(MultipleChoiceModel):
    __doc__ = "ELECTRA with a head that chooses among texts.\n\n" + MultipleChoiceModel.__doc__
    model_type, names, model_class = "electra", NAMES, ElectraModel
    dense_act = "gelu"
    summary_keys = {
        "summary_type": "first",
        "summary_use_proj": True,
        "summary_activation": "gelu",
        "summary_last_dropout": 0.1,
    }

    @property
    def dropout_p(self) -> float:
        return self.summary_keys["summary_last_dropout"]


@dataclass
class JointPreTrainingOutput(ModelOutput):
    """loss: scalar, the weighted sum of both. With return_logits: logits `[B, L]` (packed: `[T]`) of the discriminator,
    generator_logits `[N, V]` of the N labelled rows, corrupted_ids int64 and replaced bool like input_ids: what the
    discriminator was shown, and where that is not the original. Without: losses `[2]`, float32 (float64 for a model in
    float64), the means of generator and discriminator.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    generator_logits: Tensor | None = None
    corrupted_ids: Tensor | None = None
    replaced: Tensor | None = None
    losses: Tensor | None = None


class ElectraForJointPreTraining(PretrainedModel):
    """ELECTRA as it is pretrained: a generator, and a discriminator that looks for what the generator has replaced.

    config: of the discriminator. generator_config: of the generator; None: as many layers, hidden_size times
    generator_size, heads of 64 columns (at least one), intermediate_size 4 times hidden_size. The two share the tables
    of words, positions and token types and their LayerNorm; each has its own projection to its hidden_size.

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *,
    label_positions=None, cu_seqlens=None, max_seqlen=None, return_logits=True): inputs as for ElectraForMaskedLM, with
    masks; labels, the original ids where something is to be guessed, are needed. The generator guesses there; what it
    says is sampled on the device at temperature 1, by torch's generator and without a gradient, and put into the
    original text. The discriminator says of every real token whether it was changed; ids of pad_token_id are not real.
    Returns `JointPreTrainingOutput`: loss = generator's mean over labels + discriminator_weight x discriminator's mean
    over tokens (50 in the paper, section 3.1 and appendix A).

    A label of -100 changes nothing, wherever it stands. Places are drawn without replacement, as fastbert.data draws
    them; the original code draws with replacement, and averages the ids of what it drew twice.

    `ConfigError` for a generator that cannot share the embeddings; `ShapeError`, `DtypeError`, `DataError` for
    arguments that do not fit.
    """

    model_type, names = "electra", DISCRIMINATOR_NAMES

    def __init__(
        self,
        config: EncoderConfig,
        generator_config: EncoderConfig | None = None,
        generator_size: float = 0.25,
        discriminator_weight: float = 50.0,
    ):
        super().__init__(config)
        generator_config = generator_config or reduced(config, generator_size)
        self.discriminator_weight = discriminator_weight
        self.discriminator = ElectraForPreTraining(config)
        self.generator = ElectraForMaskedLM(generator_config)
        self._share()

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The terms of the loss."""
        return (
            LossTerm("generator_loss"),
            LossTerm("discriminator_loss", weight=self.discriminator_weight, per="token"),
        )

    @as_in_transformers
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        label_positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        return_logits: bool = True,
    ) -> JointPreTrainingOutput:
        if labels is None:
            raise ShapeError("labels is None; expected the original ids of what the generator is to guess")
        check_word_labels(labels, label_positions, input_ids, cu_seqlens, self.config.vocab_size)
        layout, ids, types, places = self.discriminator.model.rows(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        labels, positions = labelled_rows(labels, label_positions, layout)
        if positions is None:
            positions = torch.arange(len(labels), device=labels.device)
        rows = {"token_type_ids": types, "position_ids": places, **layout.attention}
        guessed = self.generator(ids, labels=labels, label_positions=positions, return_logits=False, **rows)
        with torch.no_grad():
            guesses = self.generator.head(guessed.label_states, self.generator.model.embeddings.word.weight)
            original = put(ids, positions, labels, labels)
            corrupted = put(original, positions, sample(guesses), labels)
            replaced = corrupted != original
            found = replaced.long().masked_fill(original == self.config.pad_token_id, IGNORE_INDEX)
        judged = self.discriminator(corrupted, labels=found, **rows)
        loss = guessed.loss + self.discriminator_weight * judged.loss
        if not return_logits:
            return JointPreTrainingOutput(loss, losses=torch.stack([guessed.loss, judged.loss]))
        shown = (layout.unpack(t) for t in (corrupted, replaced))
        return JointPreTrainingOutput(loss, layout.unpack(judged.logits), guesses, *shown)

    def published_names(self) -> dict[str, str]:
        """Our name of every parameter -> its name in a transformers checkpoint, that of the generator in its folder."""
        found = {}
        for part, folder in ((self.generator, f"{GENERATOR}/"), (self.discriminator, "")):
            names = part.published_names()
            found |= {parameter: folder + names[name] for name, parameter in part.named_parameters()}
        return {name: found[parameter] for name, parameter in self.named_parameters()}

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype | str | None = None, device=None):
        """The two models that save_pretrained wrote into `folder`, in evaluation mode; dtype and device as in
        PretrainedModel.from_pretrained, and so is what is raised. `CheckpointError` too if there is no generator in the
        folder, or one with other embeddings.
        """
        discriminator = ElectraForPreTraining.from_pretrained(folder, dtype, device)
        if not (Path(folder) / GENERATOR).is_dir():
            raise CheckpointError(
                f"model folder {folder} has no folder {GENERATOR!r}; expected the generator there, as "
                f"{cls.__name__}.save_pretrained writes it, beside the discriminator"
            )
        generator = ElectraForMaskedLM.from_pretrained(Path(folder) / GENERATOR, dtype, device)
        with torch.device("meta"):
            model = cls(discriminator.config, generator.config)
        for name in _SHARED:
            one, other = (getattr(part.model.embeddings, name) for part in (discriminator, generator))
            if not all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True)):
                raise CheckpointError(
                    f"model folder {folder}: embeddings.{name} of the generator differs from that of the "
                    "discriminator, expected the same, as the two share it"
                )
        model.discriminator, model.generator = discriminator, generator
        model._share()
        return model.eval()

    def save_pretrained(self, folder) -> None:
        """Writes the discriminator into `folder`, as ElectraForPreTraining, and the generator, as ElectraForMaskedLM,
        into its folder "generator"; transformers loads both back.
        """
        self.discriminator.save_pretrained(folder)
        self.generator.save_pretrained(Path(folder) / GENERATOR)

    def _share(self) -> None:
        mine, its = self.discriminator.config, self.generator.config
        embeddings = ("embedding_size", "vocab_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps")
        for name in (*embeddings, "pad_token_id"):
            if getattr(mine, name) != getattr(its, name):
                raise ConfigError(
                    f"{name} of the generator is {getattr(its, name)}; expected {getattr(mine, name)}, that of the "
                    "discriminator, as the two share their embeddings"
                )
        for name in _SHARED:
            setattr(self.generator.model.embeddings, name, getattr(self.discriminator.model.embeddings, name))


def reduced(config: EncoderConfig, size: float) -> EncoderConfig:
    """The generator for a discriminator: as deep, `size` times as wide, on the same embeddings."""
    if not 0 < size <= 1:
        raise ConfigError(f"generator_size is {size}; expected more than 0 and at most 1")
    hidden = round(config.hidden_size * size)
    heads = max(1, hidden // 64)
    narrow = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    return EncoderConfig(**config.to_dict() | narrow)


def sample(logits: Tensor) -> Tensor:
    """An id for each row, int64 `[...]`, drawn from softmax(logits `[..., V]`): the largest of logits + Gumbel noise,
    which is minus the logarithm of exponential noise.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide - torch.empty_like(wide).exponential_().log()).argmax(-1)


def put(ids: Tensor, positions: Tensor, values: Tensor, labels: Tensor) -> Tensor:
    """ids `[T]` with `values` `[N]` at `positions` `[N]` where there is a label; what only fills up goes to a place
    behind the end."""
    positions = torch.where(labels == IGNORE_INDEX, len(ids), positions)
    return torch.cat([ids, ids.new_zeros(1)]).scatter(0, positions, values.to(ids.dtype))[:-1]
