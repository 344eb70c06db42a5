"""Heads for tasks: to and from transformers, labels of every kind, what padding is, dropout, bad input."""

import json

import pytest
import torch
from make_goldens import HEAD_FAMILIES, SMALL, build
from test_parity import write_folder

import fastbert
from fastbert.errors import CheckpointError, ConfigError, DataError, DtypeError, FastBertError, ShapeError

FAMILIES = dict(zip(HEAD_FAMILIES, ("bert", "roberta", "albert", "nezha", "electra", "roformer"), strict=True))
TASKS = {
    "SequenceClassification": "sequence_classification",
    "TokenClassification": "token_classification",
    "QuestionAnswering": "question_answering",
    "MultipleChoice": "multiple_choice",
}


def config(family="bert", **changes):
    own = HEAD_FAMILIES[next(name for name, kind in FAMILIES.items() if kind == family)]
    return fastbert.EncoderConfig(family, **SMALL | own | {"max_position_embeddings": 20} | changes)


def made(task, family="bert", **changes):
    torch.manual_seed(0)
    return fastbert.model_class(family, task)(config(family, **changes)).double().eval()


def batch(lengths=(7, 4, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, SMALL["vocab_size"], mask.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", HEAD_FAMILIES)
def test_there_and_back(family, task, tmp_path):
    """What transformers saves is read with the same results, and what fastbert saves is read back whole, with the
    names of the labels."""
    transformers = pytest.importorskip("transformers")
    architecture = f"{family}For{task}"
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    names = {0: "none", 1: "person", 2: "place"}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    own = labels if "Classification" in task else {}
    theirs = build(architecture, SMALL | HEAD_FAMILIES[family] | own, torch.Generator().manual_seed(3))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastbert.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    assert type(ours).__name__ == architecture
    inputs = batch((6, 6, 6))
    if task == "MultipleChoice":
        inputs = {name: t[None] for name, t in inputs.items()}
    ours.save_pretrained(tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    want, got, back = theirs(**inputs), ours(**inputs), again.double().eval()(**inputs)
    tolerance = 1e-5 if family == "RoFormer" else 1e-9  # its sinusoids are in float32 there
    for name in got.keys():
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(back[name], want[name], rtol=1e-9, atol=1e-9)
    if own:
        assert ours.config.labels == list(names.values()) and again.config.id2label == names
        assert again.config.label2id == labels["label2id"]


@pytest.mark.parametrize("task", TASKS.values())
@pytest.mark.parametrize("family", FAMILIES.values())
def test_dropout_of_the_head_is_that_of_transformers(family, task):
    """By transformers' configs: hidden dropout 0.2, before classifiers 0.4 where the family has such a field."""
    field = "classifier_dropout_prob" if family == "albert" else "classifier_dropout"
    model = made(task, family, hidden_dropout_prob=0.2, **{field: 0.4})
    found = [(name, m.p) for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)]
    head = dict((name.rpartition(".")[2], p) for name, p in found if "_head." in name)
    expected = {"question_answering": 0.0, "multiple_choice": 0.4}.get(task, 0.4)
    if task == "multiple_choice":
        expected = {"roberta": 0.2, "electra": 0.1, "roformer": 0.0}.get(family, 0.4)
    assert head["dropout"] == expected
    if task == "sequence_classification":
        assert head.get("dense_dropout", 0.4) == 0.4
    if task == "multiple_choice":
        assert head.get("dense_dropout", 0.0) == 0.0


def test_a_dense_head_drops_twice():
    """Before its own layer and before the classifier: with everything dropped at one place, what is left is known."""
    model = made("sequence_classification", "roberta", classifier_dropout=0.5).train()
    head, x = model.sequence_head, torch.ones(20000, 12, dtype=torch.float64)
    with torch.no_grad():
        head.dense.weight.copy_(torch.eye(12))
        head.classifier.weight.fill_(0)
        head.classifier.weight[:, 0] = 1
        for bias in (head.dense.bias, head.classifier.bias):
            bias.zero_()
        y = head(x)[:, 0]
    kept = (y != 0).double().mean().item()
    assert abs(kept - 0.25) < 0.02, kept  # of one column, both draws must keep it
    assert torch.allclose(y[y != 0], 2 * torch.tanh(torch.tensor(2.0, dtype=torch.float64)))


def test_kinds_of_labels_of_a_sequence():
    """As transformers takes them: by problem_type, or by num_labels and the dtype."""
    inputs, draws = batch(), torch.Generator().manual_seed(5)
    reals = torch.randn(3, 3, generator=draws, dtype=torch.float64)
    model = made("sequence_classification", num_labels=3)
    logits = model(**inputs).logits
    several = (reals > 0).double()
    for problem, labels, loss in (
        (None, torch.tensor([2, 0, 1]), torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0, 1]))),
        (None, several, torch.nn.functional.binary_cross_entropy_with_logits(logits, several)),
        ("regression", reals, torch.nn.functional.mse_loss(logits, reals)),
        (
            "multi_label_classification",
            several.bool(),
            torch.nn.functional.binary_cross_entropy_with_logits(logits, several),
        ),
        (
            "single_label_classification",
            torch.tensor([-100, 0, 1]),
            torch.nn.functional.cross_entropy(logits[1:], torch.tensor([0, 1])),
        ),
    ):
        model.config.problem_type = problem
        got = model(**inputs, labels=labels)
        torch.testing.assert_close(got.loss, loss, rtol=1e-12, atol=0)
        lean = model(**inputs, labels=labels, return_logits=False)
        assert lean.logits is None and torch.equal(lean.losses, got.loss[None])
    single = made("sequence_classification", num_labels=1)
    logits = single(**inputs).logits
    for labels in (reals[:, 0], reals[:, :1], torch.tensor([1, 2, 3])):
        want = torch.nn.functional.mse_loss(logits.flatten(), labels.double().flatten())
        torch.testing.assert_close(single(**inputs, labels=labels).loss, want)


