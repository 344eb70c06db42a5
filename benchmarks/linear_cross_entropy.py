"""`linear_cross_entropy`: the mean cross entropy of hidden weight^T + bias.

T rows of C columns, of which a share `labelled` has a label, and a vocabulary of V. 2458 rows are the labelled ones of
16384 tokens, as our models hand them over. Where there are others, fastbert-triton computes them too, and the floor
does not.

Floors: one product of the labelled rows forward, two backward. fwd+bwd is what training pays: fused forms compute the
gradients already in the forward.
"""

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F

from .ceilings import DTYPES, Work
from .harness import Case, Provider
from .op import OpBenchmark, generator_on, imported, normal

IGNORED = -100


class LinearCrossEntropyBenchmark(OpBenchmark):
    op = "linear_cross_entropy"
    tiny = {"T": 16, "C": 64, "V": 100}
    modes = ("fwd", "fwd+bwd")
    graph = False  # how many rows have a label is known on the device only, and most providers ask
    sweep = (
        "cross_entropy",
        [
            {"BLOCK": block, "num_warps": warps}
            for block, warps in product((2048, 4096, 8192, 16384), (8, 16, 32))
            if 4 <= block // warps // 32 <= 32 and block * warps >= 1 << 15
        ],
    )

    def shapes(self, cuda: bool) -> list[dict]:
        if not cuda:
            return [{"T": 1024, "C": 384, "V": 21128, "labelled": 0.15}]
        handed = {"T": 2458, "C": 768, "V": 21128, "labelled": 1.0}
        return [handed, {**handed, "V": 30522}, {**handed, "T": 16384}, {**handed, "T": 16384, "labelled": 0.15}]

    def flags(self, case: Case) -> dict:
        return {}

    def small(self, case: Case) -> Case:
        return case if case.cuda else case.but(T=min(case["T"], 200), V=min(case["V"], 1000))

    def checked_form(self, op: Callable, case: Case) -> Callable:
        """The loss times 50 T: the gradients of a mean are so small that the rounding of 1 would hide them."""
        return lambda **inputs: op(**inputs) * (50 * case["T"])

    def inputs(self, case: Case, seed: int) -> dict:
        generator = generator_on(case.device, seed)
        rows, width, vocabulary = case["T"], case["C"], case["V"]
        labels = torch.randint(vocabulary, (rows,), generator=generator, device=case.device)
        labels[torch.rand(rows, generator=generator, device=case.device) >= case["labelled"]] = IGNORED
        weight = normal((vocabulary, width), case, generator).detach().mul_(0.02)
        return {
            "hidden": normal((rows, width), case, generator),
            "weight": weight.requires_grad_(),
            "bias": normal((vocabulary,), case, generator),
            "labels": labels,
        }

    def work(self, case: Case, mode: str) -> Work:
        rows, width, vocabulary = case["T"] * case["labelled"], case["C"], case["V"]
        flops = 2 * rows * width * vocabulary
        once = (rows * width + vocabulary * width) * DTYPES[case.dtype].itemsize
        return Work(flops=flops, bytes=once) if mode == "fwd" else Work(flops=3 * flops, bytes=2 * once)

    def peers(self, case: Case) -> list[Provider]:
        return [Provider("torch", _torch), Provider("liger-kernel", _liger, package="liger-kernel", gpu=True)]


def _torch(case: Case) -> Callable:
    """What transformers does: the logits of all rows, then cross_entropy in float32."""
    return lambda hidden, weight, bias, labels: F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


def _liger(case: Case) -> Callable:
    loss = imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", "liger-kernel")
    return lambda hidden, weight, bias, labels: loss(hidden, weight, labels, bias)


BENCHMARK = LinearCrossEntropyBenchmark()
