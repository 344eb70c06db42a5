"""Training: pretraining from token shards to a saved model, with checkpoints that resume exactly."""

from fastbert.train.config import PrepareConfig, PretrainConfig
from fastbert.train.demo import demo
from fastbert.train.fill import fill
from fastbert.train.phases import run_recipe
from fastbert.train.pretrain import PretrainResult, pretrain
from fastbert.train.recipe_demo import recipe_demo
from fastbert.train.recipes import Recipe, recipes
from fastbert.train.words import to_words

__all__ = [
    "PrepareConfig",
    "PretrainConfig",
    "PretrainResult",
    "Recipe",
    "demo",
    "fill",
    "pretrain",
    "recipe_demo",
    "recipes",
    "run_recipe",
    "to_words",
]