def test_nothing_labelled_is_no_loss():
    inputs = batch()
    for task, labels in (
        ("sequence_classification", {"labels": torch.full((3,), -100)}),
        ("token_classification", {"labels": torch.full((3, 7), -100)}),
        (
            "question_answering",
            {"start_positions": torch.tensor([-1, 7, 3]), "end_positions": torch.tensor([99, 4, 1])},
        ),
    ):
        model = made(task)
        loss = model(**inputs, **labels).loss
        loss.backward()
        assert loss == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None), task


@pytest.mark.parametrize("family", FAMILIES.values())
def test_answers_are_found_among_real_tokens(family):
    """The loss of a padded batch is the mean of its sequences' alone, whatever stands in the padding; packed too."""
    model, inputs = made("question_answering", family), batch((7, 4, 2))
    starts, ends = torch.tensor([5, 0, 1]), torch.tensor([6, 3, 1])
    padded = model(**inputs, start_positions=starts, end_positions=ends)
    alone = []
    for row, length in enumerate((7, 4, 2)):
        ids = inputs["input_ids"][row : row + 1, :length]
        found = model(ids, start_positions=starts[row : row + 1], end_positions=ends[row : row + 1])
        torch.testing.assert_close(padded.start_logits[row, :length], found.start_logits[0], rtol=1e-9, atol=1e-12)
        assert (padded.end_logits[row, length:] == -65504).all()
        alone.append(found.loss)
    torch.testing.assert_close(padded.loss, torch.stack(alone).mean(), rtol=1e-9, atol=0)
    other = inputs["input_ids"].where(inputs["attention_mask"].bool(), 9)
    again = model(other, inputs["attention_mask"], start_positions=starts, end_positions=ends)
    if family != "roberta":  # its positions count ids of padding
        assert torch.equal(again.loss, padded.loss)


