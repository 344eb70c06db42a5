"""fastbert.hf.accelerate: live models of transformers, before and after, and beside PEFT, Trainer and pipelines."""

import contextlib
import copy
import inspect
import io
import warnings

import pytest
import torch
from make_goldens import write_float64_tables
from torch import nn
from torch.func import functional_call

import fastbert
from fastbert.errors import ConfigError
from fastbert.hf import accelerate, restore
from fastbert.nn import EncoderLayer
from fastbert.testing import compare

transformers = pytest.importorskip("transformers")
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Albert", "Electra", "RoFormer", "Nezha")
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
LENGTHS = (9, 6, 3)


def build(family, head="ForMaskedLM", **changes):
    """A small model with weights of a size at which something happens, in evaluation mode."""
    kind = getattr(transformers, family + head, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}{head}")
    sizes = dict(
        vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0,
        initializer_range=0.2, pad_token_id=1 if "oberta" in family or family == "Camembert" else 0,
    )  # fmt: skip
    if family in ("Albert", "Electra", "RoFormer"):
        sizes["embedding_size"] = 16
    if family == "Albert":
        sizes |= dict(num_hidden_layers=5, num_hidden_groups=2, inner_group_num=2, classifier_dropout_prob=0.0)
        sizes["hidden_act"] = "gelu_new"
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(model, lengths=LENGTHS):
    """A padded batch, with the padding id at a real place, too."""
    length, pad = max(lengths), model.config.pad_token_id
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 90, mask.shape, generator=torch.Generator().manual_seed(1)).where(mask.bool(), pad)
    ids[0, 2] = pad
    return {"input_ids": ids, "attention_mask": mask}


def accelerated(model, **options):
    other = copy.deepcopy(model)
    accelerate(other, **options)
    return other


def encoder_of(model):
    return getattr(model, model.base_model_prefix, model)


