"""Models as they are pretrained: two heads, and ELECTRA's generator with its discriminator. Against plain float64
references written out here, against transformers, and in the training step.
"""

import json
import math
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_models import FAMILIES, VOCAB, batch, pack, small_config
from test_train import NO_DROPOUT, SETTINGS, TINY, data, losses, same_end  # noqa: F401

import fastbert
from fastbert import ops, reference
from fastbert.data import SimilarWords
from fastbert.errors import CheckpointError, ConfigError, DataError, DtypeError, ShapeError
from fastbert.models import electra
from fastbert.optim import param_groups
from fastbert.train import PretrainConfig, pretrain, state
from fastbert.train.feed import Buckets, MicroBatch, labelled
from fastbert.train.step import TrainStep
from fastbert.train.world import World

pytestmark = pytest.mark.usefixtures("one_thread")
TWO_HEADS = ("bert", "albert", "nezha")
LABEL = {"bert": "next_sentence_label", "nezha": "next_sentence_label", "albert": "sentence_order_label"}
CPU = torch.device("cpu")
LENGTHS = [6, 14, 1, 9]


def build(family, seed=0, dropout=False, **changes):
    """In float64, biases and norms away from 0 and 1; without dropout, also that before ALBERT's sentence head."""
    torch.manual_seed(seed)
    config = small_config(family, **changes)
    if family == "electra":
        model = fastbert.ElectraForJointPreTraining(config, generator_size=0.5)
    else:
        model = fastbert.model_class(family, "pretraining")(config)
        model.sentence_head.dropout.p *= dropout
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def padded(family, lengths=LENGTHS, seed=0):
    """Padded arguments of a model, with types and labels."""
    ids, mask, labels = batch(lengths, seed)
    types = (torch.arange(ids.shape[1]) > 3).long().expand_as(ids) * mask
    masked = ids.masked_fill(labels != -100, 4)
    masked = torch.where((labels != -100) & (ids % 3 == 0), (ids + 1) % VOCAB, masked)  # another word, not the mask
    masked = torch.where((labels != -100) & (ids % 5 == 0), ids, masked)  # or the same
    given = {"input_ids": masked, "attention_mask": mask, "token_type_ids": types, "labels": labels}
    return given if family == "electra" else given | {LABEL[family]: torch.arange(len(lengths)) % 2}


def packed(family, lengths=LENGTHS, seed=0, positions=True):
    """The same, packed, with the places of its labels."""
    given = padded(family, lengths, seed)
    mask = given.pop("attention_mask")
    for name in ("input_ids", "token_type_ids", "labels"):
        given[name], ends, longest = pack(given[name], mask)
    given |= {"cu_seqlens": ends, "max_seqlen": longest}
    if positions:
        places = (given["labels"] != -100).nonzero().squeeze(1)
        given |= {"labels": given["labels"][places], "label_positions": places}
    return given


def gradients(model, **given):
    model.zero_grad()
    torch.manual_seed(3)  # what a generator says
    output = model(**given)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected, rtol=1e-8):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=rtol, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


# -- against plain references ----------------------------------------------------------------------------------------


def plain_encoder(config, w, prefix, ids, types):
    """The last hidden states of one sequence `[L, C]`, from weights under transformers' names."""
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config.layer_norm_eps)

    e = f"{prefix}.embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.token_type_embeddings.weight"][types]
    if config.attention == "absolute":
        x = x + w[f"{e}.position_embeddings.weight"][: len(ids)]
    x = norm(x, f"{e}.LayerNorm")
    projections = (f"{prefix}.embeddings_project", f"{prefix}.encoder.embedding_hidden_mapping_in")
    for name in projections:
        x = linear(x, name) if f"{name}.weight" in w else x
    for i in range(config.num_hidden_layers):
        if config.model_type == "albert":
            layer = f"{prefix}.encoder.albert_layer_groups.0.albert_layers.0"
            names = "attention.query attention.key attention.value attention.dense attention.LayerNorm ffn ffn_output"
            names = [*names.split(), "full_layer_layer_norm"]
        else:
            layer = f"{prefix}.encoder.layer.{i}"
            names = "attention.self.query attention.self.key attention.self.value attention.output.dense"
            names += " attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm"
            names = names.split()
        q, k, v, out, norm1, wide, narrow, norm2 = (f"{layer}.{name}" for name in names)
        q, k, v = (linear(x, name).unflatten(-1, (config.num_attention_heads, -1))[None] for name in (q, k, v))
        if config.attention == "relative":
            o = reference.relative_attention(q, k, v, max_relative_position=config.max_relative_position)[0]
        else:
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(config.head_dim)
            o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)[0]
        x = norm(x + linear(o.flatten(-2), out), norm1)
        approximate = "none" if config.hidden_act == "gelu" else "tanh"
        x = norm(x + linear(F.gelu(linear(x, wide), approximate=approximate), narrow), norm2)
    return x


