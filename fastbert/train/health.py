"""What is not finite in an update that could not be made, by name."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastbert.train.feed import MicroBatch
from fastbert.train.step import TrainStep

_SHOWN = 4  # names


def diagnose(
    updates: TrainStep, batch: MicroBatch, labels: float, seed: int, *, samples: float = 0, tokens: float = 0
) -> dict[str, list[str]]:
    """Computes a micro-batch again, as `updates.accumulate` did, without compiled code and graphs. Returns the names of
    what was not finite: `weights`, `modules` (whose output was not, although their input was, in order), `losses` and
    `gradients`; empty if all was.
    """
    found = {"weights": [name for name, p in updates.model.named_parameters() if not _finite(p)]}
    torch.manual_seed(seed)
    losses = updates.once(batch, labels, samples=samples, tokens=tokens)
    found["losses"] = [term.name for term, loss in zip(updates.terms, losses, strict=True) if not math.isfinite(loss)]
    gradients = [(name, p.grad) for name, p in updates.model.named_parameters() if p.grad is not None]
    found["gradients"] = [name for name, grad in gradients if not _finite(grad)]
    torch.manual_seed(seed)
    with _watched_modules(updates.working) as found["modules"]:  # apart: what is watched computes in another way
        updates.once(batch, labels, samples=samples, tokens=tokens)
    return {what: found[what] for what in ("weights", "modules", "losses", "gradients") if found[what]}


def describe(faults: Sequence[dict]) -> str:
    """What is told of the faults of all micro-batches of an update."""
    if not faults:
        return "computed again, all of it is finite: memory or a processor may be faulty"
    parts = []
    for fault in faults[:_SHOWN]:
        whats = [f"{what} {_listed(names)}" for what, names in fault.items() if what != "samples"]
        parts.append(f"not finite on {named(fault['samples'])} are {'; '.join(whats)}")
    if len(faults) > _SHOWN:
        parts.append(f"and {len(faults) - _SHOWN} more micro-batches (all in the log)")
    return ". ".join(parts)


def named(samples: Sequence[int]) -> str:
    """The first of some samples, by number."""
    more = ", ... (all in the log)" if len(samples) > 16 else ""
    return f"samples {', '.join(map(str, samples[:16]))}{more}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


@contextmanager
def _watched_modules(model: nn.Module) -> Iterator[list[str]]:
    """The names of modules in which something becomes not finite, innermost ones first, as they are called."""
    names: list[str] = []

    def watch(name: str):
        def hook(_module, inputs, output) -> None:
            if all(map(_finite, _tensors(inputs))) and not all(map(_finite, _tensors(output))):
                names.append(name or type(model).__name__)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "values"):
        for part in value.values():
            yield from _tensors(part)


def _finite(tensor: Tensor) -> bool:
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
