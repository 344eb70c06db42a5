"""The names that other implementations give their tensors -> those of transformers.

Known are, each by its own unmistakable names:

- the first PyTorch ports of TensorFlow checkpoints: LayerNorm's `gamma` and `beta`;
- bert4torch: `encoderLayer.0.multiHeadAttention.q`, as its models call them in memory and torch.save keeps them, under
  any prefix (what its save_pretrained writes has transformers' names already);
- whatever was saved of a model inside DistributedDataParallel: every name begins with `module.`;
- fairseq's RoBERTa: `encoder.sentence_encoder` or `decoder.sentence_encoder`, either spelling of the LayerNorm of the
  embeddings, the three projections apart or in one `in_proj_weight`.

lonePatient's NEZHA, junnyu's RoFormer and HFL's models use transformers' names. Weights of bert4keras are read from the
TensorFlow checkpoints it loads (fastbert.tensorflow_checkpoint), not from its h5 files. Any other name stays as it is.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from fastbert.errors import CheckpointError

_GAMMA_BETA = {"gamma": "weight", "beta": "bias"}

_BERT4TORCH = re.compile(r"(.*?)encoderLayer\.\d+\.multiHeadAttention\.q\.weight")
_BERT4TORCH_LAYER = {
    "multiHeadAttention.q": ("attention.self.query", "attention.query"),
    "multiHeadAttention.k": ("attention.self.key", "attention.key"),
    "multiHeadAttention.v": ("attention.self.value", "attention.value"),
    "multiHeadAttention.o": ("attention.output.dense", "attention.dense"),
    "attnLayerNorm": ("attention.output.LayerNorm", "attention.LayerNorm"),
    "feedForward.intermediateDense": ("intermediate.dense", "ffn"),
    "feedForward.outputDense": ("output.dense", "ffn_output"),
    "ffnLayerNorm": ("output.LayerNorm", "full_layer_layer_norm"),
}
_BERT4TORCH_PARTS = {
    "embeddings.segment_embeddings": "embeddings.token_type_embeddings",
    "embeddings.layerNorm": "embeddings.LayerNorm",
    "embeddings.embedding_hidden_mapping_in": "embeddings_project",
    "pooler": "pooler.dense",
    "nsp": "cls.seq_relationship",
    "mlmDense": "cls.predictions.transform.dense",
    "mlmLayerNorm": "cls.predictions.transform.LayerNorm",
    "mlmDecoder": "cls.predictions.decoder",
    "mlmBias": "cls.predictions.bias",
}
_BERT4TORCH_OWN = {
    "albert": {
        "embeddings.embedding_hidden_mapping_in": "encoder.embedding_hidden_mapping_in",
        "pooler": "pooler",
        "nsp": "sop_classifier.classifier",
        "mlmDense": "predictions.dense",
        "mlmLayerNorm": "predictions.LayerNorm",
        "mlmDecoder": "predictions.decoder",
        "mlmBias": "predictions.bias",
    },
    "roberta": {
        "mlmDense": "lm_head.dense",
        "mlmLayerNorm": "lm_head.layer_norm",
        "mlmDecoder": "lm_head.decoder",
        "mlmBias": "lm_head.bias",
    },
    "electra": {
        "dense": "discriminator_predictions.dense",
        "dense_prediction": "discriminator_predictions.dense_prediction",
    },
}

_FAIRSEQ = re.compile(r"(.*?)((?:encoder|decoder)\.)sentence_encoder\.embed_tokens\.weight")
_FAIRSEQ_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_FAIRSEQ_PARTS = {
    "sentence_encoder.embed_tokens": "embeddings.word_embeddings",
    "sentence_encoder.embed_positions": "embeddings.position_embeddings",
    "sentence_encoder.emb_layer_norm": "embeddings.LayerNorm",
    "sentence_encoder.layernorm_embedding": "embeddings.LayerNorm",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
}
_IN_PROJ = re.compile(r"(.*sentence_encoder\.layers\.\d+\.self_attn\.)in_proj_(weight|bias)")


def translated(tensors: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Tensors by transformers' names, from a file of any port; see `published`.

    fairseq's joined projections are taken apart, and its models, which know no segments, get the one row of zeros
    that transformers adds for them. `CheckpointError`: two tensors under the same name of transformers.
    """
    apart = {}
    for name, tensor in tensors.items():
        if (match := _IN_PROJ.fullmatch(name)) and tensor.dim() and len(tensor) % 3 == 0:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                part_name = f"{match[1]}{letter}_proj.{match[2]}"
                if part_name in tensors:
                    raise CheckpointError(f"{name} and {part_name} are both there, expected one of them")
                apart[part_name] = part
        else:
            apart[name] = tensor
    names, result, source = published(apart, model_type), {}, {}
    for name, tensor in apart.items():
        if names[name] in result:
            raise CheckpointError(f"{source[names[name]]} and {name} are both {names[name]}; expected one of them")
        result[names[name]], source[names[name]] = tensor, name
    words = result.get("embeddings.word_embeddings.weight")
    if words is not None and any("sentence_encoder." in name for name in source.values()):
        result.setdefault("embeddings.token_type_embeddings.weight", torch.zeros_like(words[:1]))
    return result


