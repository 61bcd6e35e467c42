"""Diagnosis of a run's codes: dead codes and channels, codebook collapse, channels that saturate or repeat each other,
and what to change.

A tokenizer quantizes held-out examples; what its quantizers are given and what they choose is taken apart down to the
quantizers that others are made of (`evidence`), and each, by its kind (`parts`), is held against thresholds.
"""

from latticode.diagnose.run import diagnose, recommended, show, show_levels

__all__ = ["diagnose", "recommended", "show", "show_levels"]