def plain_words(config, w, prefix, head, bias, act, states):
    x = F.gelu(F.linear(states, w[f"{head}.dense.weight"], w[f"{head}.dense.bias"]), approximate=act)
    x = F.layer_norm(x, x.shape[-1:], w[f"{head}.LayerNorm.weight"], w[f"{head}.LayerNorm.bias"], config.layer_norm_eps)
    return x @ w[f"{prefix}.embeddings.word_embeddings.weight"].T + w[bias]


def sequences(given):
    for ids, mask, types, labels in zip(
        *(given[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")), strict=True
    ):
        yield ids[mask], types[mask], labels[mask]


def leaves(model):
    """Weights under transformers' names, once each, to differentiate by."""
    names = model.published_names()
    return {names[n]: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}, names


@pytest.mark.parametrize("family", TWO_HEADS)
def test_both_heads_are_the_plain_sum(family):
    model, given = build(family).train(), padded(family)
    w, names = leaves(model)
    prefix = model.names.prefix
    transform, bias = ("predictions", "predictions.bias") if family == "albert" else (None, "cls.predictions.bias")
    transform = transform or "cls.predictions.transform"
    pooler, head = ("albert.pooler", "sop_classifier.classifier") if family == "albert" else (None, None)
    pooler, head = pooler or f"{prefix}.pooler.dense", head or "cls.seq_relationship"
    act = "none" if model.config.hidden_act == "gelu" else "tanh"
    words, targets, sentences = [], [], []
    for ids, types, labels in sequences(given):
        states = plain_encoder(model.config, w, prefix, ids, types)
        words.append(plain_words(model.config, w, prefix, transform, bias, act, states))
        targets.append(labels)
        pooled = torch.tanh(F.linear(states[0], w[f"{pooler}.weight"], w[f"{pooler}.bias"]))
        sentences.append(F.linear(pooled, w[f"{head}.weight"], w[f"{head}.bias"]))
    mlm = F.cross_entropy(torch.cat(words), torch.cat(targets))
    sentence = F.cross_entropy(torch.stack(sentences), given[LABEL[family]])
    expected = dict(zip(w, torch.autograd.grad(mlm + sentence, list(w.values())), strict=True))
    expected = {name: expected[published] for name, published in names.items()}
    forms = [given, given | {"return_logits": False}]
    forms += [packed(family, positions=p) | {"return_logits": r} for p in (True, False) for r in (True, False)]
    forms += [packed(family) | {"return_logits": False, "output_hidden_states": True}]
    for form in forms:
        output, found = gradients(model, **form)
        torch.testing.assert_close(output.loss, mlm + sentence)
        if not form.get("return_logits", True):
            torch.testing.assert_close(output.losses, torch.stack([mlm, sentence]))
            assert output.prediction_logits is None and len(output.label_states) == (torch.cat(targets) != -100).sum()
        assert_same(found, expected)


def test_the_joint_loss_is_the_plain_one():
    """Given what the generator said, with its gradient stopped there."""
    model, given = build("electra").train(), padded("electra")
    w, names = leaves(model)
    generator = {n.removeprefix("generator/"): t for n, t in w.items() if n.startswith("generator/")}
    own = {n: t for n, t in w.items() if not n.startswith("generator/")}
    generator |= {n: t for n, t in own.items() if ".embeddings." in n}
    output, found = gradients(model, **given)
    guesses, targets, judged, changed = [], [], [], []
    small = model.generator.config
    for row, (ids, types, labels) in enumerate(sequences(given)):
        states = plain_encoder(small, generator, "electra", ids, types)
        head = ("electra", "generator_predictions", "generator_lm_head.bias", "none")
        guesses.append(plain_words(small, generator, *head, states))
        targets.append(labels)
        shown = output.corrupted_ids[row, : len(ids)]
        original = torch.where(labels != -100, labels, ids)
        assert torch.equal(shown[labels == -100], ids[labels == -100])
        states = plain_encoder(model.config, own, "electra", shown, types)
        x = F.gelu(F.linear(states, own[f"{P}.dense.weight"], own[f"{P}.dense.bias"]))
        judged.append(F.linear(x, own[f"{P}.dense_prediction.weight"], own[f"{P}.dense_prediction.bias"])[:, 0])
        changed.append(shown != original)
        assert torch.equal(output.replaced[row, : len(ids)], changed[-1])
    labels = torch.cat(targets)
    assert 0 < torch.cat(changed).sum() < (labels != -100).sum() or torch.cat(changed).sum() > 1
    mlm = F.cross_entropy(torch.cat(guesses), labels)
    rtd = F.binary_cross_entropy_with_logits(torch.cat(judged), torch.cat(changed).double())
    torch.testing.assert_close(output.loss, mlm + 50 * rtd)
    torch.testing.assert_close(output.generator_logits, torch.cat(guesses)[labels != -100])
    expected = dict(zip(w, torch.autograd.grad(mlm + 50 * rtd, list(w.values())), strict=True))
    expected = {name: expected[published] for name, published in names.items()}
    assert_same(found, expected)
    for form in (given, packed("electra"), packed("electra", positions=False)):
        output, again = gradients(model, **form, return_logits=False)
        torch.testing.assert_close(output.losses, torch.stack([mlm, rtd]))
        assert output.keys() == ["loss", "losses"]
        assert_same(again, expected)


P = "discriminator_predictions"


# -- the labelled rows and the first -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TWO_HEADS)
def test_the_last_layer_is_computed_for_labelled_rows_and_first_ones(family, monkeypatch):
    model, given = build(family, hidden_act="gelu"), packed(family)
    rows, gelu, widest = [], ops.bias_gelu, []
    monkeypatch.setattr(ops, "bias_gelu", lambda x, *args, **o: (rows.append(len(x)), gelu(x, *args, **o))[1])
    model.head.register_forward_hook(lambda _, arguments, result: widest.append((len(arguments[0]), result.dim())))
    with fastbert.use_backend("torch"):  # asked for, so that a CPU calls the ops that a GPU does
        model(**given, return_logits=False)
    labels = len(given["labels"])
    assert rows == [30, 30, labels + len(LENGTHS), labels] and widest == [(labels, 0)]


@pytest.mark.parametrize("family", [*TWO_HEADS, "electra"])
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), spare=st.integers(0, 2), seed=st.integers(0, 99))
@settings(max_examples=5)
def test_what_fills_up_changes_nothing(family, lengths, spare, seed):
    model = build(family).train()
    given = packed(family, lengths, seed)
    given["labels"], given["label_positions"] = given["labels"][:9], given["label_positions"][:9]
    name, longest = LABEL.get(family), given.pop("max_seqlen")
    inputs = {("sentence_labels" if n == name else n): t for n, t in given.items()}
    whole = MicroBatch(inputs, longest, len(given["labels"]), len(given["input_ids"]), len(lengths) if name else 0)
    full = Buckets(len(lengths) + spare, 12, 0.5, pad_id=model.config.pad_token_id).fill(whole)
    assert full.counts == whole.counts and len(full.inputs["input_ids"]) >= 64
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(electra, "sample", lambda logits: logits.argmax(-1))  # for other shapes draw other noise
        for each in (whole, full):
            named = {(name if n == "sentence_labels" else n): t for n, t in each.inputs.items()}
            found.append(gradients(model, **named, max_seqlen=each.max_seqlen, return_logits=False))
    torch.testing.assert_close(found[0][0].losses, found[1][0].losses)
    assert_same(found[1][1], found[0][1])


