"""Recipes: the published numbers, the plan, the phases, and each of the nine systems in small on real text."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import TINY, fails, write_text

import fastbert
from fastbert import cli
from fastbert.data import Corpus, SimilarWords, Tokenizer
from fastbert.errors import ConfigError, FastBertError, MissingFileError
from fastbert.train import Recipe, fill, recipes, run_recipe
from fastbert.train.journal import read_log
from fastbert.train.phases import phase_configs
from fastbert.train.recipes import FOLDER

ROOT = str(Path(__file__).parent.parent)
NINE = {
    "roberta-base": "<mask>",
    "bert-wwm": "[MASK]",
    "albert-base": "[MASK]",
    "nezha-base": "[MASK]",
    "wobert-base": "[MASK]",
    "electra-small": "[MASK]",
    "bert-wwm-ext": "[MASK]",
    "macbert-base": "[MASK]",
    "roformer-base": "[MASK]",
}
needs_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("snownlp", "rjieba", "gensim", "matplotlib")),
    reason="the extras `demo`, `zh` and `vectors` are not installed",
)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small prepared corpus."""
    folder = tmp_path_factory.mktemp("recipes")
    text = write_text(folder / "a.txt", documents=120)
    assert cli.main(["prepare", "--files", text, "--words", "segmented", "--out", str(folder / "corpus")]) == 0
    return str(folder / "corpus")


# -- the data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_whole(name):
    """Its options exist and fit each other, its numbers have sources, and it says which have none."""
    recipe = Recipe.load(name)
    assert recipe.sources and recipe.corpus and recipe.phases and recipe.text["level"] and recipe.text["vocab_size"]
    for number, phase in enumerate(recipe.phases):
        config = recipe.phase(number, {})
        assert config.preset and config.steps and config.global_batch % 32 == 0 and config.lr > 0
        assert phase.keys() >= {"name", "max_length", "steps"}
        assert config.warmup < config.steps


@pytest.mark.parametrize(
    ("name", "phase", "expected"),
    [
        ("roberta-base", 0, dict(max_length=512, global_batch=2048, steps=125_000, lr=5e-4, warmup=10_000, clip=0.0)),
        ("roberta-base", 0, dict(betas=(0.9, 0.98), mask_count="stochastic", mask_special=True, separators="row")),
        ("bert-wwm", 0, dict(max_length=128, global_batch=2560, steps=100_000, optimizer="lamb", objective="mlm+nsp")),
        ("bert-wwm-ext", 0, dict(max_length=128, global_batch=2560, steps=1_000_000)),
        ("bert-wwm-ext", 1, dict(max_length=512, global_batch=384, steps=400_000, masking="whole_word")),
        (
            "roberta-wwm-ext",
            0,
            dict(max_length=512, global_batch=384, steps=1_000_000, objective="mlm", optimizer="adamw"),
        ),
        ("roberta-wwm-ext-large", 0, dict(global_batch=512, steps=2_000_000, preset="chinese-roberta-wwm-ext-large")),
        ("albert-base", 0, dict(global_batch=4096, lr=0.00176, steps=125_000, warmup=3125, objective="mlm+sop")),
        (
            "albert-xxlarge",
            0,
            dict(preset="albert-xxlarge-v2", masking="ngram", optimizer="lamb", bias_correction=False),
        ),
        ("nezha-base", 0, dict(static_masks=5, max_predictions=20, schedule="nezha", objective="mlm+nsp")),
        ("nezha-base-wwm", 0, dict(masking="whole_word", preset="nezha-base-wwm-chinese")),
        ("wobert-base", 0, dict(lr=5e-6, global_batch=256, mask_count="bernoulli", mask_special=True)),
        ("wonezha-base", 0, dict(preset="wonezha-base", mask_prob=0.15)),
        ("electra-small", 0, dict(steps=1_000_000, global_batch=128, lr=5e-4, mask_actions=[0.85, 0.0, 0.15])),
        ("electra-base", 0, dict(generator_size=0.33333, steps=766_000, global_batch=256, lr=2e-4)),
        ("electra-large", 0, dict(mask_prob=0.25, global_batch=2048, steps=1_750_000, schedule="electra")),
        (
            "macbert-base",
            0,
            dict(objective="mac+sop", masking="macbert", mask_actions=[0.8, 0.1, 0.1], packing="pairs"),
        ),
        ("roformer-base", 1, dict(max_length=1536, steps=12_500, lr=1e-5)),
        (
            "bert-large-lamb",
            0,
            dict(global_batch=65536, steps=7038, lr=6e-3, warmup=0.2843, schedule="poly", degree=0.5),
        ),
        ("bert-large-lamb", 1, dict(global_batch=32768, steps=1563, lr=4e-3, warmup=0.128, max_predictions=80)),
    ],
)
def test_the_published_numbers(name, phase, expected):
    config = Recipe.load(name).phase(phase, {})
    assert {key: getattr(config, key) for key in expected} == expected


