"""Training: recipes, the loop, checkpoints, token datasets. The only package that imports Accelerate."""

from latticode.engine.config import ConfigError, RunConfig, load_config
from latticode.engine.loop import TrainingError, train

__all__ = ["ConfigError", "RunConfig", "TrainingError", "load_config", "train"]