def test_left_padding_and_holes_count_columns():
    for family in ("bert", "nezha", "roformer"):
        model, inputs = made("question_answering", family), batch((5,))
        mask = torch.tensor([[0, 1, 0, 1, 1]])
        got = model(inputs["input_ids"], mask, start_positions=torch.tensor([3]), end_positions=torch.tensor([2]))
        scores = got.start_logits[0, [1, 3, 4]]
        want = torch.nn.functional.cross_entropy(scores[None], torch.tensor([1])) / 2  # a hole is no answer
        torch.testing.assert_close(got.loss, want)


@pytest.mark.parametrize("task", ["sequence_classification", "question_answering"])
def test_what_only_fills_up_changes_nothing(task):
    """Sequences of padding with the label -100 behind a packed batch, as batches of few sizes have them."""
    model, ids = made(task), batch((4, 3))["input_ids"]
    packed, ends = ids[batch((4, 3))["attention_mask"].bool()], torch.tensor([0, 4, 7], dtype=torch.int32)
    labels = torch.tensor([1, 0])
    given = {"labels": labels} if task.startswith("seq") else {"start_positions": labels, "end_positions": labels + 1}
    want = model(input_ids=packed, cu_seqlens=ends, max_seqlen=4, return_logits=False, **given)
    filled = {name: torch.cat([t, torch.tensor([-100, -100])]) for name, t in given.items()}
    got = model(
        input_ids=torch.cat([packed, torch.zeros(2, dtype=torch.int64)]),
        cu_seqlens=torch.tensor([0, 4, 7, 9, 9], dtype=torch.int32),
        max_seqlen=4,
        return_logits=False,
        **filled,
    )
    torch.testing.assert_close(got.losses, want.losses, rtol=1e-12, atol=0)


def test_a_choice_of_packed_texts():
    model, inputs = made("multiple_choice", "nezha"), batch((7, 4, 1, 2, 6, 3))
    three = {name: t.unflatten(0, (2, 3)) for name, t in inputs.items()}
    labels = torch.tensor([2, 0])
    want = model(**three, labels=labels, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    ends = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    got = model(input_ids=inputs["input_ids"][real], cu_seqlens=ends, max_seqlen=7, num_choices=3, labels=labels)
    assert want.logits.shape == (2, 3) and want.hidden_states[-1].shape == (6, 7, 12)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)


def test_a_roformer_chooses_by_the_last_real_token():
    """transformers takes the last column, also where it is padding; padded on the left the two are one."""
    model, inputs = made("multiple_choice", "roformer"), batch((7, 4, 2))
    padded = model(**{name: t[None] for name, t in inputs.items()}).logits[0]
    for row, length in enumerate((7, 4, 2)):
        alone = model(inputs["input_ids"][row, :length][None, None]).logits[0, 0]
        torch.testing.assert_close(padded[row], alone)


