"""The entropies of `entropies` in plain operators and one piece, for `torch.export` and ONNX: no tiles, no gradient.

Memory: tokens times codes for VQ; tokens times the square root of the number of codes for LFQ and BSQ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """As `kernels.bernoulli_entropy`: (N, D) to (N,)."""
    size = logits.abs()
    return (F.softplus(-size) + size * torch.sigmoid(-size)).sum(dim=-1)


def bernoulli_mixture(logits: Tensor, weights: Tensor) -> Tensor:
    """As `kernels.bernoulli_mixture`: (N, D) and (N,) to (2^D,)."""
    halves = []
    for half in logits.masked_fill(weights[:, None] == 0, 0.0).t().tensor_split(2):
        level = torch.ones_like(weights)[None]
        for bit in half.unbind():
            level = torch.cat([level * torch.sigmoid(-bit), level * torch.sigmoid(bit)])
        halves.append(level)
    lower, upper = halves
    return (upper @ (lower * weights).t()).flatten()


def soft_assignment(x: Tensor, codebook: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As `kernels.soft_assignment`: (N, d), (K, d) and (N,) to a scalar and (K,)."""
    middle = codebook.mean(dim=0)
    x, codes = (x - middle).masked_fill(weights[:, None] == 0, 0.0), codebook - middle
    log_p = ((2 * x @ codes.t() - codes.square().sum(dim=1)) / temperature).log_softmax(dim=1)
    p = log_p.exp()
    return -(weights * (p * log_p).sum(dim=1)).sum(), weights @ p