def results(model, inputs, everywhere=False):
    """Outputs, those of tokens at real places unless everywhere, and gradients for random output gradients."""
    model.zero_grad()
    found = model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    outputs = {**found, "hidden_states": torch.stack(found["hidden_states"]).movedim(0, -1)}
    if not everywhere:
        outputs = {name: t[real] if t.shape[:2] == real.shape else t for name, t in outputs.items()}
    generator = torch.Generator().manual_seed(2)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in outputs.values())
    loss.backward()
    zero = torch.zeros(())
    gradients = {f"grad {n}": zero if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {**outputs, **gradients}


def assert_close(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        bound = tolerance * max(1.0, want.abs().max().item())
        error = (found[name] - want).abs().max().item()
        assert error <= bound, f"{name}: error {error:.1e}, bound {bound:.1e}"


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not accelerated.*")
        yield


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_in_float64(family, head):
    model = build(family, head).double()
    write_float64_tables(model)
    other = accelerated(model)
    padded = batch(model)
    full = {"input_ids": padded["input_ids"], "attention_mask": torch.ones_like(padded["attention_mask"])}
    with no_warning():
        for inputs in (padded, full, {**padded, "token_type_ids": 1 - padded["attention_mask"].roll(2, 1)}):
            everywhere = head == "ForQuestionAnswering"  # its softmax is over padding, too
            assert_close(results(other, inputs, everywhere), results(model, inputs, everywhere))
        first, second = (m(**padded) for m in (model, other))
        assert type(second) is type(first) and list(second) == list(first)


def test_albert_picks_its_groups_by_the_formula_of_transformers():
    """In floating point: of 18 layers in 14 groups some are others than in integers."""
    model = build("Albert", "Model", num_hidden_layers=18, num_hidden_groups=14, inner_group_num=1).double()
    assert [int(i / (18 / 14)) for i in range(18)] != [i * 14 // 18 for i in range(18)]
    assert_close(results(accelerated(model), batch(model)), results(model, batch(model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_by_the_tolerance_rule(family, dtype):
    model = build(family, "Model").to(dtype)
    other, inputs = accelerated(model), batch(model)
    real = inputs["attention_mask"].bool()

    def runs(module):
        def run(**parameters):
            found = functional_call(module, parameters, kwargs=inputs)
            return found.last_hidden_state[real], *([] if found.get("pooler_output") is None else [found[1]])

        return run

    with no_warning():
        compare(runs(other), runs(model), dict(model.named_parameters()))


@pytest.mark.parametrize("family", ["Bert", "Albert", "RoFormer"])
def test_dropout_has_transformers_distribution(family):
    """2048 draws at once: mean and deviation of every number. Of ALBERT nothing is dropped after the feed-forward."""
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "num_hidden_layers": 2}
    model = build(family, "Model", **rates).train()
    draws = 2048
    inputs = {name: t[:1].expand(draws, -1) for name, t in batch(model, (4,)).items()}
    inputs["input_ids"] = inputs["input_ids"].clone()
    with torch.no_grad(), no_warning():
        theirs, ours = (m(**inputs).last_hidden_state for m in (model, accelerated(model)))
    error = ((theirs.var(0) + ours.var(0)) / draws).sqrt()
    assert ((theirs.mean(0) - ours.mean(0)).abs() < 5 * error).all()
    assert ((theirs.std(0) / ours.std(0)).log().mean()).abs() < 0.02
    assert ours.std(0).min() > 0.01


def test_rates_and_modes_are_those_of_the_live_modules():
    model = accelerated(build("Bert", "Model", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)).train()
    inputs = batch(model)
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    model.encoder.layer[1].output.dropout.p = 0.5
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    assert torch.equal(model.eval()(**inputs)[0], model(**inputs)[0])


def test_results_are_zero_at_padding_unless_somebody_reads_it():
    model = build("Bert", "Model")
    inputs = batch(model)
    padding = inputs["attention_mask"] == 0
    assert (accelerated(model)(**inputs)[0][padding] == 0).all()
    torch.testing.assert_close(accelerated(model, unpad=False)(**inputs)[0], model(**inputs)[0])
    for family in ("Electra", "RoFormer"):  # whose summaries are of the first and of the last token
        model = build(family, "ForMultipleChoice")
        inputs = {name: t[None] for name, t in batch(model).items()}
        torch.testing.assert_close(accelerated(model)(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Albert", "RoFormer"])
def test_masks_of_every_kind(family):
    """Padding before the tokens, masks with holes, masks of other dtypes; everywhere if the first column is padding."""
    model = build(family, "Model").double()
    write_float64_tables(model)
    other, inputs = accelerated(model), batch(model)
    before = {name: t.flip(1) for name, t in inputs.items()}
    holes = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    holes["attention_mask"][0, 3:5] = 0
    with no_warning():
        assert_close(results(other, before, everywhere=True), results(model, before, everywhere=True))
        assert_close(results(other, holes), results(model, holes))
        for dtype in (torch.bool, torch.float32):
            same = {**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}
            assert_close(results(other, same), results(model, inputs))


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_other_arguments_that_are_served(family):
    model = build(family, "Model").double()
    other, inputs = accelerated(model), batch(model)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    embedded["attention_mask"] = inputs["attention_mask"]
    places = torch.arange(9)[None] + 2
    with no_warning():
        assert_close(results(other, embedded), results(model, embedded))
        for ids in (places, places.expand(3, -1).flip(1)):
            assert_close(
                results(other, {**inputs, "position_ids": ids}), results(model, {**inputs, "position_ids": ids})
            )
        theirs, ours = (m(*inputs.values(), return_dict=False, use_cache=True) for m in (model, other))
        assert type(ours) is tuple and len(ours) == len(theirs)
        model.config.output_hidden_states = other.config.output_hidden_states = True
        assert len(other(**inputs).hidden_states) == len(model(**inputs).hidden_states) == 4


# ---------------------------------------------------------------- in place


def test_nothing_but_forward_changes(tmp_path):
    model = build("Bert")
    before = [(name, id(p)) for name, p in model.named_parameters()]
    modules, keys, plain = list(model.modules()), list(model.state_dict()), dict(model.bert.__dict__)
    signature = inspect.signature(model.bert.forward)
    model.save_pretrained(tmp_path / "before")
    report = accelerate(model)
    model(**batch(model))
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert list(model.modules()) == modules and list(model.state_dict()) == keys
    assert inspect.signature(model.bert.forward) == signature
    model.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert report.replaced[0].path == "bert" and [left.path for left in report.left] == ["cls"]
    assert restore(model) == ["bert"] and model.bert.__dict__ == plain


def test_an_optimizer_made_before_trains_the_model():
    model = build("Albert").double()
    inputs, other = batch(model), copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, other)]
    accelerate(other)
    for _ in range(3):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            m(**inputs, labels=inputs["input_ids"].where(inputs["attention_mask"] > 0, -100)).loss.backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-7, atol=1e-8)


def test_copies_serve_themselves():
    model = accelerated(build("Bert"))
    inputs, stream = batch(model), io.BytesIO()
    expected = model(**inputs).logits
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert other.bert.forward.encoder is other.bert
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight.zero_()
        assert torch.equal(other(**inputs).logits, expected)


def test_casts_frozen_weights_and_replaced_modules():
    model = build("Bert", "Model")
    other, inputs = accelerated(model), batch(model)
    for m in (model, other):
        m.embeddings.requires_grad_(False)
        m.encoder.layer[0].requires_grad_(False)
        m.encoder.layer[1].intermediate.dense = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 48))
        m.encoder.layer[2].load_state_dict(m.encoder.layer[0].state_dict())
        m.encoder.layer[2].output.dense.weight = m.encoder.layer[0].output.dense.weight
        for p in m.encoder.layer[1].intermediate.dense.parameters():
            nn.init.constant_(p, 0.05)
        m.double()
    with no_warning():
        assert_close(results(other, inputs), results(model, inputs))
        assert other.embeddings.word_embeddings.weight.grad is None
        model.encoder.layer = nn.ModuleList(list(model.encoder.layer)[:2])
        other.encoder.layer = nn.ModuleList(list(other.encoder.layer)[:2])
        assert_close(results(other, inputs), results(model, inputs))


def test_hooks_of_linear_layers_see_what_they_saw():
    model = build("Electra", "Model").double()
    other, inputs, seen = accelerated(model), batch(model), []
    for m in (model, other):
        for linear in (m.embeddings_project, m.encoder.layer[1].attention.self.query):
            linear.register_forward_hook(lambda module, args, output: seen.append((args[0], output)) or 2 * output)
    for mask in (inputs["attention_mask"], torch.ones(3, 9, dtype=torch.long)):
        seen.clear()
        with no_warning():
            assert_close(*(results(m, {**inputs, "attention_mask": mask}) for m in (other, model)))
        for one, two in zip(seen[:2], seen[2:], strict=True):
            for a, b in zip(one, two, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_hooks_of_embeddings_and_gradient_checkpointing():
    """As PEFT has it: embeddings that require gradients by a hook, weights frozen, layers computed again."""
    model = build("Bert").double().train()
    other, inputs, counted = accelerated(model), batch(model), []
    plain = results(model, inputs)
    with no_warning():
        assert_close(results(other, inputs), plain)
        other.gradient_checkpointing_enable()
        other.enable_input_require_grads()
        forward = EncoderLayer.forward
        EncoderLayer.forward = lambda *args, **kwargs: counted.append(1) or forward(*args, **kwargs)
        try:
            assert_close(results(other, inputs), plain)
        finally:
            EncoderLayer.forward = forward
    assert len(counted) == 6


def test_autocast_and_compile():
    model = build("Bert", "ForSequenceClassification", num_hidden_layers=1)
    other, inputs = accelerated(model), batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (m(**inputs).logits for m in (model, other))
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)
    compiled = torch.compile(other, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    shorter = {name: t[:2, :6] for name, t in inputs.items()}
    torch.testing.assert_close(compiled(**shorter).logits, model(**shorter).logits)


def test_distributed_data_parallel(tmp_path):
    model = build("Albert", "ForSequenceClassification")
    inputs = {**batch(model), "labels": torch.tensor([0, 1, 1])}
    model(**inputs).loss.backward()
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        assert accelerate(wrapped).replaced[0].path == "module.albert"
        wrapped.zero_grad()
        with no_warning():
            wrapped(**inputs).loss.backward()
        for p, q in zip(model.parameters(), wrapped.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            torch.testing.assert_close(q.grad, p.grad)
        assert restore(wrapped) == ["module.albert"]
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- beside PEFT, Trainer, pipelines


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "dense", "word_embeddings"]])
def test_adapters_before_and_after(targets):
    peft = pytest.importorskip("peft")
    model = build("Bert", "ForSequenceClassification").double()
    inputs, found = batch(model), []

    def adapted(base):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"], init_lora_weights=False)
        return peft.get_peft_model(base, config).double()

    before, after = adapted(accelerated(model)), adapted(copy.deepcopy(model))
    accelerate(after)
    with no_warning():
        for m in (adapted(copy.deepcopy(model)), before, after):
            m.zero_grad()
            m(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
            found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert any("lora_A" in name for name in found[0])
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    after.merge_and_unload()
    assert restore(after) == ["base_model.model.bert"]


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = build("Bert", "ForSequenceClassification")
    rows = [{"input_ids": batch(model, (n, 9))["input_ids"][0, :n].tolist(), "labels": n % 2} for n in range(2, 10)]

    def collate(rows):
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        return {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}

    losses = []
    for m in (copy.deepcopy(model), accelerated(model)):
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, max_steps=20, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=1,
        )  # fmt: skip
        trainer = transformers.Trainer(m, arguments, train_dataset=rows, data_collator=collate)
        with no_warning():
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 20 and losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", ["fill-mask", "text-classification", "feature-extraction"])
def test_pipelines(task, tmp_path):
    heads = {"fill-mask": "ForMaskedLM", "text-classification": "ForSequenceClassification"}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(85))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    texts = ["w5 w6 [MASK] w7", "[MASK] w9"] if task == "fill-mask" else ["w5 w6 w7 w8", "w9"]
    model = build("Bert", heads.get(task, "Model"))
    with no_warning():
        theirs, ours = (
            transformers.pipeline(task, model=m, tokenizer=tokenizer, device="cpu")(texts, batch_size=2)
            for m in (model, accelerated(model))
        )
    if task == "feature-extraction":
        for one, two, length in zip(theirs, ours, (6, 3), strict=True):
            torch.testing.assert_close(torch.tensor(two)[0, :length], torch.tensor(one)[0, :length])
        return
    flat = [[x for part in found for x in (part if isinstance(part, list) else [part])] for found in (theirs, ours)]
    assert flat[0] and len(flat[0]) == len(flat[1])
    for one, two in zip(*flat, strict=True):
        assert one.pop("score") == pytest.approx(two.pop("score"), rel=1e-4)
        assert one == two