@pytest.mark.parametrize("family", FAMILIES.values())
def test_the_last_layer_is_computed_for_first_tokens_only(family):
    """With hidden states all of it is; the logits and gradients are the same."""
    model, inputs, results = made("sequence_classification", family), batch(), []
    for states in (False, True):
        model.zero_grad()
        out = model(**inputs, labels=torch.tensor([1, 0, 1]), output_hidden_states=states)
        out.loss.backward()
        results.append([out.logits, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_another_number_of_labels(tmp_path):
    model = made("sequence_classification", id2label={0: "a", 1: "b", 2: "c"})
    model.save_pretrained(tmp_path)
    kept = fastbert.from_pretrained(tmp_path)
    assert kept.config.labels == ["a", "b", "c"] and kept.config.num_labels == 3
    tokens = fastbert.BertForTokenClassification
    with pytest.raises(CheckpointError, match=r"classifier.weight has shape \[3, 12\], expected \[5, 12\]"):
        tokens.from_pretrained(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match=r"has no classifier.weight of shape \[5, 12\].*drawn anew"):
        found = tokens.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert found.config.id2label is None and found.token_head.classifier.weight.shape == (5, 12)
    masked = made("masked_lm")
    masked.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="classifier.weight.*drawn anew"):
        found = tokens.from_pretrained(tmp_path, id2label={0: "O", 1: "B", 2: "I"}, classifier_dropout=0.3)
    assert found.config.labels == ["O", "B", "I"] and found.token_head.dropout.p == 0.3
    assert torch.equal(found.model.embeddings.word.weight, masked.model.embeddings.word.weight)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_labels": 0}, "num_labels.*at least 1"),
        ({"id2label": {0: "a", 2: "b"}}, "id2label.*each id from 0 on"),
        ({"id2label": ["a", "b"]}, "id2label.*each id from 0 on"),
        ({"id2label": {0: 1}}, "id2label"),
        ({"id2label": {0: "a"}, "num_labels": 2}, "names 1 labels; expected num_labels = 2"),
        ({"problem_type": "clasification"}, "problem_type.*clasification.*regression"),
        ({"classifier_dropout": 1.0}, "classifier_dropout.*0 <= p < 1"),
        ({"classifier_dropout": "a lot"}, "classifier_dropout.*expected float"),
        ({"classifier_dropout_prob": 0.1}, "belongs to albert"),
    ],
)
def test_wrong_fields(fields, words):
    with pytest.raises(ConfigError, match=words):
        config(**fields)


def test_fields_survive_a_file(tmp_path):
    for family in FAMILIES.values():
        for changes in ({}, {"num_labels": 3}, {"id2label": {0: "一", 1: "二", 2: "三"}, "problem_type": "regression"}):
            made_of = config(family, **changes)
            (tmp_path / "config.json").write_text(json.dumps(made_of.to_dict()), encoding="utf-8")
            assert fastbert.EncoderConfig.from_json_file(tmp_path / "config.json") == made_of


ONES = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "task, given, error, words",
    [
        ("sequence_classification", {"labels": ONES[:2]}, ShapeError, r"labels has shape \[2\]; expected \[3\]"),
        ("sequence_classification", {"labels": ONES * 2}, DataError, "labels.*2"),
        ("sequence_classification", {"labels": ONES.double()}, ShapeError, r"expected \[3, 2\]"),
        ("sequence_classification", {"labels": [1, 0, 1]}, FastBertError, "labels"),
        ("sequence_classification", {"return_logits": False}, ShapeError, "labels is None and return_logits is False"),
        ("token_classification", {"labels": ONES}, ShapeError, r"labels has shape \[3\]; expected \[3, 7\]"),
        ("token_classification", {"labels": ONES.float()}, DtypeError, "labels"),
        ("token_classification", {"labels": torch.full((3, 7), 2)}, DataError, "labels"),
        ("question_answering", {"start_positions": ONES}, ShapeError, "start_positions was given alone"),
        ("question_answering", {"start_positions": ONES, "end_positions": ONES[:1]}, ShapeError, "end_positions"),
        ("question_answering", {"start_positions": ONES.double(), "end_positions": ONES}, DtypeError, "start_pos"),
        (
            "sequence_classification",
            {"labels": torch.full((3, 2), 5.0)},
            DataError,
            r"labels\[0, 0\]: got 5.0, expected 0",
        ),
        ("sequence_classification", {"labels": torch.full((3, 2), torch.nan)}, DataError, "got nan"),
        ("multiple_choice", {"labels": ONES}, ShapeError, r"input_ids has shape \[3, 7\]"),
    ],
)
def test_bad_input(task, given, error, words):
    with pytest.raises(error, match=words):
        made(task)(**batch(), **given)


