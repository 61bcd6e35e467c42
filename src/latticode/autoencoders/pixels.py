"""Distributions of pixels that a decoder's output parameterizes: the logit-Laplace likelihood of DALL-E's dVAE."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LogitLaplace(nn.Module):
    """A density on (0, 1) for every channel of every pixel (DALL-E, Ramesh et al. 2021, arXiv 2102.12092, App. A.3).

    A pixel x in [-1, 1] becomes y = (1 - 2 eps) (x + 1) / 2 + eps in [eps, 1 - eps], and the density of y is
    exp(-|logit y - mu| / b) / (2 b y (1 - y)). The decoder's 2 C channels are mu of all C, then ln b of all C. The
    image is sigmoid(mu) mapped back; it may leave [-1, 1] by up to 2 eps / (1 - 2 eps).

    Args:
        eps: keeps the logit of black and white finite; in (0, 0.5).

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import LogitLaplace
        >>> likelihood = LogitLaplace()
        >>> output = torch.zeros(2, 6, 8, 8)  # of a decoder with two channels for each of the image: mu 0, ln b 0
        >>> likelihood.image(output).shape, float(likelihood.image(output).abs().max())
        (torch.Size([2, 3, 8, 8]), 0.0)
        >>> round(float(likelihood.nll(output, torch.zeros(2, 3, 8, 8))), 4)  # -ln of 1 / (2 b y (1 - y)) at y = 1/2
        -0.6931
    """

    name = "logit_laplace"

    def __init__(self, eps: float = 0.1):
        super().__init__()
        if not 0 < eps < 0.5:
            raise ValueError(f"eps must be in (0, 0.5), got {eps}")
        self.eps = eps

    def image(self, output: Tensor) -> Tensor:
        """(B, 2 C, *size) -> (B, C, *size)."""
        mu, _ = _halves(output)
        return 2 * (mu.sigmoid() - self.eps) / (1 - 2 * self.eps) - 1

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over all values of -ln density(y) of `target` (B, C, *size), in nats per channel value.

        The density of x itself is lower by the constant ln(2 / (1 - 2 eps)), 0.92 nats. Values outside [-1, 1] count as
        black or white.
        """
        mu, log_b = (half.to(torch.promote_types(half.dtype, torch.float32)) for half in _halves(output))
        logit = (self.eps + (1 - 2 * self.eps) * (target.to(mu).clamp(-1, 1) + 1) / 2).logit()
        # -ln(y (1 - y)) = softplus(l) + softplus(-l) of l = logit y, which is the Jacobian of the logit
        jacobian = -F.softplus(logit) - F.softplus(-logit)
        return (math.log(2) + log_b + (logit - mu).abs() * (-log_b).exp() + jacobian).mean()


def _halves(output: Tensor) -> tuple[Tensor, Tensor]:
    if output.shape[1] % 2:
        raise ValueError(f"a likelihood needs a decoder of 2 output channels per channel, got {output.shape[1]}")
    mu, log_b = output.chunk(2, dim=1)
    return mu, log_b
