"""Every error that a user can cause: a FastBertError, and the built-in error that fits it, so that either can be
caught.
"""


class FastBertError(Exception):
    """Base of all errors raised by fastbert on purpose."""


class ConfigError(FastBertError, ValueError):
    """A configuration has an unknown key, an unknown preset or a value that makes no sense."""


class ShapeError(FastBertError, ValueError):
    """A tensor has the wrong shape, or two tensors do not fit each other."""


class DtypeError(FastBertError, TypeError):
    """A tensor has a dtype that the operation does not take."""


class BackendError(FastBertError, RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


class DataError(FastBertError, ValueError):
    """Text, tokens or shards are malformed, damaged or do not belong together."""


class CheckpointError(FastBertError, ValueError):
    """A checkpoint is damaged, incomplete or does not fit the model."""


class MissingFileError(FastBertError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class MissingDependencyError(FastBertError, ImportError):
    """An optional package is needed for what was asked; the message names the extra that installs it."""


class StorageError(FastBertError, OSError):
    """A file cannot be written: a full disk, a read-only target."""


class ProcessError(FastBertError, RuntimeError):
    """Another of the processes that train together has failed, or does not answer."""


def shown(value, most: int = 160) -> str:
    """A value as an error shows it: its repr, cut where that is longer than `most`."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # the latter of an integer with too many digits
        return f"a {type(value).__name__} that is too deep or long to show"
    return text if len(text) <= most else f"{text[: most - 3]}..."
