"""The static report: what the compilers say of every kernel that ships, rules that can fail, and how SASS is read."""

import ast
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import sass, static

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

ROOT = Path(__file__).parent.parent


@triton.jit
def _product_kernel(p_a, p_b, p_c, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    o_tile = o[:, None] * BLOCK + o[None, :]
    b_sum = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, n, BLOCK):
        b_sum = tl.dot(tl.load(p_a + start * BLOCK + o_tile), tl.load(p_b + start * BLOCK + o_tile), b_sum)
    tl.store(p_c + o_tile, b_sum)


def toys():
    """Compiled with what ships: a matrix product as it should be, and the same with too few registers for it."""
    a, c = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64)
    yield "good", lambda: _product_kernel[(1,)](a, a, c, 64, BLOCK=64)
    yield "starved", lambda: _product_kernel[(1,)](a, a, c, 64, BLOCK=64, num_warps=1, maxnreg=64)


@pytest.fixture(scope="module")
def tools():
    return static.Toolchain.find()


@pytest.fixture(scope="module")
def everything(tools):
    configurations = {**static.CONFIGURATIONS, "toys": toys}
    return static.collect(configurations, static.SOURCES, tools, list(sass.TARGETS))


@pytest.fixture(scope="module")
def shipped(everything):
    return [each for each in everything if each.source != "toys"]


@pytest.fixture(scope="module")
def toy(everything):
    return {(each.names[0], each.target): each for each in everything if each.source == "toys"}


def title(each):
    return f"{each.source}: {each.kernel}, {', '.join(each.names)}, sm_{each.target}"


def spilling(rows):
    return [title(each) for each in rows if each.spills]


def oversized(rows):
    return [title(each) for each in rows if each.shared > sass.SM[each.target].shared_cta]


def without_matrix_unit(rows):
    """Kernels that multiply matrices, but not with their target's matrix unit in their longest loop. IEEE products of
    float32 have none; those of tiles of less than 64 rows are made by the older instructions everywhere."""
    units, older = {90: ("HGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCQMMA")}, ("HMMA", "QMMA")

    def unit(each):
        flat = each.kernel == "_linear_kernel" and re.search(r"BLOCK_M=(16|32)\b", each.settings)
        return older if flat else units.get(each.target, older)

    used = {id(each): {i.opcode for i in each.loops[0][1]} for each in rows}
    wanted = [each for each in rows if each.dot and not any(name.startswith("float32") for name in each.names)]
    return [title(each) for each in wanted if not used[id(each)] & {*unit(each)}]


def serialized(rows):
    """Kernels for sm_90 of which some loop waits for every single instruction of the matrix unit."""
    found = []
    for each in rows:
        for _, loop in each.loops:
            products = sum(i.opcode == "HGMMA" for i in loop)
            starts = sum(i.mnemonic.startswith("WARPGROUP.ARRIVE") for i in loop)
            if products and starts >= products:
                found.append(title(each))
    return found


def test_no_kernel_spills(shipped):
    assert not spilling(shipped)


def test_no_kernel_asks_for_more_shared_memory_than_its_target_has(shipped):
    assert not oversized(shipped)
    for each in shipped:
        ctas, by = each.residency
        assert ctas > 0, f"{title(each)}: not one CTA fits a multiprocessor, for want of {by}"


def test_matrix_products_run_on_the_matrix_unit(shipped):
    assert not without_matrix_unit(shipped)


def test_matrix_products_run_asynchronously(shipped):
    assert not serialized(shipped)


def test_products_of_float32_are_not_rounded(shipped):
    """The matrix units would round its operands to TF32."""
    exact = [each for each in shipped if each.dot and each.names[0].startswith("float32")]
    assert {each.target for each in exact} == set(sass.TARGETS)
    assert not [title(each) for each in exact if any(i.pipe == "mma" for i in each.code)]


PASSES = ("forward", "backward_q", "backward_kv")


def test_attention_multiplies_on_the_matrix_unit_alone_and_loads_16_bytes(shipped):
    """In the loops of what is trained, on sm_90: every product with HGMMA, operands 16 bytes at a time; the rest are
    single numbers per row: log-sum-exp and delta, angles of a tile's first row."""
    rows = [
        r
        for r in shipped
        if r.source == "attention" and r.target == 90 and " 64 " in r.names[0] and "mask" not in r.names[0]
    ]
    rows = [r for r in rows if "float32" not in r.names[0]]
    assert {r.kernel for r in rows} == {f"_attention_{name}_kernel" for name in PASSES}
    for each in rows:
        loops = products(each)
        assert len(loops) == (1 if each.kernel.endswith("_kv_kernel") else 2), title(each)  # and for the last keys
        for loop in loops:
            assert {i.opcode for i in loop if i.pipe == "mma"} == {"HGMMA"}, title(each)
            loads = [i.mnemonic for i in loop if i.pipe == "gmem"]
            assert {m.rpartition(".")[2] for m in loads} <= {"128", "E"}, (title(each), loads)
            assert sum(m.endswith(".128") for m in loads) >= 4, (title(each), loads)
        assert each.residency[0] * each.used.warps >= 8, title(each)


