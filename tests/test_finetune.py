"""Fine-tuning from files to a model that predicts: what is learnt, what is kept, what is said of bad input."""

import csv
import json
import math
import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastbert
from fastbert.cli import main
from fastbert.data import Tokenizer
from fastbert.errors import CheckpointError, ConfigError, DataError, FastBertError, MissingFileError
from fastbert.finetune import FinetuneConfig, Predictor, finetune, predict
from fastbert.finetune.loop import Tuner, layer_groups
from fastbert.train.journal import read_log

GOOD, BAD, FILL = "好妙棒", "坏烂差", "的了在是我你他这那"
PLACES = ("北京", "上海")


def sentence(number):
    """Some characters in an order of their own, without a word of what they are about."""
    return [FILL[(number * 7 + i * i * (number % 5 + 1)) % len(FILL)] for i in range(3 + number % 6)]


def texts(count, begin=0):
    for number in range(begin, begin + count):
        words = sentence(number)
        words[number % len(words)] = (GOOD if number % 2 else BAD)[number % 3]
        yield "".join(words), "good" if number % 2 else "bad"


def tagged(count, begin=0):
    for number in range(begin, begin + count):
        words, at = sentence(number), number % 3
        tokens = [*words[:at], *PLACES[number % 2], *words[at:]]
        tags = ["O"] * at + ["B-LOC", "I-LOC"] + ["O"] * (len(words) - at)
        yield tokens, tags


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of examples, and pretrained models of random weights with a tokenizer."""
    out = tmp_path_factory.mktemp("finetune")
    text = out / "text.txt"
    text.write_text("\n".join([*(t for t, _ in texts(300)), *("".join(t) for t, _ in tagged(300))]), encoding="utf-8")
    tokenizer = Tokenizer.train(text, 60, min_frequency=1, progress=False)
    for family in ("bert", "albert", "roformer"):
        torch.manual_seed(0)
        config = fastbert.EncoderConfig(family, vocab_size=tokenizer.vocab_size, **SMALL)
        fastbert.model_class(family, "masked_lm")(config).save_pretrained(out / family)
        tokenizer.save_pretrained(out / family)
    for name, begin, count in (("train", 0, 160), ("validation", 500, 40), ("test", 700, 40)):
        with open(out / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *texts(count, begin)])
        with open(out / f"{name}-tags.jsonl", "w", encoding="utf-8") as file:
            for tokens, tags in tagged(count, begin):
                file.write(json.dumps({"tokens": tokens, "tags": tags}, ensure_ascii=False) + "\n")
    return out


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 32,
}
FAST = {"max_length": 32, "batch_size": 16, "lr": 3e-3, "epochs": 3, "log_every": 5, "device": "cpu"}


def config(folder, out, task="classification", family="bert", **changes):
    suffix = ".csv" if task == "classification" else "-tags.jsonl"
    files = {name: [str(folder / f"{name}{suffix}")] for name in ("train", "validation", "test")}
    own = {"task": task, "model": str(folder / family), "out": str(out)}
    return FinetuneConfig(**{**FAST, **own, **files, **changes})


@pytest.fixture(scope="module")
def classified(folder, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("classified")
    return finetune(config(folder, out / "run"))


def test_classification_is_learnt_and_reported(classified, folder):
    (found,) = classified.seeds
    assert found.test.metrics["accuracy"] == 1.0 == classified.mean["accuracy"] and math.isnan(
        classified.deviation["accuracy"]
    )
    assert (
        not classified.interrupted
        and classified.model == classified.folder / "model"
        and classified.metric == "accuracy"
    )
    report = (classified.folder / "report.txt").read_text(encoding="utf-8")
    assert "accuracy 1.0000" in report and "good" in report and "bad" in report
    scores = json.loads((classified.folder / "scores.json").read_text(encoding="utf-8"))
    assert scores["test"]["metrics"] == found.test.metrics and scores["test"]["confusion"]["counts"] == [
        [20, 0],
        [0, 20],
    ]
    assert (classified.folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in open(classified.folder / "predictions.jsonl", encoding="utf-8")]
    assert [record["truth"] for record in records] == [label for _, label in texts(40, 700)]
    assert [record["label"] for record in records] == [record["truth"] for record in records]
    assert records[0]["where"] == f"{folder / 'test.csv'}:2"
    events = {event: read_log(classified.folder, event) for event in ("begin", "train", "validation", "end")}
    assert events["begin"][0]["steps"] == 30 == events["train"][-1]["step"]
    assert [record["step"] for record in events["validation"]] == [10, 20, 30]


def test_the_model_folder_is_one_of_transformers(classified):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(classified.model).eval()
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    predictor = Predictor(classified.model, device="cpu")
    text = next(texts(1, 901))[0]
    ids = torch.tensor([predictor.task.tokenizer.encode(text)])
    with torch.no_grad():
        scores = theirs(ids).logits.softmax(-1)[0]
    (mine,) = predictor([text])
    assert mine["label"] == "good" == theirs.config.id2label[int(scores.argmax())]
    assert abs(mine["scores"]["good"] - scores[1].item()) < 1e-5


def test_predictions_of_the_folder_are_those_of_the_run(classified, folder, tmp_path, capsys):
    recorded = [json.loads(line) for line in open(classified.folder / "predictions.jsonl", encoding="utf-8")]
    given = [text for text, _ in texts(40, 700)]
    assert [p["label"] for p in predict(classified.model, given, device="cpu")] == [r["label"] for r in recorded]
    command = ["predict", "--model", str(classified.model), "--device", "cpu"]
    out = tmp_path / "p.jsonl"
    assert main([*command, "--files", str(folder / "test.csv"), "--out", str(out), "--labelled"]) == 0
    assert "accuracy 1.0000" in capsys.readouterr().err
    lines = [json.loads(line) for line in open(out, encoding="utf-8")]
    assert [line["text"] for line in lines] == given
    for line, record in zip(lines, recorded, strict=True):
        assert line["label"] == record["label"] and abs(line["score"] - record["score"]) < 1e-6
    assert main([*command, "--files", str(folder / "test.csv"), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--text", given[0]]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == lines[0]["label"]


def test_predict_reads_stdin_and_plain_text(classified, tmp_path, capsys, monkeypatch):
    import io

    given = "".join(f"{text}\n\n" for text, _ in texts(3, 800))
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    assert main(["predict", "--model", str(classified.model), "--device", "cpu"]) == 0
    one = capsys.readouterr().out
    (tmp_path / "t.txt").write_text(given, encoding="utf-8")
    assert (
        main(["predict", "--model", str(classified.model), "--device", "cpu", "--files", str(tmp_path / "t.txt")]) == 0
    )
    assert capsys.readouterr().out == one and len(one.splitlines()) == 3


@pytest.mark.parametrize("family", ["bert", "roformer"])
def test_tagging_is_learnt(folder, tmp_path, family):
    result = finetune(config(folder, tmp_path / "run", "tagging", family, epochs=4))
    (found,) = result.seeds
    assert found.test.metrics["f1"] == 1.0 and [row["label"] for row in found.test.per_class] == ["LOC"]
    (prediction,) = predict(result.model, ["我在上海是"], device="cpu")  # a raw text, cut as the training tokens were
    assert prediction["tokens"] == list("我在上海是")
    assert prediction["spans"] == [{"type": "LOC", "begin": 2, "end": 4, "text": "上海"}]


def test_answers_are_learnt(folder, tmp_path):
    """Where is it: the place in a text; and nothing where there is none."""
    for name, begin, count in (("train", 0, 240), ("validation", 500, 40)):
        with open(tmp_path / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for number, (tokens, _) in enumerate(tagged(count, begin)):
                place = PLACES[(begin + number) % 2]
                context = "".join(tokens)
                answers = [{"text": place, "answer_start": context.index(place)}]
                if number % 4 == 3:
                    context, answers = context.replace(place, ""), []
                record = {"question": "他在那", "context": context, "answers": answers, "id": number}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    files = {name: [str(tmp_path / f"{name}.jsonl")] for name in ("train", "validation")}
    result = finetune(config(folder, tmp_path / "run", "qa", **files, test=[], epochs=8))
    scores = result.seeds[0].validation.metrics
    assert scores["f1"] > 0.95 and scores["no_answer_accuracy"] > 0.9, scores
    with_answer, without = predict(result.model, [("他在那", "我在上海是你"), ("他在那", "我在的你")], device="cpu")
    assert with_answer["answer"] == "上海" and (with_answer["begin"], with_answer["end"]) == (2, 4)
    assert without["answer"] == "" and without["begin"] is None


@pytest.mark.parametrize("kind", ["regression", "several", "pairs"])
def test_other_kinds_of_classification(kind, folder, tmp_path):
    rows = {}
    for name, begin, count in (("train", 0, 240), ("validation", 500, 40)):
        rows[name] = []
        for text, label in texts(count, begin):
            if kind == "regression":
                rows[name].append({"text": text, "label": 1.5 if label == "good" else -0.5})
            elif kind == "several":
                held = [label] + ["mine"] * ("我" in text)
                rows[name].append({"text": text, "label": held})
            else:
                rows[name].append(
                    {"text": text[: len(text) // 2] or "的", "text_pair": text[len(text) // 2 :], "label": label}
                )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows[name]), encoding="utf-8")
    files = {name: [str(tmp_path / f"{name}.jsonl")] for name in ("train", "validation")}
    metric = "mean_squared_error" if kind == "regression" else None
    result = finetune(
        config(folder, tmp_path / "run", **files, test=[], epochs=8 if kind == "several" else 5, metric=metric)
    )
    scores = result.seeds[0].validation.metrics
    if kind == "regression":
        assert scores["pearson"] > 0.95 and scores["mean_squared_error"] < 0.01
        assert predict(result.model, ["的了好我"], device="cpu")[0]["value"] > 1
    elif kind == "several":
        assert scores["micro_f1"] > 0.95
        both = next(row for row in rows["validation"] if row["label"] == ["good", "mine"])
        (found,) = predict(result.model, [both["text"]], device="cpu")
        assert found["labels"] == ["good", "mine"]
    else:
        assert scores["accuracy"] == 1.0
        assert predict(result.model, [("的了", "好我")], device="cpu")[0]["label"] == "good"


def test_learning_rates_of_layers(folder):
    model = fastbert.BertForSequenceClassification.from_pretrained(folder / "bert")
    groups = layer_groups(model, 0.01, 0.5)
    scale = {p: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    for name, p in model.named_parameters():
        expected = 1.0
        if ".embeddings." in name:
            expected = 0.125
        elif "layers.0." in name:
            expected = 0.25
        elif "layers.1." in name:
            expected = 0.5
        assert scale[p] == expected, name
        assert decay[p] == (0.0 if name.endswith("bias") or "norm" in name else 0.01), name


def test_a_first_update_moves_each_layer_by_its_own_rate(folder, tmp_path):
    """Adam's first step is as long as the learning rate: the largest change of each parameter says what that was."""
    made = config(
        folder,
        tmp_path / "run",
        layer_decay=0.5,
        steps=1,
        epochs=None,
        warmup=0,
        schedule="constant",
        weight_decay=0.0,
        eps=1e-15,
    )
    result = finetune(made)
    before = fastbert.BertForMaskedLM.from_pretrained(folder / "bert").state_dict()
    after = fastbert.from_pretrained(result.model).state_dict()
    for name, expected in (
        ("model.encoder.layers.1.output.weight", 0.5),
        ("model.encoder.layers.0.output.weight", 0.25),
        ("model.embeddings.position.weight", 0.125),
    ):
        moved = (after[name] - before[name]).abs().max().item()
        assert moved == pytest.approx(3e-3 * expected, rel=0.02), name


