"""What several ops check of their arguments. Every error names the argument, what was got and what was expected."""

import torch
from torch import Tensor

from fastbert.errors import ConfigError, DataError, DtypeError, ShapeError


def tensors(**named: object) -> None:
    """Everything is a tensor."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise DtypeError(f"{name}: got a {type(value).__name__}, expected a torch.Tensor")


def floating(**tensors: Tensor | None) -> None:
    """Every tensor (None is skipped) is real and of a floating dtype."""
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise DtypeError(f"{name}: got {t.dtype}, expected a floating dtype")


def integer(**tensors: Tensor | None) -> None:
    """Every tensor (None is skipped) holds int64 or int32 indices."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in (torch.int64, torch.int32):
            raise DtypeError(f"{name}: got {t.dtype}, expected torch.int64 or torch.int32")


def same_dtype(**tensors: Tensor | None) -> None:
    """All tensors (None is skipped) have the dtype of the first."""
    (first, like), *others = ((name, t) for name, t in tensors.items() if t is not None)
    for name, t in others:
        if t.dtype != like.dtype:
            raise DtypeError(f"{name}: got {t.dtype}, expected {like.dtype} as {first} has")


def same_device(**tensors: Tensor | None) -> None:
    """All tensors (None is skipped) are on the device of the first."""
    (first, like), *others = ((name, t) for name, t in tensors.items() if t is not None)
    for name, t in others:
        if t.device != like.device:
            raise ShapeError(f"{name}: got a tensor on {t.device}, expected {like.device} as {first}")


def shape(name: str, t: Tensor, expected: tuple[int, ...], why: str) -> None:
    if t.shape != expected:
        raise ShapeError(f"{name}: got shape {tuple(t.shape)}, expected {tuple(expected)} ({why})")


def option(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def dropout(p: float, seed: int | None) -> None:
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"dropout_p: got {p}, expected 0 <= dropout_p < 1")
    if seed is not None and not 0 <= seed < 2**64:
        raise ConfigError(f"seed: got {seed}, expected None or 0 <= seed < 2**64")


def indices(name: str, ids: Tensor, limit: int, of: str, *, besides: int | None = None) -> None:
    """0 <= ids < limit, or ids == besides. Only on the CPU: on a GPU the answer would have to be waited for."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (ids < 0) | (ids >= limit)
    if besides is not None:
        wrong &= ids != besides
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        other = "" if besides is None else f" or {besides}"
        place = ", ".join(map(str, position))
        raise DataError(f"{name}[{place}]: got {ids[position].item()}, expected 0 to {limit - 1} ({of}){other}")