def products(each):
    """The loops that multiply matrices, longest first."""
    return [loop for loop in sass.loops(each.code) if any(i.pipe == "mma" for i in loop)]


def test_relative_attention_multiplies_on_the_matrix_unit_alone_and_shuffles_for_sums_of_rows_only(shipped):
    """On sm_90, of what is trained: a loop for the tiles that touch the band and one for the others, each once more for
    the last keys. A thread has two rows of a tile of queries by keys, and a sum or a maximum of four lanes takes two
    shuffles each."""
    rows = [r for r in shipped if r.source.startswith("relative") and r.target == 90 and " 64 R64" in r.names[0]]
    rows = [r for r in rows if "float32" not in r.names[0] and "mask" not in r.names[0]]
    reductions = dict(zip(PASSES, (4, 2, 0), strict=True))  # at most, with dropout's
    reductions = {f"_relative_attention_{name}_kernel": count for name, count in reductions.items()}
    assert {r.kernel for r in rows} == set(reductions)
    for each in rows:
        loops = products(each)
        assert len(loops) == (2 if each.kernel.endswith("_kv_kernel") else 4), title(each)
        for loop in loops:
            assert {i.opcode for i in loop if i.pipe == "mma"} == {"HGMMA"}, title(each)
            assert sum(i.pipe == "shfl" for i in loop) <= 4 * reductions[each.kernel], title(each)
        assert each.residency[0] * each.used.warps >= 8, title(each)


def test_tiles_outside_of_the_band_cost_what_plain_attention_costs(shipped):
    """Clocks of the pipe that binds per element of a tile, on sm_90: at most 10 % more than of the same pass without
    relative positions, in the loop over whole tiles."""
    clocks = {}
    for each in shipped:
        if each.target == 90 and each.names[0] in ("float16 64 absolute packed", "float16 64 R64 packed"):
            settings = dict(word.split("=") for word in each.settings.split())
            tile = int(settings["BLOCK_M"]) * int(settings["BLOCK_N"])
            each_tile = (sass.clocks(loop, 90, each.used.warps) for loop in products(each))
            clocks[each.kernel] = min(c[sass.binding(c).rstrip("?")] / tile for c in each_tile)
    for name in PASSES:
        relative, plain = (clocks[f"_{prefix}attention_{name}_kernel"] for prefix in ("relative_", ""))
        assert relative <= 1.1 * plain, (name, clocks)


def test_head_dims_that_16_does_not_divide_load_pairs(shipped):
    """26 elements of 2 bytes: 4 bytes at a time, not 2."""
    rows = [each for each in shipped if each.names[0].startswith("float16 26")]
    assert len(rows) == 6 * len(sass.TARGETS)
    narrow = [
        (title(each), i.mnemonic) for each in rows for i in each.code if i.pipe == "gmem" and ".U16" in i.mnemonic
    ]
    assert not narrow


def test_gelu_has_registers_to_spare_and_moves_16_bytes_at_a_time(shipped):
    rows = [each for each in shipped if each.source == "gelu" and each.kernel != "_column_sum_kernel"]
    assert len(rows) == 2 * 6 * len(sass.TARGETS)
    for each in rows:
        assert each.used.registers <= 128, title(each)
        accesses = [i.mnemonic for i in each.code if i.pipe in ("gmem", "local")]
        assert accesses and all(m.startswith(("LDG", "STG")) and ".128" in m for m in accesses), (title(each), accesses)


def test_cross_entropy_moves_16_bytes_at_a_time_and_has_two_rows_on_an_sm(shipped):
    """Two, or the second sweep would not find them in the caches; and no thread waits for others within a sweep."""
    rows = [each for each in shipped if each.source == "cross_entropy"]
    assert len(rows) == 4 * len(sass.TARGETS)
    for each in rows:
        loops = sass.loops(each.code)
        assert len(loops) == (1 if "loss only" in each.names else 2), title(each)
        for i in itertools.chain.from_iterable(loops):
            assert i.pipe not in ("shfl", "smem"), (title(each), i.text)
            assert i.pipe != "gmem" or ".128" in i.mnemonic, (title(each), i.text)
        assert each.residency[0] * each.used.warps in (16, 32), title(each)


