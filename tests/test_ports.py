"""Weights under the names of other implementations, in files, give the same model bit for bit."""

import json
import re

import pytest
import torch
from test_models import FAMILIES, build

import fastbert
from fastbert.errors import CheckpointError
from fastbert.ports import published, translated

# bert4torch 0.6.2: the names in state_dict() of its models, by our own. Its ALBERT keeps one layer.
BERT4TORCH = {
    "model.embeddings.token_type": "embeddings.segment_embeddings",
    "model.embeddings.norm": "embeddings.layerNorm",
    "model.embeddings.word": "embeddings.word_embeddings",
    "model.embeddings.position": "embeddings.position_embeddings",
    "model.embeddings.projection": "embeddings.embedding_hidden_mapping_in",
    "model.pooler.dense": "pooler",
    "head.norm": "mlmLayerNorm",
    "head.prediction": "dense_prediction",
    "sentence_head.classifier": "nsp",
    "attention.query": "multiHeadAttention.q",
    "attention.key": "multiHeadAttention.k",
    "attention.value": "multiHeadAttention.v",
    "attention.output": "multiHeadAttention.o",
    "attention_norm": "attnLayerNorm",
    "intermediate": "feedForward.intermediateDense",
    "output": "feedForward.outputDense",
    "output_norm": "ffnLayerNorm",
}
FAIRSEQ = {
    "model.embeddings.word": "encoder.sentence_encoder.embed_tokens",
    "model.embeddings.position": "encoder.sentence_encoder.embed_positions",
    "model.embeddings.norm": "encoder.sentence_encoder.layernorm_embedding",
    "head.dense": "encoder.lm_head.dense",
    "head.norm": "encoder.lm_head.layer_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "intermediate": "fc1",
    "output": "fc2",
    "output_norm": "final_layer_norm",
}
TASKS = [
    *((family, "masked_lm") for family in FAMILIES if family != "electra"),
    *((family, "pretraining") for family in ("bert", "albert", "electra")),
]


def of_port(model, names, layer):
    """The parameters of a model under the names of a port."""
    tensors = {}
    for name, parameter in model.named_parameters():
        stem, _, leaf = name.rpartition(".")
        if match := re.fullmatch(r"model\.encoder\.layers\.(\d+)\.(.+)", stem):
            stem = f"{layer}.{match[1]}.{names[match[2]]}"
        else:
            stem = names.get(stem, stem)
        tensors[f"{stem}.{leaf}"] = parameter.detach()
    return tensors


def bert4torch(model):
    dense = "dense" if model.model_type == "electra" else "mlmDense"
    tensors = of_port(model, BERT4TORCH | {"head.dense": dense}, "encoderLayer")
    if "head.bias" in tensors:
        tensors["mlmBias"] = tensors["mlmDecoder.bias"] = tensors.pop("head.bias")
        tensors["mlmDecoder.weight"] = tensors["embeddings.word_embeddings.weight"]
    return tensors


def fairseq(model):
    tensors = of_port(model, FAIRSEQ, "encoder.sentence_encoder.layers")
    tensors["encoder.lm_head.bias"] = tensors.pop("head.bias")
    tensors["encoder.lm_head.weight"] = tensors["encoder.sentence_encoder.embed_tokens.weight"]
    tensors["encoder.sentence_encoder.version"] = torch.tensor([3.0])
    assert not tensors.pop("model.embeddings.token_type.weight").any()  # fairseq has none
    return tensors


def read_back(tmp_path, model, tensors):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    return type(model).from_pretrained(tmp_path)


def assert_equal(one, other):
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("prefix", ["", "bert.", "module.encoder."])
@pytest.mark.parametrize("family, task", TASKS)
def test_bert4torch(tmp_path, family, task, prefix, recwarn):
    model = build(family, task)
    tensors = {prefix + name: tensor for name, tensor in bert4torch(model).items()}
    if family == "nezha":
        tensors[f"{prefix}encoderLayer.0.multiHeadAttention.relative_positions_encoding.position_embeddings"] = (
            torch.zeros(24, 24, 8)
        )
    assert_equal(model, read_back(tmp_path, model, tensors))
    assert not recwarn.list


