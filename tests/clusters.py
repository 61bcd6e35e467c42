"""Tokens with known clusters, and the entropy losses from their definition."""

from __future__ import annotations

import torch
from torch import Tensor


def blobs(per_blob: int, spread: float = 0.01, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Tokens around 8 corners of a cube (8 * per_blob, 3), and the corners (8, 3)."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3) + offset
    tokens = corners.repeat_interleave(per_blob, dim=0)
    return tokens + spread * torch.randn_like(tokens), corners


def shares(x: Tensor, vectors: Tensor, temperature: float) -> Tensor:
    """softmax(-|x - c|^2 / temperature) over codes (N, K), in float64 without any trick."""
    return (-(x.double()[:, None] - vectors.double()).square().sum(dim=-1) / temperature).softmax(dim=-1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(dim=-1)