def test_sequences_and_batches_without_tokens():
    for family in TWO_HEADS:
        model = build(family).eval()
        given = packed(family, [5, 7])
        given["cu_seqlens"] = torch.tensor([0, 5, 5, 12, 12], dtype=torch.int32)
        given[LABEL[family]] = torch.tensor([0, 1, 1, 0])
        one, two = model(**given), model(**given, return_logits=False)
        torch.testing.assert_close(one.loss, two.loss)
        torch.testing.assert_close(one.sentence_logits, two.sentence_logits)
        nothing = {n: t[:0] for n, t in given.items() if n in ("input_ids", "token_type_ids", "labels")}
        given |= nothing | {"label_positions": nothing["labels"], "max_seqlen": 0}
        given["cu_seqlens"] = torch.zeros(5, dtype=torch.int32)
        assert model(**given, return_logits=False).losses[0] == 0
    assert model(**given | {LABEL[family]: torch.full((4,), -100)}, return_logits=False).loss == 0


def test_one_head_alone_has_its_own_loss():
    model, given = build("bert").eval(), padded("bert")
    both = model(**given)
    assert both.keys() == ["loss", "prediction_logits", "seq_relationship_logits"] and both[2].shape == (4, 2)
    label = given.pop("next_sentence_label")
    words = model(**given)
    given.pop("labels")
    sentence = model(**given, next_sentence_label=label)
    torch.testing.assert_close(words.loss + sentence.loss, both.loss)
    assert model(**given).loss is None
    some = model(**given, next_sentence_label=torch.tensor([0, -100, -100, 1]))
    torch.testing.assert_close(some.loss, F.cross_entropy(both[2][[0, 3]], torch.tensor([0, 1])))