def test_layer_norm_moves_16_bytes_at_a_time(shipped):
    """But for the seed and the statistics of its rows. In 16 bits four CTAs of the backward fit an SM of sm_90, so that
    its 512 programs run at once on 132."""
    rows = [each for each in shipped if each.source == "layer_norm" and each.kernel != "_column_sum_kernel"]
    assert {each.kernel for each in rows} == {
        f"_dropout_add_layer_norm_{name}_kernel" for name in ("forward", "backward")
    }
    for each in rows:
        accesses = [i.mnemonic for i in each.code if i.pipe == "gmem"]
        assert sum(".128" not in m for m in accesses) <= 5, (title(each), accesses)
        if each.target == 90 and "float16 1024" in each.names[0]:
            assert each.residency[0] >= 4, title(each)


def test_embedding_moves_16_bytes_at_a_time(shipped):
    """All but ids, the seed and statistics: three tables and two vectors in thirds of a row; dy and three tables of two
    rows, and a vector; eight rows. In 16 bits four CTAs of the backward fit an SM of sm_90."""
    rows = [each for each in shipped if each.source == "embedding" and each.names[0].startswith("bfloat16 768 wtp")]
    wide = {f"_embedding_{name}_kernel": loads for name, loads in (("forward", 15), ("backward", 9), ("chunk", 8))}
    assert {*wide} <= {each.kernel for each in rows}
    for each in rows:
        loads = [i.mnemonic for i in each.code if i.opcode == "LDG"]
        if each.kernel in wide:
            assert sum(".128" in m for m in loads) == wide[each.kernel], (title(each), loads)
            assert not any(".U16" in i.mnemonic for i in each.code if i.pipe == "gmem"), title(each)
        if each.kernel == "_embedding_backward_kernel" and each.target == 90:
            assert each.residency[0] >= 4, title(each)


def test_every_triton_kernel_is_compiled_for_every_target(shipped):
    kernels = set()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                    kernels.add((path.stem, node.name))
    assert kernels
    missing = set(itertools.product(kernels, sass.TARGETS)) - {((r.source, r.kernel), r.target) for r in shipped}
    assert not missing, "CONFIGURATIONS in benchmarks/static.py launches none of these"


def test_every_cuda_kernel_is_compiled_for_every_target(shipped, tools):
    if tools.nvcc is None:
        pytest.skip(tools.cuda)
    found = {(each.source, each.kernel.partition("<")[0], each.target) for each in shipped}
    names = [(path.stem, name) for path in static.SOURCES for name in cuda_kernels(path)]
    assert names and {(*name, target) for name in names for target in tools.cuda_targets} <= found


def test_lamb_moves_16_bytes_at_a_time(shipped, tools):
    """A thread has 8 elements: g, m, v, w in and m, v out in the first phase; m, v, w in and w and its copy out in the
    second."""
    if tools.nvcc is None:
        pytest.skip(tools.cuda)
    for each in shipped:
        if each.kernel != "lamb_kernel":
            continue
        wide = [i.opcode for i in each.code if i.opcode in ("LDG", "STG") and ".128" in i.mnemonic]
        assert wide.count("LDG") >= 2 * 7 + 2 and wide.count("STG") >= 2 * 4 + 1, title(each)


def cuda_kernels(path):
    """The names behind __global__, its attributes left out."""
    for definition in path.read_text(encoding="utf-8").split("__global__")[1:]:
        words = definition.split("{")[0].replace("(", " ( ").split()
        yield next(word for word, after in itertools.pairwise(words) if after == "(" and word.endswith("_kernel"))


def test_the_committed_table_is_what_the_compilers_say(shipped, tools):
    diff, elsewhere = static.compare(static.TABLE.read_text(encoding="utf-8"), static.table(shipped, tools))
    assert not diff, "renew it: python -m benchmarks.static --write\n" + "\n".join(diff)
    if elsewhere:
        pytest.skip(f"other compilers wrote the committed table, not {', '.join(h[3:] for h in elsewhere)}")


def test_what_spills_is_flagged(toy):
    assert not spilling(toy["good", target] for target in sass.TARGETS)
    assert len(spilling(toy["starved", target] for target in sass.TARGETS)) == len(sass.TARGETS)


