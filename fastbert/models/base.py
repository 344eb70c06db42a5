"""What the families have in common: from ids to rows and back, outputs, the masked-language-model loss, folders. A
family file adds what is peculiar to it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert import checkpoint, hub
from fastbert.config import EncoderConfig
from fastbert.errors import ConfigError, ShapeError
from fastbert.models.arguments import as_in_transformers
from fastbert.models.labels import check_word_labels, labelled_rows
from fastbert.models.outputs import ModelOutput
from fastbert.nn import Embeddings, Encoder, MaskedLMHead, Pooler
from fastbert.ops import checks
from fastbert.ops.sequences import check_packed
from fastbert.packing import Layout, packed_layout, padded_layout, positions_in_sequence


@dataclass
class EncoderOutput(ModelOutput):
    """last_hidden_state `[B, L, C]` (packed: `[T, C]`), pooler_output `[B, C]` where the model has a pooler,
    hidden_states: num_hidden_layers + 1 such tensors.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MaskedLMOutput(ModelOutput):
    """loss: scalar; logits `[B, L, V]` (packed: `[T, V]`); hidden_states as in EncoderOutput. With return_logits=False
    also losses `[k]`, float32 (float64 for a model in float64), the means of the model's `terms`, and label_states
    `[N, C]`, the last hidden state of the rows that have a label.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Tensor | None = None
    label_states: Tensor | None = None


class LossTerm(NamedTuple):
    """One term of a loss by its name: `weight` times its mean over what it is `per`, "label", "sample" or "token"."""

    name: str
    weight: float = 1.0
    per: str = "label"


@dataclass(frozen=True)
class PublishedNames:
    """The names that transformers gives our parameters: `prefix` before the encoder's, a template for one layer, and
    the parts by our name. `constants(config)`: what transformers stores besides, though it follows from the config.
    """

    prefix: str
    parts: dict[str, str]
    layer: str = "encoder.layer.{index}"
    layer_parts: dict[str, str] | None = None
    constants: Callable[[EncoderConfig], dict[str, Tensor]] = lambda config: {}

    def of(self, name: str, config: EncoderConfig) -> str:
        stem, _, leaf = name.rpartition(".")
        prefix = f"{self.prefix}." if stem.startswith("model.") else ""
        stem = stem.removeprefix("model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", stem):
            index, inner = int(match[1]), config.inner_group_num or 1
            layer = self.layer.format(index=index, group=index // inner, inner=index % inner)
            return f"{prefix}{layer}.{(self.layer_parts or _LAYER_PARTS)[match[2]]}.{leaf}"
        return f"{prefix}{self.parts[stem]}.{leaf}"


_LAYER_PARTS = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
EMBEDDING_PARTS = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
TASK_HEAD_PARTS = {
    "sequence_head.classifier": "classifier",
    "token_head.classifier": "classifier",
    "span_head.classifier": "qa_outputs",
    "choice_head.classifier": "classifier",
}
DENSE_SEQUENCE_HEAD_PARTS = {
    "sequence_head.dense": "classifier.dense",
    "sequence_head.classifier": "classifier.out_proj",
}
BERT_HEAD_PARTS = TASK_HEAD_PARTS | {
    "sentence_head.classifier": "cls.seq_relationship",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions",
}


class PretrainedModel(nn.Module):
    """A model of one family that is read from and written to a folder in the transformers layout."""

    model_type: str
    names: PublishedNames

    def __init__(self, config: EncoderConfig):
        super().__init__()
        if not isinstance(config, EncoderConfig):
            raise ConfigError(f"{type(self).__name__} takes a fastbert.EncoderConfig; got {type(config).__name__}")
        if config.model_type != self.model_type:
            raise ConfigError(
                f"{type(self).__name__} takes a config with model_type {self.model_type!r}; got {config.model_type!r}"
            )
        self.config = config

    def initialize(self, module: nn.Module) -> None:
        """Normal weights with std initializer_range, zero biases, LayerNorm at identity; called through `apply`."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(module.bias)

    def gradient_checkpointing_enable(self) -> None:
        """In training mode, keep only the input of each layer application for the backward pass and compute the rest
        again there: a third more arithmetic for a fraction of the memory of activations. Results stay the same."""
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, Encoder):
                module.gradient_checkpointing = enabled

    def published_names(self) -> dict[str, str]:
        """Our name of every parameter -> its name in a transformers checkpoint."""
        return {name: self.names.of(name, self.config) for name, _ in self.named_parameters()}

    def published_constants(self) -> dict[str, Tensor]:
        """What transformers stores besides parameters, by its name there: written, never read."""
        prefix = f"{self.names.prefix}." if hasattr(self, "model") else ""
        return {prefix + name: tensor for name, tensor in self.names.constants(self.config).items()}

    def num_parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(
        cls,
        folder,
        dtype: torch.dtype | str | None = None,
        device=None,
        revision: str | None = None,
        ignore_mismatched_sizes: bool = False,
        **changes,
    ):
        """The model in `folder`, in evaluation mode.

        folder: `config.json` with `model.safetensors` or `pytorch_model.bin` (read with weights_only), either of them
          whole or in shards with an index, under the names of transformers or of another implementation that
          fastbert.ports knows. If there is no such folder, the name of a model on the Hugging Face hub, such as
          "hfl/chinese-roberta-wwm-ext", which is downloaded with the extra hf (see fastbert.hub).
        dtype: of the parameters, a floating torch.dtype or its name, default as stored; device: default CPU;
        revision: branch, tag or commit of a model on the hub.
        ignore_mismatched_sizes: draw a head of another shape anew, and say so, instead of refusing it.
        changes: fields of the config to change, such as num_labels=3 or classifier_dropout=0.1.

        Tensors of head and pooler that the folder lacks are drawn anew and named in a warning, as are tensors that the
        model has no place for. `MissingFileError`, `ConfigError` or `CheckpointError` name what is absent, damaged, of
        the wrong shape or not finite.
        """
        folder = hub.local_folder(folder, revision)
        config = EncoderConfig.from_json_file(checkpoint.config_file(folder), cls.model_type).changed(**changes)
        with torch.device("meta"):
            model = cls(config)
        checkpoint.load(model, folder, dtype=dtype, device=device, new_heads=ignore_mismatched_sizes)
        return model.eval()

    def save_pretrained(self, folder) -> None:
        """Writes `config.json` and `model.safetensors` with transformers' names into `folder`, which transformers loads
        back (NEZHA: up to 4.40).
        """
        checkpoint.save(self, folder)


