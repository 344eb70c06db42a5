"""One configuration for six families. Field names are those of the transformers configs, so that a `config.json` reads
as it stands.

Which fields a family has, the values its authors published for the base size, and every published size by name stand
here; what a field means to the computation stands where it is used.
"""

import dataclasses
import difflib
import math
import typing
import warnings
from dataclasses import dataclass

from fastbert.errors import ConfigError, shown
from fastbert.files import read_json

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish")

_COMMON = dict(
    vocab_size=30522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    max_position_embeddings=512,
    type_vocab_size=2,
    initializer_range=0.02,
    layer_norm_eps=1e-12,
    pad_token_id=0,
    num_labels=2,
    id2label=None,
    problem_type=None,
)
_DROPOUT = dict(classifier_dropout=None)

# What the authors published as the base model: the defaults of EncoderConfig(model_type=...). A key that stands here
# only is that family's own field.
BASE = {
    "bert": _COMMON | _DROPOUT,
    "roberta": _COMMON
    | _DROPOUT
    | dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1),
    "albert": _COMMON
    | dict(vocab_size=30000, hidden_act="gelu_new", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    | dict(embedding_size=128, num_hidden_groups=1, inner_group_num=1, classifier_dropout_prob=0.1),
    "nezha": _COMMON | _DROPOUT | dict(vocab_size=21128, max_relative_position=64),
    "electra": _COMMON | _DROPOUT | dict(embedding_size=None),
    "roformer": _COMMON
    | _DROPOUT
    | dict(vocab_size=50000, max_position_embeddings=1536, embedding_size=None, rotary_value=False),
}

# Where the default of the transformers config class differs: what a key that is missing from a config.json means.
TRANSFORMERS_DEFAULTS = {
    "roberta": dict(max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12),
    "albert": dict(hidden_size=4096, num_attention_heads=64, intermediate_size=16384),
    "electra": dict(hidden_size=256, num_attention_heads=4, intermediate_size=1024, embedding_size=128),
}

# Keys that transformers and the original ports write and that do not change the encoder or its masked-language-model
# head.
_IGNORED = frozenset(
    "architectures attention_dropout bos_token_id chunk_size_feed_forward classifier_dropout "
    "classifier_dropout_prob cls_token_id directionality down_scale_factor dtype embedding_type eos_token_id "
    "eos_token_ids finetuning_task gap_size generator_size gradient_checkpointing "
    "is_encoder_decoder label2id language mask_token_id model_name name net_structure_type "
    "num_memory_blocks output_attentions output_hidden_states output_past pooler_fc_size "
    "pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type return_dict "
    "sep_token_id summary_activation summary_last_dropout summary_type summary_use_proj task_specific_params "
    "tokenizer_class torch_dtype transformers_version unk_token_id use_cache "
    "use_relative_position _name_or_path _commit_hash".split()
)
# Keys for generating text, and other switches, that transformers 4 writes into the config.json of every model; and what
# Google's and later configs say besides.
_OF_EVERY_MODEL = frozenset(
    "attn_implementation bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty "
    "forced_bos_token_id forced_eos_token_id layers_to_keep length_penalty max_length min_length "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores pooler_activation prefix "
    "remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature tf_legacy_loss "
    "top_k top_p torchscript typical_p use_bfloat16 xla_device _attn_implementation_autoset _num_labels".split()
)
# Foreign keys that would change the computation: read only with the value for which they do not. The last two are those
# of RoFormerV2, which has neither biases nor LayerNorm.
_ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "use_bias": True,
    "norm_type": "layer_norm",
}
# Leftovers of another family in published config files (the sijunhe NEZHA ports carry ALBERT's).
_LEFTOVERS = {"nezha": frozenset({"embedding_size", "num_hidden_groups", "inner_group_num"})}


_LONGEST_NAME = 200  # that is taken for a misspelling
_OPTIONAL = ("id2label", "problem_type", "classifier_dropout", "classifier_dropout_prob")
_MOST = {"num_hidden_layers": 1024, "num_hidden_groups": 1024, "inner_group_num": 1024, "num_labels": 1 << 20}
_PROBABILITIES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "classifier_dropout_prob",
)


