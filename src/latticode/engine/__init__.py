"""Training: recipes, the loop, checkpoints, token datasets. The only package that imports Accelerate."""

from latticode.engine.config import ConfigError, RunConfig, load_config
from latticode.engine.loop import TrainingError, TrainingStoppedError, train

__all__ = ["ConfigError", "RunConfig", "TrainingError", "TrainingStoppedError", "load_config", "train"]
