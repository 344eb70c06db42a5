"""The worked examples in short, on real data: the demonstration's own model, pretrained for 800 steps in place of 2000,
learns faster from labelled text than a random one. What is printed is what `fastbert finetune --demo` prints."""

import pytest

from fastbert.errors import ConfigError
from fastbert.finetune import DEMOS, demo
from fastbert.train import demo as pretraining_demo


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of the demonstration."""
    folder = tmp_path_factory.mktemp("demo")
    pretraining_demo({"out": str(folder), "steps": 800, "validate_every": 0, "checkpoint_every": 0})
    return folder


@pytest.mark.parametrize("name, limit, epochs, lr", [("pos", 500, 4, 1e-3), ("sentiment", 3000, 3, 2e-3)])
def test_a_pretrained_start_beats_a_random_one(name, limit, epochs, lr, out, capsys):
    results = demo(name, {"out": str(out), "seeds": [0], "epochs": epochs, "lr": lr, "validate_every": 10_000}, limit)
    shown = capsys.readouterr().out
    pretrained, random = (results[start].seeds[0].test.metrics for start in ("pretrained", "random"))
    metric = results["random"].metric
    print(f"{name}: {metric} pretrained {pretrained[metric]:.4f}, random {random[metric]:.4f}")
    assert pretrained[metric] > random[metric]
    assert f"{pretrained[metric]:.4f}" in shown and f"{random[metric]:.4f}" in shown and "is better by" in shown
    assert (results["pretrained"].folder / "confusion.png").is_file()


def test_an_example_that_is_not_there():
    with pytest.raises(ConfigError, match="demo is 'nre', expected one of sentiment, ner, pos"):
        demo("nre")
    assert list(DEMOS) == ["sentiment", "ner", "pos"]