def test_the_best_model_is_kept_and_patience_ends(folder, tmp_path, monkeypatch):
    """Validations say 0.5, 0.9, 0.7, 0.6: the second one's weights stay, and the run ends."""
    said, saved = iter([0.5, 0.9, 0.7, 0.6, 1.0]), []
    real = fastbert.finetune.loop.evaluate

    def evaluate(*arguments):
        predictions, scores = real(*arguments)
        return predictions, replace(scores, metrics=scores.metrics | {"accuracy": next(said)})

    monkeypatch.setattr("fastbert.finetune.loop.evaluate", evaluate)
    keep = Tuner._save
    monkeypatch.setattr(Tuner, "_save", lambda self: (saved.append(self.step), keep(self)))
    result = finetune(config(folder, tmp_path / "run", validate_every=3, patience=2, test=[]))
    assert saved == [3, 6] and result.seeds[0].validation.metrics["accuracy"] == 0.9
    assert [record["step"] for record in read_log(result.folder, "validation")] == [3, 6, 9, 12]
    assert read_log(result.folder, "end")[0]["best_step"] == 6


def test_seeds(folder, tmp_path, capsys):
    """Several runs, their mean and deviation; the same seed is the same run, another one another."""
    many = finetune(config(folder, tmp_path / "many", seeds=[3, 4], steps=6, epochs=None, lr=1e-3))
    values = [found.test.metrics["accuracy"] for found in many.seeds]
    assert many.mean["accuracy"] == statistics.fmean(values)
    assert many.deviation["accuracy"] == pytest.approx(statistics.stdev(values))
    table = capsys.readouterr().out
    assert all(word in table for word in ("mean", "deviation", "lowest", "highest"))
    one = finetune(config(folder, tmp_path / "one", seeds=[4], steps=6, epochs=None, lr=1e-3))
    read = [(found.model / "model.safetensors").read_bytes() for found in (*many.seeds, *one.seeds)]
    assert read[1] == read[2] and read[0] != read[1]
    assert many.seeds[1].folder == tmp_path / "many" / "seed-4" and one.model == tmp_path / "one" / "model"