@dataclass(init=False)
class EncoderConfig:
    """The architecture of one encoder.

    `EncoderConfig(model_type="nezha", hidden_size=384, ...)` fills what is not named with that family's published base
    values. A name that is unknown, or that belongs to another family, raises `ConfigError` with the nearest known name;
    so does a value out of range. Fields of other families are None.

    model_type: bert, roberta, albert, nezha, electra or roformer. WWM, ext, MacBERT and WoBERT are presets of bert,
      WoNEZHA of nezha (`fastbert.presets()`).
    hidden_act: one of `ACTIVATIONS`. "gelu" is the exact (erf) form; "gelu_new", "gelu_pytorch_tanh" and "gelu_fast"
      name the same tanh form. The original BERT, ALBERT and NEZHA were trained with tanh, but their published PyTorch
      configs mostly say "gelu": the file decides.
    embedding_size (albert, electra, roformer): width of the embedding tables and of the head's decoder, projected to
      hidden_size; None means hidden_size.
    num_hidden_groups, inner_group_num (albert): layer i uses the weights of group
      i * num_hidden_groups // num_hidden_layers.
    max_relative_position (nezha): distance R at which relative positions are clipped; 64 in the Chinese models, 127 in
      the English one.
    rotary_value (roformer): rotate values as well as queries and keys; False in all published models.
    num_labels: of what ForSequenceClassification and ForTokenClassification tell apart. id2label: their names by id
      from 0 on, which decide num_labels. problem_type: one of `PROBLEM_TYPES`, for ForSequenceClassification; None:
      regression if num_labels is 1, else by the dtype of the labels.
    classifier_dropout (in albert classifier_dropout_prob): before a classifier; None: hidden_dropout_prob
      (which roformer always takes in transformers, where it has no such field).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int
    type_vocab_size: int
    initializer_range: float
    layer_norm_eps: float
    pad_token_id: int
    num_labels: int
    id2label: dict | None
    problem_type: str | None
    classifier_dropout: float | None
    classifier_dropout_prob: float | None
    embedding_size: int | None
    num_hidden_groups: int | None
    inner_group_num: int | None
    max_relative_position: int | None
    rotary_value: bool | None

    def __init__(self, model_type="bert", **fields):
        values = dict(BASE[_family(model_type)])
        for name, value in fields.items():
            if name in values:
                values[name] = value
            elif name not in _FIELDS:
                raise ConfigError(
                    f"unknown config key {shown(name)} = {shown(value)}{nearest(name, values)}; {model_type} has: "
                    f"{', '.join(values)}"
                )
            elif value is not None:
                owners = ", ".join(family for family, base in BASE.items() if name in base)
                raise ConfigError(
                    f"config key {name!r} = {shown(value)} belongs to {owners}, not to model_type {model_type!r}"
                )
        if "embedding_size" in values and values["embedding_size"] is None:
            values["embedding_size"] = values["hidden_size"]
        if values["id2label"] is not None:
            values["id2label"] = _label_names(values["id2label"])
            values["num_labels"] = fields.get("num_labels", len(values["id2label"]))
        self.model_type = model_type
        for name in _FIELDS[1:]:
            setattr(self, name, values.get(name))
        self._validate()

    def _validate(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                if field.name in BASE[self.model_type] and field.name not in _OPTIONAL:
                    raise ConfigError(f"config key {field.name!r} = None; {self.model_type} needs a value")
                continue
            expected = (typing.get_args(field.type) or (field.type,))[0]
            if type(value) is not expected and not (expected is float and type(value) is int):
                raise ConfigError(
                    f"config key {field.name!r} = {shown(value)} is a {type(value).__name__}; expected "
                    f"{expected.__name__}"
                )
            smallest = 0 if field.name == "pad_token_id" else 1
            if expected is int and value < smallest:
                raise ConfigError(f"config key {field.name!r} = {value} is too small; expected at least {smallest}")
            most = _MOST.get(field.name, 1 << 24)
            if expected is int and value > most:
                raise ConfigError(f"config key {field.name!r} = {value} is too large; expected at most {most}")
        self._validate_numbers()
        self._validate_together()

    def _validate_numbers(self):
        for name in _PROBABILITIES:
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise ConfigError(f"config key {name!r} = {getattr(self, name)} is out of range; expected 0 <= p < 1")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"config key {name!r} = {getattr(self, name)} is out of range; expected a positive number"
                )
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"config key 'hidden_act' = {shown(self.hidden_act)} is unknown; expected one of "
                f"{', '.join(ACTIVATIONS)}"
            )

    def _validate_together(self):
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ConfigError(
                f"config key 'problem_type' = {shown(self.problem_type)} is unknown; expected one of "
                f"{', '.join(PROBLEM_TYPES)}"
            )
        if self.id2label is not None and len(self.id2label) != self.num_labels:
            raise ConfigError(
                f"config key 'id2label' names {len(self.id2label)} labels; expected num_labels = {self.num_labels}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = "
                f"{self.num_attention_heads}"
            )
        if self.attention != "absolute" and self.head_dim % 2:
            raise ConfigError(
                f"{self.model_type} needs an even head dim; hidden_size {self.hidden_size} / num_attention_heads "
                f"{self.num_attention_heads} = {self.head_dim}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise ConfigError(
                f"pad_token_id = {self.pad_token_id} is outside the vocabulary; expected less than vocab_size = "
                f"{self.vocab_size}"
            )
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(
                f"max_position_embeddings = {self.max_position_embeddings} is too small; expected at least "
                f"{self.first_position + 1}"
            )
        if self.num_hidden_groups is not None and self.num_hidden_groups > self.num_hidden_layers:
            raise ConfigError(
                f"num_hidden_groups = {self.num_hidden_groups} exceeds num_hidden_layers = {self.num_hidden_layers}"
            )

    @property
    def labels(self) -> list[str]:
        """The names of the num_labels labels by id; LABEL_0, LABEL_1, ... where id2label gives none."""
        names = self.id2label or {i: f"LABEL_{i}" for i in range(self.num_labels)}
        return [names[i] for i in range(self.num_labels)]

    @property
    def classifier_dropout_p(self) -> float:
        """The probability of dropout before a classifier."""
        given = self.classifier_dropout_prob if self.model_type == "albert" else self.classifier_dropout
        return self.hidden_dropout_prob if given is None else given

    @property
    def head_dim(self) -> int:
        """hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def attention(self) -> str:
        """How the family knows positions: "absolute" (a table added to the embeddings), "rotary" (RoFormer) or
        "relative" (NEZHA).
        """
        return {"roformer": "rotary", "nezha": "relative"}.get(self.model_type, "absolute")

    @property
    def first_position(self) -> int:
        """The position id of the first token: 0, or pad_token_id + 1 in RoBERTa, whose table therefore serves 512
        positions with 514 rows.
        """
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the position table serves; None for rotary and relative positions, which have no
        table.
        """
        return self.max_position_embeddings - self.first_position if self.attention == "absolute" else None

    def to_dict(self) -> dict:
        """The family's fields by name, `model_type` first; `EncoderConfig(**config.to_dict())` equals config."""
        return {name: getattr(self, name) for name in _FIELDS if name == "model_type" or name in BASE[self.model_type]}

    @classmethod
    def from_dict(cls, values: dict, model_type: str = "bert") -> "EncoderConfig":
        """Reads the contents of a transformers-style `config.json`. model_type: the family if `values` names none.

        A missing key has the default of the transformers config class (which is not always the published base value).
        Keys of transformers that do not concern the encoder are passed over; keys that nobody knows are named in a
        warning. `ConfigError`: a key that looks like a misspelt one, for the default would silently take its place; a
        value of the wrong type or out of range; a key that asks for what fastbert does not compute, such as those of
        RoFormerV2.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"config is a {type(values).__name__}; expected a dict of keys and values")
        family = _family(values.get("model_type") or model_type)
        for name, only in _ONLY.items():
            if values.get(name, only) != only:
                raise ConfigError(f"config key {name!r} = {shown(values[name])} is not supported; expected {only!r}")
        known = {name: value for name, value in values.items() if name in BASE[family] and value is not None}
        unknown = sorted(set(values) - _keys_of(family))
        for name in unknown:
            if meant := _misspelt(name, family):
                raise ConfigError(
                    f"config key {shown(name)} = {shown(values[name])} is unknown (did you mean {meant!r}?)"
                )
        if unknown:
            warnings.warn(f"config keys not used by fastbert: {', '.join(unknown)}", stacklevel=2)
        return cls(family, **TRANSFORMERS_DEFAULTS.get(family, {}) | known)

    def changed(self, **changes) -> "EncoderConfig":
        """The same with fields changed by keyword; another num_labels without id2label forgets the old names."""
        values = self.to_dict()
        if changes.get("id2label") is not None:
            del values["num_labels"]
        elif changes.get("num_labels", self.num_labels) != self.num_labels:
            del values["id2label"]
        return EncoderConfig(**values | changes)

    @classmethod
    def from_preset(cls, name: str, **changes) -> "EncoderConfig":
        """The published architecture `name` (one of `fastbert.presets()`), with fields changed by keyword."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(
                f"preset {name!r} is unknown{nearest(name, PRESETS)}; fastbert.presets() lists all {len(PRESETS)}"
            )
        return cls(**PRESETS[name] | changes)

    @classmethod
    def from_json_file(cls, path, model_type: str = "bert") -> "EncoderConfig":
        """`from_dict` of a JSON file; `MissingFileError` or `ConfigError` name the path."""
        values = read_json(path, ConfigError)
        try:
            return cls.from_dict(values, model_type)
        except ConfigError as error:
            raise ConfigError(f"config file {path}: {error}") from None


