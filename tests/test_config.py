"""EncoderConfig: strict fields, published values, published sizes with their parameter counts."""

import dataclasses
import json

import pytest
import torch

import fastbert
from fastbert.config import BASE, PRESETS
from fastbert.errors import ConfigError, MissingFileError

# Trainable parameters of the bare encoder (with pooler where the family has one), as published by the authors or
# counted on the published weights.
PUBLISHED_COUNTS = {
    "bert-base-uncased": 109_482_240,
    "bert-large-uncased": 335_141_888,
    "bert-base-cased": 108_310_272,
    "bert-base-chinese": 102_267_648,
    "bert-tiny": 4_385_920,
    "bert-mini": 11_170_560,
    "bert-small": 28_763_648,
    "bert-medium": 41_373_184,
    "chinese-roberta-wwm-ext": 102_267_648,
    "macbert-base": 102_267_648,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "albert-base-v1": 11_683_584,
    "albert-base-v2": 11_683_584,
    "albert-large-v2": 17_683_968,
    "albert-xlarge-v2": 58_724_864,
    "albert-xxlarge-v2": 222_595_584,
    "nezha-base-chinese": 101_874_432,
    "electra-small-discriminator": 13_483_008,
    "electra-base-discriminator": 108_891_648,
    "electra-large-discriminator": 334_092_288,
    "roformer-base-chinese": 123_457_536,
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_preset_has_the_published_number_of_parameters(name):
    config = fastbert.EncoderConfig.from_preset(name)
    with torch.device("meta"):
        model = fastbert.model_class(config.model_type, "model")(config)
    assert model.num_parameters() == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize("name", fastbert.presets())
def test_every_preset_is_a_valid_config_and_round_trips(name):
    config = fastbert.EncoderConfig.from_preset(name)
    assert fastbert.EncoderConfig(**config.to_dict()) == config
    assert fastbert.EncoderConfig.from_dict(config.to_dict()) == config
    assert config.head_dim * config.num_attention_heads == config.hidden_size


def test_every_family_has_presets():
    assert {PRESETS[name]["model_type"] for name in PRESETS} == set(BASE)


def test_generator_sizes_follow_the_published_fractions():
    large = fastbert.EncoderConfig.from_preset("electra-large-generator")
    assert (large.hidden_size, large.num_attention_heads, large.intermediate_size, large.embedding_size) == (
        256,
        4,
        1024,
        1024,
    )
    chinese = fastbert.EncoderConfig.from_preset("chinese-electra-base-generator")
    assert (chinese.hidden_size, chinese.num_attention_heads, chinese.embedding_size) == (192, 3, 768)


def test_fields_of_other_families_are_none_and_replace_works():
    config = fastbert.EncoderConfig("bert")
    assert config.embedding_size is None and config.max_relative_position is None
    assert dataclasses.replace(config, hidden_size=120).hidden_size == 120
    assert fastbert.EncoderConfig("roformer", hidden_size=96).embedding_size == 96


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(hiden_size=3), ["hiden_size", "3", "hidden_size"]),
        (dict(rotary_value=True), ["rotary_value", "roformer", "bert"]),
        (dict(hidden_size="768"), ["hidden_size", "'768'", "int"]),
        (dict(hidden_size=True), ["hidden_size", "True", "int"]),
        (dict(hidden_size=770), ["770", "num_attention_heads", "12"]),
        (dict(hidden_size=0), ["hidden_size", "0", "at least 1"]),
        (dict(hidden_act="gelo"), ["hidden_act", "gelo", "gelu_new"]),
        (dict(hidden_dropout_prob=1.0), ["hidden_dropout_prob", "1.0", "p < 1"]),
        (dict(layer_norm_eps=0.0), ["layer_norm_eps", "0.0"]),
        (dict(pad_token_id=30522), ["pad_token_id", "30522"]),
        (dict(model_type="robreta"), ["robreta", "roberta"]),
        (dict(model_type="nezha", hidden_size=36), ["even head dim", "3"]),
        (dict(model_type="albert", num_hidden_groups=13), ["num_hidden_groups", "13", "12"]),
        (dict(model_type="albert", num_hidden_groups=None), ["num_hidden_groups", "None", "albert"]),
        (dict(pad_token_id=None), ["pad_token_id", "None"]),
        (dict(model_type=None), ["model_type", "None", "roformer"]),
        (dict(model_type=["bert"]), ["model_type", "['bert']"]),
        (dict(model_type="roberta", max_position_embeddings=2), ["max_position_embeddings", "2", "at least 3"]),
    ],
)
def test_bad_values_are_named(fields, words):
    with pytest.raises(ConfigError) as error:
        fastbert.EncoderConfig(**fields)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="nezha-base-chinse.*nezha-base-chinese"):
        fastbert.EncoderConfig.from_preset("nezha-base-chinse")