def test_recipes_are_in_the_package():
    assert len(recipes()) >= 20 and all((FOLDER / f"{name}.yaml").is_file() for name in recipes())
    assert set(NINE) <= set(recipes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extends": "macbert-bas"}, "macbert-bas.yaml does not exist"),
        ({"titel": "x"}, "unknown key 'titel' .did you mean 'title'"),
        ({"phases": []}, "names of the phases are"),
        ({"phases": [{"name": "a", "steps": 1}, {"name": "a", "steps": 1}]}, "names of the phases are"),
        ({"phases": [{"name": "../a", "steps": 1}]}, "names of the phases are"),
        ({"phases": [{"name": "a", "step": 1}]}, "unknown key 'step' = 1 .did you mean 'steps'"),
        ({"settings": {"objective": "mlm+sob"}}, "objective is 'mlm.sob'.*did you mean 'mlm.sop'"),
        ({"settings": {"masking": "token", "objective": "mac+sop"}}, "masking is 'token', expected 'macbert'"),
        ({"settings": "x"}, "settings is 'x', expected a dict"),
        ({"sources": "x"}, "sources is 'x', expected a list"),
        ({"text": {"vocabulary": 3}}, "unknown key 'vocabulary'"),
        ({"text": {"words": "os:system"}}, "text: words is 'os:system', expected no function in a recipe"),
        ({"demo": {"words": "os:system"}}, "demo: words is 'os:system', expected no function in a recipe"),
        ({"settings": {"words": "os:system"}}, "phase a: words is 'os:system', expected no function in a recipe"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path, change, message):
    recipe = {"title": "own", "settings": {"preset": "bert-tiny"}, "phases": [{"name": "a", "steps": 3}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe | change), encoding="utf-8")
    with pytest.raises((ConfigError, MissingFileError), match=message):
        Recipe.load(str(tmp_path / "own.yaml"))


def test_a_recipe_that_is_not_there_is_named_with_the_nearest(capsys, tmp_path):
    assert "there is no recipe 'macbert' (did you mean 'macbert-base'?)" in fails(
        capsys, "pretrain", "--recipe", "macbert"
    )
    assert "none.yaml does not exist" in fails(capsys, "pretrain", "--recipe", "none.yaml")
    for name, base in (("round", "trip"), ("trip", "round")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}\ntitle: x\n", encoding="utf-8")
    assert "which extends it" in fails(capsys, "pretrain", "--recipe", "round.yaml")
    assert "explain is set with recipe None and demo False, expected a recipe alone" in fails(
        capsys, "pretrain", "--explain"
    )


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_is_missing(capsys):
    assert cli.main(["pretrain", "--recipe", "macbert-base", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "fastbert prepare --files YOUR.txt --level char --vocab-size 21128 --words rjieba --out corpus" in " ".join(
        out.split()
    )
    assert "fastbert prepare similar-words" in out and "bert-base-chinese" in out and "mac+sop" in out
    assert re.search(r"length-512 +512 +1,000,000 +384 +0.0001 +197 G +- +-\n", out)
    assert "neither data nor files is set" in fails(capsys, "pretrain", "--recipe", "macbert-base")
    assert "data 'none' does not exist" in fails(capsys, "pretrain", "--recipe", "bert-wwm", "--data", "none")
    assert "manifest.json does not exist" in fails(capsys, "pretrain", "--recipe", "bert-wwm", "--data", ".")


def small(corpus):
    return [
        "--data",
        corpus,
        "--batch-size",
        "8",
        "--global-batch",
        "16",
        "--warmup",
        "0.1",
        "--steps",
        "3",
        "--model",
        *TINY,
    ]


def test_the_plan_tells_the_time_at_the_speed_measured_here(capsys, corpus):
    argv = ["pretrain", "--recipe", "bert-wwm", *small(corpus), "--explain"]
    assert cli.main([*argv, "--variant", "bert"]) == 0
    out = capsys.readouterr().out
    tokens = Corpus.open(corpus).tokens
    assert f"{corpus}: {tokens:,} tokens" in " ".join(out.split())
    speeds = [float(found.replace(",", "")) for found in re.findall(r"([\d,]+) tokens/s at length", out)]
    assert len(speeds) == 2 and min(speeds) > 0
    assert re.search(r"length-512 +512 +3 +16 ", out) and "seconds on 1 x cpu" in out


# -- the phases --------------------------------------------------------------------------------------------------------


def own_recipe(path, **keys):
    recipe = keys | {
        "title": "own",
        "settings": {
            "variant": "albert",
            "model": dict(entry.split("=") for entry in TINY) | {"embedding_size": 8},
            "objective": "mlm+sop",
            "masking": "ngram",
            "batch_size": 8,
            "validation_samples": 8,
            "log_every": 1,
        },
        "phases": [{"name": "short", "max_length": 16, "steps": 4}, {"name": "long", "max_length": 48, "steps": 3}],
    }
    recipe["settings"]["model"] = {name: int(value) for name, value in recipe["settings"]["model"].items()}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(path)


def test_phases_go_on_from_one_another_and_complete_ones_are_passed_over(corpus, tmp_path, capsys):
    path = own_recipe(tmp_path / "own.yaml")
    result = run_recipe(path, data=corpus, out="runs/own")
    assert result.folder.name == "long" and result.step == 3
    first, second = (read_log(f"runs/own/{name}", "begin")[0]["config"] for name in ("short", "long"))
    assert (first["init"], second["init"]) == (None, "runs/own/short/model")
    assert (first["max_length"], second["max_length"]) == (16, 48) and first["seed"] != second["seed"]
    one, two = (read_log(f"runs/own/{name}", "train") for name in ("short", "long"))
    assert set(one[0]) & set(two[0]) >= {"loss", "mlm_loss", "sop_loss"}
    capsys.readouterr()
    with pytest.raises(ConfigError, match="out 'runs/own/short' contains a run"):
        run_recipe(path, data=corpus, out="runs/own")
    (tmp_path / "runs/own/long/model/config.json").unlink()
    (tmp_path / "runs/own/long/model").rename(tmp_path / "gone")
    again = run_recipe(path, data=corpus, out="runs/own", resume=True)
    assert again.step == 3 and "phase short: complete already" in capsys.readouterr().out
    assert run_recipe(path, data=corpus, out="runs/own", resume=True) is None


def test_a_recipe_runs_from_raw_text(tmp_path, capsys):
    """The corpus is made once, as the recipe says, and the time is told before anything is trained."""
    path, text = (
        own_recipe(tmp_path / "own.yaml", text={"words": "segmented", "level": "char"}),
        write_text(tmp_path / "a"),
    )
    result = run_recipe(path, files=[text], vocab_size=40, out="runs/own")
    assert result.step == 3 and Corpus.open("runs/own/corpus").manifest["settings"]["words"] == "segmented"
    out = capsys.readouterr().out
    assert out.count("characters per token") == 1 and out.index("tokens/s at length 16") < out.index(
        "phase short, 1 of 2"
    )
    assert read_log("runs/own/long", "begin")[0]["config"]["data"] == "runs/own/corpus"


def test_an_init_decides_the_architecture_within_the_family(tmp_path, capsys, corpus):
    (config,) = phase_configs(Recipe.load("macbert-base"), {"data": "x", "init": "folder"})
    assert (config.init, config.preset, config.variant, config.model) == ("folder", None, "bert", {})
    run = ["pretrain", "--data", corpus, "--variant", "bert", "--model", *TINY, "--out", "r", "--max-length", "32"]
    assert cli.main([*run, "--steps", "1", "--batch-size", "8", "--validation-samples", "0"]) == 0
    capsys.readouterr()
    argv = ["pretrain", "--recipe", "nezha-base", "--data", corpus, "--init", "r/model", "--explain"]
    assert "variant is 'nezha', but r/model is 'bert'" in fails(capsys, *argv)


def test_options_change_what_they_name():
    (config, _) = phase_configs(Recipe.load("bert-base"), {"data": "x", "model": {"num_hidden_layers": 4}})
    assert config.model == {"hidden_act": "gelu_new", "num_hidden_layers": 4}
    (config,) = phase_configs(Recipe.load("nezha-base"), {"data": "x", "epochs": 2.0})
    assert (config.steps, config.epochs) == (None, 2.0)


def test_a_later_phase_that_cannot_run_is_found_before_the_first(tmp_path, corpus):
    path = own_recipe(tmp_path / "own.yaml")
    with pytest.raises(
        ConfigError, match="an update of the phase long has 600 samples, but the corpus gives [0-9]+ of"
    ):
        run_recipe(path, data=corpus, out="runs/own", global_batch=600)
    (tmp_path / "runs/two/long/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="out 'runs/two/long' contains a run"):
        run_recipe(path, data=corpus, out="runs/two")
    assert not (tmp_path / "runs/own/short").exists() and not (tmp_path / "runs/two/short/model").exists()
    with pytest.raises(MissingFileError, match="out 'never' contains no run of the recipe to resume"):
        run_recipe(path, data=corpus, out="never", resume=True)


def test_a_phase_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, corpus):
    path = own_recipe(tmp_path / "own.yaml")
    (tmp_path / "runs/own/short").mkdir(parents=True)
    (tmp_path / "runs/own/short/log.jsonl").write_text("", encoding="utf-8")
    assert run_recipe(path, data=corpus, out="runs/own", resume=True).step == 3


def test_the_plan_says_where_the_corpus_is_not_as_the_recipe_has_it(tmp_path, capsys):
    text = write_text(tmp_path / "a.txt")
    assert cli.main(["prepare", "--files", text, "--out", "plain"]) == 0
    options = ["--model", *TINY, "--batch-size", "4", "--global-batch", "4", "--warmup", "0"]
    assert cli.main(["pretrain", "--recipe", "bert-wwm", "--data", "plain", *options, "--explain"]) == 0
    assert "it was prepared without words, the recipe has those of rjieba" in capsys.readouterr().out
    assert cli.main(["pretrain", "--recipe", "roberta-base", "--data", "plain", *options, "--explain"]) == 0
    assert "its tokenizer is of level char, the recipe's of level bpe" in capsys.readouterr().out


def test_macbert_is_planned_and_trained_on_its_own_corpus(tmp_path, capsys, corpus):
    SimilarWords({"天地": ["山川"], "山川": ["天地", "日月"]}).write("similar.txt")
    argv = ["pretrain", "--recipe", "macbert-base", "--similar-words", "similar.txt", *small(corpus)]
    assert cli.main([*argv, "--out", "m"]) == 0
    out = capsys.readouterr().out
    assert out.index("tokens/s at length 512") < out.index("phase length-512, 1 of 1")
    assert set(read_log("m/length-512", "train")[0]) >= {"mlm_loss", "sop_loss"}


def test_two_processes_run_a_recipe(tmp_path, corpus):
    path = own_recipe(tmp_path / "own.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "fastbert"]
    command += ["pretrain", "--recipe", path, "--data", corpus, "--out", "two", "--batch-size", "4", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr[:2000]
    assert done.stdout.count("phase long, 2 of 2") == 1 and Path("two/long/model/config.json").is_file()


def test_config_file_and_command_line_name_a_recipe(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("recipe: bert-base\nexplain: true\nlr: 0.5\n", encoding="utf-8")
    assert cli.main(["pretrain", "--config", "c.yaml", "--recipe", "nezha-base"]) == 0
    out = capsys.readouterr().out
    assert "[nezha-base]" in out and " 0.5 " in out


def test_blanks_are_filled_by_models_with_other_heads(tmp_path, corpus):
    for variant, objective in (("bert", "mlm+nsp"), ("electra", "rtd")):
        run = ["pretrain", "--data", corpus, "--variant", variant, "--objective", objective, "--model", *TINY]
        run += [
            "--max-length",
            "32",
            "--steps",
            "1",
            "--batch-size",
            "8",
            "--validation-samples",
            "0",
            "--out",
            variant,
        ]
        assert cli.main(run) == 0
    for folder in ("bert/model", "electra/model/generator"):
        (best,) = fill(fastbert.from_pretrained(folder), Tokenizer.from_pretrained(folder), "天[MASK]", top=3)
        assert len(best) == 3 and 0 < sum(share for _, share in best) <= 1.001
    with pytest.raises(ConfigError, match="a ElectraForPreTraining has no masked-language-model head"):
        fill(fastbert.from_pretrained("electra/model"), Tokenizer.from_pretrained("electra/model"), "天[MASK]")


def test_words_that_are_longer_than_the_budget_are_told(tmp_path, corpus, capsys):
    text = tmp_path / "long.txt"
    text.write_text("".join("天地玄黄宇宙洪荒" * 20 + "\n" for _ in range(40)), encoding="utf-8")
    assert cli.main(["prepare", "--files", str(text), "--words", "segmented", "--out", "long"]) == 0
    assert "a word has 160.0 tokens on average" in capsys.readouterr().out
    run = ["pretrain", "--data", "long", "--variant", "bert", "--model", *TINY, "--max-length", "128", "--out", "r"]
    assert "0 are chosen, expected about" in fails(capsys, *run, "--steps", "1", "--batch-size", "4")


# -- each system in small ----------------------------------------------------------------------------------------------


@needs_demo
@pytest.mark.parametrize("name", NINE)
def test_each_of_the_nine_systems_learns_on_real_text(name, daily, capsys):
    demos = daily.folder
    assert cli.main(["pretrain", "--recipe", name, "--demo", "--out", str(demos)]) == 0
    out = capsys.readouterr().out
    recipe = Recipe.load(name)
    runs = [demos / name / phase["name"] for phase in recipe.phases]
    losses = [[record["loss"] for record in read_log(run, "train")] for run in runs]
    first, last = losses[0][0], min(losses[-1])
    assert last < 0.95 * first and re.search(r"\n  loss +falls ", out)
    terms = {"mlm+nsp": "nsp_loss", "mlm+sop": "sop_loss", "mac+sop": "sop_loss", "rtd": "discriminator_loss"}
    if term := terms.get(recipe.settings["objective"]):
        assert term in read_log(runs[0], "train")[0]
    assert all((run / "loss.png").stat().st_size > 1000 for run in runs)
    tokenizer = Tokenizer.from_pretrained(runs[-1] / "model")
    assert tokenizer.level == recipe.text["level"] and tokenizer.special_tokens["mask_token"] == NINE[name]
    config = json.loads((runs[-1] / "model" / "config.json").read_text())
    assert config["vocab_size"] >= tokenizer.vocab_size


# -- the other commands ------------------------------------------------------------------------------------------------


def test_similar_words_of_a_thesaurus(tmp_path, capsys, corpus):
    (tmp_path / "cilin.txt").write_text("Aa01A01= 天地 山川 日月\nAa01A02# 风雨 草木\n", encoding="utf-8")
    argv = ["prepare", "similar-words", "--cilin", "cilin.txt", "--out", "similar.txt"]
    assert cli.main(argv) == 0
    assert "with a similar word: 3" in capsys.readouterr().out
    assert SimilarWords.read("similar.txt")["天地"] == ("山川", "日月")
    assert "similar.txt" in fails(capsys, *argv)
    assert cli.main([*argv, "--overwrite", "--related"]) == 0
    assert SimilarWords.read("similar.txt")["风雨"] == ("草木",)
    assert "expected one of vectors, cilin and text" in fails(capsys, "prepare", "similar-words", "--out", "x.txt")
    assert "cilin takes no option 'epochs'" in fails(capsys, *argv, "--overwrite", "--epochs", "3")
    run = ["pretrain", "--data", corpus, "--objective", "mac+sop", "--variant", "bert", "--model", *TINY]
    run += ["--max-length", "32", "--steps", "2", "--batch-size", "8", "--validation-samples", "4", "--out", "r"]
    assert "masking 'macbert' needs similar_words" in fails(capsys, *run)
    assert "none.txt does not exist" in fails(capsys, *run, "--similar-words", "none.txt")
    assert cli.main([*run, "--similar-words", "similar.txt"]) == 0


def test_resuming_with_another_table_of_similar_words_is_refused(tmp_path, capsys, corpus):
    for name, words in (("one.txt", "天地 山川"), ("two.txt", "日月 风雨")):
        SimilarWords({word: [other] for word, other in [words.split(), words.split()[::-1]]}).write(tmp_path / name)
    run = ["pretrain", "--data", corpus, "--masking", "macbert", "--variant", "bert", "--model", *TINY, "--out", "r"]
    run += ["--max-length", "32", "--steps", "2", "--batch-size", "8", "--validation-samples", "4"]
    assert cli.main([*run, "--similar-words", "one.txt"]) == 0
    assert "data (checksum) is" in fails(capsys, *run, "--similar-words", "two.txt", "--resume")


def test_a_model_of_characters_becomes_one_of_words(tmp_path, capsys, corpus):
    run = ["pretrain", "--data", corpus, "--variant", "bert", "--model", *TINY, "--out", "r", "--max-length", "32"]
    assert cli.main([*run, "--steps", "2", "--batch-size", "8", "--validation-samples", "4"]) == 0
    (tmp_path / "words.txt").write_text("天地\n山川\n", encoding="utf-8")
    argv = ["convert", "--to-words", "--model", "r/model", "--word-list", "words.txt", "--out", "w"]
    assert cli.main(argv) == 0
    tokenizer = Tokenizer.from_pretrained("w")
    assert tokenizer.level == "word" and tokenizer.token_to_id("山川") is not None
    assert "w exists already" in fails(capsys, *argv)
    assert "word_list is None and files is []" in fails(capsys, *argv[:4], "--out", "v")
    assert "got 0 conversions to do, expected one of --from-tensorflow" in fails(
        capsys, "convert", "--model", "r/model", "--out", "v"
    )
    assert "model is not set" in fails(capsys, "convert", "--to-words", "--out", "v", "--word-list", "words.txt")


def test_shards_of_another_tokenizer_and_models_of_another_are_refused(tmp_path, capsys, corpus):
    other = Tokenizer.train(write_text(tmp_path / "b.txt"), 300, "bpe", progress=False)
    with pytest.raises(FastBertError, match="was made with the tokenizer"):
        Corpus.open(corpus, tokenizer=other)