_FIELDS = tuple(field.name for field in dataclasses.fields(EncoderConfig))


def _family(model_type) -> str:
    if not isinstance(model_type, str) or model_type not in BASE:
        known = ", ".join(BASE)
        raise ConfigError(
            f"model_type {shown(model_type)} is unknown; expected one of {known}{nearest(model_type, BASE)}"
        )
    return model_type


def _label_names(given) -> dict[int, str]:
    """id2label with ids as numbers, which a JSON file has as strings."""
    try:
        names = {int(index): name for index, name in given.items()}
    except (AttributeError, TypeError, ValueError):
        names = {}
    if sorted(names) != list(range(len(names))) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ConfigError(f"config key 'id2label' = {shown(given)}; expected a name for each id from 0 on")
    return dict(sorted(names.items()))


def _keys_of(family: str) -> set[str]:
    """What a config.json of the family may hold without a warning."""
    passed_over = _IGNORED | _OF_EVERY_MODEL | _LEFTOVERS.get(family, frozenset())
    return passed_over | set(_ONLY) | set(BASE[family]) | {"model_type"}


def _misspelt(name: str, family: str) -> str | None:
    """The key that concerns the encoder of which an unknown key seems to be a misspelling."""
    known = [*BASE[family], *_ONLY, "model_type"]
    return None if name in _FIELDS else _most_like(name.lower().replace("-", "_"), known, 0.86)


