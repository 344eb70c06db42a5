"""The families as modules: padded equals packed, masks, outputs, losses, gradients, errors. Parity with transformers is
in test_parity.py.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastbert
from fastbert.errors import ConfigError, DataError, DtypeError, ShapeError

FAMILIES = ("bert", "roberta", "albert", "nezha", "electra", "roformer")
VOCAB = 40


def small_config(family, **changes):
    fields = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
    )
    own = {
        "albert": dict(embedding_size=8),
        "electra": dict(embedding_size=8),
        "roformer": dict(embedding_size=8),
        "nezha": dict(max_relative_position=3),
    }
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return fastbert.EncoderConfig(family, **fields | own.get(family, {}) | dropout | changes)


def build(family, task="masked_lm", seed=0, **changes):
    torch.manual_seed(seed)
    model = fastbert.model_class(family, task)(small_config(family, **changes)).double()
    with torch.no_grad():  # biases and norms away from 0 and 1, weights large enough that attention is not uniform
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def batch(lengths, seed=0, width=None):
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.randint(5, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    labels = torch.where(mask & (torch.rand(mask.shape, generator=generator) < 0.4), ids, -100)
    return ids, mask, labels


def pack(x, mask):
    lengths = mask.sum(1)
    return x[mask], F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())


@pytest.mark.parametrize("family", FAMILIES)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), seed=st.integers(0, 99))
def test_padded_equals_packed(family, lengths, seed):
    model = build(family).eval()
    ids, mask, labels = batch(lengths, seed)
    padded = model(ids, mask, labels=labels, output_hidden_states=True)
    packed_ids, cu_seqlens, longest = pack(ids, mask)
    packed = model(
        packed_ids, labels=labels[mask], cu_seqlens=cu_seqlens, max_seqlen=longest, output_hidden_states=True
    )
    torch.testing.assert_close(padded.logits[mask], packed.logits)
    torch.testing.assert_close(padded.loss, packed.loss)
    assert len(padded.hidden_states) == len(packed.hidden_states) == 4
    for one, other in zip(padded.hidden_states, packed.hidden_states, strict=True):
        torch.testing.assert_close(one[mask], other)
        assert not one[~mask].any()
    assert not padded.logits[~mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_does_not_see_its_neighbours_nor_its_padding(family):
    model = build(family, "model").eval()
    ids, mask, _ = batch([3, 7, 1])
    together = model(ids, mask)
    for row, length in enumerate([3, 7, 1]):
        alone = model(ids[row : row + 1, :length])
        torch.testing.assert_close(together.last_hidden_state[row, :length], alone.last_hidden_state[0])
        if together.pooler_output is not None:
            torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_and_holes_keep_positions(family):
    """Real tokens keep the positions that their columns give them, wherever the padding stands."""
    model = build(family, "model").eval()
    ids, _, _ = batch([8, 8])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, 4] = False
    result = model(ids, mask).last_hidden_state
    assert not result[~mask].any()
    shifted = (
        model(ids[:1, 3:], position_ids=torch.arange(3, 8)[None] + (2 if family == "roberta" else 0))
        if family in ("bert", "albert", "electra", "roberta")
        else model(ids[:1, 3:])
    )
    torch.testing.assert_close(
        result[0, 3:], shifted.last_hidden_state[0]
    )  # relative and rotary positions do not feel the shift
    holes = model(ids[1:], mask[1:]).last_hidden_state
    closed = model(ids[1:][mask[1:]][None]).last_hidden_state
    assert (holes[0, 5:] - closed[0, 4:]).abs().max() > 1e-3  # a hole is not the same as no token


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_mean_over_labels_with_and_without_logits(family):
    model = build(family)
    model.eval()
    ids, mask, labels = batch([9, 4, 6])
    full = model(ids, mask, labels=labels)
    expected = F.cross_entropy(full.logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(full.loss, expected)
    full.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    short = model(ids, mask, labels=labels, return_logits=False)
    assert short.logits is None
    torch.testing.assert_close(short.loss, expected)
    short.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", ["bert", "nezha"])  # packed, and dense because of the hole
@pytest.mark.parametrize("return_logits", [True, False])
def test_labels_at_padded_positions_do_not_count(family, return_logits):
    model = build(family).eval()
    ids, _, labels = batch([8, 8])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = mask[1, 4] = False
    clean = model(ids, mask, labels=labels.masked_fill(~mask, -100), return_logits=return_logits).loss
    assert torch.equal(model(ids, mask, labels=labels.where(mask, ids), return_logits=return_logits).loss, clean)


def test_no_label_is_loss_zero():
    model = build("bert")
    ids, mask, labels = batch([5, 3])
    for return_logits in (True, False):
        loss = model(ids, mask, labels=torch.full_like(labels, -100), return_logits=return_logits).loss
        assert loss.item() == 0.0
        loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_albert_shares_by_integer_groups():
    """18 layers in 14 groups: i * 14 // 18; the floating-point form int(i / (18 / 14)) picks other groups."""
    config = small_config("albert", num_hidden_layers=18, num_hidden_groups=14, inner_group_num=2)
    encoder = fastbert.nn.Encoder(config)
    assert [application[0] // 2 for application in encoder.applications] == [i * 14 // 18 for i in range(18)]
    assert [application[0] // 2 for application in encoder.applications] != [int(i / (18 / 14)) for i in range(18)]
    assert len(encoder.layers) == 28


def test_shared_layer_equals_tied_copies_with_summed_gradients():
    shared = build("albert").eval()
    copies = build("albert", num_hidden_groups=3).eval()
    state = {
        name.replace("layers.0.", f"layers.{i}."): value
        for name, value in shared.state_dict().items()
        for i in range(3)
    }
    copies.load_state_dict(state)
    ids, mask, labels = batch([7, 5])
    for model in (shared, copies):
        model(ids, mask, labels=labels).loss.backward()
    weights = dict(copies.named_parameters())
    for name, parameter in shared.named_parameters():
        others = {name.replace("layers.0.", f"layers.{i}.") for i in range(3)}
        torch.testing.assert_close(parameter.grad, sum(weights[other].grad for other in others))


def test_roberta_positions_skip_padding_ids_in_both_layouts():
    model = build("roberta", "model").eval()
    pad = model.config.pad_token_id
    ids = torch.tensor([[7, 8, 9, pad, 10], [7, pad, 8, 9, 10]])
    expected = torch.tensor([[2, 3, 4, pad, 5], [2, pad, 3, 4, 5]])
    default = model(ids).last_hidden_state
    torch.testing.assert_close(default, model(ids, position_ids=expected).last_hidden_state)
    packed = model(ids.flatten(), cu_seqlens=torch.tensor([0, 5, 10], dtype=torch.int32)).last_hidden_state
    torch.testing.assert_close(packed, default.flatten(0, 1))


def test_electra_discriminator_loss_is_over_real_tokens():
    model = build("electra", "pretraining").eval()
    ids, mask, _ = batch([6, 3])
    replaced = (ids % 3 == 0).long()
    result = model(ids, mask, labels=replaced)
    assert result.logits.shape == ids.shape and not result.logits[~mask].any()
    torch.testing.assert_close(
        result.loss, F.binary_cross_entropy_with_logits(result.logits[mask], replaced[mask].double())
    )


def test_electra_discriminator_labels():
    model = build("electra", "pretraining").eval()
    ids, mask, _ = batch([6, 3])
    replaced = (ids % 3 == 0).long()
    counted = model(ids, mask, labels=replaced.masked_fill(ids % 2 == 0, -100))
    kept = mask & (ids % 2 == 1)
    torch.testing.assert_close(
        counted.loss, F.binary_cross_entropy_with_logits(counted.logits[kept], replaced[kept].double())
    )
    assert torch.equal(model(ids, mask, labels=replaced.bool()).loss, model(ids, mask, labels=replaced).loss)
    assert model(ids, mask, labels=torch.full_like(ids, -100)).loss == 0
    with pytest.raises(DataError, match="labels.*7.*0 to 1"):
        model(ids, mask, labels=torch.full_like(ids, 7))
    with pytest.raises(DtypeError, match="labels.*float"):
        model(ids, mask, labels=torch.rand(ids.shape))


class Adapter(torch.nn.Linear):
    """A linear layer with something added, as an adapter would."""

    def forward(self, x):
        return super().forward(x) * (1 + x[..., :1])


@pytest.mark.parametrize(
    "place", ["model.encoder.layers.0.intermediate", "head.dense", "model.encoder.layers.1.output"]
)
def test_a_replaced_linear_layer_is_called(place):
    model = build("bert").eval()
    ids, mask, labels = batch([6, 4])
    before = model(ids, mask, labels=labels)
    layer = model.get_submodule(place)
    adapter = Adapter(layer.in_features, layer.out_features).double()
    adapter.load_state_dict(layer.state_dict())
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, adapter)
    after = model(ids, mask, labels=labels)
    assert not torch.allclose(after.logits, before.logits) and not torch.allclose(after.loss, before.loss)


def test_forward_hooks_fire_on_every_module_between_embedding_and_loss():
    model = build("bert").eval()
    called = set()
    names = [name for name, module in model.named_modules() if not isinstance(module, torch.nn.ModuleList) and name]
    names = [name for name in names if not name.endswith(("norm", "word", "position", "token_type"))]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    ids, mask, labels = batch([6, 4])
    model(ids, mask, labels=labels, return_logits=False)
    assert called == set(names)


@pytest.mark.parametrize("family", ["bert", "nezha", "roformer"])
@pytest.mark.parametrize("return_logits", [True, False])
def test_compiles_without_graph_breaks(family, return_logits):
    model = build(family)
    ids, _, labels = batch([6, 6])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=labels, return_logits=return_logits).loss
    torch.testing.assert_close(loss, model(ids, labels=labels).loss)
    loss.backward()


