"""One LAMB step over all parameters of a model in float32: the compiled extension against the portable composition.

    python -m benchmarks.lamb --write

Every backend is first held to the reference in float64, on the model's small tensors. `adamw-fused` is PyTorch's fused
AdamW, which moves the same 28 bytes a parameter (p, g, m, v in; p, m, v out) but needs no norms: the yardstick of the
ratio, not LAMB.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import fastbert
from benchmarks.harness import environment, percentiles, time_interleaved, write_rows
from fastbert import ops, reference

BYTES_PER_PARAMETER = 28
STEP = {"step": 10, "lr": 1e-3, "weight_decay": 0.01}


def make_state(shapes: list[torch.Size], device: str, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Lists of parameters, gradients, first and second moments."""
    generator = torch.Generator().manual_seed(0)
    lists = [[0.02 * torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes] for _ in range(4)]
    lists[3] = [v.square() for v in lists[3]]
    return lists


def check(backend: str, shapes: list[torch.Size], device: str) -> None:
    """Stop unless a step of the backend equals the reference's in float64, to float32 rounding."""
    got = make_state(shapes, device)
    ops.lamb(*got, **STEP, backend=backend)
    want = reference.lamb(*make_state(shapes, device, torch.float64), **STEP)
    for found, expected in zip((got[0], got[2], got[3]), want, strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


def make_steps(shapes: list[torch.Size], arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """{provider: a function that does one step}."""
    steps = {}
    for backend in arguments.backends:
        check(backend, [shape for shape in shapes if shape.numel() < 10**6], arguments.device)
        state = make_state(shapes, arguments.device)
        steps[backend] = lambda state=state, backend=backend: ops.lamb(*state, **STEP, backend=backend)
    params, grads, *_ = make_state(shapes, arguments.device)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    steps["adamw-fused"] = torch.optim.AdamW(params, fused=True).step
    return steps


def main() -> None:
    """Time one step of each provider."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bert-base-chinese", help="default: bert-base-chinese")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--backends", nargs="+", default=["cuda", "torch"], help="default: cuda torch")
    parser.add_argument("--rounds", type=int, default=50, help="default: 50")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results/lamb.jsonl")
    arguments = parser.parse_args()
    config = fastbert.EncoderConfig.from_preset(arguments.preset)
    with torch.device("meta"):
        model = fastbert.model_class(config.model_type, "masked_lm")(config)
    shapes = [parameter.shape for parameter in model.parameters()]
    times = time_interleaved(make_steps(shapes, arguments), arguments.rounds, arguments.device)
    yardstick = percentiles(times["adamw-fused"])["p50_ms"]
    rows = []
    for provider, found in times.items():
        numbers = percentiles(found)
        speed = BYTES_PER_PARAMETER * model.num_parameters() / numbers["p50_ms"] / 1e6
        ratio = yardstick / numbers["p50_ms"]
        print(f"{arguments.preset:24}{provider:12}{numbers['p50_ms']:10.3f} ms{speed:9.0f} GB/s{ratio:7.2f}")
        case = {"op": "lamb", "model": arguments.preset, "dtype": "fp32", "provider": provider}
        measured = {key: round(value, 5) for key, value in numbers.items()} | {"gb_per_s": round(speed, 1)}
        rows.append(case | measured | {"ratio": round(ratio, 3)} | environment(arguments.device))
    if arguments.write:
        write_rows(rows, "lamb.jsonl")


if __name__ == "__main__":
    main()
