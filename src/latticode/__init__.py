"""latticode: images, video and audio as discrete tokens, and generators over them."""

from latticode.core.plugins import register
from latticode.core.pretrained import load_model as load
from latticode.core.registry import build
from latticode.core.types import Conditioning, Sampling
from latticode.metrics.codes import CodeStatistics
from latticode.priors.contextual import ContextualRQ
from latticode.priors.dalle import DALLE
from latticode.priors.gpt import GPT
from latticode.priors.mage import MAGE
from latticode.priors.maskgit import MaskGIT
from latticode.priors.muse import Muse
from latticode.priors.pixelcnn import PixelCNN, TwoLevel
from latticode.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    ChannelDim,
    Grouped,
    Gumbel,
    Hierarchical,
    Projected,
    QINCo,
    Quantizer,
    Residual,
    SimVQ,
    StochasticVQ,
    accumulating,
)
from latticode.tokenizers.foreign import Foreign
from latticode.tokenizers.tokenizer import Tokenizer
from latticode.version import __version__

__all__ = [
    "BSQ",
    "DALLE",
    "FSQ",
    "GPT",
    "IBQ",
    "LFQ",
    "MAGE",
    "VQ",
    "ChannelDim",
    "CodeStatistics",
    "Conditioning",
    "ContextualRQ",
    "Foreign",
    "Grouped",
    "Gumbel",
    "Hierarchical",
    "MaskGIT",
    "Muse",
    "PixelCNN",
    "Projected",
    "QINCo",
    "Quantizer",
    "Residual",
    "Sampling",
    "SimVQ",
    "StochasticVQ",
    "Tokenizer",
    "TwoLevel",
    "__version__",
    "accumulating",
    "build",
    "load",
    "register",
]
