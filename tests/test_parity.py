"""Parity with transformers: golden files made with 4.40.2 (make_goldens.py), and live models of the installed version.

The rule, for an output or a gradient: max |ours - theirs| <= tolerance * max(max |theirs|, 1e-3), all in float64. The
floor is for gradients that are zero by mathematics (the bias of the keys). The tolerance is 1e-9, or 1e-5 against
sinusoids that transformers built in float32.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_goldens import GOLDENS, TINY, build, write_float64_tables
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastbert

CASES = sorted(path.stem for path in GOLDENS.glob("*.safetensors"))
FP32_TABLE_CASES = ["nezha_mlm", "roformer_mlm"]
BACKENDS = ["torch", "reference"]


class Golden:
    """A golden file: the facts in its metadata, and its tensors by group ("weight", ..., "fp32_table/grad")."""

    def __init__(self, name):
        self.tensors = {}
        with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
            self.facts = json.loads(file.metadata()["golden"])
            self.config = self.facts["config"]
            for key in file.keys():
                group, tensor_name = key.rsplit("/", 1)
                self.tensors.setdefault(group, {})[tensor_name] = file.get_tensor(key)

    def __getitem__(self, group):
        return self.tensors[group]

    @property
    def is_right_padded(self):
        mask = self["input"]["attention_mask"].flatten(0, -2)
        return torch.equal(mask, mask.sort(dim=1, descending=True).values)

    def model(self, folder, config=None, weights=None):
        """The fastbert model that from_pretrained reads from a folder with the golden's config.json and weights."""
        write_folder(folder, config or self.config, weights or self["weight"])
        return self.model_class.from_pretrained(folder, dtype=torch.float64)

    @property
    def model_class(self):
        return getattr(fastbert, self.facts["architecture"])


def write_folder(folder, config, weights):
    """A checkpoint folder as transformers writes it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def run(model, inputs, folder):
    """(outputs at the real positions, gradients under transformers' names) of a fastbert model."""
    real = inputs["attention_mask"].bool()
    outputs = forward(model, inputs, real)
    model.zero_grad()
    outputs["loss"].backward()
    return outputs, gradients(model, folder)


def forward(model, inputs, real):
    """Outputs at the positions that `real` picks, into [B, L] or [T]; a base model has make_goldens.run's loss."""
    result = model(**{k: v for k, v in inputs.items() if not k.startswith("probe")}, output_hidden_states=True)
    flat = real.flatten(0, -2) if isinstance(real, torch.Tensor) else real
    outputs = {"hidden_states": torch.stack([state[flat] for state in result.hidden_states])}
    if "probe_hidden" not in inputs:
        whole = real if isinstance(real, slice) else real.shape
        for name in result.keys():
            value = result[name]
            if name == "loss" or name.endswith("logits"):
                by_token = isinstance(whole, torch.Size) and value.shape[: len(whole)] == whole
                outputs[name] = value[real] if by_token else value
    else:
        outputs["loss"] = (result.last_hidden_state[real] * inputs["probe_hidden"]).sum()
        if getattr(result, "pooler_output", None) is not None:
            outputs["pooler_output"] = result.pooler_output
            outputs["loss"] = outputs["loss"] + (result.pooler_output * inputs["probe_pooler"]).sum()
    return outputs


def gradients(model, folder):
    """Every gradient under its parameter's name in transformers: the model is saved with gradients as weights."""
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for target, parameter in zip(carrier.parameters(), model.parameters(), strict=True):
            target.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    carrier.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_close(got, want, tolerance=1e-9):
    """Every tensor of `want` is in `got` and near it, by the rule at the top of this file."""
    missing = sorted(set(want) - set(got))
    assert not missing, f"missing: {missing}; got {sorted(got)}"
    far = []
    for name, expected in want.items():
        expected, actual = expected.detach().double(), got[name].detach()
        assert actual.dtype == torch.float64 and actual.shape == expected.shape, (
            f"{name}: {actual.dtype} {actual.shape}, expected {expected.shape}"
        )
        bound = tolerance * max(expected.abs().max().item(), 1e-3)
        error = (actual - expected).abs().max().item()
        if not error <= bound:
            far.append(f"{name}: error {error:.2e}, bound {bound:.2e}")
    assert not far, "\n".join(far)


def without_frozen_rows(golden, grads):
    """transformers never trains the pad rows of its embeddings; it shows only where pads stand at real positions."""
    pad = golden.config["pad_token_id"]
    if not (golden["input"]["input_ids"][golden["input"]["attention_mask"].bool()] == pad).any():
        return grads
    rows = torch.arange(golden.config["vocab_size"]) != pad
    return {
        name: g[rows[: len(g)]] if name.endswith(("word_embeddings.weight", "position_embeddings.weight")) else g
        for name, g in grads.items()
    }


# ---------------------------------------------------------------- golden files


def test_goldens_are_complete():
    """Each of the six families has a masked language model and a base model among the goldens; the folder is small."""
    architectures = {Golden(name).facts["architecture"] for name in CASES}
    families = ("Bert", "Roberta", "Albert", "Nezha", "Electra", "RoFormer")
    assert architectures >= {family + kind for family in families for kind in ("ForMaskedLM", "Model")} | {
        "ElectraForPreTraining"
    }
    tasks = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
    assert architectures >= {f"{family}For{task}" for family in families for task in tasks}
    assert architectures >= {f"{family}ForPreTraining" for family in ("Bert", "Albert", "Nezha")}
    assert {Golden(name).facts["transformers"] for name in CASES} == {"4.40.2"}
    assert sum(path.stat().st_size for path in GOLDENS.iterdir()) < 4_000_000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_golden(case, backend, tmp_path):
    """Hidden states of every layer, pooler, logits, loss and the gradient of every parameter, to 1e-9."""
    golden = Golden(case)
    model = golden.model(tmp_path / "model").eval()
    with fastbert.use_backend(backend):
        outputs, grads = run(model, golden["input"], tmp_path / "grads")
    assert_close(outputs, golden["output"])
    assert_close(without_frozen_rows(golden, grads), without_frozen_rows(golden, golden["grad"]))


@pytest.mark.parametrize("case", [case for case in CASES if hasattr(Golden(case).model_class, "terms")])
def test_golden_loss_without_logits(case, tmp_path):
    """The losses that training takes, from labelled rows only where that can be, and their gradients: to 1e-9."""
    golden = Golden(case)
    model = golden.model(tmp_path / "model").eval()
    loss = model(**golden["input"], return_logits=False).losses.sum()
    loss.backward()
    assert_close({"loss": loss}, {"loss": golden["output"]["loss"]})
    assert_close(gradients(model, tmp_path / "grads"), golden["grad"])


@pytest.mark.parametrize("case", FP32_TABLE_CASES)
def test_golden_fp32_table(case, tmp_path):
    """Against NEZHA and RoFormer as transformers builds them, with sinusoids rounded to float32: to 1e-5."""
    golden = Golden(case)
    outputs, grads = run(golden.model(tmp_path / "model").eval(), golden["input"], tmp_path / "grads")
    assert_close(outputs, golden["fp32_table/output"], tolerance=1e-5)
    assert_close(grads, golden["fp32_table/grad"], tolerance=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if Golden(case).is_right_padded])
