"""Layers that share weights, in training: the op, and the encoder that uses it. One layer in N applications is N tied
copies whose gradients are summed."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_models import batch, build

import fastbert
from fastbert import ops, portable
from fastbert.errors import ConfigError, DtypeError, ShapeError
from fastbert.nn import Encoder
from fastbert.ops.shared_linear import share, shared_linear
from fastbert.optim import FusedLAMB, main_gradients, param_groups
from fastbert.testing import compare

pytestmark = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
LAYER = "model.encoder.layers.0"


def gradients(model, seed=0, **options):
    """Of every parameter, by name, for one small batch; the loss under "loss"."""
    ids, mask, labels = (t.to(next(model.parameters()).device) for t in batch([7, 5, 2], seed))
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(ids, mask, labels=labels, **options).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def assert_same(got, want, **tolerances):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerances)


def tied_copies(model):
    """The same model with a layer of its own for every application, and which shared layer each is a copy of."""
    config = model.config
    count, inner = config.num_hidden_layers, config.inner_group_num
    unshared = type(model)(fastbert.EncoderConfig(**config.to_dict() | {"num_hidden_groups": count})).to(
        next(model.parameters())
    )
    original = [i * config.num_hidden_groups // count * inner + j for i in range(count) for j in range(inner)]
    state = model.state_dict()
    for number, source in enumerate(original):
        for name in [n for n in state if n.startswith(f"model.encoder.layers.{source}.")]:
            rest = name.removeprefix(f"model.encoder.layers.{source}.")
            unshared.state_dict()[f"model.encoder.layers.{number}.{rest}"].copy_(state[name])
    for name in [n for n in state if ".layers." not in n]:
        unshared.state_dict()[name].copy_(state[name])
    return unshared.train(model.training), original


def summed(found, original, dtype=torch.float64):
    """Gradients of tied copies as those of the layers they are copies of."""
    total = {}
    for name, gradient in found.items():
        if ".layers." in name:
            prefix, _, rest = name.partition(".layers.")
            number, _, rest = rest.partition(".")
            name = f"{prefix}.layers.{original[int(number)]}.{rest}"
        total[name] = total[name] + gradient.to(dtype) if name in total else gradient.to(dtype)
    return total


# ---------------------------------------------------------------- the op


def chained(x, weights, biases, applications, dtype=None):
    """tanh of a shared linear layer, time and again; and the first input times the second weight."""
    (first, second), total = share(dtype or x.dtype, [(weights[:2], biases), (weights[2:], [])])
    extra, total = shared_linear(x, second, total)
    for _ in range(applications):
        x, total = shared_linear(x, first, total)
        x = x.tanh()
    return x, extra


def repeated(x, weights, biases, applications):
    """The same in plain PyTorch."""
    extra = torch.nn.functional.linear(x, weights[2])
    for _ in range(applications):
        x = torch.nn.functional.linear(x, torch.cat(weights[:2]), torch.cat(biases) if biases else None).tanh()
    return x, extra


@pytest.mark.parametrize("device", DEVICES)
@given(
    rows=st.integers(0, 20),
    half=st.integers(1, 9),
    applications=st.integers(1, 5),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_op(device, rows, half, applications, has_bias, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    inputs = {
        "x": draw(rows, 2 * half),
        "weights": [draw(half, 2 * half), draw(half, 2 * half), draw(3, 2 * half)],
        "biases": [draw(half), draw(half)] if has_bias else [],
        "applications": applications,
    }
    compare(chained, repeated, inputs)


def test_leading_dimensions_and_frozen_inputs():
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(4, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    (shared,), total = share(torch.float32, [([weight], [bias])])
    y, _ = shared_linear(x, shared, total)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    y.square().sum().backward()
    (want,) = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias).square().sum(), weight)
    torch.testing.assert_close(weight.grad, want)


@pytest.mark.parametrize(
    "groups, error, message",
    [
        ([([], [])], ShapeError, r"groups\[0\]: got no weights"),
        ([([torch.ones(2, 3), torch.ones(2, 4)], [])], ShapeError, r"groups\[0\] weights\[1\].*\(2, 4\).*\(2, 3\)"),
        ([([torch.ones(2, 3)], [torch.ones(3)])], ShapeError, r"groups\[0\] biases\[0\].*\(3,\).*\(2,\)"),
        ([([torch.ones(2, 3)] * 2, [torch.ones(2)])], ShapeError, r"groups\[0\]: got 1 biases.*2 weights"),
        ([([torch.ones(3)], [])], ShapeError, r"groups\[0\] weights\[0\].*two dimensions"),
        ([([torch.ones(2, 3).int()], [])], DtypeError, r"groups\[0\] weights\[0\].*int32"),
        ([(torch.ones(2, 3), [])], DtypeError, r"groups\[0\] weights.*list"),
    ],
)
def test_bad_groups_are_named(groups, error, message):
    with pytest.raises(error, match=message):
        share(torch.float32, groups)


def test_an_input_of_another_width_is_named():
    (shared,), total = share(torch.float32, [([torch.ones(2, 3, requires_grad=True)], [])])
    with pytest.raises(ShapeError, match=r"x: got shape \(5, 4\), expected \(5, 3\)"):
        shared_linear(torch.ones(5, 4), shared, total)


# ---------------------------------------------------------------- the encoder


@given(
    layers=st.integers(2, 6),
    groups=st.integers(1, 3),
    inner=st.integers(1, 2),
    hidden_act=st.sampled_from(["gelu_new", "gelu", "relu"]),
    training=st.booleans(),
    seed=st.integers(0, 99),
)
def test_shared_layers_are_tied_copies_with_summed_gradients(layers, groups, inner, hidden_act, training, seed):
    """In float64 to the last bits, with the same dropout in both."""
    sizes = dict(num_hidden_layers=layers, num_hidden_groups=min(groups, layers), inner_group_num=inner)
    model = build("albert", seed=seed, hidden_act=hidden_act, hidden_dropout_prob=0.1, **sizes).train(training)
    copies, original = tied_copies(model)
    assert_same(gradients(model, seed), summed(gradients(copies, seed), original), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_16_bit_gradients(device, dtype, autocast, monkeypatch):
    """Of 12 applications, against float64: each tensor by the tolerance rule, with the modules called one by one as the
    yardstick; and the sums alone, of the same products, far better than 16 bits can hold them."""
    wide = build("albert", num_hidden_layers=12).to(device).eval()
    narrow = copy.deepcopy(wide).to(torch.float32 if autocast else dtype)
    wide.load_state_dict(narrow.state_dict())
    yardstick = copy.deepcopy(narrow)
    main_gradients(narrow.parameters())
    products, add = {}, portable.add_product

    def record(total, a, b, *scale):
        products.setdefault(total.data_ptr(), []).append((a.clone(), b.clone()))
        add(total, a, b, *scale)

    monkeypatch.setattr(portable, "add_product", record)
    truth = gradients(wide)
    products.clear()
    with torch.autocast(device, dtype, enabled=autocast):
        ids, mask, labels = (t.to(device) for t in batch([7, 5, 2]))
        narrow(ids, mask, labels=labels).loss.backward()
        monkeypatch.setattr(Encoder, "_shared", lambda self: {})
        # on the CPU in both ways: with the ops of the shared layers and with others, see branch_linear.pays_off
        theirs = [gradients(yardstick)]
        if device == "cpu":
            yardstick.zero_grad(set_to_none=True)
            with fastbert.use_backend("torch"):
                theirs.append(gradients(yardstick))
    for name, parameter in narrow.named_parameters():
        if LAYER not in name:
            continue
        assert parameter.grad.dtype == torch.float32
        error, *slack = ((g.double() - truth[name]).abs().max() for g in (parameter.grad, *(t[name] for t in theirs)))
        assert error <= 2 * max(slack) + torch.finfo(dtype).eps * truth[name].abs().max(), name
    for name in ("attention.output", "intermediate", "output"):
        gradient = narrow.get_parameter(f"{LAYER}.{name}.weight").grad
        operands = products[gradient.data_ptr()]
        assert len(operands) == 12
        want = sum(a.double() @ b.double() for a, b in operands)
        narrow_sum = sum(a @ b for a, b in operands)
        error, lost = ((g.double() - want).norm() / want.norm() for g in (gradient, narrow_sum))
        assert error < 1e-6 and lost > 100 * error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_itself_loses_nothing(dtype):
    """256 applications to the same input: what 16-bit sums would lose most of."""
    x = torch.randn(8, 16).to(dtype)
    weight = torch.randn(4, 16).to(dtype).requires_grad_()
    main_gradients([weight])
    (shared,), total = share(dtype, [([weight], [])])
    outputs = []
    for _ in range(256):
        y, total = shared_linear(x, shared, total)
        outputs.append(y)
    torch.stack(outputs).sum(dtype=torch.float32).backward()
    want = 256 * x.double().sum(0).expand(4, 16)
    torch.testing.assert_close(weight.grad.double(), want, rtol=1e-5, atol=1e-4)


def test_gradients_are_views_of_one_buffer():
    """What autograd handed over was taken as it was, without a copy, as often as the layer was applied."""
    model = build("albert").float()
    gradients(model)
    attention = model.get_submodule(f"{LAYER}.attention")
    linears = [attention.query, attention.key, attention.value, attention.output]
    linears += [model.get_submodule(f"{LAYER}.{name}") for name in ("intermediate", "output")]
    model.zero_grad()
    ids, mask, labels = batch([7, 5])
    model(ids, mask, labels=labels).loss.backward()
    assert len({linear.weight.grad.untyped_storage().data_ptr() for linear in linears}) == 1
    size = attention.query.weight.numel() * 4
    places = [linear.weight.grad.data_ptr() for linear in linears[:3]]
    assert places[1] - places[0] == places[2] - places[1] == size


def test_each_parameter_gets_one_gradient_per_backward():
    model = build("albert", num_hidden_layers=5)
    times = {name: 0 for name, _ in model.named_parameters()}

    def count(name):
        return lambda _: times.update({name: times[name] + 1})

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(count(name))
    found = gradients(model)
    assert all(times[name] == 1 for name in found if name != "loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, groups", [("albert", 1), ("albert", 2), ("nezha", None)])
def test_gradient_checkpointing_changes_nothing(family, groups, dtype):
    changes = {} if groups is None else {"num_hidden_groups": groups}
    model = build(family, num_hidden_layers=4, **changes).to(dtype).train()
    for module in model.modules():
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.2
    plain = gradients(model)
    inputs = []
    for layer in model.model.encoder.layers:
        layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    gradients(model)
    applied = len(inputs)
    model.gradient_checkpointing_enable()
    inputs.clear()
    assert_same(gradients(model), plain, rtol=0, atol=0)
    assert len(inputs) == 2 * applied  # each once more, in the backward pass
    inputs.clear()
    model.eval()
    gradients(model)
    assert len(inputs) == applied
    model.gradient_checkpointing_disable()
    model.train()
    inputs.clear()
    gradients(model)
    assert len(inputs) == applied


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gradient_checkpointing_saves_memory():
    model = build("albert", num_hidden_layers=12, hidden_size=128, intermediate_size=512).float().cuda().train()
    ids = torch.randint(5, 40, (16, 24), device="cuda")

    def peak():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(ids, labels=ids, return_logits=False).loss.backward()
        model.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    peak()
    plain = peak()
    model.gradient_checkpointing_enable()
    assert peak() < 0.5 * plain


def test_dropout_differs_between_applications():
    """The same input into each application gives other outputs in each, and the same in evaluation mode."""
    model = build("albert", num_hidden_layers=3, hidden_dropout_prob=0.3)
    layer = model.model.encoder.layers[0]
    x, outputs = torch.randn(14, 16).double(), []
    layer.register_forward_pre_hook(lambda module, arguments: (x, *arguments[1:]))
    layer.register_forward_hook(lambda module, arguments, output: outputs.append(output.detach()))
    gradients(model.train())
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    outputs.clear()
    gradients(model.eval())
    assert torch.equal(outputs[0], outputs[1])


def test_dropout_follows_attention_and_feed_forward(monkeypatch):
    """As in the original code; transformers has none behind ALBERT's feed-forward."""
    model = build("albert", num_hidden_layers=3, hidden_dropout_prob=0.3).train()
    called, whole = [], ops.dropout_add_layer_norm
    monkeypatch.setattr(
        ops,
        "dropout_add_layer_norm",
        lambda *args, **options: (called.append(options["dropout_p"]), whole(*args, **options))[1],
    )
    gradients(model)
    assert called == [0.3] * 6


