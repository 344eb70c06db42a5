"""compile_for_latency: the model's own answers, in buckets as on a GPU (without one their graphs are calls), whatever
came before; and what it refuses."""

import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import FAMILIES, batch, build, pack

import fastbert
from fastbert import latency, ops
from fastbert.errors import ConfigError, DataError, DtypeError, ShapeError

pytestmark = pytest.mark.gpu
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def compiled(model, *, buckets=True, **options):
    """Compiled for at most 4 sequences of 12 tokens; with the buckets of a GPU, where there is none."""
    made = fastbert.compile_for_latency(model, **{"max_batch": 4, "max_length": 12} | options)
    made._in_buckets = buckets
    return made


def assert_same(got, want, **tolerances):
    assert type(got) is type(want) and got.keys() == want.keys()
    for name in want.keys():
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerances)


TASKS = [*((family, "model") for family in FAMILIES), ("albert", "masked_lm"), ("electra", "pretraining")]
TASKS += [("bert", "sequence_classification"), ("roberta", "token_classification"), ("nezha", "question_answering")]


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("family, task", TASKS)
@settings(max_examples=4)
@given(
    calls=st.lists(
        st.tuples(
            st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
            st.sampled_from(["equal", "mask", "packed", "left", "hole"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
def test_answers_are_the_models(buckets, family, task, calls, seed):
    model = build(family, task, seed=seed).eval().to(DEVICE)
    fast, kept = compiled(model, buckets=buckets), []
    for number, (lengths, form, typed) in enumerate(calls):
        ids, mask, _ = (t.to(DEVICE) for t in batch(lengths, seed + number))
        arguments = {"input_ids": ids}
        if form == "packed":
            packed, ends, longest = pack(ids, mask)
            arguments = {"input_ids": packed, "cu_seqlens": ends, "max_seqlen": longest}
        elif form == "mask":
            arguments["attention_mask"] = mask.long()
        elif form == "left":
            arguments["attention_mask"] = mask.flip(1)
        elif form == "hole":
            arguments["attention_mask"] = mask & (torch.arange(ids.shape[1], device=DEVICE) != 2)
        if typed:
            arguments["token_type_ids"] = arguments["input_ids"] % model.config.type_vocab_size
        with torch.no_grad():
            kept.append((fast(**arguments), model(**arguments)))
    for got, want in kept:  # also those of the first call, after the last
        assert_same(got, want)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_positions_of_the_caller(family):
    model = build(family, "model").eval().to(DEVICE)
    fast = compiled(model)
    ids = batch([6, 6])[0].to(DEVICE)
    for positions in (None, torch.arange(6).flip(0) + 3, None, torch.arange(12).view(2, 6)):
        positions = None if positions is None else positions.to(DEVICE)
        with torch.no_grad():
            assert_same(fast(ids, position_ids=positions), model(ids, position_ids=positions))


def test_calls_of_other_shapes_do_not_show():
    """Stale ids, types and lengths of longer calls, in both directions, in one bucket and between buckets."""
    model = build("bert", "model").eval().to(DEVICE)
    fast = compiled(model)
    shapes = [(4, 12), (1, 1), (3, 5), (1, 12), (4, 3), (2, 6), (1, 1), (4, 12)]
    for number, (rows, columns) in enumerate(shapes * 2):
        ids = torch.randint(5, 40, (rows, columns), device=DEVICE)
        types = ids % 2 if number % 3 == 0 else None
        with torch.no_grad():
            assert_same(fast(ids, token_type_ids=types), model(ids, token_type_ids=types))
    assert len(fast._buckets) == 2 and {bucket.size for bucket in fast._buckets.values()} == {16, 48}


def test_sizes_of_graphs():
    sizes = [latency._size(rows, 8) for rows in range(1, 4097)]
    assert all(size >= rows and size % 16 == 0 for rows, size in enumerate(sizes, 1))
    assert all(size < 1.25 * rows + 16 for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 28 and [latency._size(n, 8) for n in (32, 128, 129, 512)] == [32, 128, 160, 512]
    assert latency._size(20, 31) == 48  # 32 rows could not be told from 31 sequences and the rest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_leaves_the_model_alone(dtype):
    model = build("albert", "model").float().eval().to(DEVICE)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = batch([7, 7])[0].to(DEVICE)
    with torch.no_grad():
        got, want = compiled(model, dtype=dtype)(ids), model(ids)
    assert got.last_hidden_state.dtype == got.pooler_output.dtype == dtype
    torch.testing.assert_close(got.last_hidden_state.float(), want.last_hidden_state, rtol=0.1, atol=0.1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("family", ["albert", "roformer"])
def test_weights_that_were_written_to_are_copied_again(family, buckets):
    model = build(family).eval().to(DEVICE)
    fast, other = compiled(model, buckets=buckets), build(family, seed=1)
    ids = batch([7, 7])[0].to(DEVICE)
    first = fast(ids)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert_same(fast(ids), model(ids))
    assert not torch.allclose(fast(ids).logits, first.logits)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert_same(fast(ids), model(ids))


@pytest.mark.parametrize("buckets", [True, False])
def test_refresh_sees_what_leaves_no_trace(buckets):
    """Fused optimizers raise no version; parameters are replaced by load_state_dict(assign=True)."""
    model = build("albert").eval().to(DEVICE)
    fast = compiled(model, buckets=buckets)
    ids = batch([7, 7])[0].to(DEVICE)
    fast(ids)
    model(ids, labels=ids).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    fast.refresh()
    with torch.no_grad():
        assert_same(fast(ids), model(ids))
    model.load_state_dict(build("albert", seed=1).to(DEVICE).state_dict(), assign=True)
    fast.refresh()
    with torch.no_grad():
        assert_same(fast(ids), model(ids))
        next(model.parameters()).mul_(2)  # and the new ones are looked at
        assert_same(fast(ids), model(ids))


def test_a_tensor_that_encoder_and_head_share_is_copied_to_both():
    model = build("bert", "model").eval().to(DEVICE)
    model.pooler.dense.weight = model.encoder.layers[0].attention.output.weight
    fast = compiled(model)
    ids = batch([7, 7])[0].to(DEVICE)
    fast(ids)
    with torch.no_grad():
        model.pooler.dense.weight.mul_(-3)
        assert_same(fast(ids), model(ids))


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("first_inside", [True, False])
def test_calls_within_and_without_inference_mode(buckets, first_inside):
    model = build("roformer").eval().to(DEVICE)
    ids = batch([7, 7])[0].to(DEVICE)
    with torch.no_grad():
        want = model(ids)
    with torch.inference_mode(first_inside):
        fast = compiled(model, buckets=buckets)
        assert_same(fast(ids), want)
    for inside in (False, True, False):
        with torch.inference_mode(inside):
            assert_same(fast(ids.clone()), want)
            next(model.parameters()).mul_(1) if inside else None
            fast.refresh()
    with torch.inference_mode():
        other = build("roformer")
    with pytest.raises(ConfigError, match="model: got one made within torch.inference_mode"):
        fastbert.compile_for_latency(other)


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("family", ["albert", "nezha"])
def test_autocast_around_a_call_has_no_say(buckets, family):
    model = build(family).float().eval().to(DEVICE)
    ids = batch([7, 7])[0].to(DEVICE)
    with torch.no_grad():
        want = model(ids)
    fast = compiled(model, buckets=buckets)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(fast(ids), want, rtol=1e-5, atol=1e-5)


def test_positions_that_follow_the_ids_are_found_in_every_call():
    """RoBERTa counts tokens that are not padding, also where there is no mask."""
    model = build("roberta", "model").eval().to(DEVICE)
    fast, pad = compiled(model), model.config.pad_token_id
    for places in ([], [0, 1], [4], []):
        ids = torch.randint(5, 40, (2, 6), device=DEVICE)
        ids[:, places] = pad
        with torch.no_grad():
            assert_same(fast(ids), model(ids))


def test_layouts_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(latency, "_SHAPES", 3)
    model = build("bert", "model").eval().to(DEVICE)
    fast = compiled(model)
    for shape in [(1, 3), (1, 4), (2, 3), (2, 4), (1, 3), (3, 3)] * 2:
        ids = torch.randint(5, 40, shape, device=DEVICE)
        with torch.no_grad():
            assert_same(fast(ids), model(ids))
        assert len(fast._plain) <= 3


def test_a_model_in_training_mode_is_answered_for_as_in_evaluation():
    model = build("bert", hidden_dropout_prob=0.5).to(DEVICE).train()
    ids = batch([7, 7])[0].to(DEVICE)
    fast = compiled(model)
    got = fast(ids)
    assert model.training and not got.logits.requires_grad
    with torch.no_grad():
        assert_same(got, model.eval()(ids))


def test_ids_may_come_from_the_cpu_and_threads_take_turns():
    model = build("bert", "model").eval().to(DEVICE)
    fast = compiled(model)
    inputs = [torch.randint(5, 40, (1 + n % 4, 1 + n % 12)) for n in range(24)]
    answers = [None] * len(inputs)

    def work(part):
        for number in range(part, len(inputs), 3):
            answers[number] = fast(inputs[number])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for ids, answer in zip(inputs, answers, strict=True):
            assert_same(answer, model(ids.to(DEVICE)))


@pytest.mark.parametrize("buckets", [True, False])
def test_no_tokens(buckets):
    model = build("albert", "model").eval().to(DEVICE)
    fast = compiled(model, buckets=buckets)
    for shape in ((0, 5), (2, 0)):
        ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
        with torch.no_grad():
            assert_same(fast(ids), model(ids))


def test_warm_up_makes_every_size(capsys):
    fast = compiled(build("albert", "model").to(DEVICE))
    fast.warm_up()
    assert sorted(fast._buckets) == sorted({latency._size(n, 4) for n in range(1, 49)})
    assert "capturing graphs" in capsys.readouterr().err
    fast.warm_up(progress=False)
    assert "capturing" not in capsys.readouterr().err


def test_the_longest_follows_from_the_model():
    assert fastbert.compile_for_latency(build("bert")).max_length == 24  # the position table
    assert fastbert.compile_for_latency(build("nezha")).max_length == 512


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize(
    "ids, options, error, message",
    [
        (torch.ones(5, 3, dtype=torch.int64), {}, ShapeError, "5 sequences of up to 3 .* compiled for 4 of up to 12"),
        (torch.ones(2, 13, dtype=torch.int64), {}, ShapeError, "2 sequences of up to 13 tokens"),
        (torch.ones(2, 3), {}, DtypeError, "input_ids: got torch.float32"),
        ([[1, 2]], {}, DtypeError, "input_ids: got a list"),
        (torch.ones(2, 3, dtype=torch.int64), {"attention_mask": torch.ones(3, 3)}, ShapeError, "attention_mask"),
        (torch.ones(2, 3, dtype=torch.int64), {"max_seqlen": 3}, ShapeError, "max_seqlen is 3"),
        (torch.ones(6, dtype=torch.int64), {}, ShapeError, "input_ids has shape"),
    ],
)
def test_bad_calls_are_named_and_harmless(buckets, ids, options, error, message):
    model = build("bert", "model").eval().to(DEVICE)
    fast = compiled(model, buckets=buckets)
    with pytest.raises(error, match=message):
        fast(ids, **options)
    good = batch([3, 3])[0].to(DEVICE)
    with torch.no_grad():
        assert_same(fast(good), model(good))


@pytest.mark.skipif(CUDA, reason="ids are checked on the CPU only")
def test_ids_beyond_the_vocabulary_are_named():
    fast = compiled(build("bert", "model").eval())
    with pytest.raises(DataError, match="input_ids"):
        fast(torch.full((1, 3), 999))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(model=torch.nn.Linear(2, 2)), ConfigError, "model: got a Linear"),
        (dict(max_batch=0), ConfigError, "max_batch: got 0"),
        (dict(max_batch=None), ConfigError, "max_batch: got None"),
        (dict(max_length=25), ConfigError, "max_length: got 25, expected at most 24"),
        (dict(max_length=1.5), ConfigError, "max_length: got 1.5"),
        (dict(dtype=torch.int8), DtypeError, "dtype: got torch.int8"),
        (dict(dtype="float16"), DtypeError, "dtype: got 'float16'"),
    ],
)
def test_bad_settings_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fastbert.compile_for_latency(**{"model": build("bert")} | arguments)


def _hook(model):
    model.encoder.register_forward_hook(lambda *_: None)


def _subclass(model):
    model.encoder.__class__ = type("Other", (fastbert.nn.Encoder,), {})


def _patch(model):
    linear = model.encoder.layers[1].intermediate
    linear.forward = lambda x: torch.nn.Linear.forward(linear, x) * 2


def _no_bias(model):
    model.encoder.layers[1].output.bias = None


def _other_eps(model):
    model.encoder.layers[1].output_norm.eps = 0.1


def _other_radius(model):
    model.encoder.layers[1].attention.max_relative_position = 1


@pytest.mark.parametrize(
    "change, message",
    [
        (_hook, "the encoder is a Encoder that may do more"),
        (_subclass, "the encoder is a Other that may do more than fastbert's Encoder"),
        (_patch, r"layers.1.intermediate is a Linear that may do more"),
        (_no_bias, r"layers.1.output.bias is a NoneType, expected a torch.nn.Parameter"),
        (_other_eps, r"layers.1 has settings .*'eps': \(1e-12, 0.1\).* as layers.0"),
        (_other_radius, r"layers.1 has settings .*'max_relative_position': 1"),
    ],
)
def test_what_would_be_dropped_in_silence_is_refused(change, message):
    model = build("nezha", "model")
    change(model)
    with pytest.raises(ConfigError, match=message):
        fastbert.compile_for_latency(model)


@pytest.mark.parametrize("place", ["attention.query", "output", "attention_norm", "attention", ""])
def test_adapters_and_hooks_are_refused_by_name(place):
    model = build("bert")
    module = model.get_submodule("model.encoder.layers.1" + (place and f".{place}"))
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=rf"layers.1\.?{place} is a .* merge adapters and remove hooks"):
        fastbert.compile_for_latency(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_answer_as_the_model(family, monkeypatch):
    """Every family through the Triton kernels (interpreted without a GPU), in buckets; float32, so that the difference
    is one of order."""
    changes = {} if family != "albert" else {"num_hidden_groups": 2, "inner_group_num": 2}
    model = build(family, "model", **changes).float().eval().to(DEVICE)
    monkeypatch.setattr(ops, "encoder_layers", partial(ops.encoder_layers, backend="triton"))
    fast = compiled(model)
    for shape in ((2, 7), (1, 12)):
        ids = torch.randint(5, 40, shape, device=DEVICE)
        with torch.no_grad():
            assert_same(fast(ids), model(ids), rtol=1e-4, atol=1e-4)
