"""The specification of every kernel: as plain and as exact as can be. Slow, and free to use any amount of memory."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """For each row of `x` (N, d) the row of `codebook` (K, d) at the least distance, in float64: (N,) int64."""
    distances = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(dim=1)