# ---------------------------------------------------------------- what is left to transformers


def hooked(model):
    encoder_of(model).encoder.layer[0].register_forward_hook(lambda *_: None)


def patched(model):
    output = encoder_of(model).encoder.layer[1].output
    output.forward = output.forward


def foreign(model):
    layer = encoder_of(model).encoder.layer[1]
    layer.__class__ = type("OtherLayer", (type(layer),), {"__module__": "elsewhere"})


def other_norm(model):
    encoder_of(model).encoder.layer[0].output.LayerNorm = nn.RMSNorm(32)


def attentions(model):
    model.config.output_attentions = True


def own_attention(model):
    transformers.AttentionInterface.register("mine", transformers.AttentionInterface()["sdpa"])
    model.set_attn_implementation("mine")


def patched_chunk(model):
    layer = encoder_of(model).encoder.layer[1]
    layer.feed_forward_chunk = layer.feed_forward_chunk


def other_scaling(model):
    attention = encoder_of(model).encoder.layer[1].attention.self
    if not hasattr(attention, "scaling"):
        pytest.skip("this version of transformers computes the scaling in place")
    attention.scaling = 0.1


def some_checkpointed(model):
    layers = encoder_of(model).encoder.layer
    if not hasattr(layers[0], "gradient_checkpointing"):
        pytest.skip("this version of transformers checkpoints all layers or none")
    layers[1].gradient_checkpointing = True


