"""`fastbert bench train` and `feed`: tokens, utilisation, the parts of a step."""

import re

import pytest
import torch
from test_bench import quick_ceilings  # noqa: F401

from benchmarks import breakdown, cli, rows
from benchmarks.ceilings import Work
from benchmarks.harness import Case

pytestmark = pytest.mark.usefixtures("quick_ceilings")


def test_the_feed_is_measured_alone(tmp_path):
    argv = [
        "feed",
        "--device",
        "cpu",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
        "--providers",
        "fastbert",
        "--shape",
        "B=3",
        "L=40",
    ]
    for filled in (0, 1):
        assert cli.main([*argv, f"filled={filled}"]) == 0
    found = [row for row in rows.read(tmp_path) if row["op"] == "feed"]
    assert [row["shape"]["filled"] for row in found] == [0, 1]
    for row in found:
        labels, tokens = (int(word) for word in row["checked"].split() if word.isdecimal())
        assert 0.1 < labels / tokens < 0.2 and 60 < tokens <= 120
        assert 60 < row["tokens_per_s"] * row["p50_us"] / 1e6 <= 120


def test_the_feed_stands_beside_the_collator_of_transformers(tmp_path):
    argv = ["feed", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path), "--shape", "B=3", "L=40"]
    for masking in ("token", "whole_word", "macbert"):
        assert cli.main([*argv, f"masking={masking}"]) == 0
    found = {(row["provider"], row["shape"]["masking"]): row for row in rows.read(tmp_path) if row["op"] == "feed"}
    for masking in ("token", "whole_word"):
        labels, tokens = map(int, re.findall(r"\d+", found["transformers", masking]["checked"]))
        assert 0.05 < labels / tokens < 0.25 and 60 < tokens <= 120
    assert "single tokens and whole words" in found["transformers", "macbert"]["reason"]


def test_preparing_text_is_measured(tmp_path):
    argv = ["prepare", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path), "--shape", "copies=1"]
    assert cli.main([*argv, "words=segmented"]) == 0
    (row,) = [row for row in rows.read(tmp_path) if row["op"] == "prepare"]
    tokens, characters = map(int, re.findall(r"\d+", row["checked"]))
    assert tokens == characters > 300_000
    assert row["chars_per_s"] * row["p50_us"] / 1e6 == pytest.approx(characters, rel=1e-3)


def test_a_training_step_tells_tokens_and_its_parts(tmp_path, capsys):
    benchmark = cli.load("train")
    shape = benchmark.shapes(False)[0] | benchmark.tiny | {"optimizer": "lamb"}
    sizes = [f"{key}={value}" for key, value in shape.items()]
    argv = ["train", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path), "--shape", *sizes]
    assert cli.main([*argv, "--providers", "fastbert", "transformers-sdpa"]) == 0
    found = {row["provider"]: row for row in rows.read(tmp_path) if row["op"] == "train"}
    assert "transformers has no LAMB" in found["transformers-sdpa"]["reason"]
    row = found["fastbert"]
    assert row["tokens_per_s"] == pytest.approx(1e6 * 2 * 32 * shape["fill"] / row["p50_us"], rel=0.05)
    assert "mfu" not in row  # of a CPU nobody says the peak
    parts = {part["name"]: part for part in row["breakdown"]}
    assert {"matrix products", "attention", "optimizer", "rest"} <= set(parts)
    assert parts["matrix products"]["floor_us"] > 0 and parts["rest"]["floor_us"] is None
    said = capsys.readouterr().out
    assert "tokens/s" in said and "matrix products" in said


def test_model_flop_utilisation_is_by_the_data_sheet(monkeypatch):
    """BERT-base on 512 tokens, V = 30522: 588 MFLOP per token, so that 60 % of an H100 are 1.01 M tokens/s."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    benchmark = cli.load("train")
    case = Case(benchmark.shapes(True)[0] | {"vocab": 30522}, "bf16", "cuda")
    assert benchmark.work(case, "step").flops / (32 * 512) == pytest.approx(588e6, rel=0.01)
    found = benchmark.figures(case, "step", p50_us=1e6 * 32 * 512 / 1.01e6)
    assert found["tokens_per_s"] == pytest.approx(1.01e6) and found["mfu"] == pytest.approx(60, rel=0.01)
    assert "mfu" not in benchmark.figures(Case(case.shape, "fp32", "cuda"), "step", 1e4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A40")
    assert "mfu" not in benchmark.figures(case, "step", 1e4)


KERNELS = {
    "_attention_forward_kernel": "attention",
    "_relative_attention_backward_kv_kernel": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "_dropout_add_layer_norm_forward_kernel": "dropout + residual + LayerNorm",
    "_bias_gelu_backward_kernel": "bias + GELU",
    "_embedding_forward_kernel": "embeddings",
    "_cross_entropy_kernel": "cross-entropy",
    "void fastbert::lamb_kernel<float>(Plan)": "optimizer",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "matrix products",
    "void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor>": "gradients and copies",
    "Memset (Device)": "gradients and copies",
    "void at::native::reduce_kernel<512, 1, ReduceOp<float, NormTwoOps<float, float>>>": "optimizer",
    "void something_else(int)": "rest",
}


@pytest.mark.parametrize(("name", "part"), KERNELS.items())
def test_kernels_belong_to_parts(name, part):
    assert breakdown.part_of(name) == part


def test_every_kernel_of_ours_in_a_training_step_belongs_to_a_part():
    """By its name in the source, as a profiler tells it."""
    folder, inference = rows.FOLDER.parent / "kernels", {"encoder_layers"}
    names = {
        name
        for path in folder.glob("*.py")
        if path.stem not in inference
        for name in re.findall(r"@triton.jit.*\ndef (\w+_kernel)\(", path.read_text(encoding="utf-8"))
    }
    assert len(names) > 8 and {name for name in names if breakdown.part_of(name) == breakdown.REST} == set()


def test_idle_is_what_no_kernel_covers():
    assert breakdown.gaps([(5, 7), (0, 2), (1, 3), (6, 8), (6.5, 7)]) == 2


def test_parts_are_sums_of_a_step_and_idle_is_what_is_left():
    times = [("_attention_forward_kernel", 30.0)] * 3 + [("nvjet_a", 60.0)] * 6 + [("odd", 3.0)] * 3
    found = breakdown.summed(times, 9.0, {"attention": Work(bytes=5.0)}, lambda work: work.bytes)
    assert [tuple(part) for part in found] == [
        ("matrix products", 120.0, 2, None),
        ("attention", 30.0, 1, 5.0),
        ("rest", 3.0, 1, None),
        ("idle", 3.0, 0, None),
    ]
    table = breakdown.lines(found)
    assert "76.9 %" in table and "16.7" in table
