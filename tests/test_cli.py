"""The commands, from outside: what they print, where they write, how they fail; and the demonstration in small."""

import json
import math
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import fastbert
from fastbert import cli
from fastbert.errors import ConfigError
from fastbert.train import PrepareConfig, PretrainConfig, demo
from fastbert.train.config import default_of, grouped_fields

ROOT = Path(__file__).parent.parent
TINY = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Commands run in an empty folder, on one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_text(path, documents=40, tag=""):
    draw = random.Random(0)
    words = ["天地", "山川", "日月", "风雨", "草木", "人心", "古今", "东西", "的", "了"]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(documents):
            file.write("".join(f"{word}{tag} " for word in ["今日", *draw.choices(words, k=3)]) + "\n")
            for _ in range(3):
                file.write("".join(f"{word}{tag} " for word in [*draw.choices(words, k=14), "。"]) + "\n")
            file.write("\n")
    return str(path)


def fails(capsys, *argv):
    """The one line that a command prints when it fails for a reason that the user can mend."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "options"), [("pretrain", PretrainConfig), ("prepare", PrepareConfig)])
def test_help_shows_every_field_with_meaning_and_default(capsys, command, options):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for _, entries in grouped_fields(options):
        for entry in entries:
            assert f"--{entry.name.replace('_', '-')}" in shown
            assert " ".join(entry.metadata["help"].split()) in shown
            if isinstance(default_of(entry), int | float | str):
                assert f"(default: {default_of(entry)})" in shown


def test_help_is_quick_and_loads_nothing_heavy():
    script = (
        "import sys; from fastbert import cli\n"
        "try: cli.main(['pretrain', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'triton', 'transformers', 'matplotlib', 'tensorboard', 'snownlp', 'rjieba'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pretrain", "--data", "nowhere"], "nowhere"),
        (["pretrain", "--files", "nowhere.txt"], "nowhere.txt does not exist"),
        (["pretrain", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["pretrain", "--warm-up", "3"], "unknown option '--warm-up' (did you mean '--warmup'?)"),
        (["pretrain", "--data", "a", "--masking", "whole"], "masking is 'whole', expected one of token, whole_word"),
        (["pretrain", "--out", "nowhere", "--data", "a", "--resume"], "no run to resume"),
        (["pretrain", "--out", "nowhere", "--resume"], "no run to resume"),
        (["prepare"], "files is empty"),
        (["prepare", "--files", "nowhere.txt"], "nowhere.txt does not exist"),
    ],
)
def test_an_error_is_one_line_that_names_the_thing(capsys, argv, said):
    assert said in fails(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hiden_size: 3", "unknown key 'hiden_size' = 3"),
        ("warm_up: 3", "did you mean 'warmup'?"),
        ("lr: high", "lr is 'high'"),
        ("- 1", "holds a list"),
        ("a: [", "is not valid YAML"),
        ("lr: 1e-4", "neither data nor files"),
    ],
)
def test_a_config_file_is_read_strictly(capsys, text, said):
    Path("c.yaml").write_text(text, encoding="utf-8")
    assert said in fails(capsys, "pretrain", "--config", "c.yaml")


def test_invalid_utf8_and_an_empty_corpus_are_named(capsys):
    Path("bad.txt").write_bytes(b"ok\n\xff\xfe\n")
    assert "bad.txt: invalid UTF-8" in fails(capsys, "prepare", "--files", "bad.txt")
    Path("empty.txt").write_bytes(b"\n\n")
    assert "empty.txt" in fails(capsys, "prepare", "--files", "empty.txt")
    Path("taken").write_bytes(b"")
    assert "taken" in fails(capsys, "pretrain", "--files", write_text("a.txt"), "--out", "taken")


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(fastbert.FastBertError):
        cli.main(["pretrain", "--data", "nowhere", "--debug"])
    monkeypatch.setenv("FASTBERT_DEBUG", "1")
    with pytest.raises(fastbert.FastBertError):
        cli.main(["pretrain", "--data", "nowhere"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (dict(lr="fast"), "lr is 'fast'"),
        (dict(lr=-1.0), "lr is -1.0, expected at least 0"),
        (dict(lr=math.nan), "lr is nan"),
        (dict(steps=1.5), "steps is 1.5"),
        (dict(steps=True), "steps is True"),
        (dict(betas=(0.9, 1.0)), "betas is 1.0, expected less than 1"),
        (dict(betas=(0.9,)), "expected 2 values"),
        (dict(files="a.txt"), "files is 'a.txt', expected a list"),
        (dict(masking="whole-word"), "did you mean 'whole_word'"),
        (dict(data="a", files=["b"]), "data is 'a' and files"),
        (dict(steps=1, epochs=1), "steps is 1 and epochs is 1"),
        (dict(resume=True, overwrite=True), "resume and overwrite"),
    ],
)
def test_wrong_values_are_named(values, said):
    with pytest.raises(ConfigError, match=said):
        PretrainConfig(**values)


def test_unknown_keys_get_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown key 'warm_up' = 3 .did you mean 'warmup'"):
        PretrainConfig.from_dict({"warm_up": 3})
    assert PretrainConfig.from_dict({"lr": "1e-4", "betas": [0.9, 0.98]}).betas == (0.9, 0.98)


# -- from end to end -------------------------------------------------------------------------------------------------


def test_from_raw_text_to_a_model_in_one_command(capsys):
    settings = dict(words="segmented", validation_fraction=0.1, max_length=32, batch_size=4, lr="1e-3", steps=9)
    Path("c.yaml").write_text(yaml.safe_dump(settings | dict(log_every=2)), encoding="utf-8")
    flags = ["--files", write_text("a.txt"), "--out", "run", "--steps", "4", "--device", "cpu", "--model", *TINY]
    assert cli.main(["pretrain", "--config", "c.yaml", *flags]) == 0
    assert "nothing was dropped" in capsys.readouterr().out
    begun = json.loads(Path("run/log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert begun["config"]["steps"] == 4 and begun["config"]["lr"] == 1e-3 and begun["config"]["log_every"] == 2
    model = fastbert.from_pretrained("run/model")
    assert model.config.hidden_size == 16
    # a finished run that is resumed is finished; no other option is needed
    assert cli.main(["pretrain", "--out", "run", "--resume"]) == 0
    assert "lr is 0.5, but the run" in fails(capsys, "pretrain", "--out", "run", "--resume", "--lr", "0.5")


def test_prepare_writes_what_pretrain_reads(capsys):
    text = write_text("a.txt")
    assert cli.main(["prepare", "--files", text, "--out", "corpus", "--words", "segmented"]) == 0
    assert "train:" in capsys.readouterr().out
    assert "exists" in fails(capsys, "prepare", "--files", text, "--out", "corpus")
    assert (
        cli.main(["prepare", "--files", text, "--out", "corpus", "--overwrite", "--tokenizer", "corpus/tokenizer"]) == 0
    )
    flags = ["--out", "run", "--steps", "2", "--max-length", "32", "--batch-size", "4", "--device", "cpu"]
    assert cli.main(["pretrain", "--data", "corpus", *flags, "--model", *TINY]) == 0
    assert "step 2/2" in capsys.readouterr().out


# -- the demonstration -----------------------------------------------------------------------------------------------


def small(**more):
    settings = dict(out="demo", steps=40, batch_size=8, max_length=48, validate_every=20, log_every=10, device="cpu")
    return settings | more


def test_the_demonstration_shows_losses_blanks_a_curve_and_how_to_go_on(capsys):
    pytest.importorskip("matplotlib")
    tagged = write_text("tagged.txt", tag="/n")
    result = demo(small(), tagged)
    out = capsys.readouterr().out
    assert result.validation_loss < 2.8 and "below what one can know" in out
    assert "unigram entropy" in out and out.count("＿＿") >= 3 and out.count("%") >= 30
    assert (result.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert result.folder == Path("demo/roformer")

    lines = [line.strip() for line in out.splitlines()]
    snippet = lines[lines.index("From Python:") + 1 :][:4]
    done = subprocess.run([sys.executable, "-c", "\n".join(snippet)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("(")) >= 5

    command = shlex.split(lines[lines.index("Train on:") + 1])
    assert command[0] == "fastbert"
    assert cli.main([*command[1:], "--steps", "2", "--device", "cpu"]) == 0
    assert fastbert.from_pretrained("demo/roformer-2/model").config == fastbert.from_pretrained(result.model).config


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "nezha", "electra"])
def test_the_demonstration_runs_with_every_family(capsys, family):
    pytest.importorskip("matplotlib")
    result = demo(small(variant=family, steps=2), write_text("tagged.txt", tag="/n"))
    assert fastbert.from_pretrained(result.model).config.model_type == family
    out = capsys.readouterr().out
    assert f"pretraining a {family}" in out and "NOT below" in out


def test_no_arguments_mean_the_demonstration_and_resume_goes_on_with_it(monkeypatch):
    seen = []
    monkeypatch.setattr("fastbert.train.demo", lambda settings: seen.append(settings) or demo_result())
    assert cli.main(["pretrain"]) == 0
    assert cli.main(["pretrain", "--variant", "nezha", "--resume"]) == 0
    assert seen == [{}, {"variant": "nezha", "resume": True}]


def demo_result():
    class Result:
        interrupted = False

    return Result()
