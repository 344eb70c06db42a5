"""What several ops check of their arguments. Every error names the argument, what was got and what was expected."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastbert.errors import ConfigError, DataError, DtypeError, ShapeError


def tensors(*optional: str, **named: object) -> None:
    """Everything is a tensor, or None if its name is in `optional`."""
    for name, value in named.items():
        if not isinstance(value, Tensor) and (value is not None or name not in optional):
            raise DtypeError(f"{name}: got a {type(value).__name__}, expected a torch.Tensor")


def lists(**named: object) -> None:
    """Everything is a list or tuple of tensors."""
    for name, values in named.items():
        if not isinstance(values, (list, tuple)):
            raise DtypeError(f"{name}: got a {type(values).__name__}, expected a list of tensors")
        for i, value in enumerate(values):
            if not isinstance(value, Tensor):
                raise DtypeError(f"{name}[{i}]: got a {type(value).__name__}, expected a torch.Tensor")


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


def rows(**tensors: Tensor) -> None:
    """Every tensor has a last dimension."""
    for name, t in tensors.items():
        if t.dim() == 0:
            raise ShapeError(f"{name}: got shape (), expected at least one dimension")


def matrices(**tensors: Tensor | None) -> None:
    """Every tensor (None is skipped) has two dimensions."""
    for name, t in tensors.items():
        if t is not None and t.dim() != 2:
            raise ShapeError(f"{name}: got shape {tuple(t.shape)}, expected two dimensions")


def number(name: str, value: object, fits: Callable[[float], bool], expected: str, *, whole: bool = False) -> None:
    """An int, or unless `whole` a float, for which fits(value)."""
    if not isinstance(value, int if whole else (int, float)) or not fits(value):
        raise ConfigError(f"{name}: got {value!r}, expected {expected}")


def epsilon(eps: float) -> None:
    number("eps", eps, lambda x: 0 <= x < math.inf, "a number, at least 0")


def option(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def dropout(p: float, seed: int | None) -> None:
    number("dropout_p", p, lambda x: 0 <= x < 1, "0 <= dropout_p < 1")
    if seed is not None:
        number("seed", seed, lambda x: 0 <= x < 2**64, "None or 0 <= seed < 2**64, an int", whole=True)


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
