"""Training: what a run promises about its losses, its checkpoints, its end and its errors."""

import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastbert
from fastbert.data import Corpus, Tokenizer, prepare
from fastbert.errors import CheckpointError, ConfigError, DataError, FastBertError, MissingFileError
from fastbert.optim import schedule
from fastbert.train import PretrainConfig, fill, pretrain, state
from fastbert.train.setup import architecture
from fastbert.train.step import TrainStep

ROOT = Path(__file__).parent.parent
training = import_module("fastbert.train.pretrain")  # the name in fastbert.train is the function
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
pytestmark = pytest.mark.usefixtures("one_thread")
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def write_text(path, documents=60, seed=0):
    """Documents of random words; each word is two characters that always go together."""
    draw = random.Random(seed)
    words = ["天地", "山川", "日月", "风雨", "草木", "人心", "古今", "东西"]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(documents):
            for _ in range(3):
                file.write(" ".join(draw.choices(words, k=8)) + "\n")
            file.write("\n")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = write_text(folder / "text.txt")
    tokenizer = Tokenizer.train(text, 100, progress=False)
    prepare(text, tokenizer, folder / "corpus", words="segmented", validation_fraction=0.1, progress=False)
    return folder / "corpus"


SETTINGS = dict(max_length=20, batch_size=8, steps=12, lr=1e-3, warmup=2, log_every=4, validate_every=6)
SETTINGS |= dict(checkpoint_every=5, device="cpu")


@pytest.fixture
def config(data, tmp_path):
    return PretrainConfig(data=str(data), out=str(tmp_path / "run"), model=TINY, **SETTINGS)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """One run of the config above that went through."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    torch.set_num_threads(1)
    pretrain(PretrainConfig(data=str(data), out=str(out), model=TINY, **SETTINGS))
    return out


def command_line(*, model, **settings):
    """Settings as options of the command."""
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["pretrain", *words, "--model", *(f"{name}={value}" for name, value in model.items())]


def losses(out):
    """What the log says of each step, without what a clock says."""
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = ("event", "step", "loss", "lr", "grad_norm", "tokens")
    return [{k: r[k] for k in kept if k in r} for r in records if r["event"] in ("train", "validation")]


def same_end(out, other):
    """Both runs ended with the same weights and moments, bit by bit, and told the same losses on the way."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(Path(o) / "checkpoints" / "step-00000012" / name) for o in (out, other))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert losses(out) == losses(other)


def close_end(out, other, step=12):
    one, two = (load_file(Path(o) / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for o in (out, other))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=2e-5)
    for a, b in zip(losses(out), losses(other), strict=True):
        assert a["event"] == b["event"] and math.isclose(a["loss"], b["loss"], rel_tol=1e-5)


def interrupt_at(monkeypatch, update, number=signal.SIGINT):
    step = training.Trainer._train_step

    def train_step(self):
        if self.update == update:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(training.Trainer, "_train_step", train_step)


# -- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_a_model_that_loads(config):
    easy = dict(masking="token", packing="single", model=TINY | NO_DROPOUT, batch_size=32)
    result = pretrain(replace(config, **easy, steps=300, lr=1e-2, log_every=50, validate_every=0, checkpoint_every=0))
    train = [record["loss"] for record in losses(config.out) if record["event"] == "train"]
    assert train[-1] < train[0] - 0.5 and result.loss == train[-1]
    assert result.validation_loss < math.log(16)  # 16 characters
    model, tokenizer = fastbert.from_pretrained(result.model), Tokenizer.from_pretrained(result.model)
    assert isinstance(model, fastbert.RoFormerForMaskedLM) and tokenizer.vocab_size < model.config.vocab_size == 24
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("天地山[MASK]日月")])).logits[0]
    assert logits[:, tokenizer.vocab_size :].max() < logits[:, : tokenizer.vocab_size].max(-1).values.min()
    (best,) = fill(model, tokenizer, "天地山[MASK]日月", top=3)
    assert best[0][0] == "川" and len(best) == 3 and best[0][1] > best[1][1]
    header = json.loads((Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert header["event"] == "begin" and header["versions"]["torch"] == torch.__version__
    assert header["device"].startswith("cpu") and header["config"]["lr"] == 1e-2


def test_only_a_new_vocabulary_is_padded(config, tmp_path):
    size = lambda **changes: architecture(replace(config, **changes), 21, 0).vocab_size  # noqa: E731
    assert size() == size(variant="nezha") == 24 and size(pad_vocab_to=64) == 64 and size(pad_vocab_to=1) == 21
    assert size(preset="bert-tiny", model={}) == 21 and size(model=TINY | {"vocab_size": 22}) == 22
    begun = fastbert.EncoderConfig("bert", vocab_size=23, **TINY)
    fastbert.BertForMaskedLM(begun).save_pretrained(tmp_path / "begun")
    assert size(init=str(tmp_path / "begun"), model={}) == 23


def test_the_log_counts_real_tokens(uninterrupted, config):
    made = training.Trainer(config, training.World(torch.device("cpu")))
    try:
        tokens = sum(batch.tokens for update in range(4) for batch in made.feed.take(update))
    finally:
        made.close()
    assert losses(uninterrupted)[0]["tokens"] == tokens


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "nezha", "electra"])
def test_every_family_trains(config, family):
    changes = {"embedding_size": 8} if family in ("albert", "electra") else {}
    result = pretrain(replace(config, variant=family, model=TINY | changes, steps=3))
    assert fastbert.from_pretrained(result.model).config.model_type == family
    assert math.isfinite(result.validation_loss)


