"""Model folders: round trips, foreign names, and every kind of damage as an error that names the file or tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import FAMILIES, batch, build, small_config

import fastbert
from fastbert.errors import CheckpointError, ConfigError, DtypeError, MissingFileError


def saved(tmp_path, family="bert", task="masked_lm"):
    model = build(family, task).float().eval()
    model.save_pretrained(tmp_path)
    return model


def rewrite(tmp_path, change):
    save_file(
        {name: tensor for old, tensor in load_file(tmp_path / "model.safetensors").items() if (name := change(old))},
        tmp_path / "model.safetensors",
    )


def assert_same(one, other):
    ids, mask, _ = batch([6, 4])
    assert torch.equal(one(ids, mask)[0], other(ids, mask)[0])


@pytest.mark.parametrize("task", ["masked_lm", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family, task, recwarn):
    model = saved(tmp_path, family, task)
    read = fastbert.from_pretrained(tmp_path)
    assert type(read) is type(model) and read.config == model.config and not read.training
    assert all(parameter.requires_grad for parameter in read.parameters())
    assert_same(model, read)
    assert not recwarn.list
    assert list(path.name for path in sorted(tmp_path.iterdir())) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_of_a_masked_lm_folder_and_back(tmp_path, family):
    model = saved(tmp_path, family)
    cls = fastbert.model_class(family, "model")
    if cls.has_pooler:
        with pytest.warns(UserWarning, match="pooler.*drawn anew"):
            encoder = cls.from_pretrained(tmp_path)
    else:
        with pytest.warns(UserWarning, match="does not use"):
            encoder = cls.from_pretrained(tmp_path)
    ids, mask, _ = batch([6, 4])
    assert torch.equal(encoder(ids, mask)[0], model.model(ids, mask)[0])


def test_legacy_names_missing_head_and_derived_tensors(tmp_path, recwarn):
    """gamma and beta, the bias under the decoder's name only, and tensors that are copies or tables: read without a
    word.
    """
    model = saved(tmp_path)
    rewrite(
        tmp_path,
        lambda name: (
            name.replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta")
            .replace("predictions.bias", "predictions.decoder.bias")
        ),
    )
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(model, fastbert.BertForMaskedLM.from_pretrained(tmp_path))
    assert not recwarn.list


def test_missing_head_is_drawn_and_named(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, lambda name: None if name.startswith("cls.") else name)
    with pytest.warns(UserWarning, match="cls.predictions.*drawn anew"):
        read = fastbert.BertForMaskedLM.from_pretrained(tmp_path)
    assert read.head.dense.weight.std() < 0.1 and not read.head.bias.any() and (read.head.norm.weight == 1).all()


def test_nezha_under_the_prefix_of_bert_with_persistent_tables(tmp_path, recwarn):
    model = saved(tmp_path, "nezha")
    rewrite(tmp_path, lambda name: name.replace("nezha.", "bert."))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.encoder.layer.0.attention.self.relative_positions_encoding.positions_encoding"] = torch.full(
        (4, 4, 8), torch.nan
    )
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(model, fastbert.NezhaForMaskedLM.from_pretrained(tmp_path))
    assert not recwarn.list


def test_bin_and_sharded_folders(tmp_path):
    model = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_same(model, fastbert.from_pretrained(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    for index, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"model-{index}.safetensors")
    index = {"weight_map": {name: f"model-{position % 2}.safetensors" for position, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(model, fastbert.from_pretrained(tmp_path))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(MissingFileError, match="model-1.safetensors"):
        fastbert.from_pretrained(tmp_path)


def test_dtype_and_device(tmp_path):
    saved(tmp_path)
    read = fastbert.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in read.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "target, error, words",
    [
        (dict(dtype=torch.int8), DtypeError, "dtype is torch.int8"),
        (dict(dtype="half16"), DtypeError, "dtype is 'half16'"),
        (dict(device="banana"), ConfigError, "device is 'banana'"),
    ],
)
def test_bad_dtype_or_device(tmp_path, target, error, words):
    saved(tmp_path)
    assert fastbert.from_pretrained(tmp_path, dtype="float16").head.bias.dtype == torch.float16
    with pytest.raises(error, match=words):
        fastbert.from_pretrained(tmp_path, **target)


def test_an_untied_decoder_is_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cls.predictions.decoder.weight differs from the word embeddings"):
        fastbert.from_pretrained(tmp_path)


def test_a_config_without_model_type_is_of_the_family_of_the_class(tmp_path):
    model = saved(tmp_path, "nezha")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(model, fastbert.NezhaForMaskedLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("names", [5, "BertModel", [1]])
def test_architectures_of_the_wrong_kind(tmp_path, names):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="architectures"):
        fastbert.from_pretrained(tmp_path)


def test_truncated_weights(tmp_path):
    saved(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
            fastbert.from_pretrained(tmp_path)


def test_pickles_that_run_code_are_refused(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*weights_only"):
        fastbert.from_pretrained(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*tensors by name"):
        fastbert.from_pretrained(tmp_path)


def test_missing_wrong_shaped_and_unexpected_tensors_are_named(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, lambda name: None if name.endswith("layer.1.output.dense.weight") else name)
    with pytest.raises(CheckpointError, match="lacks 1 tensor.*bert.encoder.layer.1.output.dense.weight"):
        fastbert.from_pretrained(tmp_path)
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"intermediate.dense.weight has shape \[24, 16\], expected \[32, 16\]"):
        fastbert.from_pretrained(tmp_path)
    saved(tmp_path)
    rewrite(tmp_path, lambda name: name)
    tensors = load_file(tmp_path / "model.safetensors") | {"classifier.weight": torch.zeros(2, 16)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="does not use: classifier.weight"):
        fastbert.from_pretrained(tmp_path)


def test_missing_folder_config_and_weights(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        fastbert.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="config.json"):
        fastbert.from_pretrained(tmp_path)
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="no weights"):
        fastbert.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForNextSentencePrediction"]}))
    with pytest.raises(CheckpointError, match="BertForNextSentencePrediction.*BertForMaskedLM"):
        fastbert.from_pretrained(tmp_path)


def test_a_folder_without_architectures_is_the_bare_encoder(tmp_path):
    saved(tmp_path, "roformer", "model")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(fastbert.from_pretrained(tmp_path)) is fastbert.RoFormerModel


def test_names_cover_every_parameter_once():
    for family in FAMILIES:
        for task in ("masked_lm", "model"):
            model = fastbert.model_class(family, task)(
                small_config(family, **{"num_hidden_groups": 2, "inner_group_num": 2} if family == "albert" else {})
            )
            names = model.published_names()
            assert len(set(names.values())) == len(list(model.parameters()))
