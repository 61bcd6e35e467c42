"""Losses: unweighted scalars, which a recipe's `weights` scale. `TERMS` has the reconstruction losses by name.

`reconstruction`: pixels. `spectral`: audio. `perceptual`: LPIPS and features of a classifier. `adversarial`: those of a
GAN. A quantizer returns its own (commitment, codebook, entropy) with its codes.

Examples:
    >>> import torch
    >>> float(TERMS["l1"](torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)))
    1.0
"""

from latticode.core.plugins import Table
from latticode.losses.reconstruction import PIXEL_TERMS
from latticode.losses.spectral import SOUND_TERMS

TERMS = Table("loss", {**PIXEL_TERMS, **SOUND_TERMS})  # name -> f(output, target)

__all__ = ["PIXEL_TERMS", "SOUND_TERMS", "TERMS"]