def test_validation_is_the_same_twice_and_does_not_disturb(config, uninterrupted):
    pretrain(replace(config, validate_every=1))
    one, two = ([r for r in losses(out) if r["event"] == "train"] for out in (config.out, uninterrupted))
    assert one == two
    assert [r for r in losses(config.out) if r["event"] == "validation"][-1] == losses(uninterrupted)[-1]


def test_accumulation_equals_the_large_batch(config, tmp_path):
    whole = replace(config, model=TINY | NO_DROPOUT, clip=0.1)
    pretrain(whole)
    pretrain(replace(whole, batch_size=2, accumulation=4, out=str(tmp_path / "parts")))
    close_end(config.out, tmp_path / "parts")


def test_epochs_in_place_of_steps(config):
    result = pretrain(replace(config, steps=None, epochs=2))
    made = training.Trainer(replace(config, overwrite=True), training.World(torch.device("cpu")))
    made.close()
    assert result.step == 2 * (len(made.objective) // 8)


def test_tensorboard_on_request(config):
    pytest.importorskip("tensorboard")
    pretrain(replace(config, steps=4, tensorboard=True))
    assert list((Path(config.out) / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_with_fp32_weights(config, precision):
    result = pretrain(replace(config, precision=precision))
    assert math.isfinite(result.loss)
    assert fastbert.from_pretrained(result.model).head.bias.dtype == torch.float32


def test_an_update_that_overflows_moves_neither_weights_nor_schedule(config, monkeypatch):
    apply, seen = TrainStep.apply, []

    def overflow_in_the_third(self):
        if self.progress.tried == 2:
            self.model.head.bias.grad.fill_(math.inf)
        before, made = self.model.head.bias.detach().clone(), self.progress.made.item()
        apply(self)
        unchanged = torch.equal(before, self.model.head.bias)
        seen.append((self.progress.made.item() > made, unchanged, self.loss_scale.scale.item()))

    monkeypatch.setattr(TrainStep, "apply", overflow_in_the_third)
    pretrain(replace(config, precision="fp16", steps=5, log_every=1))
    skipped = [i for i, (made, *_) in enumerate(seen) if not made]
    assert 2 in skipped and len(seen) == 5 + len(skipped)
    assert all(unchanged for made, unchanged, _ in seen if not made)
    assert seen[2][2] == seen[1][2] / 2
    train = [record for record in losses(config.out) if record["event"] == "train"]
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5]
    assert [record["lr"] for record in train] == [1e-3 * schedule("linear", steps=5, warmup=2)(i) for i in range(5)]


def test_gradients_that_no_loss_scale_saves_stop_the_run(config, monkeypatch):
    apply = TrainStep.apply

    def overflow(self):
        self.gradients.buffer.fill_(math.inf)
        apply(self)

    monkeypatch.setattr(TrainStep, "apply", overflow)
    with pytest.raises(FastBertError, match="overflow in fp16 even with a loss scale of 3.05.*after step 0;"):
        pretrain(replace(config, precision="fp16"))


# -- the end before the end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_equals_the_uninterrupted_one(config, uninterrupted, monkeypatch, number):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 6, number)
        result = pretrain(config)
    assert result.interrupted and result.model is None and result.step == 7
    assert [f.name for f in sorted((Path(config.out) / "checkpoints").iterdir())] == ["step-00000005", "step-00000007"]
    result = pretrain(replace(config, resume=True))
    assert not result.interrupted and result.step == 12
    same_end(config.out, uninterrupted)


def test_a_run_that_was_killed_resumes_from_its_last_checkpoint(config, uninterrupted, monkeypatch):
    class Killed(BaseException):
        pass

    step = training.Trainer._train_step

    def die(self):
        if self.update == 9:
            raise Killed
        return step(self)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(training.Trainer, "_train_step", die)
        pretrain(config)
    with open(Path(config.out) / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"event": "train", "step": 9, "lo')  # a line cut short
    pretrain(replace(config, resume=True))
    same_end(config.out, uninterrupted)


def test_ctrl_c_saves_and_prints_the_command_that_resumes(config, uninterrupted):
    # a signal that comes from outside, at a step that is known
    script = (
        "import os, signal, sys\n"
        "from importlib import import_module\n"
        "from fastbert import cli\n"
        "trainer = import_module('fastbert.train.pretrain').Trainer\n"
        "step = trainer._train_step\n"
        "def wait(self):\n"
        "    if self.update == 7:\n"
        "        print('READY', flush=True)\n"
        "        sys.stdin.readline()\n"
        "    return step(self)\n"
        "trainer._train_step = wait\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    options = command_line(data=config.data, out=config.out, model=TINY, **SETTINGS)
    with subprocess.Popen([sys.executable, "-c", script, *options], **pipes, text=True, env=environment()) as run:
        while "READY" not in (line := run.stdout.readline()):
            assert line, run.stderr.read()
        run.send_signal(signal.SIGINT)
        out, err = run.communicate("\n", timeout=60)
    assert run.returncode == 130, err
    assert "Ctrl-C again" in err and "stopped after step 8" in out
    command = shlex.split(out.splitlines()[-1])
    assert command[1:4] == ["-m", "fastbert", "pretrain"] and command[-1] == "--resume"
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    same_end(config.out, uninterrupted)


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    module = import_module("fastbert.train.interrupt")
    clock = iter([100.0, 100.5, 102.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), module.Interrupt(announce=False) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)  # the same, passed on by torchrun
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_model_folder_and_only_the_last_are_kept(config):
    pretrain(replace(config, checkpoint_every=2, keep_last=2))
    checkpoints = sorted((Path(config.out) / "checkpoints").iterdir())
    assert [folder.name for folder in checkpoints] == ["step-00000010", "step-00000012"]
    assert isinstance(fastbert.from_pretrained(checkpoints[0]), fastbert.RoFormerForMaskedLM)
    assert Tokenizer.from_pretrained(checkpoints[0]).vocab_size > 5


def damage(path, how):
    content = path.read_bytes()
    if how == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "flipped"),
        ("optimizer.safetensors", "cut"),
        ("state.json", "missing"),
        ("manifest.json", "cut"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(config, uninterrupted, capsys, name, how):
    shutil.copytree(uninterrupted, config.out)
    damage(Path(config.out) / "checkpoints" / "step-00000012" / name, how)
    damage(Path(config.out) / "checkpoints" / "step-00000010" / name, how)
    pretrain(replace(config, resume=True))
    said = capsys.readouterr().out
    assert said.count("trying the checkpoint before it") == 2 and f"step-00000012/{name}" in said
    same_end(config.out, uninterrupted)
    if how == "cut":
        for folder in (Path(config.out) / "checkpoints").iterdir():
            damage(folder / name, how)
        with pytest.raises(CheckpointError, match="all 3 checkpoints"):
            pretrain(replace(config, resume=True))


def test_a_save_that_fails_anywhere_leaves_the_old_checkpoint_or_the_new(tmp_path, monkeypatch):
    """Stops a save at each of its file operations in turn; what is found then is whole, and a later save succeeds."""

    class PowerCut(BaseException):
        pass

    left = math.inf

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise PowerCut
            return function(*args, **kwargs)

        return call

    def write(folder):
        (folder / "model.safetensors").write_bytes(b"weights")

    moments = {"w/exp_avg": torch.ones(2)}
    state.save(tmp_path, 1, write, moments, {"step": 1})
    for owner, name in ((state, "_sync"), (state, "save_file"), (state, "_fingerprint"), (state, "_write_json")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    stopped = 0
    for operations in range(100):
        left = operations
        try:
            state.save(tmp_path, 2, write, moments, {"step": 2})
            break
        except PowerCut:
            stopped += 1
        finally:
            left = math.inf
        assert state.latest(tmp_path, pytest.fail).name in ("step-00000001", "step-00000002")
    assert stopped > 10
    assert state.latest(tmp_path, pytest.fail).name == "step-00000002"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_of_the_old_form_resumes(config, tmp_path, precision):
    """Which kept torch.amp.GradScaler's state, an empty one without scaling."""
    whole = replace(config, precision=precision, out=str(tmp_path / "whole"))
    pretrain(whole)
    shutil.copytree(whole.out, config.out)
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000012")
    folder = Path(config.out) / "checkpoints" / "step-00000010"
    content = state.read_state(folder)
    scale = content.pop("loss_scale")
    content["scaler"] = {"scale": scale["scale"], "_growth_tracker": scale["good"]} if scale else {}
    (folder / "state.json").write_text(json.dumps(content), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["state.json"] = state._fingerprint(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    pretrain(replace(config, precision=precision, resume=True))
    same_end(config.out, whole.out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(lr=2e-3), "lr is 0.002, but .* begun with 0.001"),
        (dict(model=TINY | NO_DROPOUT), "model is .*hidden_dropout_prob"),
        (dict(batch_size=4), "batch_size x accumulation x processes is 4, but .* with 8"),
        (dict(seed=1), "seed is 1, but .* with 0"),
    ],
)
def test_resuming_with_other_settings_names_field_and_values(config, uninterrupted, change, said):
    shutil.copytree(uninterrupted, config.out)
    with pytest.raises(ConfigError, match=said):
        pretrain(replace(config, resume=True, **change))


def test_resuming_with_other_data_is_refused_and_with_another_split_of_the_batch_is_not(
    config, uninterrupted, tmp_path
):
    shutil.copytree(uninterrupted, config.out)
    tokenizer = Corpus.open(config.data).load_tokenizer()
    text = write_text(tmp_path / "other.txt", seed=1)
    prepare(text, tokenizer, tmp_path / "other", words="segmented", validation_fraction=0.1, progress=False)
    with pytest.raises(ConfigError, match="data .checksum. is"):
        pretrain(replace(config, resume=True, data=str(tmp_path / "other")))
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000012")
    result = pretrain(replace(config, resume=True, batch_size=4, accumulation=2, log_every=1))
    assert result.step == 12


# -- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_equal_one_with_the_same_global_batch(config, tmp_path):
    alone = replace(config, model=TINY | NO_DROPOUT, batch_size=4, accumulation=4, steps=6)
    pretrain(alone)
    together = tmp_path / "together"
    settings = SETTINGS | dict(data=config.data, out=together, batch_size=4, accumulation=2, steps=6)
    options = command_line(model=TINY | NO_DROPOUT, **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastbert"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6: validation loss") == 1  # one process talks
    close_end(config.out, together, step=6)


# -- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_state_before_it(config):
    with pytest.raises(FastBertError, match=r"not finite in step \d+, on samples \d+, .* of epoch 0") as caught:
        pretrain(replace(config, lr=1e30, warmup=0, clip=0, checkpoint_every=0))
    log = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    error = next(record for record in log if record["event"] == "error")
    assert len(error["samples"]) == 8 and f"step {error['update'] + 1}," in str(caught.value)
    (fault,) = error["faults"]
    assert sorted(fault["samples"]) == sorted(error["samples"])
    assert fault["losses"] == ["mlm_loss"] and "weights" not in fault
    assert fault["modules"][0].startswith("model.") and fault["modules"][0] in str(caught.value)
    assert "model.embeddings.word.weight" in fault["gradients"]
    (saved,) = (Path(config.out) / "checkpoints").iterdir()
    assert saved.name == f"step-{error['update']:08d}" and saved.name in str(caught.value)
    assert all(t.isfinite().all() for t in load_file(saved / "model.safetensors").values())
    assert not (Path(config.out) / "model").exists()
    with pytest.raises(FastBertError, match=rf"not finite in step {error['update'] + 1},"):
        pretrain(replace(config, lr=1e30, warmup=0, clip=0, checkpoint_every=0, resume=True))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (dict(data=None), ConfigError, "neither data nor files"),
        (dict(data="/nowhere"), MissingFileError, "/nowhere"),
        (dict(files=["/nowhere.txt"], data=None), MissingFileError, "/nowhere.txt"),
        (dict(variant="bert", max_length=600), ConfigError, "max_length is 600, but the model has 512 positions"),
        (dict(model=dict(vocab_size=6)), ConfigError, "vocab_size of the model is 6, but the tokenizer has"),
        (dict(model=dict(hiden_size=6)), ConfigError, "hidden_size"),
        (dict(preset="bert-bse"), ConfigError, "bert-"),
        (
            dict(preset="bert-tiny", model={}, variant="nezha"),
            ConfigError,
            "variant is 'nezha', but bert-tiny is 'bert'",
        ),
        (dict(init="/nowhere", model={}), MissingFileError, "/nowhere"),
        (dict(init="/nowhere"), ConfigError, "the folder decides"),
        (dict(resume=True), MissingFileError, "no run to resume"),
        (dict(batch_size=1000), ConfigError, "1000 samples, but the corpus gives"),
        (dict(warmup=50), ConfigError, "warmup is 50"),
        (dict(device="tpu"), ConfigError, "device is 'tpu'"),
        (
            dict(cuda_graphs=True, gradient_checkpointing=True),
            ConfigError,
            "gradient_checkpointing and cuda_graphs are",
        ),
        (dict(cuda_graphs=True), ConfigError, "cuda_graphs is set, but device 'cpu' is cpu: it needs a GPU"),
    ],
)
def test_what_cannot_work_is_an_error_before_the_first_step(config, change, error, said):
    with pytest.raises(error, match=said):
        pretrain(replace(config, **change))
    assert not (Path(config.out) / "checkpoints").exists()


def test_a_run_in_the_way_is_not_overwritten_unasked(config, uninterrupted):
    shutil.copytree(uninterrupted, config.out)
    with pytest.raises(ConfigError, match="contains a run"):
        pretrain(config)
    with pytest.raises(ConfigError, match="positions"):  # nor for a run that cannot begin
        pretrain(replace(config, overwrite=True, variant="bert", max_length=600))
    same_end(config.out, uninterrupted)
    assert pretrain(replace(config, overwrite=True, steps=2)).step == 2
    assert [f.name for f in (Path(config.out) / "checkpoints").iterdir()] == ["step-00000002"]


def test_init_begins_from_weights_and_refuses_another_tokenizer(config, uninterrupted, tmp_path):
    begun = pretrain(replace(config, init=str(uninterrupted / "model"), model={}, steps=2, lr=0.0))
    one, two = (load_file(folder / "model.safetensors") for folder in (begun.model, uninterrupted / "model"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    text = write_text(tmp_path / "text.txt", 40)
    prepare(
        text, Tokenizer.train(text, 12, progress=False), tmp_path / "other", validation_fraction=0.1, progress=False
    )
    with pytest.raises(CheckpointError, match="was trained with the tokenizer"):
        pretrain(
            replace(config, data=str(tmp_path / "other"), init=str(uninterrupted / "model"), model={}, overwrite=True)
        )


def test_filling_wants_a_blank(uninterrupted):
    model, tokenizer = (
        fastbert.from_pretrained(uninterrupted / "model"),
        Tokenizer.from_pretrained(uninterrupted / "model"),
    )
    with pytest.raises(DataError, match="no blank"):
        fill(model, tokenizer, "天地")


@pytest.mark.parametrize("variant", ["roformer", "albert"])
def test_gradient_checkpointing_changes_no_bit(config, tmp_path, variant, monkeypatch):
    called, checkpoint = [], fastbert.nn.checkpoint
    monkeypatch.setattr(fastbert.nn, "checkpoint", lambda *args, **o: (called.append(1), checkpoint(*args, **o))[1])
    runs = [replace(config, variant=variant, out=str(tmp_path / name)) for name in ("kept", "computed")]
    pretrain(runs[0])
    assert not called
    pretrain(replace(runs[1], gradient_checkpointing=True))
    assert len(called) == 12 * TINY["num_hidden_layers"]
    same_end(*(run.out for run in runs))
