"""Quantizers: continuous latents to discrete codes and back, behind one contract."""

from latticode.quantizers.base import Quantizer, accumulating
from latticode.quantizers.fsq import FSQ
from latticode.quantizers.vq import VQ

__all__ = ["FSQ", "VQ", "Quantizer", "accumulating"]
