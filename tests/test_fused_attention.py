"""The Triton kernels of the attention ops, interpreted on a CPU, compiled on a GPU. What is peculiar to relative
attention is in test_fused_relative_attention.py."""

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastbert import EncoderConfig, NezhaModel, RoFormerModel, ops, reference
from fastbert.errors import BackendError
from fastbert.ops import fused_attention
from fastbert.philox import attention_keep
from fastbert.testing import compare, make_inputs

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastbert.kernels import attention, launch, relative_attention, tile  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.kernel]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
on_a_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else [])  # interpreted, bfloat16 products are wrong
NAMES = ["attention", "rotary_attention", "relative_attention"]
SHIPPED = {module: module.launch_config for module in (attention, relative_attention)}
NAN = float("nan")
every = pytest.mark.parametrize("name", NAMES)


@triton.jit
def locate_kernel(p_tile, p_ends, p_found, batch, BLOCK: tl.constexpr):
    """fastbert.kernels.tile.locate by itself."""
    i = tl.program_id(0)
    b, start, length, row = tile.locate(tl.load(p_tile + i), p_ends, batch, 0, BLOCK)
    tl.store(p_found + 4 * i, b)
    tl.store(p_found + 4 * i + 1, start)
    tl.store(p_found + 4 * i + 2, length)
    tl.store(p_found + 4 * i + 3, row)


def fused(name, **arguments):
    return partial(getattr(ops, name), backend="triton", **arguments)


def hold(name, inputs, **arguments):
    compare(fused(name, **arguments), partial(getattr(reference, name), **arguments), inputs)


def inputs(lengths, heads=1, head_dim=16, **settings):
    return make_inputs(lengths, heads, head_dim, device=DEVICE, **settings)


def run(name, arguments, **options):
    """Output, and gradients of q, k, v."""
    output = fused(name, **options)(**arguments)
    direction = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape).to(output)
    return output.detach(), *torch.autograd.grad(output, [arguments[n] for n in "qkv"], direction)


def tiles(monkeypatch, block_m, block_n, warps=4):
    """Every kernel in tiles of this size."""
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 1}
    for module in SHIPPED:
        monkeypatch.setattr(module, "launch_config", lambda *_: config)


@pytest.fixture(scope="module", autouse=True)
def _tiles_that_are_quick_to_interpret():
    """An interpreted step costs the same whatever its size. Tiles that ship have a test below, and GPUs run them."""
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            tiles(patch, 64, 64)
        yield


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


layouts = st.one_of(
    st.tuples(st.just("dense"), st.tuples(st.integers(2, 40), st.integers(1, 2)).map(lambda x: [x[0]] * x[1])),
    st.tuples(st.sampled_from(["padded", "packed"]), st.lists(st.integers(0, 40), max_size=2).map(lambda x: [*x, 23])),
)
fewer = settings(max_examples=settings().max_examples // (1 if CUDA else 2))


@every
@fewer
@example(sequences=("padded", [33, 0, 5]), head_dim=26, dtype=0, scale=0.7, dropout_p=0.1, seed=2**64 - 1, view=True)
@example(sequences=("packed", [70, 0, 1]), head_dim=32, dtype=1, scale=None, dropout_p=0.6, seed=3, view=True)
@given(
    sequences=layouts,
    head_dim=st.sampled_from([2, 16, 26, 64]),
    dtype=st.integers(0, 2),
    scale=st.sampled_from([None, 0.7]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.1, 0.6]),
    seed=st.integers(0, 2**64 - 1),
    view=st.booleans(),
)
def test_is_the_reference(name, sequences, head_dim, dtype, scale, dropout_p, seed, view):
    layout, lengths = sequences
    settings = {"layout": layout, "dtype": DTYPES[dtype % len(DTYPES)], "seed": seed % 2**32, "projection_view": view}
    arguments = inputs(lengths, 2 if CUDA else 1, head_dim, **settings, padding=NAN if layout == "padded" else None)
    hold(name, arguments, scale=scale, dropout_p=dropout_p, seed=seed)


