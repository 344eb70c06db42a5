"""The update: the same as PyTorch's own pieces make, in float32 and 16 bits, compiled, captured, and in few shapes."""

import copy
import math
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastbert
from fastbert.errors import ConfigError
from fastbert.optim import FusedLAMB, param_groups
from fastbert.train.feed import Buckets, MicroBatch, deal
from fastbert.train.step import LossScale, Rates, TrainStep
from fastbert.train.world import World

pytestmark = pytest.mark.gpu
module = import_module("fastbert.train.step")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WORLD = World(DEVICE)
FAMILIES = ["bert", "roberta", "albert", "nezha", "electra", "roformer"]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=90)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
CAPTURED = [False, pytest.param(True, marks=pytest.mark.skipif(not CUDA, reason="no GPU"))]
RATES = [1e-3, 2e-3, 1.5e-3]


def rate(step):
    return RATES[min(step, 2)]


def tiny(family="bert", dropout=False, **changes):
    torch.manual_seed(0)
    changes = SIZES | ({} if dropout else NO_DROPOUT) | changes
    config = fastbert.EncoderConfig(family, **changes)
    model = fastbert.model_class(family, "masked_lm")(config)
    return model.to(DEVICE).train()


def batch_of(lengths, seed=0, device=None):
    """A packed batch of random words with labels on a sixth of them, at least one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    ids = torch.randint(5, 90, (tokens,), generator=generator)
    places = torch.randperm(tokens, generator=generator)[: max(1, tokens // 6)].sort().values
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    inputs = {"input_ids": ids, "cu_seqlens": ends, "labels": ids[places].clone(), "label_positions": places}
    return MicroBatch({n: t.to(device or "cpu") for n, t in inputs.items()}, max(lengths), len(places), tokens)


UPDATES = [[batch_of([7, 16, 5], 1), batch_of([12, 12], 2)], [batch_of([16, 3], 3), batch_of([9], 4)]]


def adamw(model):
    return torch.optim.AdamW(param_groups(model, 0.1), fused=True, capturable=CUDA)


def lamb(model):
    return FusedLAMB(param_groups(model, 0.1), max_grad_norm=0.5)


def run(updates, model, optimizer=adamw, **options):
    """The step after the updates, and the gradients' norm of each."""
    step = TrainStep(model, optimizer(model), rate, world=WORLD, **options)
    return step, drive(step, updates)


def drive(step, updates):
    norms = []
    for update in updates:
        labels = sum(batch.labels for batch in update)
        for index, batch in enumerate(update):
            step.accumulate(batch, labels, seed=index)
        step.apply()
        norms.append(step.progress.grad_norm.item())
    return norms


def plain(updates, model, optimizer, clip):
    """The same of PyTorch's own pieces: one loss over all labels of the update, clip_grad_norm_, step."""
    norms = []
    for rate, update in zip(RATES, updates, strict=False):
        labels = sum(batch.labels for batch in update)
        for batch in update:
            inputs = {name: t.to(DEVICE) for name, t in batch.inputs.items()}
            loss = model(**inputs, max_seqlen=batch.max_seqlen).loss
            (loss * batch.labels / labels).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return norms


def assert_same(model, other, atol, rtol=0.0):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")


# -- against PyTorch's own pieces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", CAPTURED)
@pytest.mark.parametrize(("optimizer", "clip"), [(adamw, 0.5), (adamw, 0.0), (lamb, 0.5)])
def test_updates_are_those_of_plain_pytorch(optimizer, clip, captured):
    model, other = tiny(), tiny()
    step, norms = run([*UPDATES, *UPDATES[:1]], model, optimizer, clip=clip, graphs=captured)
    # FusedLAMB clips by itself
    expected = plain([*UPDATES, *UPDATES[:1]], other, optimizer(other), clip if optimizer is adamw else 0.0)
    assert norms == pytest.approx(expected, rel=1e-4) and norms[0] > 0.5
    assert_same(model, other, atol=2e-5)
    assert step.look() == 3 and step.gradients.buffer.count_nonzero() == 0