def test_backward_twice_and_from_the_middle():
    model = build("albert", num_hidden_layers=4).eval()
    ids, mask, labels = batch([7, 5])
    output = model(ids, mask, labels=labels, output_hidden_states=True)
    output.loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if name in once:
            torch.testing.assert_close(parameter.grad, 2 * once[name])

    def middle(model):
        model.zero_grad()
        model(ids, mask, output_hidden_states=True).hidden_states[2].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    copies, original = tied_copies(model)
    assert_same(middle(model), summed(middle(copies), original))


def test_gradients_of_inputs_alone_leave_no_trace():
    model = build("albert").eval()
    before = gradients(model)
    model.zero_grad()
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0, 7, 12], dtype=torch.int32)
    y, _ = model.model.encoder(x, cu_seqlens=ends, max_seqlen=7)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.abs().sum() > 0 and all(p.grad is None for p in model.parameters())
    assert_same(gradients(model), before)


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["attention.query", "attention.output", "intermediate", "output"])
def test_a_replaced_linear_layer_is_called_in_every_application(name):
    model = build("albert").train()
    copies, original = tied_copies(model)
    for one, count in ((model, 1), (copies, 3)):
        for number in range(count):
            linear = one.get_submodule(f"model.encoder.layers.{number}.{name}")
            linear.__class__ = Scaled
    assert_same(gradients(model), summed(gradients(copies), original))