@fewer
@given(
    theta=st.sampled_from([10000.0, 10.0, 0.5]),
    rotate_value=st.booleans(),
    interleaved=st.booleans(),
    head_dim=st.sampled_from([4, 16, 26]),
    layout=st.sampled_from(["padded", "packed"]),
    dtype=st.integers(0, 2),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_rotations(theta, rotate_value, interleaved, head_dim, layout, dtype, dropout_p):
    options = {"theta": theta, "rotate_value": rotate_value, "interleaved": interleaved}
    arguments = inputs([35, 6], 1, head_dim, layout=layout, dtype=DTYPES[dtype % len(DTYPES)])
    hold("rotary_attention", arguments, **options, dropout_p=dropout_p, seed=1)


EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 0]
ON_A_GPU = [range(1, 130), [255], [256], [257], [511], [512], [513], [1536]]


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [EDGES, *ON_A_GPU] if CUDA else [EDGES], ids=lambda x: f"{x[0]}-{x[-1]}")
def test_ragged_lengths(name, lengths, dtype):
    for dropout_p in (0.0, 0.1) if CUDA else (0.0,):
        hold(name, inputs(list(lengths), layout="packed", dtype=dtype), dropout_p=dropout_p, seed=1)


@every
def test_one_key(name):
    """Its probability is one, whatever the scores: their gradients are zero but for rounding."""
    arguments = inputs([1, 1], layout="packed")
    output, dq, dk, dv = run(name, arguments)
    direction = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
    sinusoids = reference.sinusoids(64, 16)[64].to(output) if name == "relative_attention" else 0
    torch.testing.assert_close(output, arguments["v"].detach() + sinusoids)
    torch.testing.assert_close(dv, direction)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.parametrize("block_m, block_n", [(32, 16), (64, 32), (128, 64), (256, 64), (64, 128), (128, 32)])
def test_tiles_of_any_size_give_the_same(block_m, block_n, monkeypatch):
    tiles(monkeypatch, block_m, block_n, warps=8 if block_m == 256 else 4)
    lengths = [block_m + 9, 3] if CUDA else [70]
    hold("rotary_attention", inputs(lengths, layout="packed", dtype=torch.float16), dropout_p=0.3, seed=2)


@pytest.mark.skipif(CUDA, reason="a GPU runs its own")
@pytest.mark.parametrize("head_dim", [16, 72])
@pytest.mark.parametrize(
    "module, major",
    [(module, major) for module in SHIPPED for major in module._CONFIGS],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_tiles_that_ship(module, major, head_dim, monkeypatch):
    """Every kernel in the tile of its own that a device with this compute capability (32: float32) has."""
    monkeypatch.setattr(module, "launch_config", SHIPPED[module])
    monkeypatch.setattr(module, "_CONFIGS", {8: module._CONFIGS[major], 32: module._CONFIGS[32]})
    name = "rotary_attention" if module is attention else "relative_attention"
    options = {} if module is attention else {"max_relative_position": 20}
    arguments = inputs([70], 1, head_dim, layout="packed", dtype=torch.float32 if major == 32 else torch.float16)
    for dropout_p in (0.0, 0.1) if head_dim == 16 else (0.1,):
        hold(name, arguments, dropout_p=dropout_p, seed=2, **options)


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SHAPES = [
    (HALF, 16),
    (HALF, 26),
    (HALF, 32),
    (HALF, 64),
    (HALF, 80),
    (HALF, 128),
    (BRAIN, 64),
    (SINGLE, 64),
    (SINGLE, 128),
]


@on_a_gpu
@every
@pytest.mark.parametrize("dtype, head_dim", SHAPES, ids=str)
def test_every_configuration_on_this_gpu(name, dtype, head_dim):
    """With 128 tokens at most and with more, dropout and none: each compiles kernels of its own."""
    for layout, dropout_p, lengths in (
        ("padded", 0.1, [300, 0, 77]),
        ("packed", 0.0, [300, 0, 77]),
        ("packed", 0.1, [128, 3]),
    ):
        arguments = inputs(lengths, 2, head_dim, layout=layout, dtype=dtype, padding=NAN)
        hold(name, arguments, dropout_p=dropout_p, seed=7)


@on_a_gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("flags", [{"rotate_value": True}, {"interleaved": False}], ids=str)
def test_every_rotation_on_this_gpu(layout, flags):
    for dropout_p in (0.0, 0.1):
        arguments = inputs([300, 0, 77], 2, 64, layout=layout, dtype=HALF, padding=NAN)
        hold("rotary_attention", arguments, dropout_p=dropout_p, seed=7, **flags)


@pytest.mark.parametrize("length", [2048, pytest.param(8192, marks=on_a_gpu)])
def test_long_sequences(length, monkeypatch):
    """The angles of late positions are as exact as those of early ones."""
    if not CUDA:
        tiles(monkeypatch, 1024, 1024)
    arguments = {name: t.detach() for name, t in inputs([length], 1, 16, dtype=torch.float16).items()}
    hold("rotary_attention", arguments)


@pytest.mark.parametrize("shift", [1, 31, 100])
def test_scores_depend_on_the_difference_of_positions_only(shift):
    q, k, v = torch.randn(3, 1, 12, 1, 16, device=DEVICE)
    expected = fused("rotary_attention")(q, k, v)
    mask = torch.arange(shift + 12, device=DEVICE)[None] >= shift
    late = (torch.cat([torch.zeros(1, shift, 1, 16, device=DEVICE), t], dim=1) for t in (q, k, v))
    output = fused("rotary_attention")(*late, key_padding_mask=mask)
    torch.testing.assert_close(output[:, shift:], expected)


@every
@pytest.mark.parametrize("junk", [NAN, float("inf"), -1e30])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
def test_padding_reaches_nothing(name, junk):
    clean, dirty = (inputs([5, 0, 9], layout="padded", padding=x) for x in (0.0, junk))
    real = clean["key_padding_mask"]
    options = {"max_relative_position": 3} if name == "relative_attention" else {}
    results = []
    for arguments in (clean, dirty):
        output = fused(name, dropout_p=0.3, seed=2, **options)(**arguments)
        results.append(
            (
                output.detach(),
                *torch.autograd.grad((output * real[:, :, None, None]).sum(), [arguments[n] for n in "qkv"]),
            )
        )
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got[real], expected[real]) and got.isfinite().all()
    for gradient in results[1][2:]:
        assert gradient[~real].count_nonzero() == 0