def test_from_dict_takes_the_defaults_of_the_transformers_classes():
    roberta = fastbert.EncoderConfig.from_dict({"model_type": "roberta"})
    assert (roberta.max_position_embeddings, roberta.layer_norm_eps, roberta.type_vocab_size, roberta.pad_token_id) == (
        512,
        1e-12,
        2,
        1,
    )
    assert fastbert.EncoderConfig.from_dict({"model_type": "albert"}).hidden_size == 4096
    assert fastbert.EncoderConfig.from_dict({"model_type": "electra"}).embedding_size == 128
    assert fastbert.EncoderConfig.from_dict({"model_type": "nezha"}).max_relative_position == 64
    assert fastbert.EncoderConfig.from_dict({}).model_type == "bert"  # Google's bert_config.json names no type


def test_from_dict_passes_over_what_does_not_concern_the_encoder(recwarn):
    config = fastbert.EncoderConfig.from_dict(
        {
            "model_type": "nezha",
            "embedding_size": 128,
            "inner_group_num": 1,
            "use_cache": True,
            "id2label": {"0": "a"},
            "directionality": "bidi",
        }
    )
    assert config.embedding_size is None and not recwarn.list


def test_from_dict_reads_null_as_absent_and_takes_the_family_of_the_caller():
    assert fastbert.EncoderConfig.from_dict({"pad_token_id": None}).pad_token_id == 0
    assert fastbert.EncoderConfig.from_dict({}, "nezha").model_type == "nezha"
    with pytest.raises(ConfigError, match="list"):
        fastbert.EncoderConfig.from_dict([1])
    with pytest.raises(ConfigError, match="preset None"):
        fastbert.EncoderConfig.from_preset(None)


def test_from_dict_warns_of_unknown_and_refuses_other_mathematics():
    with pytest.warns(UserWarning, match="surprise"):
        fastbert.EncoderConfig.from_dict({"surprise": 1})
    with pytest.raises(ConfigError, match="position_embedding_type.*relative_key.*absolute"):
        fastbert.EncoderConfig.from_dict({"position_embedding_type": "relative_key"})
    with pytest.raises(ConfigError, match="tie_word_embeddings.*False.*True"):
        fastbert.EncoderConfig.from_dict({"tie_word_embeddings": False})


