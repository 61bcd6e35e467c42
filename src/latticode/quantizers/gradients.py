"""How a gradient passes a step that has none."""

from __future__ import annotations

from torch import Tensor


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` itself, with the gradient of `z`; both (..., D), `z` finite.

    Straight-through estimator of VQ-VAE (arXiv 1711.00937, Sec. 3.2). The usual z + sg(quantized - z) rounds, and what
    the decoder trains on would not be what `decode` returns; here the term that carries the gradient is exactly zero.
    """
    return quantized.detach() + (z - z.detach())
