"""fastbert: BERT-family encoders, fast on NVIDIA GPUs and right everywhere."""

from fastbert.backend import use_backend
from fastbert.config import EncoderConfig, presets
from fastbert.errors import FastBertError
from fastbert.models import *  # noqa: F403
from fastbert.models import __all__ as _models

__version__ = "0.1.0"
__all__ = ["EncoderConfig", "FastBertError", "presets", "use_backend", *_models]


def __getattr__(name):
    # data and training are imported when they are asked for: they bring tokenizers and pyarrow
    if name in ("data", "train", "optim", "testing", "nn", "reference"):
        import importlib

        return importlib.import_module(f"fastbert.{name}")
    raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
