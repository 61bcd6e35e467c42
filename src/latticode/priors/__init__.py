"""Generators over codes."""

from latticode.priors.base import Prior
from latticode.priors.maskgit import MaskGIT

__all__ = ["MaskGIT", "Prior"]
