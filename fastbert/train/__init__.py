"""Training: pretraining from token shards to a saved model, with checkpoints that resume exactly."""

from fastbert.train.config import PrepareConfig, PretrainConfig
from fastbert.train.demo import demo
from fastbert.train.fill import fill
from fastbert.train.pretrain import PretrainResult, pretrain

__all__ = ["PrepareConfig", "PretrainConfig", "PretrainResult", "demo", "fill", "pretrain"]