@pytest.mark.parametrize("family", ["bert", "albert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", [adamw, lamb])
def test_sixteen_bits_stay_close_and_the_working_copy_is_the_weights_rounded(optimizer, dtype, family):
    changes = {"embedding_size": 16} if family == "albert" else {}
    model, other = tiny(family, **changes), tiny(family, **changes)
    step, norms = run(UPDATES, model, optimizer, clip=0.5, dtype=dtype)
    expected = plain(UPDATES, other, optimizer(other), 0.5 if optimizer is adamw else 0.0)
    assert norms == pytest.approx(expected, rel=0.03)
    assert step.working is not model
    for p, copied in zip(model.parameters(), step.working.parameters(), strict=True):
        assert p.dtype == torch.float32 and copied.dtype == dtype
        assert torch.equal(p.to(dtype), copied)
        assert p.grad.dtype == torch.float32 and copied.grad is None
    moved = [(p - q).norm() for p, q in zip(model.parameters(), tiny(family, **changes).parameters(), strict=True)]
    apart = [(p - q).norm() for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    assert torch.stack(apart).norm() < 0.2 * torch.stack(moved).norm()


def test_gradients_are_summed_in_float32():
    """A thousand small micro-batches onto a large one: in 16 bits the sum would stand still."""
    model = tiny()
    step = TrainStep(model, adamw(model), rate, world=WORLD, dtype=torch.bfloat16)
    large, small = batch_of([16, 16], 1), batch_of([4], 2)
    step.accumulate(large, large.labels, 0)
    first = step.gradients.buffer.clone()
    step.accumulate(small, 300, 0)
    once = step.gradients.buffer - first
    for _ in range(49):
        step.accumulate(small, 300, 0)
    torch.testing.assert_close(step.gradients.buffer - first, 50 * once, rtol=1e-3, atol=1e-4 * once.abs().max().item())


def test_a_weight_without_a_gradient_has_a_gradient_of_zero():
    """Not that of the update before. A second micro-batch may bring one."""
    model = tiny()
    step = TrainStep(model, adamw(model), rate, world=WORLD, dtype=torch.bfloat16)
    batch, number = batch_of([9, 7]), [name for name, _ in model.named_parameters()].index("head.bias")
    for frozen in ((False, False), (True, True), (True, False), (False, True)):
        for index in frozen:
            step.working.head.bias.requires_grad_(not index)
            step.accumulate(batch, 2 * batch.labels, seed=0)
        step.gradients.complete()
        found, sums = step.gradients.parts[number], 2 - sum(frozen)
        assert bool(found.any()) == (sums > 0) and model.model.embeddings.word.weight.grad.any()
        if frozen == (False, False):
            whole = found.clone()
        torch.testing.assert_close(found, whole * (sums / 2), rtol=0.02, atol=1e-4)
        step.gradients.begin()


def test_the_loss_is_the_mean_over_all_labels():
    model = tiny()
    step, _ = run(UPDATES[:1], model)
    fresh = tiny()
    expected = 0.0
    for batch in UPDATES[0]:
        inputs = {name: t.to(DEVICE) for name, t in batch.inputs.items()}
        expected += fresh(**inputs, max_seqlen=batch.max_seqlen).loss.item() * batch.labels
    assert step.progress.losses.item() == pytest.approx(expected, rel=1e-5)


# -- the loss scale --------------------------------------------------------------------------------------------------


def test_the_loss_scale_halves_and_doubles():
    scale, seen = LossScale(DEVICE, first=8.0, interval=3), []
    for finite in (1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1):
        scale.update(torch.tensor(bool(finite), device=DEVICE))
        seen.append(scale.scale.item())
    assert seen == [8, 8, 16, 8, 8, 8, 4, 4, 4, 8, 8]
    other = LossScale(DEVICE)
    other.load(scale.state())
    assert other.state() == {"scale": 8.0, "good": 1}


@pytest.mark.parametrize("captured", CAPTURED)
@pytest.mark.parametrize("optimizer", [adamw, lamb])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_changes_nothing_but_the_scale(optimizer, bad, captured):
    model = tiny()
    step, _ = run(UPDATES[:1], model, optimizer, dtype=torch.float16, clip=0.5, graphs=captured)
    before = copy.deepcopy(model), copy.deepcopy(optimizer_state(step)), step.loss_scale.scale.item()
    before_rate = step.rates.rate.clone()
    step.accumulate(UPDATES[0][0], 10, seed=0)
    step.gradients.buffer[3] = bad
    step.apply()
    assert_same(model, before[0], atol=0)
    assert all(torch.equal(t, u) for t, u in zip(optimizer_state(step), before[1], strict=True))
    assert step.loss_scale.scale.item() == before[2] / 2 and torch.equal(step.rates.rate, before_rate)
    assert step.look() == 1 and step.progress.tried.item() == 2
    assert step.progress.first_bad.item() == math.inf  # an overflow is what the scale is for


def optimizer_state(step):
    return [t for state in step.optimizer.state.values() for t in state.values()]


@pytest.mark.parametrize("optimizer", [adamw, lamb])
def test_without_a_scale_the_first_bad_update_is_known(optimizer):
    model = tiny()
    step, _ = run(UPDATES, model, optimizer)
    for value in (math.nan, 1.0, math.inf):
        step.accumulate(UPDATES[0][0], 10, seed=0)
        step.gradients.buffer[3] = value
        step.apply()
    assert step.progress.first_bad.item() == 2 and all(p.isfinite().all() for p in model.parameters())


def test_the_rate_follows_what_was_made_beyond_its_table(monkeypatch):
    monkeypatch.setattr(module, "_AHEAD", 4)
    asked = []
    rates = Rates(lambda step: asked.append(step) or step / 64, DEVICE)
    made, seen = torch.zeros(1, dtype=torch.int64, device=DEVICE), []
    for finite in [1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]:
        rates.reach(made)
        seen.append((rates.rate * 64).item())
        made += finite
        rates.follow(made)
    assert seen == [0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 5, 6, 7]
    assert max(asked) < 8 + 4  # and nothing far ahead, however long a run is to be


def test_frozen_weights_stay_and_have_no_gradient():
    for dtype in (None, torch.bfloat16):
        model = tiny()
        frozen = model.model.embeddings.requires_grad_(False)
        before = [p.clone() for p in frozen.parameters()]
        run(UPDATES, model, dtype=dtype)
        assert all(torch.equal(p, q) and p.grad is None for p, q in zip(frozen.parameters(), before, strict=True))
        assert not torch.equal(model.head.dense.weight, tiny().head.dense.weight)
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        TrainStep(model.requires_grad_(False), None, rate, world=WORLD)


def test_restored_in_another_precision_the_loss_scale_begins_anew():
    model = tiny()
    step = TrainStep(model, adamw(model), rate, world=WORLD, dtype=torch.float16)
    step.restore(2, 3, None)
    assert step.look() == 2 and step.loss_scale.scale == 2.0**16 and step.rates.rate.item() == pytest.approx(1.5e-3)


def test_the_norm_of_many_gradients_is_right():
    """A float32 sum over all of them, one after another, would be off by a percent."""
    model = tiny(vocab_size=200_000)
    step = TrainStep(model, adamw(model), rate, world=WORLD)
    step.gradients.buffer.fill_(1e-3)
    step.apply()
    count = sum(p.numel() for p in model.parameters())
    assert step.progress.grad_norm.item() == pytest.approx(1e-3 * math.sqrt(count), rel=1e-4)


def test_a_batch_without_labels_adds_nothing():
    model = tiny()
    step = TrainStep(model, adamw(model), rate, world=WORLD)
    batch = batch_of([5, 4])
    none = {name: batch.inputs[name][:0] for name in ("labels", "label_positions")}
    step.accumulate(batch._replace(inputs=batch.inputs | none, labels=0), 0, seed=0)
    assert step.progress.losses == 0 and not step.gradients.buffer.any()


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_graphs_need_a_gpu():
    model = tiny()
    with pytest.raises(ConfigError, match="graphs is set, but the device is cpu"):
        TrainStep(model, adamw(model), rate, world=WORLD, graphs=True)


# -- few shapes ------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(3, 24), min_size=1, max_size=6),
    spare=st.integers(0, 2),
    scale=st.sampled_from([1, 40]),
)
def test_buckets_have_few_shapes(lengths, spare, scale):
    lengths = [scale * n for n in lengths]
    buckets = Buckets(len(lengths) + spare, 24 * scale, 1 / 6, pad_id=0)
    batch = batch_of(lengths)
    batch.inputs["token_type_ids"] = torch.ones_like(batch.inputs["input_ids"])
    filled = buckets.fill(batch)
    types = filled.inputs.pop("token_type_ids")
    assert types.sum() == batch.tokens and types.shape == filled.inputs["input_ids"].shape
    tokens, most = len(filled.inputs["input_ids"]), buckets.batch_size * buckets.max_length
    assert tokens % buckets.granule == 0 and batch.tokens <= tokens < batch.tokens + buckets.granule
    assert -(-most // buckets.granule) <= 32 or buckets.granule == 64
    others = [buckets.fill(batch_of(lengths[:-1] + [n], seed=1)) for n in (3, lengths[-1], 24 * scale)]
    shapes = [{name: t.shape for name, t in each.inputs.items()} for each in (filled, *others)]
    assert all(each == shapes[0] for each in shapes if each["input_ids"] == shapes[0]["input_ids"])
    ends = filled.inputs["cu_seqlens"]
    assert ends[0] == 0 and ends[-1] == tokens and ends.diff().min() >= 0 and ends.diff().max() <= buckets.max_length
    assert torch.equal(ends[: len(lengths) + 1], batch.inputs["cu_seqlens"]) and filled.max_seqlen == buckets.max_length
    assert (filled.inputs["labels"] != -100).sum() == batch.labels
    assert (filled.inputs["input_ids"][batch.tokens :] == 0).all()
    assert filled[2:] == batch[2:]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fills_up_adds_nothing(family):
    changes = {"embedding_size": 16} if family in ("albert", "electra") else {}
    found = []
    for fill in (False, True):
        model = tiny(family, **changes)
        step = TrainStep(model, adamw(model), rate, world=WORLD)
        buckets = Buckets(4, 24, 1 / 6, pad_id=model.config.pad_token_id)
        batch = buckets.fill(UPDATES[0][0]) if fill else UPDATES[0][0]
        step.accumulate(batch, 10, seed=0)
        found.append((step.progress.losses.item(), step.gradients.buffer, batch))
    assert len(found[1][2].inputs["input_ids"]) > found[0][2].tokens
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "dtype"), [*((f, None) for f in FAMILIES), ("albert", torch.bfloat16)])
def test_compiled_without_a_graph_break_is_the_same(family, dtype, monkeypatch):
    """On a CPU without the compiler behind the graph, which takes minutes for all; that is the next test."""
    if not CUDA:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    changes = {"embedding_size": 16} if family in ("albert", "electra") else {}
    same_when_compiled(family, dtype, **changes)


