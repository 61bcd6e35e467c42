"""latticode: images, video and audio as discrete tokens, and generators over them."""

from latticode.metrics.codes import CodeStatistics
from latticode.pretrained import load_model as load
from latticode.priors.contextual import ContextualRQ
from latticode.priors.gpt import GPT
from latticode.priors.maskgit import MaskGIT
from latticode.quantizers import (
    BSQ,
    FSQ,
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
from latticode.tokenizer import Tokenizer
from latticode.version import __version__

__all__ = [
    "BSQ",
    "FSQ",
    "GPT",
    "LFQ",
    "VQ",
    "ChannelDim",
    "CodeStatistics",
    "ContextualRQ",
    "Grouped",
    "Gumbel",
    "Hierarchical",
    "MaskGIT",
    "Projected",
    "QINCo",
    "Quantizer",
    "Residual",
    "SimVQ",
    "StochasticVQ",
    "Tokenizer",
    "__version__",
    "accumulating",
    "load",
]