@pytest.mark.parametrize(
    "family, values, words",
    [
        ("bert", {"hiden_size": 96}, ["'hiden_size' = 96", "'hidden_size'"]),
        ("bert", {"Hidden-Size": 96}, ["'Hidden-Size' = 96", "'hidden_size'"]),
        ("bert", {"layer_norm_epsilon": 1e-5}, ["layer_norm_epsilon", "'layer_norm_eps'"]),
        ("roberta", {"num_attention_head": 4}, ["num_attention_head", "'num_attention_heads'"]),
        ("albert", {"num_hidden_group": 2}, ["num_hidden_group", "'num_hidden_groups'"]),
        ("nezha", {"max_relative_positions": 3}, ["max_relative_positions", "'max_relative_position'"]),
        ("electra", {"embeding_size": 64}, ["embeding_size", "'embedding_size'"]),
        ("roformer", {"rotary_values": True}, ["rotary_values", "'rotary_value'"]),
        ("bert", {"tie_word_embedding": False}, ["tie_word_embedding", "'tie_word_embeddings'"]),
        ("bert", {"modeltype": "nezha"}, ["modeltype", "'model_type'"]),
        ("bert", {"hidden_act": "swishy"}, ["hidden_act", "'swishy'", "swish"]),
        ("bert", {"num_hidden_layers": "12"}, ["num_hidden_layers", "'12'", "int"]),
        ("bert", {"pruned_heads": {"1": [2]}}, ["pruned_heads", "{'1': [2]}"]),
        ("roformer", {"use_bias": False}, ["use_bias", "False"]),
        ("roformer", {"norm_type": "rms_norm"}, ["norm_type", "'rms_norm'", "'layer_norm'"]),
    ],
)
def test_a_misspelt_key_or_a_wrong_value_is_an_error_that_names_file_and_key(tmp_path, family, values, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": family} | values))
    with pytest.raises(ConfigError) as error:
        fastbert.EncoderConfig.from_json_file(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_keys_that_resemble_none_or_belong_to_others_are_warned_of(recwarn):
    names = ["attention_head_size", "hidden_sizes_of_towers", "num_key_value_heads", "pad_token", "embedding_size"]
    for name in names:
        fastbert.EncoderConfig.from_dict({name: 1})
    assert [str(one.message).rpartition(" ")[2] for one in recwarn.list] == names


# What transformers 4.40.2 writes for every model and 5.23 no longer does.
OF_TRANSFORMERS_4 = dict(
    bad_words_ids=None,
    begin_suppress_tokens=None,
    cross_attention_hidden_size=None,
    decoder_start_token_id=None,
    diversity_penalty=0.0,
    do_sample=False,
    early_stopping=False,
    encoder_no_repeat_ngram_size=0,
    exponential_decay_length_penalty=None,
    forced_bos_token_id=None,
    forced_eos_token_id=None,
    length_penalty=1.0,
    max_length=20,
    min_length=0,
    no_repeat_ngram_size=0,
    num_beam_groups=1,
    num_beams=1,
    num_return_sequences=1,
    output_scores=False,
    prefix=None,
    pruned_heads={},
    remove_invalid_values=False,
    repetition_penalty=1.0,
    return_dict_in_generate=False,
    suppress_tokens=None,
    temperature=1.0,
    tf_legacy_loss=False,
    tie_encoder_decoder=False,
    top_k=50,
    top_p=1.0,
    torchscript=False,
    typical_p=1.0,
    use_bfloat16=False,
)


@pytest.mark.parametrize("family", BASE)
def test_every_key_that_transformers_writes_is_known(family, recwarn):
    transformers = pytest.importorskip("transformers")
    values = OF_TRANSFORMERS_4 | {"model_type": family}
    if family in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:  # NEZHA: up to 4.40
        values |= transformers.AutoConfig.for_model(family, num_labels=3, problem_type=None).to_dict()
    classes = {"architectures": ["BertForSequenceClassification"], "finetuning_task": "mnli", "torch_dtype": "float32"}
    values |= classes | {"_name_or_path": "x/y", "transformers_version": "4.40.2", "torchscript": False}
    config = fastbert.EncoderConfig.from_dict(json.loads(json.dumps(values, default=str)))
    assert config.model_type == family
    assert not recwarn.list


def test_config_file_errors(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere.json"):
        fastbert.EncoderConfig.from_json_file(tmp_path / "nowhere.json")
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="config.json"):
            fastbert.EncoderConfig.from_json_file(tmp_path / "config.json")


def test_max_length_counts_robertas_offset():
    assert fastbert.EncoderConfig.from_preset("roberta-base").max_length == 512
    assert fastbert.EncoderConfig.from_preset("bert-base-chinese").max_length == 512
    assert fastbert.EncoderConfig.from_preset("roformer-base-chinese").max_length is None