def test_compiled_to_the_end_is_the_same():
    same_when_compiled("bert", None, num_hidden_layers=1)


def same_when_compiled(family, dtype, **changes):
    torch.compiler.reset()
    buckets = Buckets(3, 16, 1 / 6, pad_id=1)
    updates = [[buckets.fill(batch) for batch in update] for update in UPDATES]
    model, other = tiny(family, **changes), tiny(family, **changes)
    run(updates, model, compile=True, clip=0.5, dtype=dtype)
    run(updates, other, clip=0.5, dtype=dtype)
    assert_same(model, other, atol=1e-5 if dtype is None else 1e-3)


class Again:
    """What a CUDA graph does, without a GPU: the same function on the same memory, and what it returned at first."""

    def __init__(self, _device):
        self.kept, self.replayed = {}, 0

    def run(self, key, function, inputs):
        if key not in self.kept:
            self.kept[key] = {name: t.clone() for name, t in inputs.items()}, function(inputs)
            return self.kept[key][1]
        self.replayed += 1
        given, result = self.kept[key]
        for name, t in inputs.items():
            given[name].copy_(t)
        function(given)
        return result


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replaying_the_same_memory_is_the_same(dtype):
    """With dropout: what is random is drawn anew from each seed."""
    buckets = Buckets(3, 16, 1 / 6, pad_id=0)
    updates = [[buckets.fill(batch) for batch in update] for update in UPDATES * 2]
    model, other = tiny(dropout=True), tiny(dropout=True)
    step = TrainStep(model, adamw(model), rate, world=WORLD, dtype=dtype)
    step._graphs = Again(DEVICE)
    drive(step, updates)
    run(updates, other, dtype=dtype)
    assert_same(model, other, atol=0)
    assert step._graphs.replayed > 4


