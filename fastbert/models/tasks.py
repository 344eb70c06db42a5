"""Encoders with a head for a task: to label sequences, tokens, or spans, or to choose among texts. Heads, names and
numbers are those of transformers; what is peculiar to a family stands in its file.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import checkpoint, hub
from fastbert.config import EncoderConfig
from fastbert.errors import ConfigError, ShapeError
from fastbert.models.arguments import as_in_transformers
from fastbert.models.base import EncoderModel, LossTerm, PretrainedModel
from fastbert.models.labels import IGNORE_INDEX, check_class_labels, check_labels, check_values, labels_of_rows
from fastbert.models.outputs import ModelOutput
from fastbert.nn import Classifier
from fastbert.ops import checks
from fastbert.packing import Layout


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """loss: scalar; logits `[B, num_labels]`; hidden_states as in EncoderOutput; losses `[1]`, float32 (float64 for a
    model in float64), with return_logits=False in place of logits.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Tensor | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """logits `[B, L, num_labels]` (packed: `[T, num_labels]`), zero at padded positions; the others as in
    SequenceClassifierOutput.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Tensor | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """start_logits and end_logits `[B, L]` (packed: `[T]`), at padded positions the least number of float16, so that
    none of them is the likeliest; the others as in SequenceClassifierOutput.
    """

    padding: ClassVar[float] = -65504.0

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Tensor | None = None


@dataclass
class MultipleChoiceModelOutput(ModelOutput):
    """logits `[B, N]`; hidden_states `[B * N, L, C]`; the others as in SequenceClassifierOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Tensor | None = None