def test_a_random_start(folder, tmp_path):
    steps = {"steps": 1, "epochs": None, "lr": 0.0, "test": []}
    pretrained = fastbert.from_pretrained(finetune(config(folder, tmp_path / "a", **steps)).model)
    random = fastbert.from_pretrained(finetune(config(folder, tmp_path / "b", random=True, **steps)).model)
    given = fastbert.from_pretrained(folder / "bert")
    assert torch.equal(pretrained.model.embeddings.word.weight, given.model.embeddings.word.weight)
    assert not torch.equal(random.model.embeddings.word.weight, given.model.embeddings.word.weight)
    assert random.config == pretrained.config


def test_a_fine_tuned_model_learns_other_labels(classified, folder, tmp_path):
    """Its head has two labels, the new task three: the head is new, the encoder is not."""
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "label": "abc"[i % 3]}) for i, (text, _) in enumerate(texts(60))),
        encoding="utf-8",
    )
    given = {"train": [str(tmp_path / "t.jsonl")], "validation": [], "test": [], "validation_fraction": 0.0}
    result = finetune(replace(config(folder, tmp_path / "run", **given), model=str(classified.model), lr=0.0))
    again, before = fastbert.from_pretrained(result.model), fastbert.from_pretrained(classified.model)
    assert again.config.labels == ["a", "b", "c"]
    assert torch.equal(again.model.pooler.dense.weight, before.model.pooler.dense.weight)