def test_a_hooked_linear_layer_is_called_in_every_application():
    model = build("albert").train()
    plain, called = gradients(model), []
    model.get_submodule(f"{LAYER}.attention.key").register_forward_hook(lambda *_: called.append(1))
    assert_same(gradients(model), plain)
    assert len(called) == 3


def test_hooks_of_the_layer_and_its_attention_fire_in_every_application():
    model = build("albert").train()
    plain, called = gradients(model), []
    model.get_submodule(LAYER).register_forward_hook(lambda *_: called.append("layer"))
    model.get_submodule(f"{LAYER}.attention").register_forward_hook(lambda *_: called.append("attention"))
    assert_same(gradients(model), plain)
    assert called == ["attention", "layer"] * 3


class OtherAttention(torch.nn.Module):
    def forward(self, x, cu_seqlens=None, max_seqlen=None, key_padding_mask=None):
        return x.roll(1, -1)


def test_a_replaced_attention_need_not_know_of_shared_weights():
    model = build("albert").train()
    model.get_submodule(LAYER).attention = OtherAttention()
    assert f"{LAYER}.intermediate.weight" in gradients(model)


@pytest.mark.parametrize("frozen", ["attention.key.weight", "attention_norm.bias", "intermediate.bias"])
def test_frozen_parameters_stay_without_a_gradient(frozen):
    model = build("albert").train()
    plain = gradients(model)
    model.zero_grad()
    model.get_parameter(f"{LAYER}.{frozen}").requires_grad_(False)
    found = gradients(model)
    del plain[f"{LAYER}.{frozen}"]
    assert_same(found, plain)


