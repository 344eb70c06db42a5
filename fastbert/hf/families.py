"""The encoders of transformers that are accelerated: by class, what fastbert's modules need to know of each."""

from dataclasses import dataclass

from torch import nn

from fastbert import models
from fastbert.models.base import EncoderModel

_ROOT = "transformers.models."
_POOLED = "BaseModelOutputWithPoolingAndCrossAttentions"
_UNPOOLED = "BaseModelOutputWithPastAndCrossAttentions"


@dataclass(frozen=True)
class Places:
    """Where a layer of transformers has what is no weight, by path in the layer; dropouts: after the probabilities,
    after attention and, if anything is dropped there, after the feed-forward block."""

    attention: str
    activation: str
    dropouts: tuple[str, ...]


_BERT = Places(
    "attention.self",
    "intermediate.intermediate_act_fn",
    ("attention.self.dropout", "attention.output.dropout", "output.dropout"),
)
_ALBERT = Places("attention", "activation", ("attention.attention_dropout", "attention.output_dropout"))


@dataclass(frozen=True)
class Family:
    """view: fastbert's class of this architecture. output: what forward returns, a class of
    transformers.modeling_outputs."""

    view: type[EncoderModel]
    output: str
    places: Places = _BERT


_NEZHA = Family(models.NezhaModel, _POOLED)
FAMILIES = {
    "bert.modeling_bert.BertModel": Family(models.BertModel, _POOLED),
    "roberta.modeling_roberta.RobertaModel": Family(models.RobertaModel, _POOLED),
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaModel": Family(models.RobertaModel, _POOLED),
    "camembert.modeling_camembert.CamembertModel": Family(models.RobertaModel, _POOLED),
    "albert.modeling_albert.AlbertModel": Family(models.AlbertModel, "BaseModelOutputWithPooling", _ALBERT),
    "electra.modeling_electra.ElectraModel": Family(models.ElectraModel, _UNPOOLED),
    "roformer.modeling_roformer.RoFormerModel": Family(models.RoFormerModel, _UNPOOLED),
    # transformers 4 only
    "nezha.modeling_nezha.NezhaModel": _NEZHA,
    "deprecated.nezha.modeling_nezha.NezhaModel": _NEZHA,
}


def family_of(module: nn.Module) -> Family | None:
    """The family of an encoder of exactly a known class; None for every other module."""
    kind = type(module)
    return FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}".removeprefix(_ROOT))