@pytest.mark.parametrize("spelling", ["layernorm_embedding", "emb_layer_norm"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("prefix", ["encoder.", "decoder.", "model.encoder."])
def test_fairseq(tmp_path, prefix, joined, spelling, recwarn):
    model = build("roberta", type_vocab_size=1)
    with torch.no_grad():
        model.model.embeddings.token_type.weight.zero_()
    tensors = {}
    for name, tensor in fairseq(model).items():
        name = prefix + name.removeprefix("encoder.").replace("layernorm_embedding", spelling)
        if joined and (match := re.fullmatch(r"(.*self_attn\.)([qkv])_proj\.(.*)", name)):
            name = f"{match[1]}in_proj_{match[3]}"  # q, k, v come in this order
            tensor = torch.cat([tensors[name], tensor]) if name in tensors else tensor
        tensors[name] = tensor
    assert any("in_proj" in name for name in tensors) == joined
    assert_equal(model, read_back(tmp_path, model, tensors))
    assert not recwarn.list


def test_a_fairseq_classifier_and_two_of_them():
    names = ["encoder.sentence_encoder.embed_tokens.weight", "classification_heads.mnli.out_proj.weight"]
    assert published(names, "roberta")[names[1]] == "classifier.out_proj.weight"
    tensors = {name: torch.zeros(3, 2) for name in [*names, "classification_heads.rte.out_proj.weight"]}
    with pytest.raises(CheckpointError, match="mnli.out_proj.*rte.out_proj.*both classifier.out_proj.weight"):
        translated(tensors, "roberta")


def test_data_parallel_and_old_norms(tmp_path, recwarn):
    model = build("bert")
    names = model.published_names()
    tensors = {
        "module."
        + re.sub(r"(LayerNorm)\.weight$", r"\1.gamma", re.sub(r"(LayerNorm)\.bias$", r"\1.beta", names[name])): (
            parameter.detach()
        )
        for name, parameter in model.named_parameters()
    }
    assert sum(name.endswith(".gamma") for name in tensors) == 8
    assert_equal(model, read_back(tmp_path, model, tensors))
    assert not recwarn.list


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_transformers_and_unknown_ones_stay(family):
    names = list(build(family).published_names().values()) + ["own.head.weight", "dense.weight", "mlmBias"]
    assert published(names, family) == {name: name for name in names}


def test_a_port_of_another_family_is_no_guess(tmp_path):
    """bert4torch's names in a folder whose config says RoBERTa: what is missing is named."""
    model = build("bert")
    tensors = bert4torch(model)
    del tensors["encoderLayer.1.feedForward.outputDense.bias"]
    with pytest.raises(CheckpointError, match="lacks 1 tensor.*bert.encoder.layer.1.output.dense.bias"):
        read_back(tmp_path, model, tensors)


def test_nezha_of_lonepatient_and_sijunhe(tmp_path, recwarn):
    """The prefix is BERT's, every layer has its table, the config has ALBERT's keys."""
    model = build("nezha", "pretraining").float()
    tensors = {
        name.replace("nezha.", "bert."): parameter.detach()
        for name, parameter in zip(model.published_names().values(), model.parameters(), strict=True)
    }
    for layer in range(3):
        tensors[f"bert.encoder.layer.{layer}.attention.self.relative_positions_encoding.positions_encoding"] = (
            torch.zeros(24, 24, 8)
        )
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    read_back(tmp_path, model, tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    more = {"embedding_size": 128, "num_hidden_groups": 1, "inner_group_num": 1, "use_relative_position": True}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    assert_equal(model, fastbert.from_pretrained(tmp_path))
    assert not recwarn.list


def test_roformer_of_junnyu(tmp_path, recwarn):
    """The table of sinusoids is not trusted; the pooler of its sim models is named; RoFormerV2 is refused."""
    model = build("roformer").float()
    names = model.published_names()
    tensors = {names[name]: parameter.detach() for name, parameter in model.named_parameters()}
    tensors["roformer.encoder.embed_positions.weight"] = torch.full((24, 8), torch.nan)
    assert_equal(model, read_back(tmp_path, model, tensors))
    config = json.loads((tmp_path / "config.json").read_text())
    more = {"use_bias": True, "norm_type": "layer_norm", "pooler_activation": "linear", "gradient_checkpointing": False}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    assert_equal(model, fastbert.from_pretrained(tmp_path))
    assert not recwarn.list
    torch.save(tensors | {"roformer.pooler.dense.weight": torch.zeros(16, 16)}, tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="does not use: roformer.pooler.dense.weight"):
        fastbert.from_pretrained(tmp_path)
    for key, value in (("use_bias", False), ("norm_type", "rms_norm")):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(
            fastbert.FastBertError, match=f"config.json: config key '{key}' = {value!r} is not supported"
        ):
            fastbert.from_pretrained(tmp_path)