def test_output_reads_by_name_and_by_index():
    model = build("bert").eval()
    ids, mask, labels = batch([4])
    result = model(ids, mask)
    assert result[0] is result.logits is result["logits"] and len(result) == 1
    result = model(ids, mask, labels=labels)
    assert "loss" in result and "hidden_states" not in result and result.keys() == ["loss", "logits"]
    with pytest.raises(KeyError, match="pooler.*loss, logits"):
        result["pooler"]
    loss, logits = result
    assert loss is result.loss and logits is result.logits
    encoder = fastbert.BertModel(model.config).double().eval()
    last, pooled = encoder(ids, mask)
    assert last.shape == (1, 4, 16) and pooled.shape == (1, 16)
    assert fastbert.BertModel(model.config, add_pooling_layer=False)(ids).pooler_output is None


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_drops_and_evaluation_does_not(family):
    model = build(family, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    ids, mask, _ = batch([6, 4])
    torch.manual_seed(1)
    first = model(ids, mask).logits
    second = model(ids, mask).logits
    torch.manual_seed(1)
    again = model(ids, mask).logits
    assert not torch.equal(first, second) and torch.equal(first, again)
    model.eval()
    assert torch.equal(model(ids, mask).logits, model(ids, mask).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast_runs_forward_and_backward(family):
    model = build(family).float()
    ids, mask, labels = batch([6, 4])
    exact = model(ids, mask, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, mask, labels=labels, return_logits=False).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_batches(family):
    model = build(family, "model").eval()
    assert model(torch.zeros(0, 5, dtype=torch.long)).last_hidden_state.shape == (0, 5, 16)
    nothing = model(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool))
    assert nothing.last_hidden_state.shape == (2, 5, 16) and not nothing.last_hidden_state.any()


IDS = torch.tensor([[7, 8, 9]])


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(input_ids=IDS.float()), DtypeError, ["input_ids", "float32", "int64"]),
        (dict(input_ids=IDS[0]), ShapeError, ["input_ids", "[3]", "cu_seqlens"]),
        (
            dict(input_ids=IDS, attention_mask=torch.ones(1, 4).long()),
            ShapeError,
            ["attention_mask", "[1, 4]", "[1, 3]"],
        ),
        (dict(input_ids=IDS, attention_mask=torch.ones(1, 3)), DtypeError, ["attention_mask", "float32", "bool"]),
        (
            dict(input_ids=IDS, token_type_ids=torch.zeros(1, 4).long()),
            ShapeError,
            ["token_type_ids", "[1, 4]", "[1, 3]"],
        ),
        (dict(input_ids=IDS, labels=IDS[:, :2]), ShapeError, ["labels", "[1, 2]", "[1, 3]"]),
        (dict(input_ids=IDS, labels=IDS.int()), DtypeError, ["labels", "int32", "int64"]),
        (dict(input_ids=IDS, labels=IDS + VOCAB), DataError, ["labels", "47", "39"]),
        (dict(input_ids=IDS, labels=IDS - 9), DataError, ["labels", "-2", "-100"]),
        (dict(input_ids=IDS + VOCAB), DataError, ["input_ids", "47", "39"]),
        (dict(input_ids=IDS, token_type_ids=IDS), DataError, ["token_type", "7", "1"]),
        (dict(input_ids=torch.full((1, 25), 7)), ShapeError, ["25 tokens", "24"]),
        (dict(input_ids=IDS, position_ids=IDS + 20), DataError, ["position", "27", "23"]),
        (
            dict(input_ids=IDS, attention_mask=IDS, cu_seqlens=torch.tensor([0, 3]).int()),
            ShapeError,
            ["attention_mask", "cu_seqlens"],
        ),
        (dict(input_ids=IDS, cu_seqlens=torch.tensor([0, 3]).int()), ShapeError, ["input_ids", "[1, 3]", "[T]"]),
        (dict(input_ids=IDS[0], cu_seqlens=torch.tensor([0, 3])), DtypeError, ["cu_seqlens", "int64", "int32"]),
        (dict(input_ids=IDS[0], cu_seqlens=torch.tensor([0, 2]).int()), ShapeError, ["cu_seqlens", "2", "3"]),
        (dict(input_ids=IDS[0], cu_seqlens=torch.tensor([0, 4, 3]).int()), ShapeError, ["cu_seqlens"]),
        (dict(input_ids=IDS, return_logits=False), ShapeError, ["labels", "return_logits"]),
        (dict(input_ids=IDS, max_seqlen=3), ShapeError, ["max_seqlen", "3", "cu_seqlens"]),
        (dict(input_ids=IDS.tolist()), DtypeError, ["input_ids", "list", "Tensor"]),
        (dict(input_ids=IDS, attention_mask=[[1, 1, 1]]), DtypeError, ["attention_mask", "list", "Tensor"]),
        (dict(input_ids=IDS, labels=IDS.numpy()), DtypeError, ["labels", "ndarray", "Tensor"]),
    ],
)
def test_bad_input_is_a_typed_error_that_names_it(arguments, error, words):
    model = build("bert").eval()
    with pytest.raises(error) as caught:
        model(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_ids_for_one_sequence_serve_the_batch():
    model = build("bert").eval()
    ids, mask, _ = batch([5, 3])
    positions, types = torch.arange(5).flip(0), torch.tensor([0, 1, 1, 0, 1])
    full = model(ids, mask, types.expand(2, 5), positions.expand(2, 5)).logits
    assert torch.equal(model(ids, mask, types, positions).logits, full)
    assert torch.equal(model(ids, mask, types[None], positions[None]).logits, full)


def test_position_ids_are_refused_where_there_is_no_table():
    with pytest.raises(ConfigError, match="position_ids.*rotary"):
        build("roformer")(IDS, position_ids=IDS)


def test_config_of_another_family_is_refused():
    with pytest.raises(ConfigError, match="BertModel.*'bert'.*'nezha'"):
        fastbert.BertModel(small_config("nezha"))
    with pytest.raises(ConfigError, match="EncoderConfig.*dict"):
        fastbert.BertModel({"hidden_size": 8})
    with pytest.raises(ConfigError, match="'bart'"):
        fastbert.model_class("bart")