@every
def test_not_a_number_stays_in_its_packed_sequence(name):
    arguments = inputs([7, 40], layout="packed")
    expected = run(name, arguments)
    for n in "qkv":
        arguments[n].data[7:] = NAN
    for a, b in zip(expected, run(name, arguments), strict=True):
        assert torch.equal(a[:7], b[:7]) and b[7:].isnan().any()


@every
def test_a_mask_may_have_holes_and_hide_a_whole_sequence(name):
    arguments = inputs([40, 40, 40])
    keys = torch.rand(3, 40, device=DEVICE) < 0.5
    keys[1] = False
    keys[2, :33] = False  # the first tile of keys has none
    hold(name, arguments | {"key_padding_mask": keys.T.contiguous().T})
    assert run(name, arguments | {"key_padding_mask": keys})[0][1].count_nonzero() == 0


@every
def test_views_and_odd_strides(name):
    """Transposed, expanded, offset, the last dimension not contiguous; and a gradient that is one expanded number."""
    draw = partial(torch.randn, device=DEVICE)
    q, k, v = draw(9, 2, 2, 16).transpose(0, 1), draw(2, 9, 1, 16).expand(-1, -1, 2, -1), draw(2, 9, 16, 2).mT
    for views in ((q, k, v), (draw(2, 9, 2, 50)[..., 3:19], draw(2, 2, 9, 16).transpose(1, 2), q)):
        arguments = {n: t.detach().requires_grad_() for n, t in zip("qkv", views, strict=True)}
        hold(name, arguments)
        plain = {n: t.detach().contiguous().requires_grad_() for n, t in arguments.items()}
        some, others = (torch.autograd.grad(fused(name)(**a).sum(), list(a.values())) for a in (arguments, plain))
        assert equal(some, others)


@pytest.mark.parametrize(
    "strides, expected", [([768, 64, 0], 1), ([936, 26, 1024], 2), ([40, 480], 8), ([3, 16], 1), ([0, 0, 0], 1)]
)
def test_what_divides_strides(strides, expected):
    assert launch.alignment(strides) == expected


@every
@pytest.mark.parametrize("width, first", [(26, 0), (29, 0), (30, 1), (40, 8)])
def test_strides_that_16_does_not_divide(name, width, first):
    """Head dims such as 26 are read as many bytes at a time as the strides allow."""
    projection = torch.randn(2, 20, 3, 2, width, device=DEVICE)[..., first : first + 24]
    arguments = {n: t.requires_grad_() for n, t in zip("qkv", projection.unbind(2), strict=True)}
    hold(name, arguments, dropout_p=0.1, seed=1)


