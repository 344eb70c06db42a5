"""What the device can do at most, measured at the start of every run: moving memory (a copy or a change in place,
whichever is faster), matrix products, exponentials. The best of ten: a ceiling is what was reached, not what is usual.

A floor is the time that an op would take if it moved its bytes as fast as that, multiplied as fast as one large
matrix product does, and took its exponentials as fast as a kernel that does nothing else; the largest of the three.
Memory and matmul cannot be passed, exp could be: by a kernel that computes some exponentials with other units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .rows import package_version

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Work:
    """What an op cannot do without: operations of matrix products, bytes to and from memory, exponentials."""

    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """Per second: bytes moved (read plus written), operations of a matrix product by dtype, exp2 in float32.

    exps is None where it was not measured (a GPU without Triton); floors then leave exponentials out. launch_us: what
    a step of one kernel that has nothing to do takes between the events, launch_random_us, what it takes if it draws a
    number from PyTorch's generator, whose state is set before a graph is replayed: that is in every time, in no floor.
    """

    bytes: float
    flops: dict[str, float]
    exps: float | None
    launch_us: float | None = None
    launch_random_us: float | None = None

    def floor_us(self, work: Work, dtype: str) -> tuple[float, str]:
        """The shortest time for the work in microseconds, and what sets it: memory, matmul or exp."""
        seconds = {"memory": work.bytes / self.bytes, "matmul": work.flops / self.flops[dtype]}
        if self.exps is not None:
            seconds["exp"] = work.exps / self.exps
        by = max(seconds, key=seconds.get)
        return 1e6 * seconds[by], by

    def row(self, dtype: str) -> dict[str, float | None]:
        """The column `ceilings` of a row."""
        return {
            "memory_gb_per_s": round(self.bytes / 1e9, 1),
            "matmul_tflops": round(self.flops[dtype] / 1e12, 3),
            "exp_g_per_s": None if self.exps is None else round(self.exps / 1e9, 1),
            **({} if self.launch_us is None else {"launch_us": round(self.launch_us, 2)}),
            **({} if self.launch_random_us is None else {"launch_random_us": round(self.launch_random_us, 2)}),
        }


def measure(clock, device: str, dtypes: list[str], graphs: bool) -> Ceilings:
    """The ceilings of `device`, by a clock of the harness."""
    cuda = device.startswith("cuda")
    source = torch.ones(2**28 if cuda else 2**26, device=device)
    target = torch.empty_like(source)
    # A CPU reads the lines that a copy is about to overwrite; changing them in place has no such third stream.
    moves = partial(target.copy_, source), partial(target.add_, 1.0)
    moved = 2 * source.nbytes / min(_seconds(clock, move) for move in moves)
    del source, target, moves
    n, products = 8192 if cuda else 1024, {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        products[dtype] = 2 * n**3 / _seconds(clock, partial(torch.mm, a, b, out=out))
    if not cuda:
        return Ceilings(moved, products, _exps_on_cpu(clock))
    number = torch.zeros(1, device=device)
    empty = (clock.prepare(lambda step=step: step, graphs, lambda: None) for step in (number.zero_, number.normal_))
    launches = [1e6 * _seconds(clock, each.step) for each in empty]
    return Ceilings(moved, products, _exps_on_gpu(clock, device), *launches)


def _seconds(clock, step: Callable[[], object]) -> float:
    for _ in range(3):
        step()
    return 1e-6 * min(clock.time(step) for _ in range(10))


def _exps_on_cpu(clock) -> float:
    x = torch.zeros(2**16)  # 256 KiB: stays in cache
    out = torch.empty_like(x)
    return 64 * x.numel() / _seconds(clock, lambda: [torch.exp2(x, out=out) for _ in range(64)])


def _exps_on_gpu(clock, device: str) -> float | None:
    if package_version("triton") is None:
        return None
    from .exp_kernel import exp2_kernel

    programs, rounds, block = 64 * torch.cuda.get_device_properties(device).multi_processor_count, 512, 2048
    out = torch.empty(programs * block, device=device)

    def step() -> None:
        exp2_kernel[(programs,)](out, ROUNDS=rounds, BLOCK=block, num_warps=4)

    return programs * block * rounds / _seconds(clock, step)
