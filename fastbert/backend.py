"""Which twin of an op runs: one predicate per op and backend, one context manager, clear errors.

The backends are "triton" (kernels/), "cuda" (the compiled extension), "torch" (portable.py) and "reference"
(reference.py). One can be asked for by name: in the call (`backend=`), in the context (`use_backend`) or in the
environment (`FASTBERT_BACKEND`), the first of these that is set. It then runs, or raises: there is no silent fallback.
With nothing asked, the first that can serve runs.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fastbert.errors import BackendError

NAMES = ("triton", "cuda", "torch", "reference")
VARIABLE = "FASTBERT_BACKEND"

Predicate = Callable[..., str | None]

_context: ContextVar[str | None] = ContextVar("fastbert_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on the backend `name`.

    Blocks nest, and the choice is local to the thread or task. Raises BackendError for an unknown name.
    """
    token = _context.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _context.reset(token)


def pick(op: str, predicates: Mapping[str, Predicate], asked: str | None, *args) -> str:
    """The name of the backend that runs `op`.

    `predicates`, in order of preference, tell of each backend whether it can serve the call: predicate(*args) is None
    if it can, else the reason why not. `asked` is the call's own `backend=` argument. Raises BackendError when the
    backend asked for is unknown or cannot serve, or when none can.
    """
    name = _asked(asked)
    if name is not None:
        reason = predicates[name](*args) if name in predicates else f"{op} has no such backend"
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot serve {op}: {reason}")
        return name
    reasons = []
    for name, predicate in predicates.items():
        reason = predicate(*args)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no backend can serve {op}: {'; '.join(reasons)}")


def is_asked_for(name: str | None = None) -> bool:
    """Whether the context or the environment asks for this backend; without a name, for any."""
    asked = _asked_around()
    return asked is not None if name is None else asked == name


def serves(*_args) -> None:
    """The predicate of a backend that serves every call."""


def lacks(reason: str) -> Predicate:
    """The predicate of a backend that serves no call, for one fixed reason."""
    return lambda *_args: reason


_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_cannot_run(device: torch.device) -> str | None:
    """Why no Triton kernel can run there, or None if one can: on CUDA, and on a CPU in Triton's interpreter."""
    if not _TRITON_IS_INSTALLED:
        return "triton is not installed"
    if device.type != "cuda":
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"it would run on {device}, not on CUDA, and TRITON_INTERPRET=1 is not set"
    capability = _capability(device)
    return None if capability >= (8, 0) else f"{device} has compute capability {capability}, and Triton needs (8, 0)"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _asked(asked: str | None) -> str | None:
    return _asked_around() if asked is None else _known(asked, "backend")


def _asked_around() -> str | None:
    name = _context.get()
    if name is not None:
        return name
    name = os.environ.get(VARIABLE)
    return _known(name, VARIABLE) if name else None


# torch.compile cannot trace a context variable: what holds during compilation stays in the compiled code. This is what
# torch.compiler.assume_constant_result does, but that imports the whole compiler, and Triton with it.
_asked_around._dynamo_marked_constant = True
_capability._dynamo_marked_constant = True


def _known(name: str, source: str) -> str:
    if name not in NAMES:
        raise BackendError(f"{source}: got {name!r}, expected one of {', '.join(map(repr, NAMES))}")
    return name