def published(names: Iterable[str], model_type: str) -> dict[str, str]:
    """Each name -> transformers' name of the same tensor in a model of that family; of bert4torch and fairseq without
    the prefix of the family's encoder. A name that belongs to no port that is known stays as it is.
    """
    names = list(names)
    wrapped = "module." if all(name.startswith("module.") for name in names) else ""
    names = {name: _without_gamma(name.removeprefix(wrapped)) for name in names}
    for pattern, rename in ((_BERT4TORCH, _from_bert4torch), (_FAIRSEQ, _from_fairseq)):
        found = next((match for match in map(pattern.fullmatch, names.values()) if match), None)
        if found:
            return {old: rename(new, found, model_type) for old, new in names.items()}
    return names


def _without_gamma(name: str) -> str:
    return re.sub(r"\.(gamma|beta)$", lambda match: f".{_GAMMA_BETA[match[1]]}", name)


def _from_bert4torch(name: str, found: re.Match, model_type: str) -> str:
    if not name.startswith(found[1]):
        return name
    bare = name.removeprefix(found[1])
    albert = model_type == "albert"
    if match := re.fullmatch(r"encoderLayer\.(\d+)\.(.+)\.(weight|bias)", bare):
        layer = "encoder.albert_layer_groups.0.albert_layers.{}" if albert else "encoder.layer.{}"
        parts = _BERT4TORCH_LAYER.get(match[2])
        return f"{layer.format(match[1])}.{parts[albert]}.{match[3]}" if parts else name
    parts = _BERT4TORCH_PARTS | _BERT4TORCH_OWN.get(model_type, {})
    if bare == "mlmBias":
        return parts[bare]
    stem, _, leaf = bare.rpartition(".")
    return f"{parts.get(stem, stem)}.{leaf}" if stem in parts or stem.startswith("embeddings.") else name


def _from_fairseq(name: str, found: re.Match, _model_type: str) -> str:
    prefix = found[1] + found[2]
    if match := re.fullmatch(rf"{re.escape(found[1])}classification_heads\.\w+\.(.+)", name):
        return f"classifier.{match[1]}"
    if not name.startswith(prefix):
        return name
    bare = name.removeprefix(prefix)
    if bare in ("lm_head.weight", "lm_head.bias"):
        return "lm_head.decoder.weight" if bare == "lm_head.weight" else bare
    if match := re.fullmatch(r"sentence_encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", bare):
        part = _FAIRSEQ_LAYER.get(match[2])
        return f"encoder.layer.{match[1]}.{part}.{match[3]}" if part else name
    stem, _, leaf = bare.rpartition(".")
    return f"{_FAIRSEQ_PARTS[stem]}.{leaf}" if stem in _FAIRSEQ_PARTS else name
