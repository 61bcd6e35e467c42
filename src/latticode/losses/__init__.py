"""Loss terms: unweighted scalars; a recipe's weights scale them."""

from latticode.losses.reconstruction import PIXEL_TERMS
from latticode.losses.spectral import SOUND_TERMS

TERMS = {**PIXEL_TERMS, **SOUND_TERMS}  # name -> f(output, target)

__all__ = ["PIXEL_TERMS", "SOUND_TERMS", "TERMS"]