MASK_4D = torch.ones(3, 1, 9, 9).tril()
FALLBACKS = {
    "output_attentions was given": (None, {"output_attentions": True}),
    "config has output_attentions": (attentions, {}),
    "attention_mask has the shape": (None, {"attention_mask": (1 - MASK_4D) * -1e9}),
    "encoder_hidden_states was given": (None, {"encoder_hidden_states": torch.randn(3, 2, 32)}),
    "a sequence has no token": (None, {"attention_mask": torch.arange(9).lt(torch.tensor([[9], [0], [4]])).long()}),
    "BertLayer in it is hooked": (hooked, {}),
    "BertOutput in it is hooked, patched": (patched, {}),
    "BertLayer in it is hooked, patched or wrapped": (foreign, {}),
    "BertLayer in it is hooked, patched": (patched_chunk, {}),
    "scaling = 0.1": (other_scaling, {}),
    "some of its layers are checkpointed": (some_checkpointed, {}),
    "its attention is 'mine'": (own_attention, {}),
    "RMSNorm is in the place": (other_norm, {}),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_is_not_served_runs_as_before_and_says_so_once(reason):
    change, more = FALLBACKS[reason]
    model = build("Bert", attn_implementation="eager")
    other = accelerated(model)
    for m in (model, other):
        torch.manual_seed(0)
        if change is not None:
            change(m)
    inputs = {**batch(model), **more}
    with pytest.warns(UserWarning, match=f"BertModel runs as transformers runs it, not accelerated: .*{reason}"):
        found = other(**inputs)
    expected = model(**inputs)
    assert torch.equal(found.logits, expected.logits) and list(found) == list(expected)
    with no_warning():
        assert torch.equal(other(**inputs).logits, expected.logits)
        if change is None:  # what transformers has set up for it is not in the way of others
            other(**batch(model))


def test_too_long_a_sequence_is_transformers_error():
    model = accelerated(build("Bert", "Model"))
    with pytest.warns(UserWarning, match="longer than 24"), pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, 30, dtype=torch.long))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Bert", {"is_decoder": True}, "is_decoder = True"),
        ("Bert", {"hidden_act": "mish"}, "'mish' is unknown"),
        ("Bert", {"chunk_size_feed_forward": 2}, "chunk_size_feed_forward"),
        ("DistilBert", {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48}, "DistilBertModel"),
    ],
)
def test_what_cannot_be_accelerated_is_an_error_that_says_what_was_seen(family, changes, reason):
    model = build(family, "Model", **changes)
    with pytest.raises(ConfigError, match=reason):
        accelerate(model)
    assert "forward" not in model.__dict__
    with pytest.raises(ConfigError, match="nothing in it is accelerated"):
        restore(model)


