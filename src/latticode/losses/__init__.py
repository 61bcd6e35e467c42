"""Loss terms: unweighted scalars; a recipe's weights scale them."""

from latticode.losses.reconstruction import PIXEL_TERMS

__all__ = ["PIXEL_TERMS"]
