"""Pixels as codes of a palette of colours (iGPT)."""

from __future__ import annotations

from torch import nn

from latticode.quantizers.vq import VQ
from latticode.tokenizers.tokenizer import Tokenizer


class Palette(Tokenizer):
    """The nearest of `size` colours for every pixel: a tokenizer without a network (iGPT, Chen et al. 2020).

    Training starts from k-means over the first batch and goes on by the gradient of the `codebook` loss, which is the
    objective of k-means, so it trains like any other tokenizer; weigh `commitment` 0, for there is no encoder.

    Examples:
        >>> from latticode.tokenizers.palette import Palette
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> palette, images = Palette(8, channels=3), torch.rand(4, 3, 6, 6) * 2 - 1
        >>> _ = palette(images)  # in training the first batch gives the colours, by k-means
        >>> codes = palette.eval().encode(images)
        >>> codes.shape, len(palette.decode(codes).movedim(1, -1).reshape(-1, 3).unique(dim=0))
        (torch.Size([4, 6, 6, 1]), 8)
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
