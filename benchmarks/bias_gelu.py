"""`bias_gelu`, forward and backward, on a GPU: the Triton kernel against PyTorch, eager and compiled.

    python -m benchmarks.bias_gelu --write

Shapes are rows x intermediate_size of base and large models. Each provider is first held to `fastbert.testing.compare`.
GB/s counts what must move: forward reads x and writes y; backward reads dy and x and writes dx.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import environment, percentiles, time_interleaved, write_rows
from fastbert import ops, reference
from fastbert.testing import compare

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = [(4096, 3072), (16384, 3072), (32768, 3072), (16384, 4096)]


def eager(x: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    """What a PyTorch user writes."""
    return F.gelu(x + bias, approximate=approximate)


def make_steps(op: Callable, x: Tensor, bias: Tensor, dy: Tensor) -> dict[str, Callable[[], object]]:
    """{direction: a function that runs it once}."""
    with torch.enable_grad():
        y = op(x, bias)

    def forward() -> None:
        with torch.no_grad():
            op(x, bias)

    return {"forward": forward, "backward": lambda: torch.autograd.grad(y, (x, bias), dy, retain_graph=True)}


def measure(shape: tuple[int, int], dtype: str, approximate: str, arguments: argparse.Namespace) -> list[dict]:
    """Check and time all providers on one shape; print a line each; return the rows."""
    x, dy = (torch.randn(shape, device=arguments.device, dtype=DTYPES[dtype]) for _ in range(2))
    bias = torch.randn(shape[1], device=arguments.device, dtype=DTYPES[dtype], requires_grad=True)
    x.requires_grad_()
    providers = {"eager": partial(eager, approximate=approximate)}
    if arguments.device.startswith("cuda"):
        providers["compiled"] = torch.compile(providers["eager"])
    for name in arguments.backends:
        providers[name] = partial(ops.bias_gelu, approximate=approximate, backend=name)
        compare(providers[name], partial(reference.bias_gelu, approximate=approximate), {"x": x[:64], "bias": bias})
    steps = {name: make_steps(op, x, bias, dy) for name, op in providers.items()}
    rows = []
    for direction, tensors in (("forward", 2), ("backward", 3)):
        timed = {name: found[direction] for name, found in steps.items()}
        medians = {}
        for name, times in time_interleaved(timed, arguments.rounds, arguments.device).items():
            numbers = percentiles(times)
            medians[name] = numbers["p50_ms"]
            speed = tensors * x.numel() * x.element_size() / numbers["p50_ms"] / 1e6
            ratio = medians["eager"] / numbers["p50_ms"]
            print(
                f"{shape!s:16}{dtype:6}{approximate:6}{direction:10}{name:10}{1e3 * numbers['p50_ms']:10.1f} us"
                f"{speed:9.0f} GB/s{ratio:7.2f}",
                flush=True,
            )
            case = {
                "op": "bias_gelu",
                "rows": shape[0],
                "columns": shape[1],
                "dtype": dtype,
                "approximate": approximate,
            }
            measured = {key: round(value, 5) for key, value in numbers.items()} | {"gb_per_s": round(speed, 1)}
            rows.append(case | {"direction": direction, "provider": name} | measured | {"ratio": round(ratio, 3)})
    return [row | environment(arguments.device) for row in rows]


def main() -> None:
    """Run all shapes, dtypes and forms of GELU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--backends", nargs="+", default=["triton", "torch"], help="default: triton torch")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--rounds", type=int, default=50, help="default: 50")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results/bias_gelu.jsonl")
    arguments = parser.parse_args()
    for shape, dtype, approximate in product(SHAPES, arguments.dtypes, ("none", "tanh")):
        rows = measure(shape, dtype, approximate, arguments)
        if arguments.write:
            write_rows(rows, "bias_gelu.jsonl")


if __name__ == "__main__":
    main()