def test_a_table_of_other_angles_is_noticed():
    model = build("RoFormer", "Model")
    model.encoder.embed_positions.weight.data.mul_(1.1)
    with pytest.raises(ConfigError, match="sinusoids"):
        accelerate(model)


def test_a_table_without_values_is_not_looked_at():
    assert accelerate(build("RoFormer", "Model").to("meta")).replaced


def test_modules_that_nobody_knows_get_padding():
    class Longest(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = build("Bert", "Model")

        def forward(self, **inputs):
            return self.encoder(**inputs).last_hidden_state.max(1).values

    model = Longest()
    inputs = batch(model.encoder)
    expected = model(**inputs)
    assert "unpad=True" in str(accelerate(model))
    torch.testing.assert_close(model(**inputs), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_that_of_transformers(strict):
    model = build("Bert", "Model", attn_implementation="eager")
    inputs = tuple(batch(model).values())
    expected = model(*inputs).last_hidden_state
    accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, inputs, strict=strict).module()
    torch.testing.assert_close(exported(*inputs).last_hidden_state, expected)


def test_gradients_of_an_ensemble_by_vmap():
    model = build("Bert", "Model").double()
    ids, found = torch.randint(3, 90, (3, 9)), []
    for m in (model, accelerated(model)):
        parameters = {name: torch.stack([p, 0.9 * p]).detach() for name, p in m.named_parameters()}

        def loss(parameters, m=m):
            return functional_call(m, parameters, (ids,)).last_hidden_state.pow(3).sum()

        found.append(torch.func.vmap(torch.func.grad(loss))(parameters))
    assert_close(*found)


def test_the_report_and_the_second_time():
    pair = nn.ModuleDict({"one": build("Bert"), "two": build("Bert", "Model", hidden_act="mish")})
    said = str(accelerate(pair))
    assert "one.bert: BertModel, 3 layers, without padding" in said and "'mish'" in said
    assert "attention torch" in said and "one.cls: BertOnlyMLMHead" in said
    forward = pair.one.bert.forward
    again = accelerate(pair, unpad=False)
    assert pair.one.bert.forward is forward and not forward.unpad
    assert again.replaced[0].again and "accelerated already" in str(again)
    report = accelerate(build("Albert"))
    assert report.replaced[0].layers == 10


@pytest.mark.parametrize("function", [accelerate, restore])
def test_what_is_no_module(function):
    with pytest.raises(ConfigError, match="got dict, expected a torch module"):
        function({})


def test_a_forward_that_was_wrapped_is_not_touched():
    model = build("Bert", "Model")
    accelerate(model)
    ours, model.forward = model.forward, lambda *args, **kwargs: None
    with pytest.raises(ConfigError, match="the forward of the model was wrapped since"):
        restore(model)
    with pytest.raises(ConfigError, match="its forward was replaced already"):
        accelerate(model)
    model.forward = ours
    assert restore(model) == [""]


def test_it_is_a_part_of_fastbert():
    assert fastbert.hf.accelerate is accelerate
