"""Priors: generators over the codes of a tokenizer, autoregressive (GPT, PixelCNN, DALL-E) or masked (MaskGIT, Muse,
MAGE, ContextualRQ), and text encoders for their captions."""

from latticode.priors.base import Prior
from latticode.priors.contextual import ContextualRQ
from latticode.priors.dalle import DALLE
from latticode.priors.gpt import GPT
from latticode.priors.guide import Guide
from latticode.priors.mage import MAGE
from latticode.priors.maskgit import MaskGIT
from latticode.priors.muse import Muse
from latticode.priors.pixelcnn import PixelCNN, TwoLevel

__all__ = ["DALLE", "GPT", "MAGE", "ContextualRQ", "Guide", "MaskGIT", "Muse", "PixelCNN", "Prior", "TwoLevel"]