class Rows(NamedTuple):
    """A batch as the rows inside a model: ids `[T]`, or `[B, L]` in a dense layout; those that are None are implied."""

    layout: Layout
    input_ids: Tensor
    token_type_ids: Tensor | None
    position_ids: Tensor | None


class HeadRows(NamedTuple):
    """What a head needs of an encoder: the last hidden state as rows, their layout, the hidden states or None, and
    what the pooler makes of the sequences, `[B, C]`, or None. Where labels were given, the rows are those with a label,
    `[N, C]`, and `labels` `[N]` theirs."""

    rows: Tensor
    layout: Layout
    hidden_states: tuple[Tensor, ...] | None
    labels: Tensor | None
    pooled: Tensor | None


class EncoderModel(PretrainedModel):
    """Embeddings, encoder and, where the family has one, pooler.

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, *, cu_seqlens=None, max_seqlen=None,
    output_hidden_states=False)

    input_ids int64 `[B, L]` with attention_mask bool or integer `[B, L]` (non-zero: real token), or packed `[T]` with
    cu_seqlens int32 `[B + 1]`. token_type_ids, position_ids: int64 like input_ids; position_ids only where the family
    has a position table. Returns `EncoderOutput`, zero at padded positions; with return_rows or return_first, what a
    head needs, a `HeadRows`: with labels (as a head takes them) only of the rows that have one; with return_first only
    of each sequence's first token, `[B, C]`; and what is pooled.

    `ShapeError`, `DtypeError` for arguments that do not fit and for sequences longer than the position table;
    `DataError` for ids outside their table.
    """

    has_pooler = False

    def __init__(self, config: EncoderConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if self.has_pooler and add_pooling_layer else None
        self.apply(self.initialize)

    @as_in_transformers
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool = False,
        return_rows: bool = False,
        return_first: bool = False,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
    ) -> EncoderOutput | HeadRows:
        layout, *ids = self.rows(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        x = self.embeddings(*ids)
        positions = None
        if labels is not None:
            if not return_rows or output_hidden_states:
                raise ShapeError("labels are for return_rows without output_hidden_states: a head has the loss")
            labels, positions = labelled_rows(labels, label_positions, layout)
        only = positions if layout.key_padding_mask is None else None
        if return_first and layout.key_padding_mask is None and len(x) > 0 and not output_hidden_states:
            only = layout.starts(len(x))
        both = positions is not None and only is positions and self.pooler is not None and len(x) > 0
        if both:  # the pooler reads each sequence's first row
            only = torch.cat([positions, layout.starts(len(x))])
        rows, states = self.encoder(x, rows=only, output_hidden_states=output_hidden_states, **layout.attention)
        states = None if states is None else tuple(layout.unpack(state) for state in states)
        pooled = None
        if return_first:
            rows = layout.first(rows) if only is None else layout.of_real(rows)
            pooled = None if self.pooler is None else self.pooler(rows)
        elif both:
            rows, first = rows[: len(positions)], rows[len(positions) :]
            pooled = self.pooler(layout.of_real(first))
        elif self.pooler is not None:
            pooled = self.pooler(layout.first(rows))
        if labels is not None and only is None:
            rows = rows.flatten(0, -2) if positions is None else rows.flatten(0, -2).index_select(0, positions)
        if return_rows or return_first:
            return HeadRows(rows, layout, states, labels, pooled)
        return EncoderOutput(layout.unpack(rows), pooled, states)

    def rows(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Rows:
        """What forward makes of its arguments before the embeddings; it raises what is wrong with them."""
        checks.tensors(input_ids=input_ids)
        checks.integer(input_ids=input_ids)
        layout = self._layout(input_ids, attention_mask, cu_seqlens, max_seqlen)
        token_type_ids = _like_input("token_type_ids", token_type_ids, input_ids)
        position_ids = self._position_rows(input_ids, _like_input("position_ids", position_ids, input_ids), layout)
        token_type_ids = None if token_type_ids is None else layout.pack(token_type_ids)
        return Rows(layout, layout.pack(input_ids), token_type_ids, position_ids)

    def _layout(
        self, input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> Layout:
        if cu_seqlens is not None:
            if attention_mask is not None:
                raise ShapeError(
                    "attention_mask and cu_seqlens were both given; expected a mask with padded input or cu_seqlens "
                    "with packed input"
                )
            if input_ids.dim() != 1:
                raise ShapeError(f"input_ids has shape {list(input_ids.shape)}; expected [T], as cu_seqlens is given")
            checks.tensors(cu_seqlens=cu_seqlens)
            check_packed(cu_seqlens, max_seqlen, input_ids.shape[0])
            return packed_layout(cu_seqlens, max_seqlen)
        if input_ids.dim() != 2:
            raise ShapeError(
                f"input_ids has shape {list(input_ids.shape)}; expected [B, L], or [T] together with cu_seqlens"
            )
        if max_seqlen is not None:
            raise ShapeError(f"max_seqlen is {max_seqlen} without cu_seqlens; expected None for padded input")
        if attention_mask is not None:
            checks.tensors(attention_mask=attention_mask)
        keep_distances = self.config.attention != "absolute"
        return padded_layout(tuple(input_ids.shape), attention_mask, input_ids.device, keep_distances=keep_distances)

    def _position_rows(self, input_ids: Tensor, position_ids: Tensor | None, layout: Layout) -> Tensor | None:
        if self.config.attention != "absolute":
            if position_ids is not None:
                raise ConfigError(
                    f"position_ids were given, but {self.model_type} has {self.config.attention} positions, which "
                    "follow from the order of the tokens"
                )
            return None
        if position_ids is not None:
            return layout.pack(position_ids)
        longest = layout.max_seqlen if layout.padded_shape is None else layout.padded_shape[1]
        if longest > self.config.max_length:
            rows = self.config.max_position_embeddings
            raise ShapeError(
                f"input_ids holds a sequence of {longest} tokens; expected at most {self.config.max_length}: the "
                f"position table has {rows} rows"
            )
        return self.default_positions(input_ids, layout)

    def default_positions(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """Position ids as rows by default: 0, 1, 2, ... along each sequence, padded positions counted."""
        if layout.padded_shape is None:
            return positions_in_sequence(layout.cu_seqlens, input_ids.shape[0])
        return layout.pack(torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids))


def _like_input(name: str, ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Ids for every token; `[L]` and `[1, L]` serve all sequences of a padded batch."""
    if ids is None:
        return None
    checks.tensors(**{name: ids})
    checks.integer(**{name: ids})
    if ids.shape != input_ids.shape:
        if ids.shape not in (input_ids.shape[1:], (1, *input_ids.shape[1:])):
            raise ShapeError(
                f"{name} has shape {list(ids.shape)}; expected {list(input_ids.shape)}, the shape of input_ids"
            )
        ids = ids.expand_as(input_ids)
    return ids


class MaskedLMModel(PretrainedModel):
    """An encoder with the masked-language-model head; the decoder is the word-embedding table.

    forward(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *, cu_seqlens=None,
    max_seqlen=None, output_hidden_states=False, return_logits=True): inputs as for the family's Model; labels int64
    like input_ids, -100 where there is nothing to predict; or, with label_positions int64 `[N]`, those of the packed
    tokens at these places, int64 `[N]`. Returns `MaskedLMOutput`: loss is the mean cross-entropy (natural logarithm)
    over the labelled real tokens, 0 if there are none; logits `[B, L, V]`. Only labelled rows pass the head for the
    loss; with return_logits=False no `[tokens, V]` tensor exists at all, and without hidden states the last layer is
    computed for labelled rows only: the way to pretrain. label_positions spare the search for them, which on a GPU
    waits for the device; some may be there to fill up, with a label of -100.
    """

    model_class: type[EncoderModel]
    head_act: str | None = None
    pools = False
    terms = (LossTerm("mlm_loss"),)

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.model = self.model_class(config, add_pooling_layer=self.pools)
        self.head = MaskedLMHead(config, self.head_act)
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
        label_positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool = False,
        return_logits: bool = True,
    ) -> MaskedLMOutput:
        return self._predict(
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
        )[0]

    def _predict(
        self, *inputs, labels, label_positions, output_hidden_states, return_logits, **sequences
    ) -> tuple[MaskedLMOutput, Tensor | None]:
        """What forward returns, and what is pooled or None."""
        if labels is None and not return_logits:
            raise ShapeError(
                "labels is None and return_logits is False; expected labels, since there is nothing to compute "
                "without them"
            )
        if label_positions is not None or labels is not None:
            limit = self.config.vocab_size
            check_word_labels(labels, label_positions, inputs[0], sequences["cu_seqlens"], limit)
        lean = not return_logits and not output_hidden_states
        rows, layout, states, found, pooled = self.model(
            *inputs,
            **sequences,
            output_hidden_states=output_hidden_states,
            return_rows=True,
            labels=labels if lean else None,
            label_positions=label_positions,
        )
        word, loss, labelled = self.model.embeddings.word.weight, None, rows
        if not lean and labels is not None:
            found, positions = labelled_rows(labels, label_positions, layout)
            flat = rows.flatten(0, -2)
            labelled = flat if positions is None else flat.index_select(0, positions)
        if labels is not None:
            loss = self.head(labelled, word, found)
        if not return_logits:
            return MaskedLMOutput(loss, None, states, loss[None], labelled), pooled
        return MaskedLMOutput(loss, layout.unpack(self.head(rows, word)), states), pooled
