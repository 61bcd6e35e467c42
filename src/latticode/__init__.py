"""latticode: images, video and audio as discrete tokens, and generators over them."""

from latticode.pretrained import load_model as load
from latticode.priors.maskgit import MaskGIT
from latticode.quantizers import FSQ, VQ
from latticode.tokenizer import Tokenizer
from latticode.version import __version__

__all__ = ["FSQ", "VQ", "MaskGIT", "Tokenizer", "__version__", "load"]
