"""Generators over codes."""

from latticode.priors.base import Prior
from latticode.priors.gpt import GPT
from latticode.priors.maskgit import MaskGIT

__all__ = ["GPT", "MaskGIT", "Prior"]