def nearest(name, known, cutoff: float = 0.6) -> str:
    """ " (did you mean ...?)" with the known name that is most like `name`, or nothing."""
    match = _most_like(name, known, cutoff)
    return f" (did you mean {match!r}?)" if match else ""


def _most_like(name, known, cutoff: float) -> str | None:
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return None
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def _size(layers, hidden, heads, **rest):
    return (
        dict(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden)
        | rest
    )


_BASE, _LARGE, _ZH = _size(12, 768, 12), _size(24, 1024, 16), dict(vocab_size=21128)
_BERT, _ROBERTA, _ALBERT, _NEZHA, _ELECTRA, _ROFORMER = ({"model_type": family} for family in BASE)
_GENERATOR = _size(12, 256, 4)
PRESETS = {
    # BERT (arXiv 1810.04805) and its smaller relatives (1908.08962)
    "bert-base-uncased": _BERT | _BASE,
    "bert-large-uncased": _BERT | _LARGE,
    "bert-base-cased": _BERT | _BASE | dict(vocab_size=28996),
    "bert-large-cased": _BERT | _LARGE | dict(vocab_size=28996),
    "bert-base-multilingual-cased": _BERT | _BASE | dict(vocab_size=119547),
    "bert-base-chinese": _BERT | _BASE | _ZH,
    "bert-tiny": _BERT | _size(2, 128, 2),
    "bert-mini": _BERT | _size(4, 256, 4),
    "bert-small": _BERT | _size(4, 512, 8),
    "bert-medium": _BERT | _size(8, 512, 8),
    # whole-word masking and the "ext" models (1906.08101): BERT's architecture, other data
    "bert-large-uncased-whole-word-masking": _BERT | _LARGE,
    "chinese-bert-wwm": _BERT | _BASE | _ZH,
    "chinese-bert-wwm-ext": _BERT | _BASE | _ZH,
    "chinese-roberta-wwm-ext": _BERT | _BASE | _ZH,
    "chinese-roberta-wwm-ext-large": _BERT | _LARGE | _ZH,
    "rbt3": _BERT | _BASE | _ZH | dict(num_hidden_layers=3),
    "rbt4": _BERT | _BASE | _ZH | dict(num_hidden_layers=4),
    "rbt6": _BERT | _BASE | _ZH | dict(num_hidden_layers=6),
    "rbtl3": _BERT | _LARGE | _ZH | dict(num_hidden_layers=3),
    # MacBERT (2004.13922), WoBERT and WoNEZHA: known architectures, other objective or vocabulary
    "macbert-base": _BERT | _BASE | _ZH,
    "macbert-large": _BERT | _LARGE | _ZH,
    "wobert-base": _BERT | _BASE | dict(vocab_size=33586),
    "wobert-plus-base": _BERT | _BASE | dict(vocab_size=50000),
    "wonezha-base": _NEZHA | _BASE | dict(vocab_size=33586),
    # RoBERTa (1907.11692)
    "roberta-base": _ROBERTA | _BASE,
    "roberta-large": _ROBERTA | _LARGE,
    # NEZHA (1909.00204)
    "nezha-base-chinese": _NEZHA | _BASE,
    "nezha-base-wwm-chinese": _NEZHA | _BASE,
    "nezha-large-chinese": _NEZHA | _LARGE,
    "nezha-large-wwm-chinese": _NEZHA | _LARGE,
    "nezha-base-english": _NEZHA | _BASE | dict(vocab_size=28996, max_relative_position=127),
    "nezha-base-multilingual": _NEZHA | _BASE | dict(vocab_size=100503),
    # RoFormer (2104.09864)
    "roformer-base-chinese": _ROFORMER | _BASE,
    "roformer-small-chinese": _ROFORMER | _size(6, 384, 6) | dict(max_position_embeddings=512),
    "roformer-char-base-chinese": _ROFORMER | _BASE | dict(vocab_size=12000, max_position_embeddings=512),
    "roformer-char-small-chinese": _ROFORMER | _size(6, 384, 6) | dict(vocab_size=12000, max_position_embeddings=512),
    # ELECTRA (2003.10555): discriminator and generator of each size; -owt is the small generator of the paper, not
    # the released one
    "electra-small-discriminator": _ELECTRA | _GENERATOR | dict(embedding_size=128),
    "electra-small-generator": _ELECTRA | _GENERATOR | dict(embedding_size=128),
    "electra-small-owt-generator": _ELECTRA | _size(12, 64, 1) | dict(embedding_size=128),
    "electra-base-discriminator": _ELECTRA | _BASE,
    "electra-base-generator": _ELECTRA | _GENERATOR | dict(embedding_size=768),
    "electra-large-discriminator": _ELECTRA | _LARGE,
    "electra-large-generator": _ELECTRA | _size(24, 256, 4) | dict(embedding_size=1024),
    "chinese-electra-small-discriminator": _ELECTRA | _GENERATOR | _ZH | dict(embedding_size=128),
    "chinese-electra-small-generator": _ELECTRA | _size(12, 64, 1) | _ZH | dict(embedding_size=128),
    "chinese-electra-base-discriminator": _ELECTRA | _BASE | _ZH,
    "chinese-electra-base-generator": _ELECTRA | _size(12, 192, 3) | _ZH | dict(embedding_size=768),
    "chinese-electra-large-discriminator": _ELECTRA | _LARGE | _ZH,
    "chinese-electra-large-generator": _ELECTRA | _size(24, 256, 4) | _ZH | dict(embedding_size=1024),
    "chinese-electra-small-ex-discriminator": _ELECTRA | _size(24, 256, 4) | _ZH | dict(embedding_size=256),
    "chinese-electra-small-ex-generator": _ELECTRA | _size(24, 64, 1) | _ZH | dict(embedding_size=256),
    # brightmart's small Chinese ALBERTs, in Google's form
    "albert-tiny-chinese": _ALBERT | _size(4, 312, 12) | _ZH,
    "albert-small-chinese": _ALBERT | _size(6, 384, 12) | _ZH,
}
# ALBERT (1909.11942): version 1 trained with dropout (but for xxlarge) and its published configs say exact gelu;
# version 2 without and tanh.
_ALBERT_SIZES = {"base": _BASE, "large": _LARGE, "xlarge": _size(24, 2048, 16), "xxlarge": _size(12, 4096, 64)}
_V1 = dict(hidden_act="gelu", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
PRESETS |= {f"albert-{name}-v2": _ALBERT | size for name, size in _ALBERT_SIZES.items()}
PRESETS |= {f"albert-{name}-v1": _ALBERT | size | _V1 for name, size in _ALBERT_SIZES.items()}
PRESETS["albert-xxlarge-v1"] |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def presets() -> list[str]:
    """The names that `EncoderConfig.from_preset` takes: every published size of every variant."""
    return sorted(PRESETS)