def test_a_share_of_train_validates(folder, tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "label": label}) for text, label in [*texts(100), *texts(100)]),
        encoding="utf-8",
    )
    from fastbert.finetune.finetune import read_splits

    splits = read_splits(
        config(folder, tmp_path / "run", train=[str(tmp_path / "t.jsonl")], validation=[], validation_fraction=0.2)
    )
    seen = {name: {example.text for example in splits[name]} for name in ("train", "validation")}
    assert not seen["train"] & seen["validation"] and len(splits["train"]) + len(splits["validation"]) == 200
    assert 15 < len(splits["validation"]) < 70


def test_questions_about_one_context_stay_together(folder, tmp_path):
    from fastbert.finetune.finetune import read_splits

    rows = [
        {"question": f"问{i}", "context": f"我在北京{number}", "answers": [{"text": "北京", "answer_start": 2}]}
        for number in range(30)
        for i in range(4)
    ]
    given = write(tmp_path / "q.jsonl", "\n".join(json.dumps(row) for row in rows))
    made = config(folder, tmp_path / "run", "qa", train=given, validation=[], test=[], validation_fraction=0.3)
    splits = read_splits(made)
    contexts = [{example.text for example in splits[name]} for name in ("train", "validation")]
    assert not contexts[0] & contexts[1] and len(contexts[0] | contexts[1]) == 30


def test_numbers_in_a_table_are_not_taken_for_names(folder, tmp_path):
    given = write(tmp_path / "n.csv", "text,label\n好的,0.5\n坏的,1.0\n妙的,2.25\n")
    with pytest.raises(ConfigError, match="n.csv:2: label is '0.5'.*problem_type"):
        finetune(config(folder, tmp_path / "run", train=given, validation=[], test=[], validation_fraction=0.0))