@every
def test_offsets_beyond_32_bits(name):
    """Sequences 2^31 elements apart, and rows so far apart that a copy is made; the memory between is never touched."""
    far = torch.empty(2**31 + 2**29, dtype=torch.float16, device=DEVICE)
    for shape, strides in (((2, 5, 1, 16), (2**31, 16, 16, 1)), ((1, 5, 1, 16), (0, 2**29, 16, 1))):
        q = far.as_strided(shape, strides)
        q.copy_(torch.randn(shape))
        near = q.clone()
        assert torch.equal(fused(name)(q, near, q), fused(name)(near, near, near))


def test_tiles_of_packed_sequences_are_found_among_very_many():
    """More sequences than a dimension of a grid, empty ones among them; every one is found at each of its tiles."""
    lengths = torch.randint(0, 4, (70_000,)) * 40
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    first = ends[:-1] // 64 + torch.arange(len(lengths))
    sequence = torch.tensor([0, 1, 2, 127, 128, 129, 16_383, 16_384, 65_535, 65_536, len(lengths) - 1])
    wanted = torch.cat([first[sequence], first[sequence] + 1])
    found = torch.empty(len(wanted), 4, dtype=torch.int32, device=DEVICE)
    locate_kernel[(len(wanted),)](wanted.int().to(DEVICE), ends.to(DEVICE), found, len(lengths), BLOCK=64)
    for i_tile, (b, start, length, row) in zip(wanted.tolist(), found.tolist(), strict=True):
        assert b == int((first <= i_tile).sum()) - 1
        assert (start, length, row) == (ends[b], lengths[b], (i_tile - first[b]) * 64)


@on_a_gpu
@every
def test_very_many_packed_sequences(name):
    arguments = inputs([1, 0, 3, 2] * 20_000, layout="packed", dtype=torch.float16)
    for got, expected in zip(run(name, arguments), run_reference(name, arguments), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def run_reference(name, arguments):
    """The padded form that portable.py runs on a GPU."""
    output = getattr(ops, name)(**arguments, backend="torch")
    direction = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape).to(output)
    return output.detach(), *torch.autograd.grad(output, [arguments[n] for n in "qkv"], direction)


@every
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_same_bits_again(name, dropout_p):
    arguments = inputs([513, 200] if CUDA else [70, 9], layout="packed")
    first = run(name, arguments, dropout_p=dropout_p, seed=1)
    assert all(equal(first, run(name, arguments, dropout_p=dropout_p, seed=1)) for _ in range(1000 if CUDA else 2))


def test_dropout_drops_what_the_reference_drops():
    """Equal probabilities and values of one show the mask itself: the share of kept keys of each query."""
    ones = torch.ones(2, 50, 2, 16, device=DEVICE)
    output = fused("attention", dropout_p=0.4, seed=11)(ones, ones, ones)
    keep = attention_keep(11, 0.4, 2, 2, 50, device=DEVICE)
    expected = keep.float().mean(-1).transpose(1, 2)[..., None].expand_as(output) * 256 / (256 - 102)
    torch.testing.assert_close(output, expected)


