"""Checks of single arguments, before any work is done with them."""

from collections.abc import Callable
from typing import Any

from fastbert.errors import ConfigError


def check(name: str, value: Any, kind: Any, expected: str, fits: Callable[[Any], bool] = lambda value: True) -> None:
    """ConfigError, naming the argument, its value and what was expected, unless the value is of `kind` (a bool is no
    number) and fits."""
    if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
        raise ConfigError(f"{name} is {value!r}, expected {expected}")