def test_bad_choices():
    model, three = made("multiple_choice"), {name: t[None] for name, t in batch().items()}
    with pytest.raises(DataError, match="labels"):
        model(**three, labels=torch.tensor([3]))
    with pytest.raises(ShapeError, match="num_choices is 2"):
        model(**three, num_choices=2)
    ends = torch.tensor([0, 4, 7], dtype=torch.int32)
    for wrong in (None, 0, -1, 2.0, 3):
        with pytest.raises(ShapeError, match=f"num_choices is {wrong} with 2 packed"):
            model(input_ids=torch.ones(7, dtype=torch.int64), cu_seqlens=ends, num_choices=wrong)
    with pytest.raises(ShapeError, match=r"attention_mask has shape \[3, 7\]; expected \[1, 3, 7\]"):
        model(three["input_ids"], batch()["attention_mask"])
    positions = torch.arange(7)
    torch.testing.assert_close(model(**three, position_ids=positions).logits, model(**three).logits)
    with pytest.raises(ConfigError, match="BertForMultipleChoice"):
        fastbert.compile_for_latency(model)


def test_folders_name_what_they_lack(tmp_path):
    write_folder(tmp_path / "a", {"model_type": "bert"} | SMALL, {"bert.embeddings.LayerNorm.bias": torch.zeros(12)})
    with pytest.raises(CheckpointError, match="lacks .* tensor.* of BertForSequenceClassification"):
        fastbert.BertForSequenceClassification.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("task", ["model", "masked_lm", "pretraining", *TASKS.values()])
def test_arguments_of_transformers(task):
    model, inputs = made(task), batch()
    if task == "multiple_choice":
        inputs = {name: t[None] for name, t in inputs.items()}
    unused = dict(head_mask=None, inputs_embeds=None, output_attentions=False, return_dict=None)
    whole, fields = model(**inputs, **unused), model(**inputs, return_dict=False)
    assert isinstance(fields, tuple) and len(fields) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(whole, fields, strict=True))
    with pytest.raises(ConfigError, match=f"output_attentions is True, which {type(model).__name__} does not support"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ConfigError, match="inputs_embeds is a Tensor.*give input_ids"):
        model(**inputs, inputs_embeds=torch.zeros(3, 7, 12))
    with pytest.raises(TypeError, match="attention_maks"):
        model(inputs["input_ids"], attention_maks=inputs["attention_mask"])


def test_a_summary_that_is_not_computed_is_refused(tmp_path):
    made("multiple_choice", "electra").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name, value in (("summary_activation", "tanh"), ("summary_type", "mean"), ("summary_use_proj", False)):
        (tmp_path / "config.json").write_text(json.dumps(values | {name: value}))
        with pytest.raises(ConfigError, match=f"{name}.*not supported by ElectraForMultipleChoice; expected"):
            fastbert.ElectraForMultipleChoice.from_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="does not use"):
            fastbert.ElectraModel.from_pretrained(tmp_path)  # which has no summary


def test_answers_of_a_model_that_knew_other_labels(tmp_path):
    """Its folder says two labels, as the head of transformers has one for each."""
    transformers = pytest.importorskip("transformers")
    made("sequence_classification", num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.warns(UserWarning):
        model = fastbert.BertForQuestionAnswering.from_pretrained(tmp_path / "three")
    model.save_pretrained(tmp_path / "answers")
    _, info = transformers.BertForQuestionAnswering.from_pretrained(tmp_path / "answers", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]


def test_no_sequences_are_no_loss():
    nothing = torch.zeros(0, 5, dtype=torch.int64)
    for changes, labels in (({"num_labels": 1}, torch.zeros(0)), ({}, torch.zeros(0, 2)), ({}, torch.zeros(0).long())):
        assert made("sequence_classification", **changes)(nothing, labels=labels).loss == 0


def test_an_output_is_read_like_a_dictionary():
    output = made("token_classification")(**batch())
    assert output.attentions is None and dict(output.items()) == {"logits": output.logits}
    assert output.get("loss", 7) == 7 and output.get("logits") is output.logits and len(output.values()) == 1
