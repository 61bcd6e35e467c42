"""Quantizers: continuous latents to discrete codes and back, behind one contract."""

from latticode.quantizers.base import Quantizer, accumulating
from latticode.quantizers.binary import BSQ, LFQ
from latticode.quantizers.compose import ChannelDim, Grouped, Hierarchical, Projected
from latticode.quantizers.fsq import FSQ
from latticode.quantizers.ibq import IBQ
from latticode.quantizers.implicit import QINCo
from latticode.quantizers.residual import Residual
from latticode.quantizers.stochastic import Gumbel, StochasticVQ
from latticode.quantizers.vq import VQ, SimVQ

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "VQ",
    "ChannelDim",
    "Grouped",
    "Gumbel",
    "Hierarchical",
    "Projected",
    "QINCo",
    "Quantizer",
    "Residual",
    "SimVQ",
    "StochasticVQ",
    "accumulating",
]
