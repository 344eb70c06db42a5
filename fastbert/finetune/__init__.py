"""From a pretrained model and labelled examples to a model for a task, and what it says of new texts."""

from fastbert.finetune.demo import DEMOS, demo
from fastbert.finetune.examples import Example, read_examples
from fastbert.finetune.finetune import TASKS, FinetuneResult, SeedResult, finetune
from fastbert.finetune.options import FinetuneConfig, PredictConfig
from fastbert.finetune.predict import Predictor, predict
from fastbert.finetune.report import Scores

__all__ = [
    "DEMOS",
    "TASKS",
    "Example",
    "FinetuneConfig",
    "FinetuneResult",
    "PredictConfig",
    "Predictor",
    "Scores",
    "SeedResult",
    "demo",
    "finetune",
    "predict",
    "read_examples",
]