@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", [adamw, lamb])
def test_captured_is_the_same(family, dtype, optimizer):
    changes = {"embedding_size": 16} if family in ("albert", "electra") else {}
    buckets = Buckets(3, 16, 1 / 6, pad_id=1)
    updates = [[buckets.fill(batch) for batch in update] for update in UPDATES * 3]
    model, other = (tiny(family, dropout=True, **changes) for _ in range(2))
    run(updates, model, optimizer, graphs=True, dtype=dtype)
    run(updates, other, optimizer, dtype=dtype)
    assert_same(model, other, atol=0)


@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("optimizer", [adamw, lamb])
def test_nothing_waits_for_the_device(optimizer, captured):
    buckets = Buckets(3, 16, 1 / 6, pad_id=1)
    batches = [buckets.fill(batch) for update in UPDATES for batch in update]
    batches = [batch._replace(inputs={n: t.pin_memory() for n, t in batch.inputs.items()}) for batch in batches]
    model = tiny(dropout=True)
    step = TrainStep(model, optimizer(model), rate, world=WORLD, dtype=torch.float16, clip=1.0, graphs=captured)
    for repeated in range(3):
        torch.cuda.set_sync_debug_mode("error" if repeated else "default")
        try:
            for batch in batches:
                step.accumulate(batch, 20, seed=repeated)
            step.apply()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step.look() == 3


# -- dealing ---------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 512), min_size=1, max_size=40), hands=st.integers(1, 8))
def test_dealing_gives_all_once_and_evenly(lengths, hands):
    lengths = np.array((lengths * hands)[: len(lengths) // hands * hands or hands])
    dealt = deal(lengths, hands)
    assert dealt.shape == (hands, len(lengths) // hands) and sorted(dealt.ravel()) == list(range(len(lengths)))
    held = lengths[dealt]
    assert (np.diff(held, axis=1) <= 0).all()
    assert np.ptp(held.sum(axis=1)) <= lengths.max() - lengths.min()