def test_packed_equals_golden(case, tmp_path):
    """Packed input gives what padded input gives: outputs, loss and gradients are the golden's."""
    golden = Golden(case)
    real = golden["input"]["attention_mask"].bool()
    lengths = real.flatten(0, -2).sum(1)
    inputs = {k: v[real] if v.shape == real.shape else v for k, v in golden["input"].items() if k != "attention_mask"}
    if real.dim() == 3:
        inputs["num_choices"] = real.shape[1]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    model = golden.model(tmp_path / "model").eval()
    outputs = forward(model, inputs | {"cu_seqlens": cu_seqlens, "max_seqlen": int(lengths.max())}, slice(None))
    outputs["loss"].backward()
    assert_close(outputs, golden["output"])
    assert_close(
        without_frozen_rows(golden, gradients(model, tmp_path / "grads")), without_frozen_rows(golden, golden["grad"])
    )


HEADS = {
    "bert_mlm": ("cls.predictions.bias", "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight"),
    "roberta_mlm": ("lm_head.bias", "lm_head.decoder", "roberta.embeddings.word_embeddings.weight"),
    "albert_mlm": ("predictions.bias", "predictions.decoder", "albert.embeddings.word_embeddings.weight"),
    "nezha_mlm": ("cls.predictions.bias", "cls.predictions.decoder", "nezha.embeddings.word_embeddings.weight"),
    "electra_generator": ("generator_lm_head.bias", "generator_lm_head", "electra.embeddings.word_embeddings.weight"),
    "roformer_mlm": ("cls.predictions.bias", "cls.predictions.decoder", "roformer.embeddings.word_embeddings.weight"),
}


