"""What is in goldens/tf_*: the variables of small models by their names in the published TensorFlow checkpoints."""

import zlib

import numpy as np

FAMILIES = ("bert", "nezha", "albert", "electra", "roformer")
SCALARS = {"global_step": np.int64(7), "good_steps": np.int32(3), "loss_scale": np.float32(2.0)}
VOCAB, HIDDEN, NARROW, INNER, LAYERS, LENGTH = 13, 8, 4, 12, 2, 6
GENERATOR = dict(hidden_size=6, intermediate_size=16, num_attention_heads=1)


def value(name, shape):
    """float32, exact, and different for every name and place."""
    numbers = np.arange(np.prod(shape)) * 7919 + zlib.crc32(name.encode())
    return ((numbers % 2003 - 1001) / 4096).astype(np.float32).reshape(shape)


def variables(family):
    """Name -> shape."""
    return {
        "bert": lambda: _embeddings("bert", HIDDEN) | _bert_encoder("bert", HIDDEN) | _bert_heads(),
        "nezha": lambda: _embeddings("bert", HIDDEN, False) | _bert_encoder("bert", HIDDEN) | _bert_heads(),
        "albert": _albert,
        "electra": _electra,
        "roformer": lambda: _embeddings("bert", HIDDEN, False) | _bert_encoder("bert", HIDDEN) | _words(HIDDEN),
    }[family]()


def config(family):
    """The name and the content of the config beside the checkpoint."""
    values = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=INNER,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=LENGTH,
        type_vocab_size=2,
        initializer_range=0.02,
    )
    own = {
        "bert": dict(directionality="bidi", pooler_type="first_token_transform", pooler_num_fc_layers=3),
        "nezha": dict(use_relative_position=True),
        "albert": dict(embedding_size=NARROW, num_hidden_groups=1, inner_group_num=1, layers_to_keep=[], gap_size=0),
        "electra": dict(embedding_size=NARROW),
    }
    names = {"albert": "albert_config.json", "electra": "base_discriminator_config.json"}
    return names.get(family, "bert_config.json"), values | own.get(family, {})


def _dense(name, inputs, outputs):
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def _norm(name, size):
    return {f"{name}/gamma": (size,), f"{name}/beta": (size,)}


def _embeddings(scope, size, positions=True):
    tables = {"word": VOCAB, "token_type": 2} | ({"position": LENGTH} if positions else {})
    found = {f"{scope}/embeddings/{name}_embeddings": (rows, size) for name, rows in tables.items()}
    return found | _norm(f"{scope}/embeddings/LayerNorm", size)


def _bert_encoder(scope, size, inner=INNER):
    found = {}
    for index in range(LAYERS):
        layer = f"{scope}/encoder/layer_{index}"
        for name in ("self/query", "self/key", "self/value", "output/dense"):
            found |= _dense(f"{layer}/attention/{name}", size, size)
        found |= _norm(f"{layer}/attention/output/LayerNorm", size) | _norm(f"{layer}/output/LayerNorm", size)
        found |= _dense(f"{layer}/intermediate/dense", size, inner) | _dense(f"{layer}/output/dense", inner, size)
    return found


def _words(narrow):
    transform = "cls/predictions/transform"
    found = _dense(f"{transform}/dense", HIDDEN, narrow) | _norm(f"{transform}/LayerNorm", narrow)
    return found | {"cls/predictions/output_bias": (VOCAB,)}


def _sentences():
    name = "cls/seq_relationship"
    return {f"{name}/output_weights": (2, HIDDEN), f"{name}/output_bias": (2,)} | _dense(
        "bert/pooler/dense", HIDDEN, HIDDEN
    )


def _bert_heads():
    return _words(HIDDEN) | _sentences()


def _albert():
    layer = "bert/encoder/transformer/group_0/inner_group_0"
    found = _embeddings("bert", NARROW) | _dense("bert/encoder/embedding_hidden_mapping_in", NARROW, HIDDEN)
    for name in ("self/query", "self/key", "self/value", "output/dense"):
        found |= _dense(f"{layer}/attention_1/{name}", HIDDEN, HIDDEN)
    found |= _norm(f"{layer}/LayerNorm", HIDDEN) | _norm(f"{layer}/LayerNorm_1", HIDDEN)
    found |= _dense(f"{layer}/ffn_1/intermediate/dense", HIDDEN, INNER)
    found |= _dense(f"{layer}/ffn_1/intermediate/output/dense", INNER, HIDDEN)
    return found | _words(NARROW) | _sentences()


def _electra():
    found = _embeddings("electra", NARROW) | _dense("electra/embeddings_project", NARROW, HIDDEN)
    found |= _bert_encoder("electra", HIDDEN) | _dense("discriminator_predictions/dense", HIDDEN, HIDDEN)
    found |= _dense("discriminator_predictions/dense_1", HIDDEN, 1)
    size = GENERATOR["hidden_size"]
    found |= _dense("generator/embeddings_project", NARROW, size)
    found |= _bert_encoder("generator", size, GENERATOR["intermediate_size"])
    found |= _dense("generator_predictions/dense", size, NARROW) | _norm("generator_predictions/LayerNorm", NARROW)
    return found | {"generator_predictions/output_bias": (VOCAB,)}
