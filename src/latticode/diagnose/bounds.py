"""What other bounds of an FSQ would make of latents that were measured on a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from latticode.metrics.codes import CodeStatistics, entropy_bits
from latticode.quantizers import FSQ

GAIN = 0.05  # bits of entropy for which another bound is worth naming
BOUNDS = (("paper", 2.0), ("symmetric", 2.0), ("symmetric", 1.6), ("equal-bins", 2.0), ("equal-bins", 1.6))


def bounds(
    levels: list[int], latents: Tensor, candidates: Iterable[tuple[str, float]] = BOUNDS
) -> list[dict[str, Any]]:
    """What each of `candidates` makes of `latents` (N, D) measured on a run: bound, slope, entropy_bits of the index,
    usage and channels, the entropy of each channel's levels."""
    rows = []
    for bound, slope in candidates:
        quantizer = FSQ(levels, bound, slope, factors=len(levels) if math.prod(levels) >= 2**63 else 1)
        statistics = CodeStatistics(quantizer.vocab)
        statistics.update(quantizer.encode(latents.float()))
        numbers, histograms = statistics.compute(), statistics.level_histograms(levels)
        rows.append(
            {
                "bound": bound,
                "slope": slope,
                "entropy_bits": numbers["entropy_bits"],
                "usage": numbers["usage"],
                "channels": [entropy_bits(torch.tensor(counts)) for counts in histograms],
            }
        )
    return rows


def better_bound(levels: list[int], now: FSQ, latents: Tensor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of `bounds` the row of the most entropy if that is `GAIN` more than under the bound of `now`, else that of `now`;
    and all rows, that of `now` first."""
    rows = bounds(levels, latents, dict.fromkeys([(now.bound, now.slope), *BOUNDS]))
    best = max(rows, key=lambda row: row["entropy_bits"])
    return (best if best["entropy_bits"] > rows[0]["entropy_bits"] + GAIN else rows[0]), rows
