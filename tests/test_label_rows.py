"""Only rows with a label: the last layer and the head are computed for them alone, with the same loss and gradients."""

import pytest
import torch
import torch.nn.functional as F
from test_models import FAMILIES, IDS, batch, build, pack
from torch import nn

import fastbert
from fastbert import ops
from fastbert.errors import DataError, DtypeError, FastBertError, ShapeError


def packed(lengths, seed=0):
    """Packed ids, their labels, and the rest of the arguments."""
    ids, mask, labels = batch(lengths, seed)
    packed_ids, ends, longest = pack(ids, mask)
    return packed_ids, labels[mask], {"cu_seqlens": ends, "max_seqlen": longest}


def loss_and_gradients(model, *arguments, **named):
    model.zero_grad()
    loss = model(*arguments, **named).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    for g, h in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_places_of_labels_give_the_same_loss_and_gradients(family):
    """Without logits, with them, with places, and with places that fill up; against all rows."""
    model = build(family)
    ids, labels, sequences = packed([6, 14, 1, 9])
    expected = loss_and_gradients(model, ids, labels=labels, **sequences)
    places = (labels != -100).nonzero().squeeze(1)
    given = {"labels": labels[places], "label_positions": places}
    filled = {"labels": F.pad(given["labels"], (0, 3), value=-100), "label_positions": F.pad(places, (0, 3))}
    assert 3 < len(places) < len(labels) - 3 and 0 not in places[1:]
    for arguments in ({"labels": labels}, given, filled):
        for more in ({"return_logits": False}, {}, {"return_logits": False, "output_hidden_states": True}):
            assert_same(loss_and_gradients(model, ids, **arguments, **more, **sequences), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_computed_for_labelled_rows_only(family, monkeypatch):
    model = build(family, hidden_act="gelu")
    ids, labels, sequences = packed([6, 14, 1, 9])
    rows, gelu = [], ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda x, *args, **o: (rows.append(len(x)), gelu(x, *args, **o))[1])
    for given, expected in (({"return_logits": False}, int((labels != -100).sum())), ({}, len(ids))):
        rows.clear()
        with fastbert.use_backend("torch"):  # asked for, so that a CPU calls the ops that a GPU does
            model(ids, labels=labels, **given, **sequences)
        assert rows[:3] == [len(ids), len(ids), expected]


class Wrapped(nn.Module):
    """A layer that does more than ours."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, **arguments):
        return self.layer(x, **arguments) * 1.5


@pytest.mark.parametrize("what", ["layer", "attention", "hook"])
def test_what_is_replaced_sees_all_rows(what):
    model = build("bert")
    ids, labels, sequences = packed([6, 14, 1, 9])
    last, seen = model.model.encoder.layers[-1], []
    if what == "layer":
        model.model.encoder.layers[-1] = Wrapped(last)
    elif what == "attention":
        last.attention = Wrapped(last.attention)
    else:
        last.register_forward_hook(lambda module, arguments, result: seen.append(len(result)))
    expected = loss_and_gradients(model, ids, labels=labels, **sequences)
    assert_same(loss_and_gradients(model, ids, labels=labels, return_logits=False, **sequences), expected)
    assert seen == ([len(ids)] * 2 if what == "hook" else [])


@pytest.mark.parametrize("family", ["nezha", "roformer", "bert"])
def test_masks_with_holes(family):
    model = build(family)
    ids, mask, labels = batch([6, 8, 8])
    mask[1, 2] = mask[0, 0] = False
    expected = loss_and_gradients(model, ids, mask, labels=labels)
    assert_same(loss_and_gradients(model, ids, mask, labels=labels, return_logits=False), expected)


def test_checkpointed_and_shared_layers():
    ids, labels, sequences = packed([6, 14, 1, 9])
    for family in ("bert", "albert"):
        model = build(family).train()
        expected = loss_and_gradients(model, ids, labels=labels, **sequences)
        model.gradient_checkpointing_enable()
        assert_same(loss_and_gradients(model, ids, labels=labels, return_logits=False, **sequences), expected)


def test_no_label_at_all():
    model = build("bert")
    ids, labels, sequences = packed([5, 9])
    none = torch.empty(0, dtype=torch.int64)
    loss, gradients = loss_and_gradients(
        model, ids, labels=none, label_positions=none, return_logits=False, **sequences
    )
    assert loss == 0 and all((g == 0).all() for g in gradients)


PLACES = torch.tensor([0, 2])
PACKED = dict(input_ids=IDS.flatten(), cu_seqlens=torch.tensor([0, IDS.numel()], dtype=torch.int32))
GOOD = PACKED | dict(labels=PLACES, label_positions=PLACES)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(input_ids=IDS, labels=PLACES, label_positions=PLACES), ShapeError, ["label_positions", "cu_seqlens"]),
        (GOOD | dict(labels=None), FastBertError, ["labels", "NoneType"]),
        (GOOD | dict(labels=PLACES[:1]), ShapeError, ["labels has shape [1]; expected [2]", "label_positions"]),
        (GOOD | dict(label_positions=PLACES[None]), ShapeError, ["label_positions has shape [1, 2]"]),
        (GOOD | dict(label_positions=PLACES.float()), DtypeError, ["label_positions", "float32"]),
        (GOOD | dict(label_positions=PLACES + 1000), DataError, ["label_positions", "1000"]),
        (GOOD | dict(label_positions=PLACES - 1), DataError, ["label_positions", "-1"]),
        (GOOD | dict(labels=PLACES + 1000), DataError, ["labels", "1000"]),
        (GOOD | dict(label_positions=[0, 2]), FastBertError, ["label_positions", "list"]),
    ],
)
def test_bad_places_are_a_typed_error_that_names_them(arguments, error, words):
    with pytest.raises(error) as caught:
        build("bert")(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("more", [{}, {"return_rows": True, "output_hidden_states": True}])
def test_an_encoder_without_a_head_takes_no_labels(more):
    ids, labels, sequences = packed([6, 14])
    with pytest.raises(ShapeError, match="labels are for return_rows without output_hidden_states"):
        build("bert").model(ids, labels=labels, **more, **sequences)