def test_dropout_without_a_seed_follows_the_generator():
    arguments = inputs([20], 2)
    torch.manual_seed(3)
    first, second = (run("attention", arguments, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(3)
    assert equal(first, run("attention", arguments, dropout_p=0.3))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_drops_the_same(reentrant):
    arguments = inputs([40])
    leaves = [arguments[n] for n in "qkv"]
    op = fused("rotary_attention", dropout_p=0.5)
    gradients = []
    for call in (op, partial(checkpoint, op, use_reentrant=reentrant)):
        torch.manual_seed(5)
        output = call(*leaves)
        output.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    assert equal(*gradients)


@every
def test_autocast(name):
    arguments = inputs([20])
    halves = {n: t.detach().half().requires_grad_() for n, t in arguments.items()}
    expected = run(name, halves)
    with torch.autocast(DEVICE, torch.float16):
        output = fused(name)(**arguments | {"k": halves["k"]})
    assert output.dtype == torch.float16 and torch.equal(output, expected[0])
    (dq,) = torch.autograd.grad(
        output, arguments["q"], torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output).half()
    )
    assert dq.dtype == torch.float32 and torch.equal(dq, expected[1].float())


@every
def test_only_some_gradients_are_wanted(name):
    arguments = inputs([20])
    expected = run(name, arguments)
    frozen = arguments | {n: arguments[n].detach() for n in "qv"}
    output = fused(name)(**frozen)
    direction = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
    assert torch.equal(torch.autograd.grad(output, frozen["k"], direction)[0], expected[2])
    with torch.no_grad():
        assert torch.equal(fused(name)(**arguments), expected[0])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name, flags", [("rotary_attention", {"rotate_value": True}), ("relative_attention", {})])
def test_compiles_as_one_graph(name, flags, layout):
    torch.compiler.reset()
    options = {"dropout_p": 0.5, "seed": 1, **flags}
    arguments = inputs([20, 9], layout=layout)
    compiled = torch.compile(fused(name, **options), fullgraph=True, backend="aot_eager")
    compare(compiled, partial(getattr(reference, name), **options), arguments)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("name", ["rotary_attention", "relative_attention"])
def test_one_graph_serves_all_lengths(name, layout):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused(name), fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    for length in (20, 24, 33, 41):
        arguments = inputs([length, length] if layout == "dense" else [length, 7], layout=layout)
        output = compiled(**arguments)
        torch.testing.assert_close(output, fused(name)(**arguments))
        torch.autograd.grad(output.sum(), [arguments[n] for n in "qkv"])
        counts.add(counter.frame_count)
    assert len(counts) == 1


@every
def test_ends_of_sequences_may_have_strides(name):
    arguments = inputs([7, 12, 21], layout="packed")
    ends = torch.stack([arguments["cu_seqlens"], torch.full_like(arguments["cu_seqlens"], 9)], dim=1)[:, 0]
    assert torch.equal(fused(name)(**arguments | {"cu_seqlens": ends}), fused(name)(**arguments))


@pytest.mark.parametrize("longest", [40, 10**9])
def test_a_generous_bound_costs_nothing(longest):
    arguments = inputs([7, 12, 21], layout="packed")
    output = fused("rotary_attention", theta=77.0)(**arguments | {"max_seqlen": longest})
    assert torch.equal(output, fused("rotary_attention", theta=77.0)(**arguments))
    assert max(table.shape[1] for table in kept(77.0)) == 256


def kept(theta):
    """The tables of angles that are there for it."""
    return [tables for key, tables in fused_attention._kept.items() if theta in key]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("positions", ["absolute", "rotary", "rotary values", "relative"])
def test_registered_operators(layout, positions):
    arguments = inputs([20, 9], layout=layout)
    q, k, v, mask, ends = (arguments.get(n) for n in ("q", "k", "v", "key_padding_mask", "cu_seqlens"))
    seeds = torch.tensor([5], device=DEVICE)
    tables, radius = (None, None, None), 0
    if "rotary" in positions:
        tables = fused_attention._angles(20, 16, 10000.0, q.device), None, None
    if positions == "relative":
        radius = 7
        tables = fused_attention._waves(None, radius, 16, q.dtype, q.device)
    options = mask, ends, seeds, *tables, 20, 0.25, 26, "values" in positions, True, radius
    torch.library.opcheck(fused_attention._forward_op, (q, k, v, *options, True))
    plain = [t.detach() for t in (q, k, v)]
    torch.library.opcheck(fused_attention._forward_op, (*plain, *options, False))
    o, lse, *used = fused_attention._forward(*plain, *options, True)
    operands = [new if new.numel() else old for new, old in zip(used, plain, strict=True)]
    given = None if mask is None else plain[0]
    torch.library.opcheck(fused_attention._backward_op, (o, *operands, given, o, lse, *options))


@every
def test_fake_tensors(name):
    with FakeTensorMode():
        fake = torch.zeros(1, 13, 1, 16, device=DEVICE)
        assert fused(name, dropout_p=0.1)(fake, fake, fake).shape == fake.shape


def test_tables_are_not_kept_from_a_mode_that_makes_fake_tensors():
    x = torch.zeros(1, 13, 1, 16, device=DEVICE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fused("relative_attention", max_relative_position=61)(x, x, x)
    assert fused("relative_attention", max_relative_position=61)(x, x, x).isfinite().all()


@on_a_gpu
def test_a_captured_graph_drops_anew_at_every_replay():
    q = torch.randn(2, 64, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)

    def step(theta):
        output = fused("rotary_attention", dropout_p=0.2, theta=theta)(q, q, q)
        return output.detach(), torch.autograd.grad(output.float().square().sum(), q)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(10000.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(12345.0)  # for which there is no table yet
    assert not kept(12345.0)
    torch.cuda.manual_seed(3)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([t.clone() for t in results])
    assert not torch.equal(replays[0][0], replays[1][0])
    assert all(t.isfinite().all() for replay in replays for t in replay)


@on_a_gpu
def test_compiled_into_a_captured_graph():
    torch.compiler.reset()
    fused_attention._kept.clear()
    compiled = torch.compile(fused("rotary_attention", theta=54321.0), fullgraph=True, mode="reduce-overhead")
    q = torch.randn(2, 64, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    expected = fused("rotary_attention", theta=54321.0)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        output = compiled(q, q, q)
        (gradient,) = torch.autograd.grad(output.float().square().sum(), q)
        other = expected(q, q, q)
        torch.testing.assert_close(output, other)
        torch.testing.assert_close(gradient, torch.autograd.grad(other.float().square().sum(), q)[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every
def test_on_the_second_gpu(name):
    arguments = {n: t.detach().to("cuda:1").requires_grad_() for n, t in inputs([40, 40]).items()}
    hold(name, arguments, dropout_p=0.1, seed=1)


@every
def test_what_the_kernels_do_not_serve(name):
    x = torch.zeros(1, 3, 1, 16, device=DEVICE)
    wide = torch.zeros(1, 3, 1, 130, device=DEVICE)
    cases = [
        ((x.double(),) * 3, {}, "q is torch.float64, not float16, bfloat16 or float32"),
        ((wide,) * 3, {}, "the head dim is 130, more than 128"),
        ((x,) * 3, {"scale": -1.0}, "scale is -1.0, not at least 1e-30"),
    ]
    if not CUDA:
        cases.append(((x.bfloat16(),) * 3, {}, "q is bfloat16, whose products Triton's interpreter gets wrong"))
    far = torch.zeros(1, device=DEVICE).expand(1, 2**18, 128, 64)
    with pytest.raises(BackendError, match="offsets within q of shape .1, 262144, 128, 64. do not fit 32 bits"):
        fused(name)(far, far, far)
    for operands, options, reason in cases:
        with pytest.raises(BackendError, match=f"backend 'triton' cannot serve {name}: {reason}"):
            fused(name, **options)(*operands)
        getattr(ops, name)(*operands, **options)


def test_the_default_for_16_bits_on_cuda_and_on_request_elsewhere(monkeypatch):
    calls, launch = [], attention.attention_fwd
    monkeypatch.setattr(attention, "attention_fwd", lambda *args: calls.append(args[0].dtype) or launch(*args))
    x = torch.zeros(1, 3, 1, 16, device=DEVICE)
    ops.attention(x, x, x)
    ops.attention(*(x.half(),) * 3)
    with torch.autocast(DEVICE, torch.float16):
        ops.rotary_attention(x, x, x)
    assert calls == ([torch.float16] * 2 if CUDA else [])
    calls.clear()
    monkeypatch.setenv("FASTBERT_BACKEND", "triton")
    ops.attention(x, x, x)
    ops.rotary_attention(x, x, x)
    assert calls == [torch.float32] * 2
    if not CUDA:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(BackendError, match="it would run on cpu, not on CUDA, and TRITON_INTERPRET=1 is not set"):
            ops.attention(x, x, x)


@pytest.mark.parametrize("Model, flags", [(RoFormerModel, {}), (NezhaModel, {"max_relative_position": 5})])
def test_models_train_on_it_as_on_the_portable_twin(Model, flags, monkeypatch):
    """What a model does in 16 bits on CUDA, where the kernels are the default."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    family = Model.__name__.removesuffix("Model").lower()
    model = Model(EncoderConfig(family, **sizes, **flags)).to(DEVICE).eval()
    ids = torch.randint(1, 40, (2, 20), device=DEVICE)
    mask = torch.arange(20, device=DEVICE) < torch.tensor([[20], [7]], device=DEVICE)
    results, every = [], fused_attention.backends(torch.empty(0))
    for only in ("triton", "torch"):
        monkeypatch.setattr(fused_attention, "backends", lambda _, only=only: {only: every[only]})
        model.zero_grad()
        output = model(ids, attention_mask=mask).last_hidden_state
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