class TaskModel(PretrainedModel):
    """Base of the models with a head for a task."""

    model_class: type[EncoderModel]
    terms: tuple[LossTerm, ...]
    pools = False  # whether the head reads the family's pooler

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.model = self.model_class(config, add_pooling_layer=self.pools)

    def _checked(self, labels: Tensor | None, return_logits: bool, names: str = "labels is") -> None:
        if labels is None and not return_logits:
            raise ShapeError(f"{names} None and return_logits is False; expected labels, or there is nothing to return")


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy over the labels that are not -100, 0 if there are none."""
    total = F.cross_entropy(_wide(logits), labels.long(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


class SequenceClassificationModel(TaskModel):
    """An encoder with a head that labels sequences, or gives each a number.

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *, cu_seqlens=None,
    max_seqlen=None, output_hidden_states=False, return_logits=True): inputs as for the family's Model. labels, by the
    config's problem_type: "single_label_classification": integers `[B]`, -100 where one does not count;
    "multi_label_classification": `[B, num_labels]`, 1 where a label holds and 0 where not; "regression": floating
    `[B]`, or `[B, num_labels]`. Without a problem_type: regression if num_labels is 1, else by the dtype of the labels,
    multi-label if it is floating. Returns `SequenceClassifierOutput`; loss is the mean of cross-entropies, binary
    cross-entropies, or squared differences. Without hidden states, the last layer is computed for the first token of
    each sequence only.

    `ShapeError`, `DtypeError`, `DataError` for arguments that do not fit.
    """

    terms = (LossTerm("classification_loss", per="sample"),)
    dense_act: ClassVar[str | None] = None  # of a layer of the head's own, where the family does not use its pooler

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.sequence_head = Classifier(config, config.num_labels, config.classifier_dropout_p, self.dense_act)
        self.sequence_head.apply(self.initialize)

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
        return_logits: bool = True,
    ) -> SequenceClassifierOutput:
        self._checked(labels, return_logits)
        first, _, states, _, pooled = self.model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            output_hidden_states=output_hidden_states,
            return_first=True,
        )
        logits = self.sequence_head(first if pooled is None else pooled)
        loss = None if labels is None else self._loss(logits, labels)
        if not return_logits:
            return SequenceClassifierOutput(loss, None, states, loss[None])
        return SequenceClassifierOutput(loss, logits, states)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        checks.tensors(labels=labels)
        problem = self.config.problem_type
        if problem is None:
            kind = "multi" if labels.is_floating_point() or labels.dtype == torch.bool else "single"
            problem = "regression" if self.config.num_labels == 1 else f"{kind}_label_classification"
        if problem == "single_label_classification":
            check_class_labels(labels, logits.shape, "labels of the config")
            return _class_loss(logits, labels)
        wide = _wide(logits)
        if problem == "multi_label_classification":
            check_values(labels, logits.shape, between=(0, 1))
            total = F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="sum")
            return total / max(wide.numel(), 1)
        if self.config.num_labels == 1 and labels.dim() == 1:
            wide = wide.squeeze(1)
        check_values(labels, wide.shape)
        return F.mse_loss(wide, labels.to(wide.dtype), reduction="sum") / max(wide.numel(), 1)


class TokenClassificationModel(TaskModel):
    """An encoder with a head that labels tokens.

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *, cu_seqlens=None,
    max_seqlen=None, output_hidden_states=False, return_logits=True): inputs as for the family's Model; labels integers
    like input_ids, -100 where there is nothing to predict. Returns `TokenClassifierOutput`; loss is the mean
    cross-entropy over the labelled real tokens, 0 if there are none.

    `ShapeError`, `DtypeError`, `DataError` for arguments that do not fit.
    """

    terms = (LossTerm("tagging_loss"),)

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.token_head = Classifier(config, config.num_labels, config.classifier_dropout_p)
        self.token_head.apply(self.initialize)

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
        return_logits: bool = True,
    ) -> TokenClassifierOutput:
        self._checked(labels, return_logits)
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
        logits, loss = self.token_head(rows), None
        if labels is not None:
            check_labels(labels, input_ids, self.config.num_labels, "labels of the config")
            loss = _class_loss(logits.flatten(0, -2), labels_of_rows(labels, layout).flatten())
        if not return_logits:
            return TokenClassifierOutput(loss, None, states, loss[None])
        return TokenClassifierOutput(loss, layout.unpack(logits), states)


class QuestionAnsweringModel(TaskModel):
    """An encoder with a head that finds a span: where an answer begins and where it ends.

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, start_positions=None,
    end_positions=None, *, cu_seqlens=None, max_seqlen=None, output_hidden_states=False, return_logits=True): inputs as
    for the family's Model; start_positions and end_positions int64 `[B]`, the place of the first and of the last token
    of the answer in its (packed: own) sequence; what is not the place of a real token does not count. Returns
    `QuestionAnsweringModelOutput`; loss is the mean of two mean cross-entropies over the real tokens of each sequence.

    Two things differ from transformers, where padding is among what is chosen from: there a padded batch has another
    loss than its sequences alone, and a negative position means the first token.

    `ShapeError`, `DtypeError` for arguments that do not fit.
    """

    terms = (LossTerm("span_loss", per="sample"),)

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.config = config.changed(num_labels=2, id2label=None)  # as many as the head of transformers then has
        self.span_head = Classifier(config, 2)
        self.span_head.apply(self.initialize)

    @as_in_transformers
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool = False,
        return_logits: bool = True,
    ) -> QuestionAnsweringModelOutput:
        if (start_positions is None) != (end_positions is None):
            given = "end_positions" if start_positions is None else "start_positions"
            raise ShapeError(f"{given} was given alone; expected start_positions and end_positions, or neither")
        self._checked(start_positions, return_logits, "start_positions and end_positions are")
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
        logits, loss = self.span_head(rows), None
        if start_positions is not None:
            wide, real = _by_sequence(_wide(logits), layout)
            positions = {"start_positions": start_positions, "end_positions": end_positions}
            loss = sum(_span_loss(*each, real) for each in zip(wide.unbind(-1), positions.items(), strict=True)) / 2
        if not return_logits:
            return QuestionAnsweringModelOutput(loss, hidden_states=states, losses=loss[None])
        logits = layout.unpack(logits, QuestionAnsweringModelOutput.padding)
        return QuestionAnsweringModelOutput(loss, *logits.unbind(-1), hidden_states=states)


def _by_sequence(rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Rows as `[B, L, 2]`, with padding, and where a token is, bool `[B, L]`."""
    fill = QuestionAnsweringModelOutput.padding
    if layout.padded_shape is not None:
        real = layout.unpack(torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device))
        return layout.unpack(rows, fill), real
    lengths = layout.cu_seqlens.diff()
    columns = torch.arange(layout.max_seqlen, device=rows.device)
    real = columns < lengths[:, None]
    places = (layout.cu_seqlens[:-1, None] + columns).clamp(max=max(len(rows) - 1, 0))
    padded = rows[places.long()] if len(rows) else rows.new_zeros((*real.shape, rows.shape[-1]))
    return padded.masked_fill(~real[..., None], fill), real


