"""Generators over codes."""

from latticode.priors.base import Prior
from latticode.priors.gpt import GPT
from latticode.priors.maskgit import MaskGIT
from latticode.priors.pixelcnn import PixelCNN, TwoLevel

__all__ = ["GPT", "MaskGIT", "PixelCNN", "Prior", "TwoLevel"]
