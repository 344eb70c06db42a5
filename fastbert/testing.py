"""How an op is tested: fresh inputs, and one rule for what counts as equal. For tests and benchmarks: nothing else in
the package imports it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# What an error may be besides twice the yardstick's, in units of eps(dtype) * max(1, largest true value of the result;
# of a gradient in float32: of all results of the call). In 16 bits: one, the rounding of the result. In float32 the
# order of a sum alone moves the result by several, a yardstick of few elements can be exact by luck, and what is added
# may be as large as other results while the sum is not: attention's gradients of q and k are made of differences. In
# float64 the yardstick is the truth.
FLOOR = {torch.float64: 4096.0, torch.float32: 16.0, torch.float16: 1.0, torch.bfloat16: 1.0}


@dataclass(frozen=True)
class Comparison:
    """One output or gradient: the op's largest absolute error against float64, the yardstick's, and the bound."""

    name: str
    error: float
    yardstick: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        verdict = "" if self.ok else "  <-- too large"
        return f"{self.name}: error {self.error:.3e}, bound {self.bound:.3e}, yardstick {self.yardstick:.3e}{verdict}"


class Mismatch(AssertionError):
    """An op does not do what the reference does."""


def compare(
    op: Callable, reference: Callable, inputs: Mapping[str, Any], *, seed: int = 0, poison: bool = True
) -> list[Comparison]:
    """Hold `op(**inputs)` to the tolerance rule against `reference(**inputs)`, in every output and every gradient.

    The truth is the reference in float64, the yardstick the reference in the dtype of the inputs. An error may be twice
    the yardstick's, plus FLOOR; where in float32 a yardstick is exact by luck, twice what becomes of rounding the
    inputs once (the condition of the result, which no op can do better than). Outputs are a tensor or nested lists and
    tuples of tensors; so may inputs be.
    Gradients are those of every tensor in `inputs` that requires one, for random output gradients drawn from `seed`.
    The op gets its inputs with their strides; while it runs, fresh memory is filled with NaN, unless `poison` is False
    (the filling needs PyTorch's deterministic mode, for which torch.compile compiles anew). An op that writes to its
    inputs comes wrapped in a function that clones them, one with arguments of its own as a functools.partial.

    Returns a Comparison for each output ("output", or "output[0]", ...) and gradient ("grad q"). Raises Mismatch with
    the whole table if one is out of bounds.
    """
    dtype = _coarsest(inputs)
    wide = {name: _map(_widen, value) for name, value in inputs.items()}
    truth = _run(reference, wide, seed, dtype)
    yardstick = _run(reference, inputs, seed, dtype)
    with _poisoned_memory() if poison else nullcontext():
        result = _run(op, inputs, seed, dtype)
    if result.keys() != truth.keys():
        raise Mismatch(f"outputs and gradients: got {', '.join(result)}, expected {', '.join(truth)}")
    judge = partial(_judge, dtype=dtype, largest=max(map(_size, truth.values())))
    rows = [judge(name, truth[name], yardstick[name], result[name]) for name in truth]
    if dtype == torch.float32 and not all(row.ok for row in rows):
        rounded = _run(
            reference, {name: _map(_rounder(seed, dtype), value) for name, value in wide.items()}, seed, dtype
        )
        rows = [judge(name, truth[name], yardstick[name], result[name], rounded[name]) for name in truth]
    if not all(row.ok for row in rows):
        raise Mismatch(f"against float64 ({dtype}):\n" + "\n".join(f"  {row}" for row in rows))
    return rows


def make_inputs(
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    *,
    layout: str = "dense",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    projection_view: bool = False,
    padding: float | None = None,
) -> dict[str, Any]:
    """Arguments for an attention op over sequences of `lengths` tokens: fresh normal q, k, v that require gradients.

    layout "dense": [B, L, H, D], all lengths equal. "padded": [B, max(lengths), H, D] and key_padding_mask, with padded
    positions set to `padding`, say NaN, if that is given. "packed": [T, H, D], cu_seqlens and max_seqlen.
    projection_view makes q, k, v views of one [..., 3, H, D] tensor, as a fused projection leaves them.
    """
    longest = max(lengths, default=0)
    if layout not in ("dense", "padded", "packed") or (layout == "dense" and any(n != longest for n in lengths)):
        raise ValueError(
            f"layout: got {layout!r} for {lengths}, expected 'dense' (equal lengths), 'padded' or 'packed'"
        )
    rows = (sum(lengths),) if layout == "packed" else (len(lengths), longest)
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(*rows, 3, heads, head_dim, generator=generator, dtype=torch.float64)
    arguments: dict[str, Any] = {}
    if layout == "padded":
        mask = torch.arange(longest) < torch.tensor(lengths, dtype=torch.int64)[:, None]
        if padding is not None:
            projection[~mask] = padding
        arguments = {"key_padding_mask": mask.to(device)}
    elif layout == "packed":
        ends = torch.tensor([0, *lengths]).cumsum(0)
        arguments = {"cu_seqlens": ends.to(device, torch.int32), "max_seqlen": longest}
    qkv = projection.to(device, dtype).unbind(-3)
    if not projection_view:
        qkv = [t.contiguous() for t in qkv]
    return {**{name: t.requires_grad_() for name, t in zip("qkv", qkv, strict=True)}, **arguments}


def _run(function: Callable, inputs: Mapping[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """All outputs and gradients of one call, by name. The output gradients are rounded to `dtype`, so that every call
    sees the same ones."""
    inputs = {name: _map(lambda t: t.detach().requires_grad_(t.requires_grad), value) for name, value in inputs.items()}
    outputs = dict(_leaves("output", function(**inputs)))
    results = {name: t.detach() for name, t in outputs.items()}
    leaves = {f"grad {path}": t for name, value in inputs.items() for path, t in _leaves(name, value)}
    leaves = {path: t for path, t in leaves.items() if t.requires_grad}
    roots = [t for t in outputs.values() if t.requires_grad]
    if leaves and roots:
        generator = torch.Generator().manual_seed(seed)
        normal = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in roots)
        cotangents = [n.to(t.device, dtype).to(t.dtype) for n, t in zip(normal, roots, strict=True)]
        gradients = torch.autograd.grad(
            roots, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
        )
        results.update(zip(leaves, gradients, strict=True))
    return results


def _judge(
    name: str,
    truth: Tensor,
    yardstick: Tensor,
    result: Tensor,
    rounded: Tensor | None = None,
    *,
    dtype: torch.dtype,
    largest: float,
) -> Comparison:
    if result.shape != truth.shape or result.dtype != yardstick.dtype:
        got, expected = (f"{t.dtype} {tuple(t.shape)}" for t in (result, yardstick))
        raise Mismatch(f"{name}: got {got}, expected {expected}")
    if not truth.isfinite().all():
        raise Mismatch(f"{name}: the float64 reference is not finite")
    slack = max(_distance(t, truth) for t in (yardstick, rounded) if t is not None)
    reach = max(1.0, largest if dtype == torch.float32 and name.startswith("grad ") else _size(truth))
    bound = 2 * slack + FLOOR[dtype] * torch.finfo(dtype).eps * reach
    return Comparison(name, _distance(result, truth), slack, bound)


def _size(t: Tensor) -> float:
    return _distance(t, torch.zeros_like(t))


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite if any element is NaN."""
    if a.numel() == 0:
        return 0.0
    return (a.double() - b.double()).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def _rounder(seed: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Moves every number by at most eps(dtype) of itself, at random."""
    generator, eps = torch.Generator().manual_seed(seed), torch.finfo(dtype).eps

    def rounded(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        noise = torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.device) * 2 - 1
        return (t.detach() * (1 + eps * noise)).requires_grad_(t.requires_grad)

    return rounded


def _widen(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def _coarsest(inputs: Mapping[str, Any]) -> torch.dtype:
    dtypes = {t.dtype for name, value in inputs.items() for _, t in _leaves(name, value) if t.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with the function applied to every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_map(function, item) for item in value) if isinstance(value, list | tuple) else value


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested lists and tuples, with a name such as q or params[0]."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill freshly allocated tensors with NaN, so that an element that an op forgets to write shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
