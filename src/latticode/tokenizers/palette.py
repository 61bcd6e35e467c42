"""Pixels as codes of a palette of colours (iGPT)."""

from __future__ import annotations

from torch import nn

from latticode.quantizers.vq import VQ
from latticode.tokenizers.tokenizer import Tokenizer


class Palette(Tokenizer):
    """The nearest of `size` colours for every pixel: a tokenizer without a network (iGPT, Chen et al. 2020).

    Training starts from k-means over the first batch and goes on by the gradient of the `codebook` loss, which is the
    objective of k-means, so it trains like any other tokenizer; weigh `commitment` 0, for there is no encoder.
    """

    def __init__(self, size: int = 512, channels: int = 3):
        super().__init__(_Pixels(channels), VQ(size, channels, update="gradient"), _Pixels(channels))
        self.size = size
        self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()


class _Pixels(nn.Identity):
    """An encoder or decoder that leaves the image as it is."""

    def __init__(self, channels: int):
        super().__init__()
        self.in_channels = self.out_channels = self.latent = channels
        self.stride = 1
