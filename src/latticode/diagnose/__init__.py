"""What is wrong with the codes of a trained run, by its numbers, and what to change.

A tokenizer quantizes held-out examples; what its quantizers are given and what they choose is taken apart down to the
quantizers that others are made of (`evidence`), and each is held against thresholds (`findings`).
"""

from latticode.diagnose.run import diagnose, recommended, show, show_levels

__all__ = ["diagnose", "recommended", "show", "show_levels"]