def test_albert_drops_before_the_sentence_head():
    model, given = build("albert", dropout=True).train(), padded("albert")
    assert model.sentence_head.dropout.p == 0.1
    torch.manual_seed(0)
    drawn = {model(**given).sop_logits.sum().item() for _ in range(5)}
    assert len(drawn) > 1 and len({model.eval()(**given).sop_logits.sum().item() for _ in range(2)}) == 1


# -- what a generator says -------------------------------------------------------------------------------------------


def test_sampling_follows_the_distribution_and_the_generator():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0])
    torch.manual_seed(5)
    drawn = electra.sample(logits.expand(40_000, 5))
    torch.manual_seed(5)
    assert torch.equal(drawn, electra.sample(logits.expand(40_000, 5)))
    counts = torch.bincount(drawn, minlength=5).double()
    expected = 40_000 * logits.double().softmax(-1)
    assert counts[4] == 0 and ((counts - expected)[:4] ** 2 / expected[:4]).sum() < 20  # chi square, 3 degrees


def test_labels_follow_the_actual_change():
    """A generator that says what was there has replaced nothing, whatever was masked."""
    model, given = build("electra").eval(), padded("electra")
    labels = given["labels"]
    labels[labels != -100] = 7
    with torch.no_grad():
        model.generator.head.bias[7] = 1e4
        right = model(**given)
        model.generator.head.bias[9] = 2e4
        wrong = model(**given)
    assert not right.replaced.any() and (right.corrupted_ids[labels != -100] == 7).all()
    assert torch.equal(wrong.replaced, labels != -100) and (wrong.corrupted_ids[labels != -100] == 9).all()
    with torch.no_grad():  # what it puts there counts, even if it is padding by its id
        model.generator.head.bias[model.config.pad_token_id] = 3e4
        padding = model(**given)
    assert torch.equal(padding.replaced, labels != -100)
    mask = given["attention_mask"]
    torch.testing.assert_close(
        padding.loss - F.cross_entropy(padding.generator_logits, labels[labels != -100]),
        50 * F.binary_cross_entropy_with_logits(padding.logits[mask], padding.replaced[mask].double()),
    )


def test_the_same_place_twice_is_a_legal_id():
    model, given = build("electra").eval(), packed("electra")
    for name in ("labels", "label_positions"):
        given[name] = torch.cat([given[name], given[name]])
    output = model(**given)
    assert output.corrupted_ids.max() < VOCAB and output.loss.isfinite()


def test_the_two_share_their_embeddings_and_nothing_else():
    model = build("electra")
    mine, its = model.discriminator.model.embeddings, model.generator.model.embeddings
    for name in ("word", "position", "token_type", "norm"):
        assert getattr(mine, name) is getattr(its, name)
    assert mine.projection is not its.projection
    parts = sum(part.num_parameters() for part in (model.discriminator, model.generator))
    shared = sum(
        p.numel() for name in ("word", "position", "token_type", "norm") for p in getattr(mine, name).parameters()
    )
    assert model.num_parameters() == parts - shared


@pytest.mark.parametrize(("size", "hidden", "heads"), [(0.25, 192, 3), (1 / 3, 256, 4), (1.0, 768, 12), (0.05, 38, 1)])
def test_the_size_of_the_generator(size, hidden, heads):
    config = fastbert.EncoderConfig("electra", num_hidden_layers=3)
    small = electra.reduced(config, size)
    assert (small.hidden_size, small.num_attention_heads, small.intermediate_size) == (hidden, heads, 4 * hidden)
    assert (small.num_hidden_layers, small.embedding_size) == (3, 768)