def _span_loss(logits: Tensor, named: tuple[str, Tensor], real: Tensor) -> Tensor:
    name, positions = named
    checks.tensors(**{name: positions})
    checks.integer(**{name: positions})
    if positions.shape != logits.shape[:1]:
        raise ShapeError(
            f"{name} has shape {list(positions.shape)}; expected {list(logits.shape[:1])}, one for each sequence"
        )
    length = logits.shape[1]
    inside = (positions >= 0) & (positions < length)
    if length == 0:
        return logits.sum()
    inside &= real.gather(1, positions.long().clamp(0, length - 1)[:, None]).squeeze(1)
    return _class_loss(logits, positions.long().masked_fill(~inside, IGNORE_INDEX))


class MultipleChoiceModel(TaskModel):
    """An encoder with a head that chooses one of N texts.

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *, cu_seqlens=None,
    max_seqlen=None, num_choices=None, output_hidden_states=False, return_logits=True): input_ids, attention_mask,
    token_type_ids and position_ids `[B, N, L]`; or packed `[T]` with cu_seqlens `[B * N + 1]`, the texts of a choice
    one after another, and num_choices N. labels integers `[B]`, which of the N is right, -100 where none counts.
    Returns `MultipleChoiceModelOutput`; loss is the mean cross-entropy.

    `ShapeError`, `DtypeError`, `DataError` for arguments that do not fit.
    """

    terms = (LossTerm("choice_loss", per="sample"),)
    summary: ClassVar[str] = "first"  # the token of a sequence that stands for it
    summary_keys: ClassVar[dict] = {}  # what of a config.json says how it does, and the values that are computed
    dense_act: ClassVar[str | None] = None

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.choice_head = Classifier(config, 1, self.dropout_p, self.dense_act, dense_dropout_p=0.0)
        self.choice_head.apply(self.initialize)

    @property
    def dropout_p(self) -> float:
        return self.config.classifier_dropout_p

    @classmethod
    def from_pretrained(cls, folder, *arguments, revision: str | None = None, **named):
        folder = hub.local_folder(folder, revision)
        found = checkpoint.read_config(checkpoint.config_file(folder))
        for name, only in cls.summary_keys.items():
            if found.get(name, only) != only:
                given = f"{folder}: config key {name!r} = {found[name]!r}"
                raise ConfigError(f"{given} is not supported by {cls.__name__}; expected {only!r}")
        return super().from_pretrained(folder, *arguments, **named)

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
        num_choices: int | None = None,
        output_hidden_states: bool = False,
        return_logits: bool = True,
    ) -> MultipleChoiceModelOutput:
        self._checked(labels, return_logits)
        checks.tensors(input_ids=input_ids)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        if cu_seqlens is None:
            num_choices = _num_choices(input_ids, num_choices)
            inputs = tuple(_flat(name, t, input_ids.shape) for name, t in zip(_INPUTS, inputs, strict=True))
        elif type(num_choices) is not int or num_choices < 1 or (len(cu_seqlens) - 1) % num_choices:
            raise ShapeError(
                f"num_choices is {num_choices!r} with {len(cu_seqlens) - 1} packed sequences; expected the number of "
                "texts of each choice"
            )
        found = self.model(
            *inputs,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            output_hidden_states=output_hidden_states,
            **{"return_first" if self.summary == "first" else "return_rows": True},
        )
        row = found.rows if self.summary == "first" else found.layout.last(found.rows)
        logits, loss = self.choice_head(row if found.pooled is None else found.pooled).view(-1, num_choices), None
        if labels is not None:
            check_class_labels(labels, logits.shape, "texts of a choice")
            loss = _class_loss(logits, labels)
        if not return_logits:
            return MultipleChoiceModelOutput(loss, None, found.hidden_states, loss[None])
        return MultipleChoiceModelOutput(loss, logits, found.hidden_states)


_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _flat(name: str, given: Tensor | None, shape: torch.Size) -> Tensor | None:
    """`[B, N, L]` as `[B * N, L]`; what serves all texts, `[L]` or `[1, L]`, stays."""
    if given is None or name == "position_ids" and given.shape in (shape[2:], (1, shape[2])):
        return given
    checks.tensors(**{name: given})
    if given.shape != shape:
        raise ShapeError(f"{name} has shape {list(given.shape)}; expected {list(shape)}, the shape of input_ids")
    return given.flatten(0, 1)


def _num_choices(input_ids: Tensor, num_choices: int | None) -> int:
    if input_ids.dim() != 3 or num_choices not in (None, input_ids.shape[1]) or input_ids.shape[1] == 0:
        raise ShapeError(
            f"input_ids has shape {list(input_ids.shape)} and num_choices is {num_choices}; expected [B, N, L] and N "
            "or None, or [T] together with cu_seqlens"
        )
    return input_ids.shape[1]
