"""`lamb`: one step over all parameters of a model, in place.

Floors: parameter, gradient and both moments in, parameter and moments out: 28 bytes a parameter in float32. The peers
follow other definitions of LAMB, or are AdamW, which needs no norms: they move the same bytes and cannot be compared.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastbert
from fastbert import ops, reference
from fastbert.testing import compare

from .ceilings import Work
from .clocks import Step
from .harness import Benchmark, Case, Missing, Provider
from .op import compiled, generator_on, imported

STEP = {"step": 10, "lr": 1e-3, "weight_decay": 0.01}
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")
BYTES_PER_PARAMETER = 28
COMPILED = 50  # tensors


class LambBenchmark(Benchmark):
    op = "lamb"
    modes = ("step",)
    tiny = {"preset": "albert-tiny-chinese"}

    def shapes(self, cuda: bool) -> list[dict]:
        presets = ["bert-base-chinese", "albert-base-v2", "bert-large-uncased"] if cuda else ["albert-base-v2"]
        return [{"preset": preset} for preset in presets]

    def dtypes(self, cuda: bool):
        return ("fp32",)

    def inputs(self, case: Case, seed: int) -> dict:
        """The four lists, as a run in its tenth step would have them."""
        return make_lists(sizes(case["preset"]), case.device, seed)

    def providers(self, case: Case) -> list[Provider]:
        fastbert.EncoderConfig.from_preset(case["preset"])  # ConfigError if there is none
        ours = [Provider(f"fastbert-{name}", partial(_ours, name)) for name in ("cuda", "torch")]
        other = {"comparable": False, "checked": False}
        peers = [
            Provider("adamw-fused", _adamw, **other),
            Provider("timm-lamb", _timm, package="timm", **other),
            Provider("pytorch-optimizer-lamb", _pytorch_optimizer, package="pytorch-optimizer", **other),
            Provider("eager", _eager),
            Provider("compiled", _compiled),
        ]
        return [*ours, *peers]

    def check(self, provider: Provider, op: Callable, case: Case) -> str:
        """compare() on copies; on a CPU without the tensors of a million elements and more."""

        def stepped(**lists: list[Tensor]) -> list[list[Tensor]]:
            copies = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
            op(**copies)
            return [copies["params"], copies["exp_avgs"], copies["exp_avg_sqs"]]

        checked = [size for size in sizes(case["preset"]) if case.cuda or size.numel() < 10**6]
        inputs = make_lists(checked, case.device, seed=1)
        rows = compare(stepped, partial(reference.lamb, **STEP), inputs, poison=provider.ours)
        return f"{len(rows)} tensors: at most {max(row.error / row.bound for row in rows):.2f} of the bound"

    def step(self, op: Callable, inputs: dict, mode: str) -> Step:
        return lambda: op(**inputs)

    def work(self, case: Case, mode: str) -> Work:
        return Work(bytes=BYTES_PER_PARAMETER * parameters(case))

    def figures(self, case: Case, mode: str, p50_us: float) -> dict[str, float]:
        return {"parameters_per_s": 1e6 * parameters(case) / p50_us}


def sizes(preset: str) -> list[torch.Size]:
    """The shapes of the parameters of a preset's masked-language model."""
    config = fastbert.EncoderConfig.from_preset(preset)
    with torch.device("meta"):
        model = fastbert.model_class(config.model_type, "masked_lm")(config)
    return [parameter.shape for parameter in model.parameters()]


def parameters(case: Case) -> int:
    return sum(size.numel() for size in sizes(case["preset"]))


def make_lists(shapes: list[torch.Size], device: str, seed: int) -> dict[str, list[Tensor]]:
    generator = generator_on(device, seed)
    lists = {name: [0.02 * torch.randn(s, generator=generator, device=device) for s in shapes] for name in LISTS}
    lists["exp_avg_sqs"] = [v.square() for v in lists["exp_avg_sqs"]]
    return lists


def _ours(backend: str, case: Case) -> Callable:
    return partial(ops.lamb, **STEP, backend=backend)


def _eager(case: Case) -> Callable:
    return partial(ops.lamb, **STEP, backend="reference")


def _optimizer(build: Callable) -> Callable:
    """A peer's optimizer as a function of the lists; it keeps moments of its own."""
    built = {}

    def run(params, grads, exp_avgs, exp_avg_sqs) -> None:
        key = params[0].data_ptr()
        if key not in built:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            built[key] = build(params)
        built[key].step()

    return run


def _compiled(case: Case) -> Callable:
    count = len(sizes(case["preset"]))
    if count > COMPILED:
        raise Missing(f"torch.compile takes minutes for {count} tensors; it is tried with up to {COMPILED}")
    return compiled(_eager(case))


def _adamw(case: Case) -> Callable:
    """capturable: so that its steps can be CUDA graphs, as the others' are."""
    flags = {"lr": STEP["lr"], "weight_decay": STEP["weight_decay"], "fused": True, "capturable": case.cuda}
    return _optimizer(partial(torch.optim.AdamW, **flags))


def _timm(case: Case) -> Callable:
    lamb = imported("timm.optim.lamb", "Lamb", "timm")
    return _optimizer(partial(lamb, lr=STEP["lr"], weight_decay=STEP["weight_decay"]))


def _pytorch_optimizer(case: Case) -> Callable:
    lamb = imported("pytorch_optimizer", "Lamb", "pytorch-optimizer")
    return _optimizer(partial(lamb, lr=STEP["lr"], weight_decay=STEP["weight_decay"]))


BENCHMARK = LambBenchmark()
