"""fastbert: BERT-family encoders, fast on NVIDIA GPUs and right everywhere."""

from fastbert.backend import use_backend
from fastbert.config import EncoderConfig, presets
from fastbert.errors import FastBertError
from fastbert.models import *  # noqa: F403
from fastbert.models import __all__ as _models

__version__ = "0.1.0"
__all__ = ["EncoderConfig", "FastBertError", "compile_for_latency", "presets", "use_backend", *_models]  # noqa: F405


def __getattr__(name):
    # data, training and the progress of compile_for_latency are imported when they are asked for: they bring
    # tokenizers, pyarrow and tqdm
    import importlib

    if name == "compile_for_latency":
        return importlib.import_module("fastbert.latency").compile_for_latency
    if name in ("latency", "data", "train", "finetune", "hf", "optim", "testing", "nn", "reference"):
        return importlib.import_module(f"fastbert.{name}")
    raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