# -- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*TWO_HEADS, "electra"])
def test_folders_keep_every_bit(family, tmp_path):
    model, given = build(family).eval(), padded(family)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not again.training and [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    torch.manual_seed(1)
    loss = model(**given).loss
    torch.manual_seed(1)
    torch.testing.assert_close(again(**given).loss, loss)  # another alignment in memory, another order of sums
    names = model.published_names()
    assert len(set(names.values())) == len(names) == len(list(model.parameters()))
    kind = fastbert.ElectraForPreTraining if family == "electra" else type(model)
    assert type(fastbert.from_pretrained(tmp_path)) is kind


@pytest.mark.parametrize("family", TWO_HEADS)
def test_the_head_that_a_folder_lacks_is_drawn_anew_and_named(family, tmp_path):
    model = build(family)
    masked_lm = fastbert.model_class(family, "masked_lm")
    model.save_pretrained(tmp_path)
    head = "sop_classifier.classifier" if family == "albert" else "cls.seq_relationship"
    with pytest.warns(UserWarning, match=f"does not use: .*{head}.bias"):
        words = masked_lm.from_pretrained(tmp_path)
    given = padded(family)
    torch.testing.assert_close(words(given["input_ids"]).logits, model.eval()(given["input_ids"]).prediction_logits)
    words.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"has no .*pooler.*{head}.*: drawn anew"):
        again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.head.bias, model.head.bias) and not again.sentence_head.classifier.bias.any()
    assert 0.005 < again.model.pooler.dense.weight.std() < 0.05


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_transformers_and_we_load_each_other(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs_class = getattr(transformers, f"{family.capitalize()}ForPreTraining")
    model, given = build(family).eval(), padded(family)
    for config_act in ("gelu", "gelu_new"):
        model.config.hidden_act = config_act
        model.save_pretrained(tmp_path / config_act)
        theirs, info = theirs_class.from_pretrained(
            tmp_path / config_act, output_loading_info=True, dtype=torch.float64
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        real = given["attention_mask"]
        ours = type(model).from_pretrained(tmp_path / config_act)
        want, (got, grads) = theirs.eval()(**given), gradients(ours, **given)
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.prediction_logits[real], want.prediction_logits[real])
        torch.testing.assert_close(got[2], want[2])
        want.loss.backward()
        published = ours.published_names()
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        assert_same(grads, {name: expected[published[name]] for name in grads})
        theirs.save_pretrained(tmp_path / "theirs")
        back = type(model).from_pretrained(tmp_path / "theirs")
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), back.parameters(), strict=True))


def test_transformers_loads_generator_and_discriminator(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, given = build("electra").eval(), padded("electra")
    model.save_pretrained(tmp_path)
    ids, mask = given["input_ids"], given["attention_mask"]
    for kind, folder, part in (
        (transformers.ElectraForPreTraining, tmp_path, model.discriminator),
        (transformers.ElectraForMaskedLM, tmp_path / "generator", model.generator),
    ):
        theirs, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        want = theirs.eval()(ids, attention_mask=mask).logits
        torch.testing.assert_close(part(ids, mask).logits[mask], want[mask])


def test_a_folder_that_is_not_of_both(tmp_path):
    model = build("electra")
    model.discriminator.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no folder 'generator'"):
        fastbert.ElectraForJointPreTraining.from_pretrained(tmp_path)
    other = build("electra", seed=1)
    other.generator.save_pretrained(tmp_path / "generator")
    with pytest.raises(CheckpointError, match="embeddings.word of the generator differs"):
        fastbert.ElectraForJointPreTraining.from_pretrained(tmp_path)


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "error", "said"),
    [
        ("bert", dict(next_sentence_label=torch.zeros(3).long()), ShapeError, r"next_sentence_label has shape \[3\]"),
        ("bert", dict(next_sentence_label=torch.zeros(4)), DtypeError, "next_sentence_label.*float32"),
        ("bert", dict(next_sentence_label=torch.full((4,), 2)), DataError, "next_sentence_label.*2.*0 to 1"),
        ("bert", dict(next_sentence_label=[0] * 4), DtypeError, "next_sentence_label.*list"),
        ("albert", dict(sentence_order_label=None, return_logits=False), ShapeError, "sentence_order_label is None"),
        ("albert", dict(labels=None, return_logits=False), ShapeError, "labels is None"),
        ("nezha", dict(sentence_order_label=torch.zeros(4).long()), TypeError, "sentence_order_label"),
        ("electra", dict(labels=None), ShapeError, "labels is None"),
        ("electra", dict(labels=torch.full((4, 14), VOCAB)), DataError, "labels"),
        ("electra", dict(label_positions=torch.zeros(2).long()), ShapeError, "label_positions"),
    ],
)
def test_bad_arguments_are_named(family, change, error, said):
    with pytest.raises(error, match=said):
        build(family)(**padded(family) | change)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(generator_size=0.0), "generator_size is 0.0"),
        (dict(generator_size=2.0), "generator_size is 2.0"),
        (dict(generator_config=small_config("electra", vocab_size=30)), "vocab_size of the generator is 30"),
        (dict(generator_config=small_config("electra", embedding_size=6)), "embedding_size of the generator is 6"),
        (dict(generator_config=small_config("bert")), "model_type 'electra'"),
    ],
)
def test_generators_that_do_not_fit(arguments, said):
    with pytest.raises(ConfigError, match=said):
        fastbert.ElectraForJointPreTraining(small_config("electra"), **arguments)