def test_ctrl_c_keeps_the_best_so_far(folder, tmp_path, monkeypatch, capsys):
    step = Tuner._train_once

    def interrupted(self):
        step(self)
        if self.update == 13:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Tuner, "_train_once", interrupted)
    result = finetune(config(folder, tmp_path / "run", seeds=[0, 1]))
    assert result.interrupted and len(result.seeds) == 1 and result.model == tmp_path / "run" / "seed-0" / "model"
    assert read_log(result.model.parent, "validation")[-1]["step"] == 10
    assert (result.model / "finetune.json").is_file()
    monkeypatch.setattr(Tuner, "_validate", lambda self: None)
    other = finetune(config(folder, tmp_path / "none"))
    assert other.interrupted and other.model == tmp_path / "none" / "model"
    assert fastbert.from_pretrained(other.model).config.labels == ["bad", "good"]  # the last weights


def test_numbers_that_are_not_finite_name_the_examples(folder, tmp_path):
    """Of a model that overflows float32."""
    model = fastbert.BertForMaskedLM.from_pretrained(folder / "bert")
    with torch.no_grad():
        model.model.encoder.layers[1].output_norm.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "huge")
    Tokenizer.from_pretrained(folder / "bert").save_pretrained(tmp_path / "huge")
    with pytest.raises(FastBertError, match=r"not finite in step 1, on .*train.csv:\d+"):
        finetune(replace(config(folder, tmp_path / "run", test=[]), model=str(tmp_path / "huge")))
    (record,) = read_log(tmp_path / "run", "error")
    assert len(record["examples"]) == 16


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return [str(path)]


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"task": None}, ConfigError, "task is not set.*classification, tagging, qa"),
        ({"task": "clasification"}, ConfigError, "task is 'clasification'.*did you mean 'classification'"),
        ({"model": None}, ConfigError, "model is not set"),
        ({"model": "./nowhere"}, FileNotFoundError, "nowhere"),
        ({"train": []}, ConfigError, "train is empty"),
        ({"train": ["nowhere.csv"]}, MissingFileError, "nowhere.csv does not exist"),
        ({"steps": 3}, ConfigError, "steps is 3 and epochs is 3"),
        ({"seeds": [1, 1]}, ConfigError, "seeds is .1, 1."),
        ({"max_length": 33}, ConfigError, "max_length is 33, but the model has 32 positions"),
        ({"metric": "acuracy"}, ConfigError, "metric is 'acuracy', expected one of accuracy"),
        (
            {"stride": 5, "task": "classification", "null_threshold": 1.0},
            ConfigError,
            "null_threshold.*goes with task 'qa'",
        ),
        ({"layer_decay": 1.5}, ConfigError, "layer_decay is 1.5"),
        ({"problem_type": "regression"}, DataError, r"train.csv:2: label is 'bad', expected a number"),
        ({"columns": {"text": "body"}}, DataError, "train.csv:1: no column 'body' for text; it has text, label"),
        ({"columns": {"txt": "body"}}, ConfigError, "columns names 'txt'"),
    ],
)
def test_bad_settings(folder, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        finetune(config(folder, tmp_path / "run", **changes))
    assert not list(tmp_path.glob("run/*/model")) and not (tmp_path / "run" / "model").exists()


def test_bad_data(folder, tmp_path):
    odd = write(tmp_path / "odd.csv", "text,label\n好的,good\n坏的,ugly\n")
    with pytest.raises(DataError, match=r"odd.csv:3: label 'ugly' is not among those of training: bad, good"):
        finetune(config(folder, tmp_path / "run", validation=odd))
    one = write(tmp_path / "one.csv", "text,label\n好的,good\n坏的,good\n")
    with pytest.raises(DataError, match="train has the one label 'good'"):
        finetune(config(folder, tmp_path / "run", train=one))
    with pytest.raises(DataError, match="leaves 0 for validation"):
        few = write(tmp_path / "few.csv", "text,label\n好的,good\n坏的,bad\n")
        finetune(config(folder, tmp_path / "run", train=few, validation=[], validation_fraction=1e-9))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_in_it(classified, folder, tmp_path):
    again = config(folder, classified.folder)
    with pytest.raises(ConfigError, match="contains a run; overwrite it"):
        finetune(again)
    with pytest.raises(ConfigError, match="model .* is in out"):
        finetune(replace(again, model=str(classified.model), overwrite=True))
    with pytest.raises(CheckpointError):
        finetune(replace(again, model=str(_broken(folder, tmp_path)), overwrite=True))
    assert (classified.model / "model.safetensors").is_file()
    write(tmp_path / "notes.txt", "mine")
    with pytest.raises(ConfigError, match="contains something else"):
        finetune(config(folder, tmp_path, overwrite=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    first = finetune(config(folder, tmp_path / "run", steps=1, epochs=None))
    second = finetune(config(folder, tmp_path / "run", steps=2, epochs=None, overwrite=True, seeds=[0, 1]))
    assert not first.model.exists() and all(found.model.is_dir() for found in second.seeds)


def _broken(folder, tmp_path):
    """A model folder that lacks a layer."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for path in (folder / "bert").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    return copy


def test_folders_that_cannot_predict(folder, classified, tmp_path, capsys):
    with pytest.raises(MissingFileError, match="has no finetune.json"):
        Predictor(folder / "bert")
    assert main(["predict", "--model", str(folder / "bert"), "--text", "好"]) == 2
    assert "finetune.json" in capsys.readouterr().err
    for content, words in (
        ("{", "finetune.json: not valid JSON"),
        ('{"task": "tagging"}', "settings is None"),
        ('{"task": "qa", "settings": {"labels": []}}', "do not fit"),
    ):
        copy = tmp_path / f"model-{len(content)}"
        copy.mkdir()
        for path in Path(classified.model).iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / "finetune.json").write_text(content)
        with pytest.raises(CheckpointError, match=words):
            Predictor(copy)
    good = json.loads((Path(classified.model) / "finetune.json").read_text())
    for changes, words in (
        ({"labels": ["a"]}, "labels"),
        ({"max_length": 1000}, "max_length 1000"),
        ({"max_length": 8.5}, "'max_length' = 8.5"),
        ({"problem_type": "regression"}, "problem_type"),
    ):
        (copy / "finetune.json").write_text(json.dumps(good | {"settings": good["settings"] | changes}))
        with pytest.raises(CheckpointError, match=words):
            Predictor(copy)
    predictor = Predictor(classified.model, device="cpu")
    for bad in ("", "  ", None, 7, ("好", 3)):
        with pytest.raises(DataError, match="text 2 is"):
            predictor(["好", bad])
    assert predictor([]) == []
    with pytest.raises(DataError, match="expected a list of texts"):
        predictor("好的")


def test_the_command(folder, tmp_path, capsys):
    command = [
        "finetune",
        "--task",
        "classification",
        "--model",
        str(folder / "albert"),
        "--out",
        str(tmp_path / "run"),
    ]
    files = ["--train", str(folder / "train.csv"), "--columns", "text=text", "label=label"]
    settings = ["--max-length", "32", "--lr", "3e-3", "--steps", "12", "--seeds", "5", "--device", "cpu"]
    assert main([*command, *files, *settings]) == 0
    shown = capsys.readouterr().out
    assert "train: " in shown and "validation: accuracy" in shown and f"model: {tmp_path / 'run' / 'model'}" in shown
    written = tmp_path / "c.yaml"
    written.write_text("task: classification\nlearning_rate: 1\n")
    assert main(["finetune", "--config", str(written)]) == 2
    assert "unknown key 'learning_rate'" in capsys.readouterr().err
    written.write_text(f"task: classification\nmodel: {folder / 'bert'}\nsteps: 1\nmax_length: 32\n")
    assert main(["finetune", "--config", str(written), *files, "--out", str(tmp_path / "two"), "--device", "cpu"]) == 0
    assert main(["finetune", "--limit", "5", *command[1:], *files]) == 2
    assert "limit is 5, which does nothing" in capsys.readouterr().err


def _together(folder, out):
    made = config(folder, out, steps=8, epochs=None, batch_size=4, accumulation=2, lr=1e-3, classifier_dropout=0.3)
    result = finetune(made)
    return result.seeds[0].validation.metrics, [record["loss"] for record in read_log(out, "train")]


def test_two_processes_do_what_one_does(folder, tmp_path, processes, one_thread):
    """With dropout."""
    alone = config(
        folder, tmp_path / "one", steps=8, epochs=None, batch_size=4, accumulation=4, lr=1e-3, classifier_dropout=0.3
    )
    result = finetune(alone)
    (scores, losses), (others, _) = processes(2).run(_together, folder, tmp_path / "two")
    assert scores == others == result.seeds[0].validation.metrics
    want = [record["loss"] for record in read_log(result.folder, "train")]
    assert losses == pytest.approx(want, rel=1e-5)