@pytest.mark.parametrize("spelling", ["bias", "decoder.bias", "both and decoder.weight"])
@pytest.mark.parametrize("case", HEADS)
def test_spellings_of_the_tied_head(case, spelling, tmp_path):
    """Files hold the vocabulary's bias under one of two names or both, and the tied matrix or not."""
    golden = Golden(case)
    bias, decoder, embeddings = HEADS[case]
    weights = dict(golden["weight"])
    if spelling == "decoder.bias":
        weights[f"{decoder}.bias"] = weights.pop(bias)
    elif spelling == "both and decoder.weight":
        weights[f"{decoder}.bias"], weights[f"{decoder}.weight"] = weights[bias].clone(), weights[embeddings].clone()
    inputs = golden["input"]
    outputs = forward(golden.model(tmp_path, weights=weights).eval(), inputs, inputs["attention_mask"].bool())
    assert_close(outputs, golden["output"])


def test_nezha_longer_than_the_buffer_of_transformers(tmp_path):
    """NEZHA computes any length: past max_position_embeddings, where transformers has no rows left, nothing changes."""
    golden = Golden("nezha_mlm")
    model = golden.model(tmp_path, config=golden.config | {"max_position_embeddings": 4})
    inputs = golden["input"]
    assert inputs["input_ids"].shape[1] > 4
    outputs = forward(model.eval(), inputs, inputs["attention_mask"].bool())
    assert_close(outputs, golden["output"])


# ---------------------------------------------------------------- live


@st.composite
def live_configs(draw, family):
    """A small random transformers config of one family."""
    heads, head_dim = draw(st.integers(1, 3)), 2 * draw(st.sampled_from([*range(1, 10), 13]))
    layers = draw(st.integers(1, 3))
    config = TINY | {
        "vocab_size": draw(st.integers(8, 50)),
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 40)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-7, 1e-5])),
        "type_vocab_size": draw(st.integers(1, 3)),
        "pad_token_id": draw(st.integers(0, 3)),
    }
    if family in ("Albert", "Electra", "RoFormer"):
        config["embedding_size"] = draw(st.one_of(st.just(config["hidden_size"]), st.integers(2, 30)))
    if family == "Albert":
        config["num_hidden_groups"] = draw(st.integers(1, layers))
        config["inner_group_num"] = draw(
            st.integers(1, layers // config["num_hidden_groups"])
        )  # more make transformers 4.40 fail
    if family == "RoFormer":
        config["rotary_value"] = draw(st.booleans())
    if family == "Nezha":
        config["max_relative_position"] = draw(st.integers(1, 20))
    return config


def live_inputs(config, lengths, seed):
    """A right-padded batch with token types and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, config["vocab_size"], shape, generator=generator)
    labels = torch.randint(0, config["vocab_size"], shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.5] = -100
    labels[0, 0] = 5  # at least one
    return {
        "input_ids": ids.where(real, config["pad_token_id"]),
        "attention_mask": real.long(),
        "token_type_ids": torch.randint(0, config["type_vocab_size"], shape, generator=generator),
        "labels": labels.where(real, -100),
    }


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Albert", "Electra", "RoFormer", "Nezha"])
def test_live(family, tmp_path_factory):
    """What one saves the other loads: outputs agree both ways, and gradients."""
    transformers = pytest.importorskip("transformers")
    architecture = f"{family}ForMaskedLM"
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")

    @settings(max_examples=5, deadline=None)
    @given(
        config=live_configs(family),
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
        seed=st.integers(0, 2**20),
    )
    def check(config, lengths, seed):
        folder = tmp_path_factory.mktemp(family)
        theirs = build(architecture, config, torch.Generator().manual_seed(seed))
        theirs.save_pretrained(folder / "theirs")
        write_float64_tables(theirs)
        inputs = live_inputs(config, lengths, seed)
        real = inputs["attention_mask"].bool()
        want = forward(theirs, inputs, real)
        want["loss"].backward()
        want["hidden_states"] = want["hidden_states"][:: inner_blocks(theirs, want)]
        ours = getattr(fastbert, architecture).from_pretrained(folder / "theirs", dtype=torch.float64).eval()
        got, grads = run(ours, inputs, folder / "grads")
        assert_close(got, want)
        assert_close(grads, {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
        again = reload_in_transformers(type(theirs), ours, folder / "ours")
        want.pop("hidden_states")  # compared above
        assert_close(forward(again, inputs, real), want)

    check()


def inner_blocks(model, outputs):
    """How many hidden states transformers returns per layer: in 5.x one for every inner block of an ALBERT group."""
    return (len(outputs["hidden_states"]) - 1) // model.config.num_hidden_layers


def reload_in_transformers(model_class, model, folder: Path):
    """The transformers model made of what a fastbert model saved; every tensor must be found and none be left over."""
    model.save_pretrained(folder)
    loaded, info = model_class.from_pretrained(folder, output_loading_info=True)  # float32 holds the weights exactly
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    write_float64_tables(loaded.double())
    return loaded.eval()