# -- in the training step --------------------------------------------------------------------------------------------


def micro(family, lengths, seed):
    given = packed(family, lengths, seed, positions=False)
    sentence = given.get(LABEL.get(family))
    rows = (given[name] for name in ("input_ids", "labels", "cu_seqlens", "max_seqlen", "token_type_ids"))
    return labelled(*rows, sentence)


def joined(batches):
    """One batch of several."""
    inputs, shift = {}, 0
    parts = {name: [] for name in batches[0].inputs}
    for each in batches:
        for name, t in each.inputs.items():
            moved = t + shift if name in ("label_positions", "cu_seqlens") else t
            parts[name].append(moved[1:] if name == "cu_seqlens" and shift else moved)
        shift += each.tokens
    inputs = {name: torch.cat(ts) for name, ts in parts.items()}
    counts = (sum(getattr(each, name) for each in batches) for name in ("labels", "tokens", "samples"))
    return MicroBatch(inputs, max(each.max_seqlen for each in batches), *counts)


def micros(family):
    """Uneven ones: labels, samples and tokens have different shares."""
    return [micro(family, [9, 12, 3], 1), micro(family, [4], 2), micro(family, [5, 5, 5, 6], 3), micro(family, [14], 4)]


def updated(family, batches, rank=0, size=1):
    """Parameters after an update, and the sums of the terms."""
    model = build(family).train().float()
    world = World(CPU, rank, size)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=1.0), lambda _: 0.1, world=world)
    step._move = lambda _: None  # gradients are what is compared
    whole = {per: sum(each.counts[per] for each in batches) for per in ("label", "sample", "token")}
    labels, samples, tokens = whole.values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(electra, "sample", lambda logits: logits.argmax(-1))
        own = batches[rank::size]
        for each in own:
            step.accumulate(each, labels, 0, samples=samples, tokens=tokens, last=each is own[-1])
    step.gradients.complete()
    sums = step.progress.losses.clone()
    world.add(sums)
    return step.gradients.buffer.clone(), sums


@pytest.mark.parametrize("family", [*TWO_HEADS, "electra"])
def test_accumulation_equals_the_large_batch(family):
    """Every term with its own share: labels, samples and tokens are not as many in proportion."""
    batches = micros(family)
    whole, sums = updated(family, [joined(batches)])
    parts, sums_of_parts = updated(family, batches)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
    torch.testing.assert_close(sums, sums_of_parts, rtol=1e-5, atol=0)
    assert sums.shape == (2,) and (sums > 0).all()