@pytest.mark.parametrize(
    "target, opcode", [(80, "HMMA"), (89, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")]
)  # fmt: skip
def test_a_matrix_product_shows_its_unit(toy, target, opcode):
    good = toy["good", target]
    where, loop = good.loops[0]
    assert good.dot and where == "loop 1" and opcode in {i.opcode for i in loop}
    assert not without_matrix_unit([good])
    # 2 x 64 x 64 x 64 FLOP at the rate of the unit
    clocks = sass.clocks(loop, target, good.used.warps)["mma"]
    expected = {80: 256, 89: 512, 90: 128, 120: 512}.get(target, math.nan)
    assert clocks == pytest.approx(expected, nan_ok=True)


def test_a_matrix_product_without_its_unit_is_flagged(toy):
    good = toy["good", 90]
    without = [i for i in good.code if i.pipe != "mma"]
    assert without_matrix_unit([changed(good, code=without)]) == [title(good)]


def test_products_that_wait_for_each_other_are_flagged(toy):
    good = toy["good", 90]
    waiting = [
        sass.Instruction(i.address, i.predicate, "WARPGROUP.ARRIVE" if i.pipe == "alu" else i.text, i.target)
        for i in good.code
    ]
    assert not serialized([good]) and serialized([changed(good, code=waiting)]) == [title(good)]


def test_too_much_shared_memory_is_flagged(toy):
    assert oversized([changed(toy["good", 89], shared=99 * 1024 + 1)])
    assert not oversized([changed(toy["good", 89], shared=99 * 1024)])


def changed(each, **changes):
    return static.Compiled(**{**vars(each), **changes})


def test_a_part_is_compared_where_the_same_compiler_wrote_both():
    old = "rates\n\n== Triton kernels: triton 1\na\nb\n\n== CUDA sources: nvcc 1\nc\n"
    assert static.compare(old, old) == ([], [])
    diff, elsewhere = static.compare(old, old.replace("nvcc 1", "nvcc 2").replace("\nc", "\nd").replace("\nb", "\nB"))
    assert [line for line in diff if line[:2] in ("-b", "+B")] == ["-b", "+B"] and not {"-c", "+d"} & set(diff)
    assert elsewhere == ["== CUDA sources: nvcc 2"]


@pytest.mark.parametrize("arguments", ["--write --targets sm_90", "--targets sm_75", "--kernels x", "--write --check"])
def test_says_what_it_cannot_do(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        static.main(arguments.split())
    assert error.value.code == 2 and "usage:" in capsys.readouterr().err


# An outer loop around two inner ones; the second waits on a barrier out of line. Behind the last EXIT, ptxas's padding.
SASS = """
	.headerflags	@"EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 FFMA R4, R4, R5, R6 ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R2 ;
        /*0060*/              @!P2 BRA 0xe0 ;
        /*0070*/                   LDS.64 R8, [R3] ;
        /*0080*/                   CALL.REL.NOINC 0x110 ;
        /*0090*/                   BRA.U UP0, 0x50 ;
        /*00a0*/               @P3 CALL.REL.NOINC 0xc0 ;
        /*00b0*/                   BRA 0x10 ;
        /*00c0*/                   STG.E [R2.64], R8 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R2 ;
        /*00f0*/              @!P2 BRA 0xe0 ;
        /*0100*/                   BRA 0x70 ;
        /*0110*/                   MUFU.RCP R8, R8 ;
        /*0120*/                   RET.REL.NODEC R20 0x0 ;
        /*0130*/                   BRA 0x130;
        /*0140*/                   NOP;
"""


def test_loops_are_the_innermost_that_work():
    code = sass.parse(SASS)
    assert [[i.address for i in loop] for loop in sass.loops(code)] == [
        [0x50, 0x60, 0x70, 0x80, 0x90, 0xE0, 0xF0, 0x100],
        [0x20, 0x30, 0x40],
    ]


def test_a_body_ends_before_the_padding():
    body = sass.body(sass.parse(SASS))
    assert [i.address for i in body] == list(range(0, 0x130, 16))
    assert sass.loops(body[:1]) == []


def instructions(*texts):
    lines = (f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate(texts))
    return sass.parse("\n".join(lines))


def test_instructions_are_counted_by_pipe_whatever_their_predicate():
    code = sass.parse(SASS)
    loop = sass.loops(code)[1]
    assert {pipe: n for pipe, n in sass.count(loop).items() if n} == {"issue": 3, "gmem": 1, "fma": 1, "other": 1}
    assert loop[1].predicate == "@!P1" and loop[1].mnemonic == "FFMA"
    kinds = {
        "UIADD3 UR4, UR4, UR5, URZ": "other",
        "R2UR UR4, R2": "other",
        "LDL R2, [R1]": "local",
        "DADD R2, R2, R4": "fp64",
        "F2F.F64.F32 R2, R4": "fp64",
        "F2F.F32.F16 R2, R4": "mufu",
        "F2FP.BF16.F32.PACK_AB R2, R3, R4": "cvt",
        "BAR.SYNC.DEFER_BLOCKING 0x0": "sync",
        "UTCHMMA gdesc[UR6], gdesc[UR8]": "mma",
    }
    assert {text: i.pipe for text, i in zip(kinds, instructions(*kinds), strict=True)} == kinds


@pytest.mark.parametrize(
    "text, target, expected",
    [
        # eight warps of 32 lanes, on 64 or 128 lanes a clock
        ("FFMA R4, R4, R5, R6", 80, {"issue": 2, "fma": 4}),
        ("FFMA R4, R4, R5, R6", 90, {"issue": 2, "fma": 2}),
        ("IMAD R4, R4, R5, R6", 90, {"issue": 2, "fma": 4}),
        ("LOP3.LUT R4, R4, R5, RZ, 0xc0, !PT", 90, {"issue": 2, "alu": 4}),
        ("MUFU.EX2 R4, R4", 90, {"issue": 2, "mufu": 16}),
        ("DFMA R4, R4, R6, R8", 80, {"issue": 2, "fp64": 8}),
        ("DFMA R4, R4, R6, R8", 89, {"issue": 2, "fp64": 128}),
        ("DFMA R4, R4, R6, R8", 90, {"issue": 2, "fp64": 4}),
        ("SHFL.BFLY PT, R4, R5, 0x1, 0x1f", 90, {"issue": 2, "shfl": 8}),
        ("LDS R4, [R5]", 90, {"issue": 2, "smem": 8}),
        ("LDS.U16 R4, [R5]", 90, {"issue": 2, "smem": 8}),
        ("LDSM.16.MT88.4 R4, [R8]", 90, {"issue": 2, "smem": 32}),
        ("STG.E.64 desc[UR4][R2.64], R4", 90, {"issue": 2, "gmem": 16}),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64]", 90, {"issue": 2, "gmem": 32}),
        ("STL.128 [R1], R4", 90, {"issue": 2, "local": 32}),
        # 2 x 16 x 8 x 16 FLOP a warp, at 2048, 1024 and, through HMMA, 2048 a clock
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 80, {"issue": 2, "mma": 16}),
        ("HMMA.16816.F32 R4, R8, R12, R4", 89, {"issue": 2, "mma": 32}),
        ("HMMA.16816.F32 R4, R8, R12, R4", 90, {"issue": 2, "mma": 16}),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 80, {"issue": 2, "mma": 16}),
        # two warpgroups, each 2 x 64 x 128 x 16 FLOP, at 4096 a clock
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", 90, {"issue": 2, "mma": 128}),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24", 90, {"issue": 2, "mma": 128}),
        ("WARPGROUP.ARRIVE", 90, {"issue": 2}),
    ],
)
def test_clocks_of_eight_warps(text, target, expected):
    clocks = sass.clocks(instructions(text), target, warps=8)
    assert {pipe: value for pipe, value in clocks.items() if value} == expected