def test_a_second_derivative_is_refused():
    model = build("albert").eval()
    ids, mask, labels = batch([7, 5])
    weight = model.get_parameter(f"{LAYER}.output.weight")
    (gradient,) = torch.autograd.grad(model(ids, mask, labels=labels).loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_reference_backend_has_second_derivatives_and_torch_func():
    """As its other operations do; so weights are not shared under it, nor within torch.func's transforms."""
    model = build("albert", "model").eval()
    weight, x = model.get_parameter("encoder.layers.0.output.weight"), torch.randn(1, 5, 16, dtype=torch.float64)
    with fastbert.use_backend("reference"):
        (gradient,) = torch.autograd.grad(model.encoder(x)[0].square().sum(), weight, create_graph=True)
        gradient.sum().backward()
        assert weight.grad.abs().sum() > 0
        one = torch.func.jvp(lambda x: model.encoder(x)[0], (x,), (torch.ones_like(x),))[1]
        assert one.isfinite().all()
    per_sample = torch.func.vmap(lambda x: model.encoder(x[None])[0][0])(x[0].repeat(3, 1, 1))
    torch.testing.assert_close(per_sample, model.encoder(x.repeat(3, 1, 1))[0])


def test_a_patched_linear_layer_is_called_in_every_application():
    """On the instance, as accelerate's hooks do."""
    model = build("albert").train()
    linear = model.get_submodule(f"{LAYER}.intermediate")
    called, forward = [], linear.forward
    linear.forward = lambda x: (called.append(1), forward(x))[1]
    gradients(model)
    assert len(called) == 3


def test_main_gradients_come_before_gradients():
    model = build("albert").to(torch.bfloat16)
    gradients(model)
    with pytest.raises(ConfigError, match=r"has a gradient in torch.bfloat16, expected none: call zero_grad"):
        main_gradients(model.parameters())


def test_compiles_with_its_backward_without_graph_breaks():
    model = build("albert")
    ids, _, labels = batch([6, 6])
    model(ids, labels=labels).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=labels).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lamb_reads_main_gradients_as_they_are(dtype):
    """The step of 16-bit parameters with float32 gradients is that of float32 parameters with the same ones."""
    model = build("albert").to(dtype)
    main_gradients(model.parameters())
    found = gradients(model)
    wide = copy.deepcopy(model).float()
    for name, parameter in wide.named_parameters():
        parameter.grad = found.get(name)
    for one in (model, wide):
        FusedLAMB(param_groups(one, 0.01), lr=0.1).step()
    for (name, parameter), other in zip(model.named_parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(parameter, other.to(dtype), rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert found[f"{LAYER}.output.weight"].dtype == torch.float32


def test_albert_base_trains_in_an_eighth_of_bert_bases_memory():
    """Parameters, gradients and the optimizer's state, after a step."""

    def held(preset):
        config = fastbert.EncoderConfig.from_preset(preset)
        with torch.device("meta"):
            model = fastbert.model_class(config.model_type)(config)
        model.to_empty(device="cpu")
        optimizer = FusedLAMB(param_groups(model, 0.01))
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values()]
        return sum(t.nbytes for p in model.parameters() for t in (p, p.grad)) + sum(t.nbytes for t in states)

    assert held("albert-base-v2") <= held("bert-base-uncased") / 8


def _gradients_of_rank():
    """What DDP leaves on this process, of a batch of its own; with as many labels on each, so that the mean of means is
    the mean."""
    model = build("albert", num_hidden_layers=4).train()
    ids, mask, _ = batch([6, 6], seed=torch.distributed.get_rank())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    parallel(ids, mask, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_ddp_reduces_one_gradient_of_each(processes):
    one, two = processes(2).run(_gradients_of_rank)
    assert_same(one, two, rtol=0, atol=0)
    model = build("albert", num_hidden_layers=4).train()
    for rank in range(2):
        ids, mask, _ = batch([6, 6], seed=rank)
        (model(ids, mask, labels=ids).loss / 2).backward()
    assert_same(one, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