def of_rank(family):
    return [t.tolist() for t in updated(family, micros(family), dist.get_rank(), dist.get_world_size())]


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_two_processes_equal_one(family, processes):
    found = processes(2).run(of_rank, family)
    assert found[0] == found[1]
    for got, want in zip(found[0], updated(family, micros(family)), strict=True):
        torch.testing.assert_close(torch.tensor(got).to(want), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_shares_need_the_counts_of_the_whole_update():
    model = build("bert").float()
    step = TrainStep(model, torch.optim.SGD(model.parameters()), lambda _: 0.1, world=World(CPU))
    each = micro("bert", [5, 9], 0)
    with pytest.raises(ConfigError, match="the samples of the update are 0, but this micro-batch alone has 2"):
        step.accumulate(each, each.labels, 0)


def test_evaluation_counts_the_sentences_that_are_guessed():
    model = build("bert").float()
    step = TrainStep(model, torch.optim.SGD(model.parameters()), lambda _: 0.1, world=World(CPU))
    each = micro("bert", [5, 9, 4, 7], 0)
    with torch.no_grad():
        model.sentence_head.classifier.bias.copy_(torch.tensor([1e4, 0]))
        losses, right = step.evaluate(each)
    assert right == 2 and losses.shape == (2,)
    each.inputs["sentence_labels"][0] = -100
    assert step.evaluate(each)[1] == 1


@pytest.mark.parametrize("family", [*TWO_HEADS, "electra"])
def test_compiles_without_a_graph_break(family, monkeypatch):
    """What fills up included; without the compiler behind the graph, which takes minutes."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    drawn = electra.sample  # eager and compiled draw alike from one seed only if both draw as often
    monkeypatch.setattr(electra, "sample", lambda logits: torch.where(drawn(logits) >= 0, logits.argmax(-1), 0))
    full = Buckets(5, 14, 0.5, pad_id=0).fill(micro(family, [6, 9, 4, 5], 0))
    found = []
    for compiled in (True, False):
        model = build(family, num_hidden_layers=1).float()
        sgd = torch.optim.SGD(param_groups(model, 0.1))
        step = TrainStep(model, sgd, lambda _: 0.1, world=World(CPU), compile=compiled)
        step.accumulate(full, full.labels, 0, samples=full.samples, tokens=full.tokens)
        found.append((step.progress.losses, step.gradients.buffer))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_sixteen_bits_stay_close(family, dtype, monkeypatch):
    monkeypatch.setattr(electra, "sample", lambda logits: logits[..., :1].argmax(-1))
    found = []
    for precision in (None, dtype):
        model = build(family).float()
        step = TrainStep(
            model, torch.optim.AdamW(model.parameters(), fused=True), lambda _: 0.0, world=World(CPU), dtype=precision
        )
        if step.loss_scale is not None:  # where a run ends up after some halvings
            step.loss_scale.scale.fill_(2.0**8)
        each = micro(family, [6, 9, 4, 5], 0)
        step.accumulate(each, each.labels, 0, samples=each.samples, tokens=each.tokens)
        scale = 1.0 if step.loss_scale is None else step.loss_scale.scale
        found.append(step.gradients.buffer / scale)
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(data, tmp_path):  # noqa: F811
    return PretrainConfig(data=str(data), out=str(tmp_path / "run"), model=TINY, **SETTINGS)


def learning(config, objective, **changes):
    """A config for another objective, with what goes with it."""
    own = {"masking": None, "packing": None, "mask_actions": []}
    if objective == "mac+sop":
        own["similar_words"] = str(Path(config.out).with_name("similar.txt"))
        SimilarWords({"天地": ["山川", "日月"], "山川": ["风雨"], "草木": ["人心"]}).write(own["similar_words"])
    return replace(config, objective=objective, **own | changes)


def records(out, event):
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.mark.parametrize(
    ("family", "objective", "kind", "term"),
    [
        ("bert", "mlm+nsp", fastbert.BertForPreTraining, "nsp_loss"),
        ("bert", "mac+sop", fastbert.BertForPreTraining, "sop_loss"),
        ("nezha", "mlm+nsp", fastbert.NezhaForPreTraining, "nsp_loss"),
        ("albert", "mlm+sop", fastbert.AlbertForPreTraining, "sop_loss"),
    ],
)
def test_runs_of_two_heads_tell_both_losses(config, family, objective, kind, term):
    changes = {"embedding_size": 8} if family == "albert" else {}
    result = pretrain(learning(config, objective, variant=family, model=TINY | changes, steps=4))
    assert type(fastbert.from_pretrained(result.model)) is kind
    for event in ("train", "validation"):
        record = records(config.out, event)[-1]
        assert record["loss"] == pytest.approx(record["mlm_loss"] + record[term])
    assert 0 <= records(config.out, "validation")[-1]["sentence_accuracy"] <= 1


def interrupted_and_resumed(config, monkeypatch):
    training = import_module("fastbert.train.pretrain")
    step = training.Trainer._train_step

    class Killed(BaseException):
        pass

    def die(self):
        if self.update == 9:
            raise Killed
        return step(self)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(training.Trainer, "_train_step", die)
        pretrain(config)
    return pretrain(replace(config, resume=True))


@pytest.mark.parametrize(("family", "objective"), [("electra", "rtd"), ("bert", "mlm+nsp")])
def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path, monkeypatch, family, objective):
    changes = {"embedding_size": 8} if family == "electra" else {}
    config = learning(config, objective, variant=family, model=TINY | changes, log_every=3)
    whole = replace(config, out=str(tmp_path / "whole"))
    pretrain(whole)
    interrupted_and_resumed(config, monkeypatch)
    same_end(config.out, whole.out)
    assert records(config.out, "train") and [
        {n: r[n] for n in r if n.endswith("loss")} for r in records(config.out, "train")
    ] == [{n: r[n] for n in r if n.endswith("loss")} for r in records(whole.out, "train")]
    if objective == "rtd":
        for out in (config.out, whole.out):
            folder = Path(out) / "checkpoints" / "step-00000012"
            files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
            assert {"generator/config.json", "generator/model.safetensors", "model.safetensors"} <= set(files)
        one, two = (
            load_file(Path(out) / "model" / "generator" / "model.safetensors") for out in (config.out, whole.out)
        )
        assert all(torch.equal(one[name], two[name]) for name in one)
        (folder / "generator" / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match="generator/model.safetensors is damaged"):
            state.verify(folder)
        record = records(whole.out, "validation")[-1]
        assert record["loss"] == pytest.approx(record["generator_loss"] + 50 * record["discriminator_loss"])
        discriminator = fastbert.from_pretrained(Path(whole.out) / "model")
        assert type(discriminator) is fastbert.ElectraForPreTraining
        fastbert.ElectraForJointPreTraining.from_pretrained(Path(whole.out) / "model")


def test_a_checkpoint_from_before_there_were_terms_resumes(config, tmp_path, monkeypatch):
    """Its window was a list, and its config knew nothing of the new options."""
    config = replace(config, log_every=4)
    whole = replace(config, out=str(tmp_path / "whole"))
    pretrain(whole)
    write = state.save

    def old(root, step, write_model, moments, content):
        window = content["window"]
        content["window"] = [window["losses"][0], window["counts"]["label"], window["counts"]["token"]]
        for name in ("objective", "generator_size", "bias_correction", "global_batch", "teacher", "distill_logits"):
            del content["config"][name]
        return write(root, step, write_model, moments, content)

    with monkeypatch.context() as patched:
        patched.setattr(state, "save", old)
        pretrain(config)
    for step in (10, 12):  # that of step 5 stays, one step after a record
        state.remove_folder(Path(config.out) / "checkpoints" / state.name_of(step))
    pretrain(replace(config, resume=True))
    same_end(config.out, whole.out)


def test_learning_to_tell_replaced_words(config):
    model = TINY | NO_DROPOUT | {"embedding_size": 16}
    config = learning(config, "rtd", variant="electra", model=model, batch_size=32, validate_every=0)
    pretrain(replace(config, steps=120, lr=1e-2, log_every=20, checkpoint_every=0, packing="single"))
    train = records(config.out, "train")
    assert train[-1]["discriminator_loss"] < 0.8 * train[0]["discriminator_loss"]
    assert train[-1]["generator_loss"] < train[0]["generator_loss"] - 0.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(variant="roberta", objective="mlm+nsp"), "variant 'roberta' has no heads for it.* bert, albert, nezha"),
        (dict(variant="electra", objective="mlm+nsp"), "variant 'electra' has no heads for it.* bert, albert, nezha"),
        (dict(variant="bert", objective="rtd"), "variant 'bert' has no heads for it; it can be one of electra"),
        (dict(objective="clm"), "objective is 'clm', expected one of mlm"),
        (dict(global_batch=12), "global_batch is 12, expected a multiple of batch_size 8 x 1 processes = 8"),
        (dict(global_batch=16, accumulation=3), "accumulation is 3, but global_batch 16 asks for 2"),
        (dict(variant="electra", objective="rtd", generator_size=1.5), "generator_size is 1.5"),
    ],
)
def test_what_cannot_work_is_an_error_before_the_first_step(config, change, said):
    with pytest.raises(ConfigError, match=said):
        pretrain(learning(config, **{"objective": "mlm"} | change))
    assert not (Path(config.out) / "checkpoints").exists()


def test_a_global_batch_sets_the_accumulation(config, tmp_path):
    other = replace(config, global_batch=16, steps=4)
    pretrain(other)
    pretrain(replace(config, accumulation=2, steps=4, out=str(tmp_path / "other")))
    assert losses(config.out) == losses(tmp_path / "other")


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_runs_without_bias_correction(config, optimizer, tmp_path, monkeypatch):
    config = replace(config, optimizer=optimizer, bias_correction=False, schedule="electra", warmup=4)
    whole = replace(config, out=str(tmp_path / "whole"))
    pretrain(whole)
    interrupted_and_resumed(config, monkeypatch)
    same_end(config.out, whole.out)
    corrected = replace(config, bias_correction=True, out=str(tmp_path / "corrected"))
    pretrain(corrected)
    assert losses(config.out) != losses(corrected.out)
    train = records(config.out, "train")
    assert [r["lr"] for r in train] == [1e-3 * min(1, s / 4) * (1 - s / 12) for s in (3, 7, 11)]


def test_every_family_states_its_terms():
    for family in FAMILIES:
        terms = fastbert.model_class(family, "masked_lm").terms
        assert [tuple(term) for term in terms] == [("mlm_loss", 1.0, "label")]
    model = fastbert.ElectraForJointPreTraining(small_config("electra"), discriminator_weight=20.0)
    assert [tuple(t) for t in model.terms] == [("generator_loss", 1.0, "label"), ("discriminator_loss", 20.0, "token")]