def test_the_pipe_that_binds():
    assert sass.binding(sass.clocks(instructions("FFMA R4, R4, R5, R6", "MUFU.EX2 R4, R4"), 90, 4)) == "mufu"
    unknown = sass.clocks(instructions("MUFU.EX2 R4, R4", "UTCHMMA gdesc[UR6], gdesc[UR8]"), 100, 4)
    assert math.isnan(unknown["mma"]) and sass.binding(unknown) == "mufu?"


@pytest.mark.parametrize(
    "target, used, expected",
    [
        (90, {"registers": 32, "shared": 0, "warps": 4}, (16, "regs")),
        (90, {"registers": 128, "shared": 0, "warps": 4}, (4, "regs")),
        (90, {"registers": 16, "shared": 0, "warps": 4}, (16, "warps")),
        (89, {"registers": 16, "shared": 0, "warps": 1}, (24, "CTAs")),
        (90, {"registers": 32, "shared": 113 * 1024, "warps": 4}, (2, "shared")),
        (90, {"registers": 32, "shared": 114 * 1024, "warps": 4}, (1, "shared")),
        (100, {"registers": 32, "shared": 0, "warps": 4, "tensor_columns": 256}, (2, "tensor")),
        (80, {"registers": 255, "shared": 0, "warps": 12}, (0, "regs")),
    ],
)
def test_ctas_that_fit_a_multiprocessor(target, used, expected):
    assert sass.residency(target, **used) == expected
